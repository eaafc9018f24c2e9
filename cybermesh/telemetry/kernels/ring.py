"""Find the frames of a block of the kernel's packet ring, each of which says where the next one is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.kernels import kernel, load_16, load_32

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

# struct tpacket3_hdr of linux/if_packet.h.
_SECONDS, _NANOSECONDS, _CAPTURED, _WIRE, _STATUS, _MAC, _TCI, _TPID = 4, 8, 12, 16, 20, 24, 32, 36
_SMALLEST = 68


@kernel("UniTuple(int64, 2)(uint8[::1], int64, int64, int64, int64[:, ::1])")
def scan_ring(data: U8, start: int, end: int, count: int, frames: I64) -> tuple[int, int]:
    """Describe the next frames of a block.

    Args:
        data: The ring.
        start: Where a frame's header begins.
        end: Where the block ends.
        count: How many frames of the block are still to come.
        frames: int64[6, limit], filled with offset, captured bytes, bytes on the wire, time in microseconds, status, VLAN tag
            (protocol << 16 | control information).

    Returns:
        How many were found, and where the next header begins.
    """
    found = 0
    limit = min(frames.shape[1], count)
    while found < limit and start >= 0 and start + _SMALLEST <= end:
        at = start + load_16(data, start + _MAC)
        captured = load_32(data, start + _CAPTURED)
        if at + captured > end:
            break
        frames[0, found] = at
        frames[1, found] = captured
        frames[2, found] = load_32(data, start + _WIRE)
        frames[3, found] = load_32(data, start + _SECONDS) * 1_000_000 + load_32(data, start + _NANOSECONDS) // 1000
        frames[4, found] = load_32(data, start + _STATUS)
        frames[5, found] = load_16(data, start + _TPID) << 16 | load_16(data, start + _TCI)
        found += 1
        following = load_32(data, start)
        start = start + following if following else -1
    return found, start
