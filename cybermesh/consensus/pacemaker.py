"""When a round is given up, and when an idle one is left alone.

R7 idle     entering a round arms nothing. The round timer runs from the moment there is something to wait for; without it
            a leader proposes only when the heartbeat is due.
The timer grows with the rounds since the last certificate, base * 1.5^k, k = min(round - 1 - certified round, 6), plus up to a
tenth of jitter; without the jitter it is the same on every node. All times are milliseconds of a clock that never jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.types import Round

_GROWTH: Final = 1.5
_GROWTH_STEPS: Final = 6
_JITTER: Final = 0.1


@dataclass(frozen=True, slots=True)
class Timing:
    """Waiting times in milliseconds.

    ``base_ms`` is the first round timer, ``heartbeat_ms`` the pause between empty blocks, ``forward_ms`` how long a
    transaction waits for a proposal before it is sent to all; ``ahead_ms`` how far a block's time may be ahead of the clock.
    """

    base_ms: int = 200
    heartbeat_ms: int = 5_000
    forward_ms: int = 50
    ahead_ms: int = 10_000

    def round_timer_ms(self, round_: Round, certified: Round) -> int:
        """Return the timer of a round without its jitter."""
        steps = max(0, min(round_ - 1 - certified, _GROWTH_STEPS))
        return round(self.base_ms * _GROWTH**steps)


class Pacemaker:
    """The round of one replica and its deadlines; ``jitter`` gives numbers in [0, 1)."""

    def __init__(self, timing: Timing, jitter: Callable[[], float], round_: Round, now_ms: int) -> None:
        self.timing = timing
        self.round = round_
        self.heartbeat_at = now_ms + timing.heartbeat_ms
        self._jitter = jitter
        self._armed_at: int | None = None
        self._deadline: int | None = None
        self._forward_at: int | None = None
        self._has_forwarded = False

    @property
    def deadline(self) -> int | None:
        """When the round is given up, None while nothing is waited for."""
        return self._deadline

    @property
    def forward_at(self) -> int | None:
        """When the oldest transaction is sent to all, None if it need not be."""
        return None if self._has_forwarded else self._forward_at

    def enter(self, round_: Round) -> None:
        """Begin a round, with nothing to wait for yet (R1, R7)."""
        assert round_ > self.round
        self.round = round_
        self._armed_at = None
        self._deadline = None
        self._forward_at = None
        self._has_forwarded = False

    def progress(self, now_ms: int) -> None:
        """Note a new highest certificate: the next heartbeat is a whole pause away."""
        self.heartbeat_at = now_ms + self.timing.heartbeat_ms

    def arm(self, at_ms: int, certified: Round) -> None:
        """Give the round a timer's length from ``at_ms`` on, unless it is already running from an earlier moment."""
        if self._armed_at is None or at_ms < self._armed_at:
            self._armed_at = at_ms
            self._deadline = at_ms + self._timer_ms(certified)

    def rearm(self, now_ms: int, certified: Round) -> None:
        """Give a round that was given up another timer's length, after which the timeout is sent again."""
        self._armed_at = now_ms
        self._deadline = now_ms + self._timer_ms(certified)

    def misses_proposal(self, now_ms: int) -> bool:
        """Note that a transaction waits and no proposal is here; return whether it is time to send it, once per round."""
        if self._forward_at is None:
            self._forward_at = now_ms + self.timing.forward_ms
        if self._has_forwarded or now_ms < self._forward_at:
            return False
        self._has_forwarded = True
        return True

    def stop_missing(self) -> None:
        """Note that the proposal came or the transaction went."""
        self._forward_at = None

    def is_over(self, now_ms: int) -> bool:
        """Return whether the round timer has ended."""
        return self._deadline is not None and now_ms >= self._deadline

    def _timer_ms(self, certified: Round) -> int:
        timer = self.timing.round_timer_ms(self.round, certified)
        return timer + int(timer * _JITTER * self._jitter())
