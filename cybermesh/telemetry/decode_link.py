"""Find the IP packet inside a captured frame: link headers, VLAN tags, loopback families.

Works on columns: one offset per frame into the shared buffer. Every read is checked against the frame's captured end first,
so that no byte of another packet is ever taken for one of this frame. The usual cases are vectorised; what is rare (stacks of
tags) goes through ever shorter index lists, and one packet at a time when few are left, so that a frame made of tags only
costs time in proportion to its length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

# LINKTYPE_ values (https://www.tcpdump.org/linktypes.html); 12 and 14 are the DLT_RAW of different systems.
NULL, ETHERNET, RAW_BSD, RAW_OPENBSD, RAW, LOOP, SLL, RAW_V4, RAW_V6, SLL2 = 0, 1, 12, 14, 101, 108, 113, 228, 229, 276

ANY, V4, V6 = 0, 4, 6  # the version an IP header must have; ANY where the link does not say
NOT_IP, SHORT, UNKNOWN = -1, -2, -3  # why there is none

FEW = 24  # below this many rows a Python loop is quicker than a pass of numpy calls

_IPV4, _IPV6 = 0x0800, 0x86DD
_TAGS = (0x8100, 0x88A8, 0x9100, 0x9200)
_FAMILIES_V6 = (10, 23, 24, 28, 30)  # Linux, Windows, NetBSD and OpenBSD, FreeBSD, Darwin


def gather(data: U8, at: I64, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Read one packed, unaligned value of ``dtype`` at each offset; every one must lie inside ``data``."""
    wanted = np.dtype(dtype)
    if not len(at):
        return np.empty(0, wanted)
    raw = np.dtype((np.void, wanted.itemsize))  # opaque items copy four times as fast as structured ones
    everywhere: npt.NDArray[Any] = np.ndarray((len(data) - wanted.itemsize + 1,), raw, data, 0, (1,))
    return everywhere[at].view(wanted)


def be16(data: U8, at: I64) -> I64:
    """Read big-endian 16-bit numbers."""
    return gather(data, at, ">u2").astype(np.int64)


def locate(data: U8, at: I64, cap_end: I64, link: int) -> tuple[I64, I64]:
    """Find the network header of frames of one link type.

    Args:
        data: The buffer.
        at: Offset of each frame in it.
        cap_end: Offset of the first byte that was not captured of each.
        link: LINKTYPE of all of them.

    Returns:
        Offset of the IP header, and its version (ANY, V4, V6) or why there is none (NOT_IP, SHORT, UNKNOWN), for each frame.
    """
    if link == ETHERNET:
        return ethernet(data, at, cap_end)
    if link in (RAW, RAW_BSD, RAW_OPENBSD):
        return at, np.full(len(at), ANY, np.int64)
    if link in (RAW_V4, RAW_V6):
        return at, np.full(len(at), V4 if link == RAW_V4 else V6, np.int64)
    if link in (NULL, LOOP):
        return _loopback(data, at, cap_end)
    if link == SLL:
        return _typed(data, at, cap_end, type_at=14, header=16)
    if link == SLL2:
        return _typed(data, at, cap_end, type_at=0, header=20)
    return at, np.full(len(at), UNKNOWN, np.int64)


def ethernet(data: U8, at: I64, cap_end: I64) -> tuple[I64, I64]:
    """Find the network header of Ethernet frames; arguments and result as of ``locate``."""
    return _typed(data, at, cap_end, type_at=12, header=14)


def by_ethertype(ethertype: I64) -> I64:
    """Translate EtherTypes to V4, V6 or NOT_IP."""
    return np.where(ethertype == _IPV4, V4, np.where(ethertype == _IPV6, V6, NOT_IP)).astype(np.int64)


def _typed(data: U8, at: I64, cap_end: I64, *, type_at: int, header: int) -> tuple[I64, I64]:
    """Read the EtherType of a fixed link header and walk the tags behind it."""
    whole = cap_end - at >= header
    rows = slice(None) if whole.all() else np.flatnonzero(whole)
    ethertype = np.zeros(len(at), np.int64)
    ethertype[rows] = be16(data, at[rows] + type_at)
    network = at + header
    version = by_ethertype(ethertype)
    version[~whole] = SHORT
    tagged = np.flatnonzero(version == NOT_IP)
    tagged = tagged[np.isin(ethertype[tagged], _TAGS)]
    while len(tagged) > FEW:
        room = cap_end[tagged] - network[tagged] >= 4
        version[tagged[~room]] = SHORT
        tagged = tagged[room]
        inner = be16(data, network[tagged] + 2)
        network[tagged] += 4
        version[tagged] = by_ethertype(inner)
        tagged = tagged[np.isin(inner, _TAGS)]
    for row in tagged.tolist():
        network[row], version[row] = _untag(data, int(network[row]), int(cap_end[row]))
    return network, version


def _untag(data: U8, at: int, end: int) -> tuple[int, int]:
    """Walk the tags of one frame; ``at`` is behind a tag's EtherType."""
    view = data.data
    while end - at >= 4:
        inner = view[at + 2] << 8 | view[at + 3]
        at += 4
        if inner not in _TAGS:
            return at, V4 if inner == _IPV4 else V6 if inner == _IPV6 else NOT_IP
    return at, SHORT


def _loopback(data: U8, at: I64, cap_end: I64) -> tuple[I64, I64]:
    """Read the address family in front of the packet, written in whichever byte order the capturing host had."""
    whole = cap_end - at >= 4
    family = np.zeros(len(at), np.int64)
    little = gather(data, at[whole], "<u4").astype(np.int64)
    big = gather(data, at[whole], ">u4").astype(np.int64)
    family[whole] = np.minimum(little, big)
    version = np.where(family == 2, V4, np.where(np.isin(family, _FAMILIES_V6), V6, NOT_IP)).astype(np.int64)
    version[~whole] = SHORT
    return at + 4, version
