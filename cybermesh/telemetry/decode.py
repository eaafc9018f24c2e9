"""Decode captured frames into a ``PacketBatch``: link header, tunnels, IP, transport.

Tunnels (GRE, VXLAN, GENEVE) are opened level by level: the carriers among the packets are an index list, their insides are
decoded like any other packets, and an inside that is a sound IP packet takes its carrier's place. An inside that is not leaves
the carrier. Hostile bytes never raise; what is not metered is counted by reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import counters as reasons
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode_ip import WHOLE, Headers, decode_ip
from cybermesh.telemetry.decode_link import I64, NOT_IP, SHORT, U8, UNKNOWN, be16, by_ethertype, ethernet, locate
from cybermesh.telemetry.packets import UDP, PacketBatch

MAX_LEVELS = 8  # of tunnels inside one another

_GRE, _VXLAN_PORT, _GENEVE_PORT = 47, 4789, 6081
_BRIDGED = 0x6558  # transparent Ethernet bridging: an Ethernet frame inside


@dataclass(frozen=True, slots=True)
class Frames:
    """Columns of n captured frames in file order.

    ``at`` is a frame's offset in ``data``, ``captured`` how many of its bytes are there (all of them lie inside ``data``),
    ``wire`` how many there were on the wire, never less than ``captured``; ``link`` is the LINKTYPE, one for each frame.
    """

    data: U8
    at: I64
    captured: I64
    wire: I64
    ts_us: I64
    link: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.at)


def decode(frames: Frames, counters: Counters) -> PacketBatch:
    """Decode frames into the packets that are metered, in the same order.

    Args:
        frames: What a source read.
        counters: Receives the number of frames, of metered packets and, by reason, of the others.
    """
    data, cap_end = frames.data, frames.at + frames.captured
    at, version = _locate(frames, cap_end)
    headers, sound = decode_ip(data, at, cap_end, frames.at + frames.wire, version)
    _count(counters, frames, version, sound)
    rows = np.flatnonzero(sound)
    if len(rows) != len(frames):
        headers = headers.take(rows)
    _open_tunnels(data, headers)
    inside = np.minimum(headers.captured, headers.length) - headers.size
    return PacketBatch(
        ts_us=frames.ts_us[rows],
        src=headers.src,
        dst=headers.dst,
        family=headers.family,
        sport=headers.sport,
        dport=headers.dport,
        proto=headers.proto,
        klass=headers.klass,
        icmp_type=headers.icmp_type,
        icmp_code=headers.icmp_code,
        flags=headers.flags,
        payload=headers.length - headers.size,
        header=headers.size.astype(np.int32),
        window=headers.window,
        wire=np.minimum(frames.wire[rows], 0xFFFF_FFFF).astype(np.uint32),
        payload_at=np.where(inside > 0, headers.at + headers.size, -1),
        payload_captured=np.clip(inside, 0, None).astype(np.int32),
        data=data,
    )


def _locate(frames: Frames, cap_end: I64) -> tuple[I64, I64]:
    """Find the network header of every frame, whatever mixture of link types there is."""
    links = np.unique(frames.link)
    if len(links) == 1:
        return locate(frames.data, frames.at, cap_end, int(links[0]))
    at, version = frames.at.copy(), np.full(len(frames), UNKNOWN, np.int64)
    for link in links.tolist():
        rows = np.flatnonzero(frames.link == link)
        at[rows], version[rows] = locate(frames.data, frames.at[rows], cap_end[rows], link)
    return at, version


def _count(counters: Counters, frames: Frames, version: I64, sound: npt.NDArray[np.bool_]) -> None:
    metered = int(np.count_nonzero(sound))
    counters.packets += len(frames)
    counters.metered += metered
    if metered == len(frames):
        return
    counters.skip(reasons.NOT_IP, int(np.count_nonzero(version == NOT_IP)))
    counters.skip(reasons.SHORT_FRAME, int(np.count_nonzero(version == SHORT)))
    counters.skip(reasons.BROKEN_IP, int(np.count_nonzero((version >= 0) & ~sound)))
    unknown = frames.link[version == UNKNOWN]
    for link, count in zip(*(column.tolist() for column in np.unique(unknown, return_counts=True)), strict=True):
        counters.skip(f"{reasons.LINK_TYPE}: {link}", count)


def _open_tunnels(data: U8, headers: Headers) -> None:
    """Replace carriers in ``headers`` by the packets inside them, down to the innermost that decodes."""
    rows = np.arange(len(headers.at))
    level = headers
    for _ in range(MAX_LEVELS):
        carriers, at, version = _insides(data, level)
        if not len(carriers):
            return
        cap_end = level.at[carriers] + level.captured[carriers]
        wire_end = level.at[carriers] + level.length[carriers]
        inner, sound = decode_ip(data, at, cap_end, wire_end, version)
        rows = rows[carriers[sound]]
        level = inner.take(sound)
        headers.put(rows, level, np.arange(len(rows)))


def _insides(data: U8, headers: Headers) -> tuple[I64, I64, I64]:
    """Find what the tunnels among the packets carry.

    Returns:
        Rows of the carriers, and offset and version of the IP header inside each (version as of ``locate``).
    """
    whole = headers.part == WHOLE
    gre = np.flatnonzero(whole & (headers.proto == _GRE) & (headers.captured >= 4))
    over_udp = (headers.klass == UDP) & whole & (headers.captured >= 16)
    vxlan = np.flatnonzero(over_udp & (headers.dport == _VXLAN_PORT))
    vxlan = vxlan[data[headers.at[vxlan] + 8] & 0x08 != 0]
    geneve = np.flatnonzero(over_udp & (headers.dport == _GENEVE_PORT))
    geneve = geneve[data[headers.at[geneve] + 8] >> 6 == 0]
    gre_at, gre_type, gre = _open_gre(data, headers, gre)
    options = (data[headers.at[geneve] + 8] & 0x3F).astype(np.int64) * 4
    carriers = np.concatenate([gre, vxlan, geneve])
    at = np.concatenate([gre_at, headers.at[vxlan] + 16, headers.at[geneve] + 16 + options])
    ethertype = np.concatenate([gre_type, np.full(len(vxlan), _BRIDGED), be16(data, headers.at[geneve] + 10)])
    version = by_ethertype(ethertype)
    bridged = np.flatnonzero(ethertype == _BRIDGED)
    cap_end = headers.at[carriers] + headers.captured[carriers]
    at[bridged], version[bridged] = ethernet(data, at[bridged], cap_end[bridged])
    return carriers, at, version


def _open_gre(data: U8, headers: Headers, rows: I64) -> tuple[I64, I64, I64]:
    """Return offset and EtherType behind the GRE headers of ``rows`` that are of version 0 without routing, and these rows."""
    flags = be16(data, headers.at[rows])
    plain = flags & 0x4007 == 0
    rows, flags = rows[plain], flags[plain]
    optional = sum((flags & bit != 0).astype(np.int64) * 4 for bit in (0x8000, 0x2000, 0x1000))  # checksum, key, sequence
    return headers.at[rows] + 4 + optional, be16(data, headers.at[rows] + 2), rows
