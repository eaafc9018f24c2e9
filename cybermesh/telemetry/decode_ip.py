"""Decode IP and transport headers into columns (section 7 of the feature definitions: L4 bytes, fragments, broken headers).

Lengths come from the length fields and the frame's length on the wire, never from what was captured, so padding and a snap
length change nothing. A header that is not wholly captured or does not fit makes the packet "other" (the traffic class), never
an error.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.decode_link import ANY, FEW, I64, U8, V4, V6, gather
from cybermesh.telemetry.packets import ICMP, OTHER, TCP, UDP

WHOLE, FIRST, LATER = 0, 1, 2  # not a fragment, the fragment at offset 0, any other fragment

_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_FRAGMENT, _AUTHENTICATION = 44, 51
_EXTENSION = np.zeros(256, np.bool_)
_EXTENSION[[0, 43, _FRAGMENT, _AUTHENTICATION, 60, 135, 139, 140]] = True

_IPV4_HEADER = np.dtype(
    {
        "names": ["version_ihl", "total", "fragment", "proto", "src", "dst"],
        "formats": ["u1", ">u2", ">u2", "u1", ("u1", 4), ("u1", 4)],
        "offsets": [0, 2, 6, 9, 12, 16],
        "itemsize": 20,
    }
)
_IPV6_HEADER = np.dtype(
    {
        "names": ["payload", "next", "src", "dst"],
        "formats": [">u2", "u1", ("u1", 16), ("u1", 16)],
        "offsets": [4, 6, 8, 24],
        "itemsize": 40,
    }
)
_TCP_HEADER = np.dtype(
    {
        "names": ["sport", "dport", "offset", "flags", "window"],
        "formats": [">u2", ">u2", "u1", "u1", ">u2"],
        "offsets": [0, 2, 12, 13, 14],
        "itemsize": 20,
    }
)
_TCP_BYTES = 20
_UDP_BYTES = _ICMP_BYTES = 8


@dataclass(frozen=True, slots=True)
class Headers:
    """Columns of n decoded packets; the arrays are filled in place while decoding goes on.

    ``at`` is the offset of the L4 bytes in the buffer, ``length`` how many there are on the wire, ``captured`` how many of them
    were captured, ``part`` WHOLE, FIRST or LATER. ``size`` is the L4 header's length, 0 for OTHER.
    """

    src: U8  # [n, 16]
    dst: U8  # [n, 16]
    family: U8
    proto: U8
    part: U8
    at: I64
    length: I64
    captured: I64
    klass: U8
    sport: npt.NDArray[np.uint16]
    dport: npt.NDArray[np.uint16]
    icmp_type: U8
    icmp_code: U8
    flags: U8
    window: npt.NDArray[np.uint16]
    size: I64

    @classmethod
    def blank(cls, count: int) -> Headers:
        """Return columns of zeros."""
        bytes_, wide, port = (np.uint8, np.int64, np.uint16)
        kinds = {"at": wide, "length": wide, "captured": wide, "size": wide, "sport": port, "dport": port, "window": port}
        shapes = {"src": (count, 16), "dst": (count, 16)}
        return cls(**{f.name: np.zeros(shapes.get(f.name, (count,)), kinds.get(f.name, bytes_)) for f in fields(cls)})

    def put(self, rows: I64, others: Headers, chosen: I64) -> None:
        """Overwrite ``rows`` with the rows ``chosen`` of ``others``."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(others, f.name)[chosen]

    def take(self, rows: npt.NDArray[np.bool_] | I64) -> Headers:
        """Return a copy of some rows."""
        return Headers(*(getattr(self, f.name)[rows] for f in fields(self)))


class _Extent(NamedTuple):
    """Where each packet begins, where its captured bytes end, and where it would end on the wire."""

    at: I64
    cap_end: I64
    wire_end: I64


def decode_ip(data: U8, at: I64, cap_end: I64, wire_end: I64, version: I64) -> tuple[Headers, npt.NDArray[np.bool_]]:
    """Decode the packets that begin at ``at``.

    Args:
        data: The buffer.
        at: Offset of each IP header.
        cap_end: Offset behind the last captured byte of each packet's frame.
        wire_end: Offset at which the frame would end if all of it had been captured.
        version: What the version field must say, or ANY; other values mean that there is no IP packet.

    Returns:
        Columns of all n packets, and which of them have a sound IP header (the others' columns mean nothing).
    """
    headers = Headers.blank(len(at))
    sound = np.zeros(len(at), np.bool_)
    extent = _Extent(at, cap_end, wire_end)
    readable = np.flatnonzero((version >= ANY) & (cap_end - at >= _IPV4_HEADER.itemsize))
    found = (data[at[readable]] >> 4).astype(np.int64)
    fits = (version[readable] == ANY) | (version[readable] == found)
    _decode_v4(data, readable[fits & (found == V4)], extent, headers, sound)
    _decode_v6(data, readable[fits & (found == V6)], extent, headers, sound)
    _decode_transport(data, headers, sound)
    return headers, sound


def _decode_v4(data: U8, rows: I64, extent: _Extent, headers: Headers, sound: npt.NDArray[np.bool_]) -> None:
    start = extent.at[rows]
    left = extent.wire_end[rows] - start
    fixed = gather(data, start, _IPV4_HEADER)
    ihl = (fixed["version_ihl"] & 15).astype(np.int64) * 4
    total = fixed["total"].astype(np.int64)
    total = np.where((total == 0) | (total > left), left, total)
    sound[rows] = (ihl >= _IPV4_HEADER.itemsize) & (total >= ihl)
    headers.family[rows] = V4
    for name in ("src", "dst"):
        address = getattr(headers, name)
        address[rows, 10:12] = 0xFF
        address[rows, 12:] = fixed[name]
    headers.proto[rows] = fixed["proto"]
    offset, more = fixed["fragment"] & 0x1FFF, fixed["fragment"] & 0x2000
    headers.part[rows] = np.where(offset != 0, LATER, np.where(more != 0, FIRST, WHOLE))
    headers.at[rows] = start + ihl
    headers.length[rows] = total - ihl
    headers.captured[rows] = np.clip(np.minimum(extent.cap_end[rows], start + total) - start - ihl, 0, None)


