"""Builds packet batches for tests of windows and detectors, one packet a line."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from cybermesh.telemetry.packets import ICMP, TCP, UDP, PacketBatch

KLASS = {6: TCP, 17: UDP, 1: ICMP, 58: ICMP}


@dataclass(frozen=True)
class Packet:
    """One packet; ``at`` in seconds, payload as bytes (what a reader would have captured)."""

    at: float
    src: str
    dst: str
    sport: int = 0
    dport: int = 0
    proto: int = 6
    flags: int = 0
    payload: bytes = b""
    icmp: tuple[int, int] = (0, 0)


def packed(address: str) -> bytes:
    ip = ipaddress.ip_address(address)
    return ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed


def batch(packets: Iterable[Packet]) -> PacketBatch:
    rows = list(packets)
    data = b"".join(row.payload for row in rows)
    sizes = np.array([len(row.payload) for row in rows], np.int64)
    header = np.array([20 if row.proto == 6 else 8 for row in rows], np.int32)
    return PacketBatch(
        ts_us=np.array([round(row.at * 1e6) for row in rows], np.int64),
        src=np.frombuffer(b"".join(packed(row.src) for row in rows), np.uint8).reshape(-1, 16),
        dst=np.frombuffer(b"".join(packed(row.dst) for row in rows), np.uint8).reshape(-1, 16),
        family=np.array([6 if ":" in row.src else 4 for row in rows], np.uint8),
        sport=np.array([row.sport for row in rows], np.uint16),
        dport=np.array([row.dport for row in rows], np.uint16),
        proto=np.array([row.proto for row in rows], np.uint8),
        klass=np.array([KLASS.get(row.proto, 0) for row in rows], np.uint8),
        icmp_type=np.array([row.icmp[0] for row in rows], np.uint8),
        icmp_code=np.array([row.icmp[1] for row in rows], np.uint8),
        flags=np.array([row.flags for row in rows], np.uint8),
        payload=sizes,
        header=header,
        window=np.zeros(len(rows), np.uint16),
        wire=(sizes + header + 34).astype(np.uint32),
        payload_at=np.where(sizes > 0, np.cumsum(sizes) - sizes, -1),
        payload_captured=sizes.astype(np.int32),
        data=np.frombuffer(data or b"\0", np.uint8),
    )


def sliced(whole: PacketBatch, start: int, stop: int) -> PacketBatch:
    parts = {field.name: getattr(whole, field.name)[start:stop] for field in fields(whole) if field.name != "data"}
    return PacketBatch(**parts, data=whole.data)


def blocks(whole: PacketBatch, size: int) -> list[PacketBatch]:
    return [sliced(whole, start, start + size) for start in range(0, len(whole), size)]
