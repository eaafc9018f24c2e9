"""Packet time as the windows see it: steps of one hop that never go back, whatever clocks and captures do.

Rules:
1. Slightly late packets (out of order, several capture queues) belong to the current hop.
2. A packet far behind or more than an hour ahead is a stray: it is counted in the current hop and moves nothing, until
   ``CONFIRM`` strays in a row agree with each other. Then the clock has stepped: forward steps are time that passed (the
   windows empty), backward steps are a new clock (the windows go on from where they are).
3. A forward step counts as ``JUMP_US``, longer than any window, however far it went; so no sequence of hostile clocks, forwards
   and back again, adds up to more than an integer holds.
4. A stray's own time is not believed: it is told as that of the last packet before it that was no stray.
5. The result depends on the packets' order only, not on how they are cut into blocks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

HOP_US = 1_000_000
SLACK_US = 5_000_000  # disorder that capture queues and merged files show
JUMP_US = 3_600_000_000  # the meter's figure for a forward jump that needs confirmation
CONFIRM = 64
_FARTHEST_US = 1 << 61  # times beyond, 73,000 years from 1970, count as this one


class Timeline:
    """Maps capture times (µs) to hop numbers that never decrease."""

    def __init__(self, hop_us: int = HOP_US) -> None:
        self.hop_us = hop_us
        self.strays = 0
        self.steps = 0
        self._now: int | None = None
        self._offset = 0
        self._stray_run = 0
        self._stray_at = 0
        self._believed = 0

    def place(self, ts_us: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return each packet's hop, int64[n], non-decreasing also from call to call, and its time as far as it is believed."""
        if len(ts_us) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        ts_us = np.clip(ts_us, -_FARTHEST_US, _FARTHEST_US)
        if self._now is None:
            self._now = self._believed = int(ts_us[0])
        moved = ts_us + self._offset
        run = np.maximum.accumulate(np.concatenate(([self._now], moved)))
        if bool((np.diff(run) <= JUMP_US).all()) and bool((moved >= run[:-1] - SLACK_US).all()):
            self._now = int(run[-1])
            self._stray_run = 0
            self._believed = int(ts_us[-1])
            return run[1:] // self.hop_us, ts_us
        placed = [(self._follow(ts) // self.hop_us, self._believed) for ts in ts_us.tolist()]
        hops, believed = np.array(placed, np.int64).T
        return hops, believed

    def _follow(self, ts_us: int) -> int:
        """Take one packet by the rules of this module and return the current time."""
        assert self._now is not None
        at = ts_us + self._offset
        if self._now - SLACK_US <= at <= self._now + JUMP_US:
            self._now = max(self._now, at)
            self._believed = ts_us
            self._stray_run = 0
            return self._now
        self.strays += 1
        agrees = self._stray_run > 0 and abs(at - self._stray_at) <= JUMP_US
        self._stray_run = self._stray_run + 1 if agrees else 1
        self._stray_at = at
        if self._stray_run >= CONFIRM:
            self.steps += 1
            self._stray_run = 0
            stepped = self._now if at < self._now else self._now + JUMP_US
            self._offset += stepped - at
            self._now = stepped
            self._believed = ts_us
        return self._now
