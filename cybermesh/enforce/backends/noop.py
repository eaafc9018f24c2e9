"""A backend without a firewall: for observe mode, demos and tests. It keeps what it was told, and forgets it on time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection

from cybermesh.enforce.backends import Audit
from cybermesh.enforce.reconcile import Mirror, Plan, Touched
from cybermesh.enforce.rules import Element, Match

PLANS_KEPT = 1_000


class NoopBackend:
    """Keeps the elements in memory and the last 1,000 plans (the oldest are dropped)."""

    name = "noop"

    def __init__(self) -> None:
        self.plans: deque[Plan] = deque(maxlen=PLANS_KEPT)
        self._mirror = Mirror()

    async def apply(self, plan: Plan, now_ms: int) -> None:
        """Keep the plan and do it."""
        self._mirror.forget_ended(now_ms)
        self.plans.append(plan)
        self._mirror.apply(plan)

    async def rebuild(self, elements: Collection[Element], now_ms: int) -> None:
        """Hold exactly ``elements``."""
        self._mirror.replace(element for element in elements if element.expires_at_ms > now_ms)

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        """Return what is held."""
        asked = Touched(set(matches), {match.lane for match in matches if match.area})
        return frozenset(self._mirror.view(asked).keys() & set(matches))

    async def audit(self, now_ms: int) -> Audit:
        """Return everything that has not ended."""
        self._mirror.forget_ended(now_ms)
        return Audit(self._mirror.view())

    async def glance(self, now_ms: int) -> Audit | None:
        """Return None: a look at memory costs nothing."""
        return None

    async def wait_changed(self) -> None:
        """Wait for ever: nobody else holds this."""
        await asyncio.Event().wait()

    def close(self) -> None:
        """There is nothing to give back."""

    async def remove_all(self) -> None:
        """Forget everything."""
        self._mirror.replace(())
