"""Recording with tcpdump, and reading the recording back.

The sensor is the router: one tcpdump per link records what *enters* the router there, so that a packet between two hosts is in
the capture exactly once, as on a mirror port. The parts share one clock and are merged by time into one classic pcap file
(Ethernet, microseconds, little-endian). The reader below is deliberately small and its own: labels and tests must not depend on
the product's decoder being right.
"""

from __future__ import annotations

import heapq
import re
import struct
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from tests.lab.network import Host, Lab, LabError, wait_until

SNAPLEN = 160  # whole headers, and enough payload for DNS names, HTTP request lines and SSH banners

TCP, UDP = 6, 17
SYN, RST, ACK = 0x02, 0x04, 0x10

_HEADER = struct.Struct("<IHHiIII")
_RECORD = struct.Struct("<IIII")
_MAGIC_US = 0xA1B2C3D4
_ETHERNET = 1
_BUFFER_KIB = 16_384


@dataclass(frozen=True, slots=True)
class Packet:
    """One IP packet of a capture; ports are 0 and flags empty where the protocol has none."""

    ts_us: int
    src: str
    dst: str
    protocol: int
    sport: int
    dport: int
    flags: int
    wire: int  # bytes of the frame
    payload: bytes  # what was captured above TCP, UDP, or IP

    @property
    def flow(self) -> tuple[int, tuple[str, int], tuple[str, int]]:
        """The conversation this packet belongs to, the same in both directions."""
        first, second = sorted(((self.src, self.sport), (self.dst, self.dport)))
        return self.protocol, first, second


@contextmanager
def recording(lab: Lab, path: Path, *, hosts: Collection[str] | None = None, snaplen: int = SNAPLEN) -> Iterator[None]:
    """Record what enters the router from ``hosts`` (all by default) into ``path``, while the context lasts.

    Raises:
        LabError: tcpdump did not start, or the kernel dropped a packet: a capture with holes would have wrong labels.
    """
    wanted = [host for host in lab.hosts if hosts is None or host.name in hosts]
    parts = [_Part(lab, host, snaplen) for host in wanted]
    try:
        for part in parts:
            wait_until(lambda part=part: "listening on" in part.said(), f"tcpdump at {part.host.name}")  # type: ignore[misc]
        yield
    finally:
        for part in parts:
            part.stop()
    if lossy := [f"{part.host.name}: {part.dropped()}" for part in parts if part.dropped()]:
        raise LabError(f"the kernel dropped packets: {', '.join(lossy)}")
    merge([part.path for part in parts], path, snaplen)


class _Part:
    """The recording of one link."""

    def __init__(self, lab: Lab, host: Host, snaplen: int) -> None:
        assert host.tap is not None
        self.host = host
        self.path = lab.router.directory / f"{host.name}.pcap"
        self._log = lab.router.directory / f"{host.name}.tcpdump.log"
        # -Z root: by default tcpdump becomes a user who may not write here. Immediate mode leaves nothing behind in the ring.
        command = ["tcpdump", "-i", host.tap, "-Q", "in", "-s", str(snaplen), "-B", str(_BUFFER_KIB), "-n", "-U"]
        with self._log.open("wb") as log:
            self._process = lab.start("router", [*command, "--immediate-mode", "-Z", "root", "-w", str(self.path)], log=log)

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        self._settle()
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def dropped(self) -> int:
        counted = re.search(r"(\d+) packets dropped by kernel", self.said())
        if counted is None:
            raise LabError(f"tcpdump at {self.host.name} ended early: {self.said().strip()}")
        return int(counted[1])

    def _settle(self) -> None:
        # A signal makes tcpdump leave its ring unread, so wait until the file no longer grows.
        sizes = [-2, -1]

        def is_still() -> bool:
            sizes.append(self.path.stat().st_size if self.path.exists() else 0)
            return len(set(sizes[-6:])) == 1

        wait_until(is_still, f"tcpdump at {self.host.name} to settle")


def merge(parts: Collection[Path], path: Path, snaplen: int) -> int:
    """Write the records of ``parts`` in order of time to ``path``; return how many. ``path`` appears complete or not at all."""
    new = path.with_name(path.name + ".new")
    count = 0
    with new.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC_US, 2, 4, 0, 0, snaplen, _ETHERNET))
        for ts_us, wire, data in heapq.merge(*(_records(part) for part in parts), key=lambda record: record[0]):
            out.write(_RECORD.pack(*divmod(ts_us, 1_000_000), len(data), wire) + data)
            count += 1
    new.replace(path)
    return count


def packets(path: Path) -> Iterator[Packet]:
    """The IP packets of a capture that this module wrote, in file order."""
    for ts_us, wire, data in _records(path):
        if (packet := _decode(ts_us, wire, data)) is not None:
            yield packet


def _records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    with path.open("rb") as file:
        magic, *_, link = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC_US or link != _ETHERNET:
            raise LabError(f"{path}: not a little-endian Ethernet capture in microseconds")
        while head := file.read(_RECORD.size):
            seconds, micros, captured, wire = _RECORD.unpack(head)
            data = file.read(captured)
            if len(data) < captured:
                raise LabError(f"{path}: ends within a record")
            yield seconds * 1_000_000 + micros, wire, data


def _decode(ts_us: int, wire: int, data: bytes) -> Packet | None:
    kind, network = int.from_bytes(data[12:14]), data[14:]
    if kind == 0x0800:
        protocol, src, dst, above = network[9], network[12:16], network[16:20], network[(network[0] & 15) * 4 :]
    elif kind == 0x86DD:
        protocol, src, dst, above = network[6], network[8:24], network[24:40], network[40:]
    else:
        return None
    sport = dport = flags = 0
    if protocol in {TCP, UDP}:
        sport, dport = struct.unpack_from(">HH", above)
        flags = above[13] if protocol == TCP else 0
        above = above[(above[12] >> 4) * 4 :] if protocol == TCP else above[8:]
    return Packet(ts_us, str(ip_address(src)), str(ip_address(dst)), protocol, sport, dport, flags, wire, above)
