"""The kernel's packet ring (AF_PACKET, TPACKET_V3) in shared memory: set up, wait, describe frames, give blocks back.

The numbers are those of linux/if_packet.h and asm-generic/socket.h; all structures are read in the machine's byte order.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import select
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.sources import SourceError

_SOL_PACKET, _ETH_P_ALL = 263, 3
_ADD_MEMBERSHIP, _RX_RING, _STATISTICS, _VERSION, _RESERVE, _IGNORE_OUTGOING = 1, 5, 6, 10, 12, 23
_TPACKET_V3, _PROMISCUOUS, _ATTACH_FILTER = 2, 1, 26
_GET_HARDWARE = 0x8927  # SIOCGIFHWADDR
_ETHERNET, _LOOPBACK, _NO_HARDWARE = 1, 772, 0xFFFE  # ARPHRD_*
_OWNED_BY_US, _VLAN_VALID, _TPID_VALID = 0x1, 0x10, 0x40  # TP_STATUS_*
_BLOCK_STATUS, _BLOCK_PACKETS, _BLOCK_FIRST = 8, 12, 16  # in struct tpacket_block_desc
_HEADER = struct.Struct("=IIIIIIHHIIHH")  # struct tpacket3_hdr
_TAG_BYTES = 4
_PAGE = 4096
_FILTER_SECONDS = 30
_DOT1Q = 0x8100
LINK_ETHERNET, LINK_RAW = 1, 101

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RingOptions:
    """Size and behaviour of a ring.

    ``bytes_total`` is divided into blocks of ``block_bytes`` (a power of two); a block that is not full is handed over after
    ``handover_ms``. ``promiscuous`` also takes frames for other hosts. ``expression`` is a filter as tcpdump takes it.
    """

    bytes_total: int = 64 << 20
    block_bytes: int = 1 << 20
    handover_ms: int = 20
    promiscuous: bool = True
    expression: str = ""


class PacketRing:
    """A ring on one interface; closing it gives the memory back."""

    def __init__(self, interface: str, options: RingOptions) -> None:
        """Make the ring and begin to capture.

        Raises:
            SourceError: There is no such interface, its frames are of no known kind, the filter is wrong, or capturing is not
                allowed.
        """
        assert options.block_bytes % _PAGE == 0
        self.interface = interface
        self.lost = 0  # frames that found the ring full
        self._options = options
        self._blocks = max(2, options.bytes_total // options.block_bytes)
        self._turn = 0
        self._socket = _packet_socket(interface)
        try:
            self._hardware = _hardware(self._socket, interface)
            self.link = LINK_RAW if self._hardware == _NO_HARDWARE else LINK_ETHERNET
            self._map = self._set_up(interface)
        except SourceError:
            self._socket.close()
            raise
        except OSError as error:
            self._socket.close()
            raise SourceError(f"live:{interface}: {error.strerror}; check the interface (ip link)") from error
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._words = np.frombuffer(self._map, np.uint32)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN | select.POLLERR)

    def _set_up(self, interface: str) -> mmap.mmap:
        opened, options = self._socket, self._options
        opened.setsockopt(_SOL_PACKET, _VERSION, _TPACKET_V3)
        opened.setsockopt(_SOL_PACKET, _RESERVE, _TAG_BYTES)  # room to put a VLAN tag back in its place
        if self._hardware == _LOOPBACK:  # where every frame would come twice
            opened.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        if options.expression:
            _attach(opened, interface, options.expression, self.link)
        frame_bytes = 2048  # only bounds the number of frames below; V3 packs frames of any length
        request = struct.pack(
            "=7I",
            options.block_bytes,
            self._blocks,
            frame_bytes,
            options.block_bytes // frame_bytes * self._blocks,
            options.handover_ms,
            0,
            0,
        )
        opened.setsockopt(_SOL_PACKET, _RX_RING, request)
        mapped = mmap.mmap(opened.fileno(), options.block_bytes * self._blocks, mmap.MAP_SHARED)
        opened.bind((interface, _ETH_P_ALL))
        if options.promiscuous and self._hardware == _ETHERNET:
            membership = struct.pack("=iHH8x", socket.if_nametoindex(interface), _PROMISCUOUS, 0)
            opened.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, membership)
        return mapped

    def wait(self, seconds: float) -> bool:
        """Return whether a block is ours within this time.

        Raises:
            OSError: The interface went down or away.
        """
        if self._status() & _OWNED_BY_US:
            return True
        ready = self._poll.poll(int(seconds * 1000))
        if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in ready):
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, "the interface went down")
        return bool(self._status() & _OWNED_BY_US)

    def block(self) -> tuple[int, int, int]:
        """Return of the block that is ours: where its first frame's header and its end are, and how many frames it has."""
        begin = self._turn * self._options.block_bytes
        first, packets = (int(self._words[(begin + at) // 4]) for at in (_BLOCK_FIRST, _BLOCK_PACKETS))
        return begin + first, begin + self._options.block_bytes, packets

    def release(self) -> None:
        """Give the block back to the kernel; nothing of it may be used any more."""
        self._words[(self._turn * self._options.block_bytes + _BLOCK_STATUS) // 4] = 0
        self._turn = (self._turn + 1) % self._blocks

    def count_lost(self) -> None:
        """Add what the kernel dropped since the last call to ``lost``."""
        _, drops, _ = struct.unpack("=III", self._socket.getsockopt(_SOL_PACKET, _STATISTICS, 12))
        self.lost += drops

    def restore_tags(self, frames: I64) -> None:
        """Put the VLAN tags, which the kernel takes out of frames, back; ``frames`` as ``scan_ring`` fills it."""
        tagged = np.nonzero(frames[4] & _VLAN_VALID)[0]
        if len(tagged) == 0 or self.link != LINK_ETHERNET:
            return
        at = frames[0, tagged] - _TAG_BYTES
        addresses = np.arange(12)
        self.data[at[:, None] + addresses] = self.data[at[:, None] + _TAG_BYTES + addresses]
        protocol = np.where(frames[4, tagged] & _TPID_VALID, frames[5, tagged] >> 16, _DOT1Q)
        tag = np.stack([protocol >> 8, protocol & 0xFF, frames[5, tagged] >> 8 & 0xFF, frames[5, tagged] & 0xFF], axis=1)
        self.data[at[:, None] + np.arange(12, 16)] = tag.astype(np.uint8)
        frames[0, tagged] = at
        frames[1:3, tagged] += _TAG_BYTES

    def close(self) -> None:
        """Stop capturing; may be called more than once."""
        self._socket.close()
        # The memory goes when the last view of it does: batches may still hold one.

    def _status(self) -> int:
        return int(self._words[(self._turn * self._options.block_bytes + _BLOCK_STATUS) // 4])


def scan_in_python(data: npt.NDArray[np.uint8], start: int, end: int, count: int, frames: I64) -> tuple[int, int]:
    """Do what ``kernels.ring.scan_ring`` does, without it: a microsecond for each frame."""
    view = data.data
    found = 0
    limit = min(frames.shape[1], count)
    while found < limit and start >= 0 and start + _HEADER.size + 20 <= end:
        following, seconds, nanoseconds, captured, wire, status, mac, _, _, tci, tpid, _ = _HEADER.unpack_from(view, start)
        if start + mac + captured > end:
            break
        micros = seconds * 1_000_000 + nanoseconds // 1000
        frames[:, found] = (start + mac, captured, wire, micros, status, tpid << 16 | tci & 0xFFFF)
        found += 1
        start = start + following if following else -1
    return found, start


def compile_filter(expression: str, link: int = LINK_ETHERNET) -> bytes:
    """Return a filter expression as the kernel's instructions (struct sock_filter each), compiled by tcpdump.

    Raises:
        SourceError: The expression is wrong, or tcpdump is not installed.
    """
    tcpdump = shutil.which("tcpdump")
    if tcpdump is None:
        raise SourceError(f"filter '{expression}': tcpdump, which compiles filters, is not installed; install it or do without")
    words = [tcpdump, "-ddd", "-y", "RAW" if link == LINK_RAW else "EN10MB", "--", expression]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_FILTER_SECONDS)  # noqa: S603
        lines = done.stdout.split("\n")
        program = [struct.pack("=HBBI", *map(int, line.split())) for line in lines[1:] if line]
    except (subprocess.TimeoutExpired, struct.error, ValueError) as error:
        raise SourceError(f"filter '{expression}': cannot be compiled: {error}; see the manual page pcap-filter") from error
    if done.returncode != 0 or not program:
        reason = done.stderr.strip().splitlines()[-1:] or ["no program"]
        raise SourceError(f"filter '{expression}': {reason[0]}; see the manual page pcap-filter")
    return b"".join(program)


def _attach(opened: socket.socket, interface: str, expression: str, link: int) -> None:
    try:
        program = array.array("B", compile_filter(expression, link))
    except SourceError as error:
        raise SourceError(f"live:{interface}: {error}") from error
    address, size = program.buffer_info()
    opened.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("@HP", size // 8, address))


def _packet_socket(interface: str) -> socket.socket:
    if not sys.platform.startswith("linux"):
        raise SourceError(f"live:{interface}: live capture needs Linux; give a capture file")
    try:
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # of no protocol: nothing comes in before it is bound
    except PermissionError as error:
        raise SourceError(f"live:{interface}: capturing is not allowed; run as root or with CAP_NET_RAW") from error
    except OSError as error:
        raise SourceError(f"live:{interface}: {error.strerror}; is AF_PACKET in this kernel?") from error


def _hardware(opened: socket.socket, interface: str) -> int:
    name = interface.encode()
    if not 0 < len(name) < 16:
        raise SourceError(f"live:{interface}: is no name of an interface; see ip link")
    try:
        answer = fcntl.ioctl(opened, _GET_HARDWARE, struct.pack("=16s24x", name))
    except OSError as error:
        raise SourceError(f"live:{interface}: {error.strerror}; see ip link for the interfaces") from error
    kind = int(struct.unpack_from("=H", answer, 16)[0])
    if kind not in {_ETHERNET, _LOOPBACK, _NO_HARDWARE}:
        raise SourceError(f"live:{interface}: frames of hardware type {kind} are not read; capture on an Ethernet interface")
    return kind
