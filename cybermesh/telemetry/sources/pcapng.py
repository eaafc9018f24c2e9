"""The newer capture format (draft-ietf-opsawg-pcapng): sections, interfaces, enhanced and obsolete packet blocks.

Each section has its own byte order and interfaces, each interface its link type, clock resolution and offset. Blocks other than
packets, interfaces and section headers are passed over. Simple packet blocks carry no time: they are counted, not metered. A
block that does not fit ends the file: behind it there are no borders to trust.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import counters as reasons
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames
from cybermesh.telemetry.decode_link import I64, gather
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.pcap import TRUNCATED
from cybermesh.telemetry.sources.stream import ByteStream

_SECTION, _INTERFACE, _OBSOLETE, _SIMPLE, _ENHANCED = 0x0A0D0D0A, 1, 2, 3, 6
_MAGIC = b"\x0a\x0d\x0d\x0a"
_ORDERS = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_SMALLEST = {_SECTION: 28, _INTERFACE: 20, _OBSOLETE: 32, _SIMPLE: 16, _ENHANCED: 32}  # bytes, whole blocks
_FRAME_AT = 28  # of the block, enhanced and obsolete alike
_TSRESOL, _TSOFFSET = 9, 14  # options of an interface
_MAX_INTERFACES = 65_536  # of a section; more would only serve to fill memory
_TIME_LIMIT_US = 1 << 62  # beyond, differences of times could overflow


@dataclass(frozen=True, slots=True)
class _Interface:
    link: int
    resolution: int  # as in the option: a power of ten, or of two if the top bit is set
    offset_s: int


@dataclass(slots=True)
class _Found:
    """Packet blocks of one pass over the buffer, and what held for them.

    ``marks`` are (index of the first packet, byte order, where the section's interfaces begin, how many are described so far).
    """

    at: list[int]
    marks: list[tuple[int, str, int, int]]

    def mark(self, order: str, base: int, count: int) -> None:
        """Note what holds for the packets from here on."""
        if self.marks and self.marks[-1][0] == len(self.at):
            self.marks.pop()
        self.marks.append((len(self.at), order, base, count))


def is_pcapng(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is a pcapng file."""
    return head[:4] == _MAGIC and head[8:12] in _ORDERS


class PcapngReader:
    """Finds and describes the packet blocks of one pcapng file."""

    def __init__(self, stream: ByteStream, counters: Counters, resume_at: int = 0) -> None:
        """Begin at the first section; packets before the offset ``resume_at`` are passed over."""
        if not stream.need(_SMALLEST[_SECTION]):
            raise SourceError(f"{stream.name}: ends inside the pcapng section header; copy the capture again")
        self._stream = stream
        self._counters = counters
        self._resume_at = resume_at
        self._order = "<"
        self._interfaces: list[_Interface] = []
        self._base = 0  # of the current section in _interfaces

    def read(self, limit: int) -> Frames | None:
        """Return the next ``limit`` frames, or as many as the buffer holds; None at the end of what can be read."""
        del self._interfaces[: self._base]
        self._base = 0
        found = _Found([], [])
        found.mark(self._order, self._base, len(self._interfaces))
        while not found.at:
            if self._scan(found, limit):
                continue
            if self._counters.ended or not (self._pass_over() or self._stream.fill()):
                self._explain_end()
                return None
        return self._describe(found)

    def _scan(self, found: _Found, limit: int) -> bool:
        """Collect whole packet blocks of the buffer and move the stream behind them; return whether it moved."""
        stream = self._stream
        view, begin, moved = stream.data.data, stream.offset - stream.start, stream.start
        while len(found.at) < limit and stream.end - stream.start >= 12:
            at = stream.start
            kind, total = self._block(view, at)
            if total < _SMALLEST.get(kind, 12) or total % 4:
                self._end("has an impossible length")
                break
            if total > stream.end - at:
                break
            if kind in (_ENHANCED, _OBSOLETE):
                if self._captured(view, at) > total - _SMALLEST[kind]:
                    self._end("is shorter than the packet in it")
                    break
                if begin + at >= self._resume_at:
                    found.at.append(at)
            elif kind in (_SECTION, _INTERFACE):
                if kind == _SECTION and not found.at:  # sections without packets must not fill memory
                    self._interfaces.clear()
                self._learn(kind, view[at : at + total])
                found.mark(self._order, self._base, len(self._interfaces) - self._base)
            elif kind == _SIMPLE and begin + at >= self._resume_at:
                self._counters.packets += 1
                self._counters.skip(reasons.NO_TIME)
            stream.start = at + total
        return stream.start != moved

    def _block(self, view: memoryview, at: int) -> tuple[int, int]:
        """Return type and length of the block at ``at``; a section header sets the byte order it is read in."""
        if view[at : at + 4] == _MAGIC:
            order = _ORDERS.get(view[at + 8 : at + 12].tobytes())
            if order is None:
                return _SECTION, 0
            self._order = order
        kind, total = struct.unpack_from(f"{self._order}II", view, at)
        return kind, total

    def _captured(self, view: memoryview, at: int) -> int:
        captured: int = struct.unpack_from(f"{self._order}20xI", view, at)[0]
        return captured

    def _pass_over(self) -> bool:
        """Skip a block that is larger than the buffer, if it is not a packet; return whether one was skipped."""
        stream = self._stream
        if stream.end - stream.start < 12:
            return False
        kind, total = self._block(stream.data.data, stream.start)
        if total <= len(stream.data):
            return False
        if kind in _SMALLEST:
            self._end(f"claims {total} bytes")
            return False
        return stream.skip(total)

    def _learn(self, kind: int, block: memoryview) -> None:
        """Take in a section header or an interface description."""
        if kind == _SECTION:
            self._base = len(self._interfaces)
        elif len(self._interfaces) - self._base < _MAX_INTERFACES:
            self._interfaces.append(_interface(block, self._order))

    def _describe(self, found: _Found) -> Frames:
        """Read the packet blocks' fields in columns, each in its section's byte order and its interface's clock."""
        data = self._stream.data
        at = np.array(found.at, np.int64)
        held = np.searchsorted([mark[0] for mark in found.marks], np.arange(len(at)), side="right") - 1
        base, count = (np.array([mark[n] for mark in found.marks], np.int64)[held] for n in (2, 3))
        big = np.array([mark[1] == ">" for mark in found.marks])[held]
        interface, captured, wire = (np.zeros(len(at), np.int64) for _ in range(3))
        ticks = np.zeros(len(at), np.uint64)
        for order, rows in (("<", np.flatnonzero(~big)), (">", np.flatnonzero(big))):
            names = ("kind", "total", "interface", "high", "low", "captured", "wire")
            block = gather(data, at[rows], [(name, f"{order}u4") for name in names])
            narrow = gather(data, at[rows] + 8, f"{order}u2").astype(np.int64)
            interface[rows] = np.where(block["kind"] == _OBSOLETE, narrow, block["interface"])
            captured[rows], wire[rows] = block["captured"], block["wire"]
            ticks[rows] = block["high"].astype(np.uint64) << np.uint64(32) | block["low"]
        usable = interface < count
        self._leave_out(reasons.NO_INTERFACE, len(at) - int(np.count_nonzero(usable)))
        number = np.where(usable, base + interface, 0)
        ts_us, link = np.zeros(len(at), np.int64), np.zeros(len(at), np.int32)
        for index in np.unique(number[usable]).tolist():
            rows = np.flatnonzero(usable & (number == index))
            ts_us[rows], in_range = _microseconds(ticks[rows], self._interfaces[index])
            link[rows] = self._interfaces[index].link
            self._leave_out(reasons.ODD_TIME, len(rows) - int(np.count_nonzero(in_range)))
            usable[rows[~in_range]] = False
        rows = np.flatnonzero(usable)
        captured = captured[rows]
        return Frames(data, at[rows] + _FRAME_AT, captured, np.maximum(wire[rows], captured), ts_us[rows], link[rows])

    def _leave_out(self, reason: str, count: int) -> None:
        self._counters.packets += count
        self._counters.skip(reason, count)

    def _end(self, why: str) -> None:
        self._counters.ended = f"the block at byte {self._stream.offset} {why}; the rest cannot be read"

    def _explain_end(self) -> None:
        stream = self._stream
        if not self._counters.ended and stream.end > stream.start:
            self._counters.ended = f"{TRUNCATED}: the block at byte {stream.offset} is not whole"
        if stream.damage:
            self._counters.ended = stream.damage


def _interface(block: memoryview, order: str) -> _Interface:
    """Read an interface description block; options that do not fit end the list of options."""
    link = struct.unpack_from(f"{order}H", block, 8)[0]
    resolution, offset_s = 6, 0
    at, end = 16, len(block) - 4
    while end - at >= 4:
        code, length = struct.unpack_from(f"{order}HH", block, at)
        if code == 0 or length > end - at - 4:
            break
        if code == _TSRESOL and length == 1:
            resolution = block[at + 4]
        elif code == _TSOFFSET and length == 8:
            offset_s = struct.unpack_from(f"{order}q", block, at + 4)[0]
        at += 4 + (length + 3 & ~3)
    return _Interface(link, resolution, offset_s)


def _microseconds(ticks: npt.NDArray[np.uint64], interface: _Interface) -> tuple[I64, npt.NDArray[np.bool_]]:
    """Convert an interface's clock to microseconds since 1970, rounded down.

    Returns:
        The times, and which of them are in range (the others are 0).
    """
    exponent, offset_us = interface.resolution & 0x7F, interface.offset_s * 1_000_000
    if not interface.resolution & 0x80 and 6 <= exponent <= 25 and abs(offset_us) < _TIME_LIMIT_US:
        fine = ticks // np.uint64(10 ** (exponent - 6))
        in_range = fine < np.uint64(_TIME_LIMIT_US)
        times = np.where(in_range, fine, 0).astype(np.int64) + offset_us
        in_range &= np.abs(times) < _TIME_LIMIT_US
        return np.where(in_range, times, 0), in_range
    per_second = 2**exponent if interface.resolution & 0x80 else 10**exponent
    exact = [tick * 1_000_000 // per_second + offset_us for tick in ticks.tolist()]
    in_range = np.array([abs(time) < _TIME_LIMIT_US for time in exact], np.bool_)
    return np.array([time if abs(time) < _TIME_LIMIT_US else 0 for time in exact], np.int64), in_range
