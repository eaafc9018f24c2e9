"""What must be done though store or bus is away: again and again, saying meanwhile what it waits for.

Nothing is dropped for such a failure; whoever waits here takes nothing new, which is the back-pressure that the rest relies on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar

import structlog

from cybermesh.bus import BusError
from cybermesh.store import StoreUnavailable

T = TypeVar("T")

RETRY_FIRST_S: Final = 0.1
RETRY_MAX_S: Final = 5.0


class Patience:
    """Retries for one role; several of its tasks may wait at once."""

    def __init__(self, log: structlog.typing.FilteringBoundLogger) -> None:
        self._log = log
        self._reasons: dict[object, str] = {}

    @property
    def problem(self) -> str | None:
        """What the role has waited for longest, None while it waits for nothing."""
        return next(iter(self._reasons.values()), None)

    @contextlib.contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Say what the block waits for, if it has to."""
        place = object()
        self._reasons[place] = reason
        self._log.warning("waiting", reason=reason)
        try:
            yield
        finally:
            del self._reasons[place]

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work, after every failure that passes by itself once more, with a capped pause."""
        pause_s, place = RETRY_FIRST_S, object()
        try:
            while True:
                try:
                    return await work()
                except (StoreUnavailable, BusError) as error:
                    self._reasons[place] = str(error)
                    self._log.warning("waiting", reason=str(error), retry_s=round(pause_s, 2))
                await asyncio.sleep(pause_s * (1 + random.random() / 4))  # noqa: S311 - jitter, not a secret
                pause_s = min(2 * pause_s, RETRY_MAX_S)
        finally:
            self._reasons.pop(place, None)