def _decode_v6(data: U8, rows: I64, extent: _Extent, headers: Headers, sound: npt.NDArray[np.bool_]) -> None:
    size = _IPV6_HEADER.itemsize
    rows = rows[extent.cap_end[rows] - extent.at[rows] >= size]
    start = extent.at[rows]
    left = extent.wire_end[rows] - start - size
    fixed = gather(data, start, _IPV6_HEADER)
    payload = fixed["payload"].astype(np.int64)
    payload = np.where((payload == 0) | (payload > left), left, payload)
    sound[rows] = True
    headers.family[rows] = V6
    headers.src[rows] = fixed["src"]
    headers.dst[rows] = fixed["dst"]
    headers.proto[rows] = fixed["next"]
    headers.at[rows] = start + size
    headers.length[rows] = payload
    headers.captured[rows] = np.minimum(extent.cap_end[rows] - start - size, payload)
    _walk_extensions(data, rows[_EXTENSION[fixed["next"]]], headers)


def _walk_extensions(data: U8, rows: I64, headers: Headers) -> None:
    """Move ``at`` and ``proto`` of ``rows`` behind their extension headers, all packets one header at a time."""
    while len(rows) > FEW:
        rows = rows[headers.captured[rows] >= 8]
        at, kind = headers.at[rows], headers.proto[rows]
        first = gather(data, at, [("next", "u1"), ("length", "u1"), ("fragment", ">u2")])
        units = first["length"].astype(np.int64)
        size = np.where(kind == _FRAGMENT, 8, np.where(kind == _AUTHENTICATION, units * 4 + 8, units * 8 + 8))
        fits = size <= headers.length[rows]
        rows, at, kind, first, size = rows[fits], at[fits], kind[fits], first[fits], size[fits]
        is_fragment = kind == _FRAGMENT
        later = is_fragment & (first["fragment"] >> 3 != 0)
        headers.part[rows[is_fragment & ~later & (first["fragment"] & 1 != 0)]] = FIRST
        headers.part[rows[later]] = LATER
        headers.proto[rows] = first["next"]
        headers.at[rows] = at + size
        headers.length[rows] -= size
        headers.captured[rows] = np.clip(headers.captured[rows] - size, 0, None)
        rows = rows[_EXTENSION[first["next"]] & ~later]
    for row in rows.tolist():
        _walk_one(data.data, row, headers)


def _walk_one(view: memoryview, row: int, headers: Headers) -> None:
    """Do for one packet what ``_walk_extensions`` does for many."""
    at, kind = int(headers.at[row]), int(headers.proto[row])
    length, captured, part = int(headers.length[row]), int(headers.captured[row]), int(headers.part[row])
    while _EXTENSION[kind] and part != LATER and captured >= 8:
        following, units = view[at], view[at + 1]
        size = 8 if kind == _FRAGMENT else units * 4 + 8 if kind == _AUTHENTICATION else units * 8 + 8
        if size > length:
            break
        if kind == _FRAGMENT:
            fragment = view[at + 2] << 8 | view[at + 3]
            part = LATER if fragment >> 3 else FIRST if fragment & 1 else part
        at, kind, length, captured = at + size, following, length - size, max(captured - size, 0)
    headers.at[row], headers.proto[row], headers.length[row] = at, kind, length
    headers.captured[row], headers.part[row] = captured, part


def _decode_transport(data: U8, headers: Headers, sound: npt.NDArray[np.bool_]) -> None:
    """Fill ports, flags, types and sizes; what is not sound TCP, UDP or ICMP stays OTHER with zeros."""
    open_ = sound & (headers.part != LATER)
    proto = headers.proto
    rows = np.flatnonzero(open_ & (proto == _TCP) & (headers.captured >= _TCP_BYTES))
    fixed = gather(data, headers.at[rows], _TCP_HEADER)
    size = (fixed["offset"] >> 4).astype(np.int64) * 4
    fits = (size >= _TCP_BYTES) & (size <= headers.length[rows])
    if not fits.all():
        rows, fixed, size = rows[fits], fixed[fits], size[fits]
    headers.klass[rows] = TCP
    headers.size[rows] = size
    headers.flags[rows] = fixed["flags"]
    headers.window[rows] = fixed["window"]
    headers.sport[rows], headers.dport[rows] = fixed["sport"], fixed["dport"]

    rows = np.flatnonzero(open_ & (proto == _UDP) & (headers.captured >= _UDP_BYTES))
    ports = gather(data, headers.at[rows], [("sport", ">u2"), ("dport", ">u2")])
    headers.klass[rows], headers.size[rows] = UDP, _UDP_BYTES
    headers.sport[rows], headers.dport[rows] = ports["sport"], ports["dport"]

    rows = np.flatnonzero(open_ & ((proto == _ICMP) | (proto == _ICMPV6)) & (headers.captured >= _ICMP_BYTES))
    headers.klass[rows], headers.size[rows] = ICMP, _ICMP_BYTES
    headers.icmp_type[rows] = data[headers.at[rows]]
    headers.icmp_code[rows] = data[headers.at[rows] + 1]
    assert OTHER == 0, "columns of zeros are of the class OTHER"
