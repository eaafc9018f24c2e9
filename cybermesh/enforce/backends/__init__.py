"""What puts rules into a firewall: the port, its error, and what an audit says.

Contract of every backend:

- ``apply`` and ``rebuild`` are atomic: they return when the firewall does what the plan says, or raise and leave it as it was.
- An element ends by itself at its ``expires_at_ms``, even when this process is dead. A backend never sets a later end.
- A backend touches nothing but what is its own, and needs no record of its own to know what that is.
- Calls do not overlap: the enforcer makes them one at a time. Only ``glance`` may run beside all others. Cancellation may leave
  a call done or not done, as after a crash; the next audit tells.
- Only the enforcer retries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Element, Match


class BackendError(Exception):
    """The firewall refused; ``code`` goes into acks: APPLY_FAILED, SET_FULL, NO_RIGHTS or NO_FIREWALL."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Audit:
    """What is installed, read from the firewall itself; ends are exact to ``TOLERANCE_MS``.

    ``damage`` says what an edit cannot mend (a missing table, a foreign rule among ours), so that only a rebuild helps.
    """

    elements: Mapping[Match, Element]
    damage: tuple[str, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)


TOLERANCE_MS = 2_500
"""Firewalls tell remaining time in whole seconds, and listing takes a while."""


class Backend(Protocol):
    """A firewall."""

    @property
    def name(self) -> str:
        """The name in settings and status."""
        ...

    async def apply(self, plan: Plan, now_ms: int) -> None:
        """Make the changes of ``plan`` in one transaction; a firewall that is not as the plan assumes may refuse it.

        Raises:
            BackendError: Nothing was changed.
        """
        ...

    async def rebuild(self, elements: Collection[Element], now_ms: int) -> None:
        """Make ``elements`` all that is ours, in one transaction, whatever was there.

        Raises:
            BackendError: Nothing was changed.
        """
        ...

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        """Return those of ``matches`` that the firewall holds.

        Raises:
            BackendError: It could not be asked.
        """
        ...

    async def audit(self, now_ms: int) -> Audit:
        """Read everything of ours; slow, never part of a decision's way.

        Raises:
            BackendError: It could not be read.
        """
        ...

    async def glance(self, now_ms: int) -> Audit | None:
        """Read everything of ours while other calls go on; None where only ``audit`` can tell.

        What is changed meanwhile may be in it or not; the caller knows what that was.
        """
        ...

    async def wait_changed(self) -> None:
        """Return when somebody else may have changed the firewall; never return where a firewall does not tell.

        Raises:
            BackendError: It cannot be listened to; reconciliation by time goes on.
        """
        ...

    def close(self) -> None:
        """Give back what is open in this process; the firewall stays as it is. Whoever made the backend calls it."""
        ...

    async def remove_all(self) -> None:
        """Remove everything of ours and nothing else; doing it twice is the same as once.

        Raises:
            BackendError: Something may be left.
        """
        ...
