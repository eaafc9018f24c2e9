"""Find the records of a capture in a buffer: the part of reading that must go from one to the next."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.kernels import kernel, load_32, part

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

WHOLE, TOO_LONG = 0, 1  # why a scan ended: nothing more that is whole (or enough found), or a length that cannot be

_RECORD_HEADER = 16
_ENHANCED, _FRAME_AT, _SMALLEST = 6, 28, 32


@part
def read_u32(data: U8, at: int, big: bool) -> int:
    """Return the 32-bit number at ``at`` in either byte order."""
    number: int = load_32(data, at)
    if big:
        number = (number & 0xFF) << 24 | (number & 0xFF00) << 8 | (number >> 8 & 0xFF00) | number >> 24
    return number


@kernel("UniTuple(int64, 3)(uint8[::1], UniTuple(int64, 2), boolean, int64, int64, int64[:, ::1])")
def scan_pcap(
    data: U8, stretch: tuple[int, int], big: bool, per_us: int, max_captured: int, frames: I64
) -> tuple[int, int, int]:
    """Describe the whole pcap records of a stretch of ``data``.

    Args:
        data: The buffer.
        stretch: Where a record begins, and where the bytes that were read end.
        big: Byte order of the file.
        per_us: Fractions of a second in a microsecond.
        max_captured: More captured bytes than this are a damaged record.
        frames: int64[4, limit], filled with offset, captured bytes, bytes on the wire, and time in microseconds.

    Returns:
        How many were found, where the next one begins, and WHOLE or TOO_LONG.
    """
    start, end = stretch
    found = 0
    limit = frames.shape[1]
    while found < limit and start + _RECORD_HEADER <= end:
        captured = read_u32(data, start + 8, big)
        if captured > max_captured:
            return found, start, TOO_LONG
        if start + _RECORD_HEADER + captured > end:
            break
        frames[0, found] = start + _RECORD_HEADER
        frames[1, found] = captured
        frames[2, found] = max(read_u32(data, start + 12, big), captured)
        frames[3, found] = read_u32(data, start, big) * 1_000_000 + read_u32(data, start + 4, big) // per_us
        found += 1
        start += _RECORD_HEADER + captured
    return found, start, WHOLE


@kernel("UniTuple(int64, 2)(uint8[::1], int64, int64, boolean, int64[::1])")
def scan_enhanced(data: U8, start: int, end: int, big: bool, at: I64) -> tuple[int, int]:
    """Find sound enhanced packet blocks of pcapng that follow each other; any other block ends the scan.

    Args:
        data: The buffer.
        start: Where a block begins.
        end: Where the bytes that were read end.
        big: Byte order of the section.
        at: Filled with the offsets of the blocks.

    Returns:
        How many were found and where the next block begins.
    """
    found = 0
    while found < len(at) and start + _SMALLEST <= end:
        total = read_u32(data, start + 4, big)
        if read_u32(data, start, big) != _ENHANCED or total < _SMALLEST or total % 4 or total > end - start:
            break
        if read_u32(data, start + 20, big) > total - _SMALLEST:
            break
        at[found] = start
        found += 1
        start += total
    return found, start
