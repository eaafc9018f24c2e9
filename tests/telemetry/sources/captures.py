"""Capture files built by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

PCAP_MAGIC = {("<", 1): 0xA1B2C3D4, (">", 1): 0xA1B2C3D4, ("<", 1000): 0xA1B23C4D, (">", 1000): 0xA1B23C4D}


def pcap(records: list[tuple[int, bytes]], *, order: str = "<", per_us: int = 1, link: int = 1) -> bytes:
    """Build a pcap file of (time in µs, frame) records."""
    data = struct.pack(order + "IHHiIII", PCAP_MAGIC[order, per_us], 2, 4, 0, 0, 65535, link)
    for time, frame in records:
        seconds, micros = divmod(time, 10**6)
        data += struct.pack(order + "IIII", seconds, micros * per_us, len(frame), len(frame)) + frame
    return data


def block(kind: int, body: bytes, *, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    total = 12 + len(body)
    return struct.pack(order + "II", kind, total) + body + struct.pack(order + "I", total)


def section(*, order: str = "<") -> bytes:
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order=order)


def interface(*, link: int = 1, resolution: int | None = None, offset_s: int | None = None, order: str = "<") -> bytes:
    options = b""
    if resolution is not None:
        options += struct.pack(order + "HHB3x", 9, 1, resolution)
    if offset_s is not None:
        options += struct.pack(order + "HHq", 14, 8, offset_s)
    if options:
        options += struct.pack(order + "HH", 0, 0)
    return block(1, struct.pack(order + "HHI", link, 0, 0) + options, order=order)


def enhanced(ticks: int, frame: bytes, *, number: int = 0, order: str = "<", captured: int | None = None) -> bytes:
    captured = len(frame) if captured is None else captured
    head = struct.pack(order + "IIIII", number, ticks >> 32, ticks & 0xFFFFFFFF, captured, len(frame))
    return block(6, head + frame, order=order)


def obsolete(ticks: int, frame: bytes, *, number: int = 0, order: str = "<") -> bytes:
    head = struct.pack(order + "HHIIII", number, 7, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame))
    return block(2, head + frame, order=order)


def simple(frame: bytes, *, order: str = "<") -> bytes:
    return block(3, struct.pack(order + "I", len(frame)) + frame, order=order)


def set_records(path: Path, at: np.ndarray, size: np.ndarray, ts_us: np.ndarray) -> None:
    """Give the records of a pcap file, whose frames begin at ``at``, other times, and as their lengths those they have."""
    data = np.fromfile(path, np.uint8)
    header = np.stack([ts_us // 1_000_000, ts_us % 1_000_000, size, size], axis=1).astype("<u4")
    data[(at - 16)[:, None] + np.arange(16)] = header.view(np.uint8)
    data.tofile(path)
