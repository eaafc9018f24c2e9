"""Packet time of a whole input: how far it has come, and what to make of clocks that jump.

The watermark is the newest packet time seen. A single wrong clock must not end every open flow, so a time more than an hour
away counts as an outlier until 64 packets in a row (without one near the watermark between them) say the same; then the
watermark steps to the most cautious of their times, forwards or backwards.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

JUMP_US = 3_600_000_000
CONFIRMATIONS = 64


class Watermark:
    """The watermark of one meter."""

    def __init__(self) -> None:
        self.now_us: int | None = None
        self.steps_back = 0
        self._ahead: list[int] = []
        self._behind: list[int] = []

    def advance(self, ts_us: I64) -> I64:
        """Take in the times of a block of at least one packet; return the watermark after each of them."""
        if self.now_us is None:
            self.now_us = int(ts_us[0])
        newest, oldest = max(int(ts_us.max()), self.now_us), min(int(ts_us.min()), self.now_us)
        if newest - oldest <= JUMP_US:  # no time can be far from any watermark that the block may lead to
            self._ahead.clear()
            self._behind.clear()
            marks = np.maximum(np.maximum.accumulate(ts_us), self.now_us)
            self.now_us = int(marks[-1])
            return marks
        return np.array([self._step(time) for time in ts_us.tolist()], np.int64)

    def _step(self, time: int) -> int:
        """Take in one packet's time; return the watermark after it."""
        assert self.now_us is not None
        if abs(time - self.now_us) <= JUMP_US:
            self._ahead.clear()
            self._behind.clear()
            self.now_us = max(self.now_us, time)
        elif time > self.now_us:
            self._ahead.append(time)
            if len(self._ahead) == CONFIRMATIONS:
                self._jump(min(self._ahead))
        else:
            self._behind.append(time)
            if len(self._behind) == CONFIRMATIONS:
                self.steps_back += 1
                self._jump(max(self._behind))
        return self.now_us

    def _jump(self, to: int) -> None:
        self.now_us = to
        self._ahead.clear()
        self._behind.clear()
