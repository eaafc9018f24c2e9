"""A bound on how much is reported per second of packet time: a bucket of integers, no clock of its own."""

from __future__ import annotations

_STEP_US = 3_600_000_000  # so far back it is another clock, not a late packet (or the one before was a stray)


class RateLimit:
    """Allows ``per_s`` events per second, and bursts of as many; time that goes back refills nothing.

    After a step back of more than an hour it goes on from there, or one packet of another year would silence it until then.
    """

    def __init__(self, per_s: int) -> None:
        assert per_s > 0
        self.refused = 0
        self._per_s = per_s
        self._micro = per_s * 1_000_000
        self._at_us: int | None = None

    def has_room(self, now_us: int) -> bool:
        """Return whether an event at ``now_us`` would be allowed."""
        if self._at_us is not None and now_us > self._at_us:
            self._micro = min(self._per_s * 1_000_000, self._micro + (now_us - self._at_us) * self._per_s)
        if self._at_us is None or now_us > self._at_us or self._at_us - now_us > _STEP_US:
            self._at_us = now_us
        return self._micro >= 1_000_000

    def allows(self, now_us: int) -> bool:
        """Take one event at ``now_us``; False, and counted, if there were too many."""
        if not self.has_room(now_us):
            self.refused += 1
            return False
        self._micro -= 1_000_000
        return True
