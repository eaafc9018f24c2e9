"""Decode the usual frames straight from the buffer into the columns of a ``PacketBatch``.

Usual: Ethernet, Linux cooked or raw IP, any number of VLAN tags, IPv4, IPv6 without extension headers, no tunnel. The rest is
listed and left to ``decode``, so that there is one meaning. Every read is checked against the captured end first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba.core import types

from cybermesh.telemetry.kernels import kernel, load_8, load_16, load_32, load_64, part, record
from cybermesh.telemetry.packets import ICMP, OTHER, TCP, UDP

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

SOUND, NOT_IP, SHORT, BROKEN, ODD = 0, 1, 2, 3, 4  # what became of a frame; the result counts them in this order

# Rows of the columns that share an array.
FAMILY, PROTO, KLASS, ICMP_TYPE, ICMP_CODE, FLAGS = range(6)  # small
SPORT, DPORT, WINDOW = range(3)  # middle
TS_US, PAYLOAD, PAYLOAD_AT = range(3)  # wide
HEADER, PAYLOAD_CAPTURED = range(2)  # sizes


class Places(NamedTuple):
    """Frames in the buffer: offset, captured bytes, bytes on the wire and time of each."""

    begin: I64
    captured: I64
    wire: I64
    ts_us: I64


class Link(NamedTuple):
    """A link header: where in it the EtherType is (negative: there is none, the IP header tells), and its length."""

    type_at: int
    size: int


class Decoded(NamedTuple):
    """What the decoder fills, in file order.

    ``counts`` int64[5] is the number of frames of each outcome; as many rows of the columns are used as frames are SOUND or
    ODD. ``odd`` int64[2, n] holds for the ODD frames their number and their row, of which only time and length on the wire are
    filled. ``ends`` is uint64[2, n, 2], source and destination as two words each; then uint8[6, n], uint16[3, n], int64[3, n]
    and int32[2, n] with the rows named above, and the lengths on the wire.
    """

    counts: I64
    odd: I64
    ends: U64
    small: U8
    middle: npt.NDArray[np.uint16]
    wide: I64
    sizes: npt.NDArray[np.int32]
    wire: npt.NDArray[np.uint32]


LINK = record(Link, types.int64, types.int64)
PLACES = record(Places, *[types.int64[::1]] * 4)
DECODED = record(
    Decoded,
    types.int64[::1],
    types.int64[:, ::1],
    types.uint64[:, :, ::1],
    types.uint8[:, ::1],
    types.uint16[:, ::1],
    types.int64[:, ::1],
    types.int32[:, ::1],
    types.uint32[::1],
)


def new_decoded(count: int) -> Decoded:
    """Return columns for so many frames."""
    return Decoded(
        counts=np.empty(5, np.int64),
        odd=np.empty((2, count), np.int64),
        ends=np.empty((2, count, 2), np.uint64),
        small=np.empty((6, count), np.uint8),
        middle=np.empty((3, count), np.uint16),
        wide=np.empty((3, count), np.int64),
        sizes=np.empty((2, count), np.int32),
        wire=np.empty(count, np.uint32),
    )


_IPV4, _IPV6 = 0x0800, 0x86DD
_GRE, _VXLAN_PORT, _GENEVE_PORT = 47, 4789, 6081
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58


@part
def _be16(data: U8, at: int) -> int:
    pair: int = load_16(data, at)
    return (pair & 255) << 8 | pair >> 8


@part
def _mapped(data: U8, at: int) -> np.uint64:
    """Return the second half of an IPv4 address as IPv4-mapped: two bytes of ones in front of the four of the address."""
    return np.uint64(load_32(data, at) << 32 | 0xFFFF0000)


@part
def _network(data: U8, at: int, cap_end: int, link: Link) -> tuple[int, int]:
    """Return the EtherType behind link header and tags (-1: too short) and where the network header begins."""
    if link.type_at < 0:
        return _IPV4 if cap_end > at and load_8(data, at) >> 4 == 4 else _IPV6, at
    if cap_end - at < link.size:
        return -1, at
    ethertype = _be16(data, at + link.type_at)
    at += link.size
    while ethertype == 0x8100 or ethertype == 0x88A8 or ethertype == 0x9100 or ethertype == 0x9200:
        if cap_end - at < 4:
            return -1, at
        ethertype = _be16(data, at + 2)
        at += 4
    return ethertype, at


@part
def _decode_v4(data: U8, at: int, cap_end: int, wire_end: int) -> tuple[int, int, int, int]:
    """Check an IPv4 header.

    Returns:
        SOUND or BROKEN, offset of the L4 bytes, how many there are, and how many were captured.
    """
    if cap_end - at < 20 or load_8(data, at) >> 4 != 4:
        return BROKEN, 0, 0, 0
    size = (load_8(data, at) & 15) * 4
    total, left = _be16(data, at + 2), wire_end - at
    if total == 0 or total > left:
        total = left
    if size < 20 or total < size:
        return BROKEN, 0, 0, 0
    return SOUND, at + size, total - size, max(min(cap_end, at + total) - at - size, 0)


@part
def _decode_v6(data: U8, at: int, cap_end: int, wire_end: int) -> tuple[int, int, int, int]:
    """Check an IPv6 header in the same way; ODD where an extension header follows."""
    if cap_end - at < 40 or load_8(data, at) >> 4 != 6:
        return BROKEN, 0, 0, 0
    following = load_8(data, at + 6)
    if following in (0, 43, 44, 51, 60, 135, 139, 140):
        return ODD, 0, 0, 0
    payload, left = _be16(data, at + 4), wire_end - at - 40
    if payload == 0 or payload > left:
        payload = left
    return SOUND, at + 40, payload, min(cap_end - at - 40, payload)


@part
def _transport(data: U8, at: int, length: int, captured: int, proto: int) -> tuple[int, int]:
    """Return class and length of the L4 header of what is not a later fragment."""
    if proto == _TCP:
        if captured >= 20:
            size = (load_8(data, at + 12) >> 4) * 4
            if 20 <= size <= length:
                return TCP, size
    elif captured >= 8:
        if proto == _UDP:
            return UDP, 8
        if proto in (_ICMP, _ICMPV6):
            return ICMP, 8
    return OTHER, 0


@part
def _fill(data: U8, at: int, ethertype: int, inside: tuple[int, int, int], k: int, out: Decoded) -> bool:
    """Fill row ``k`` from a packet with a sound IP header; False if it may be a tunnel, which is not for us.

    ``inside`` is offset, length and captured bytes of L4.
    """
    l4, length, captured = inside
    ends, small, middle, wide, sizes = out.ends, out.small, out.middle, out.wide, out.sizes
    if ethertype == _IPV4:
        proto, later = load_8(data, at + 9), _be16(data, at + 6) & 0x1FFF != 0
        ends[0, k, 0] = ends[1, k, 0] = 0
        ends[0, k, 1], ends[1, k, 1] = _mapped(data, at + 12), _mapped(data, at + 16)
        small[FAMILY, k] = 4
    else:
        proto, later = load_8(data, at + 6), False
        ends[0, k, 0], ends[0, k, 1] = load_64(data, at + 8), load_64(data, at + 16)
        ends[1, k, 0], ends[1, k, 1] = load_64(data, at + 24), load_64(data, at + 32)
        small[FAMILY, k] = 6
    klass, size = (OTHER, 0) if later else _transport(data, l4, length, captured, proto)
    sport = dport = window = flags = kind = code = 0
    if klass in (TCP, UDP):
        sport, dport = _be16(data, l4), _be16(data, l4 + 2)
        if klass == TCP:
            flags, window = load_8(data, l4 + 13), _be16(data, l4 + 14)
        elif dport in (_VXLAN_PORT, _GENEVE_PORT):
            return False
    elif klass == ICMP:
        kind, code = load_8(data, l4), load_8(data, l4 + 1)
    elif proto == _GRE:
        return False
    small[PROTO, k], small[KLASS, k], small[FLAGS, k] = proto, klass, flags
    small[ICMP_TYPE, k], small[ICMP_CODE, k] = kind, code
    middle[SPORT, k], middle[DPORT, k], middle[WINDOW, k] = sport, dport, window
    sizes[HEADER, k], sizes[PAYLOAD_CAPTURED, k] = size, max(captured - size, 0)
    wide[PAYLOAD, k] = length - size
    wide[PAYLOAD_AT, k] = l4 + size if captured > size else -1
    return True


@kernel(types.void(types.uint8[::1], PLACES, LINK, DECODED))
def decode_usual(data: U8, frames: Places, link: Link, out: Decoded) -> None:
    """Decode frames of one link type.

    Args:
        data: The buffer.
        frames: Where the frames are.
        link: Their link header.
        out: Filled.
    """
    counts = out.counts
    counts[:] = 0
    k = 0
    for i in range(len(frames.begin)):
        begin = frames.begin[i]
        cap_end, wire_end = begin + frames.captured[i], begin + frames.wire[i]
        ethertype, at = _network(data, begin, cap_end, link)
        if ethertype == _IPV4:
            told, l4, length, held = _decode_v4(data, at, cap_end, wire_end)
        elif ethertype == _IPV6:
            told, l4, length, held = _decode_v6(data, at, cap_end, wire_end)
        else:
            counts[SHORT if ethertype < 0 else NOT_IP] += 1
            continue
        if told == BROKEN:
            counts[BROKEN] += 1
            continue
        out.wide[TS_US, k] = frames.ts_us[i]
        out.wire[k] = min(frames.wire[i], 0xFFFFFFFF)
        if told == SOUND and not _fill(data, at, ethertype, (l4, length, held), k, out):
            told = ODD
        if told == ODD:
            out.odd[0, counts[ODD]] = i
            out.odd[1, counts[ODD]] = k
        counts[told] += 1
        k += 1
