"""The watermark's rule of ``meter_clock``, compiled: the same steps, one packet after the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.kernels import kernel
from cybermesh.telemetry.meter_clock import CONFIRMATIONS, JUMP_US

I64 = npt.NDArray[np.int64]

# Columns of the clock.
KNOWN, NOW, STEPS_BACK, AHEAD, AHEAD_MIN, BEHIND, BEHIND_MAX = range(7)
CLOCK_WIDTH = 7


@kernel("void(int64[::1], int64[::1], int64[::1])")
def advance(clock: I64, ts_us: I64, marks: I64) -> None:
    """Take in times.

    Args:
        clock: int64[CLOCK_WIDTH], zeros at first.
        ts_us: Times of packets in file order.
        marks: Filled with the watermark after each of them.
    """
    if not clock[KNOWN] and len(ts_us):
        clock[KNOWN], clock[NOW] = 1, ts_us[0]
    now = clock[NOW]
    for i in range(len(ts_us)):
        time = ts_us[i]
        if abs(time - now) <= JUMP_US:
            clock[AHEAD] = clock[BEHIND] = 0
            now = max(now, time)
        elif time > now:
            clock[AHEAD_MIN] = min(clock[AHEAD_MIN], time) if clock[AHEAD] else time
            clock[AHEAD] += 1
            if clock[AHEAD] == CONFIRMATIONS:
                now = clock[AHEAD_MIN]
                clock[AHEAD] = clock[BEHIND] = 0
        else:
            clock[BEHIND_MAX] = max(clock[BEHIND_MAX], time) if clock[BEHIND] else time
            clock[BEHIND] += 1
            if clock[BEHIND] == CONFIRMATIONS:
                now = clock[BEHIND_MAX]
                clock[STEPS_BACK] += 1
                clock[AHEAD] = clock[BEHIND] = 0
        marks[i] = now
    clock[NOW] = now
