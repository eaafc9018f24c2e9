"""The only place where roles read the time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Wall time in milliseconds since 1970, and a clock that never jumps, in seconds."""

    def wall_ms(self) -> int:
        """Return the wall time."""
        ...

    def monotonic_s(self) -> float:
        """Return the time of a clock that never jumps."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_ms(self) -> int:
        """Return the wall time."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Return the time of a clock that never jumps."""
        return time.monotonic()
