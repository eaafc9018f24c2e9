"""The installer: makes the firewall hold what is desired, and knows what it holds.

It exists to keep one question out of the enforcer: how memory and kernel stay the same. Plans are made against the mirror; the
mirror changes only after the firewall has said yes; when an edit fails because somebody has changed our table, the table is
rebuilt once; and everything that was asked for is read back from the kernel before anybody claims it.
In the modes observe and off the same goes to a backend without a firewall, and the real one holds nothing of ours.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cybermesh.enforce.backends import TOLERANCE_MS, Audit, Backend, BackendError
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.reconcile import Desired, LaneFullError, Mirror, Plan, Touched, plan
from cybermesh.enforce.rules import Element, Match

_SAMPLE_MAX: Final = 4_096


@dataclass(frozen=True, slots=True)
class Finding:
    """What an audit found: elements that others had changed, what needed a rebuild, and the firewall's counters."""

    drift: int = 0
    damage: tuple[str, ...] = ()
    counters: Mapping[str, int] | None = None


class Installer:
    """The firewall side of an agent; one call at a time.

    It asks the clock itself, as late as it can: the time that a large plan takes must not become time that a ban gains.
    """

    def __init__(self, backend: Backend, now_ms: Callable[[], int]) -> None:
        self._real = backend
        self._now_ms = now_ms
        self._target: Backend = NoopBackend()
        self._mirror = Mirror()
        self._rebuild_due = True
        self._is_fresh = False
        self._removal_due = False
        # What has been asked for since a glance began; None when no glance is under way, or one was made worthless.
        self._since: Touched | None = None

    @property
    def is_enforcing(self) -> bool:
        """Whether the real firewall is used."""
        return self._target is self._real

    @property
    def is_fresh(self) -> bool:
        """Whether everything was built and read back in this round, so that a look would tell nothing new."""
        return self._is_fresh and not self._rebuild_due

    @property
    def installed(self) -> int:
        """How many elements the firewall holds, as far as we know."""
        return len(self._mirror)

    async def enter(self, mode: Mode) -> None:
        """Use the real firewall in enforce mode only; leaving that mode removes everything of ours.

        Raises:
            BackendError: Our table could not be removed, and may still be there.
        """
        self._since = None
        if mode is Mode.ENFORCE:
            if not self.is_enforcing:
                self._target, self._rebuild_due = self._real, True
                self._mirror.replace(())
            return
        self._target, self._rebuild_due, self._removal_due = NoopBackend(), True, True
        self._mirror.replace(())
        await self.leave_nothing_behind()

    async def leave_nothing_behind(self) -> None:
        """Remove everything of ours from a firewall that is not used any more, if that has not been done yet.

        Raises:
            BackendError: Our table could not be removed, and may still be there.
        """
        if self._removal_due and not self.is_enforcing:
            await self._real.remove_all()
            self._removal_due = False

    def begin_round(self) -> None:
        """Begin a reconciliation: what was built before it is not known to be there still."""
        self._is_fresh = False

    async def glance(self, desired: Desired) -> bool:
        """Say whether the firewall is as desired, without keeping ``bring`` waiting; False also when that cannot be told.

        The listing, the comparison and the changes that are made meanwhile go side by side: what those concern is not judged,
        it has been read back. Only one glance at a time. It changes nothing: ``check`` repairs what it has seen.
        """
        if self._rebuild_due or not self.is_enforcing:
            return False
        self._mirror.forget_ended(self._now_ms())
        self._since = since = Touched()
        before, before_ms = desired.snapshot(), self._now_ms()
        try:
            audit = await self._target.glance(before_ms)
            if audit is None or audit.damage:
                return False
            step = await asyncio.to_thread(self._differences, before, audit, before_ms)
            return self._since is since and not step.beside(since)
        except LaneFullError:
            return False
        finally:
            self._since = None

    def _differences(self, desired: Desired, audit: Audit, before_ms: int) -> Plan:
        now_ms = self._now_ms()
        # The remaining times were read somewhere in between.
        return plan(desired.view(now_ms), audit.elements, now_ms, TOLERANCE_MS + now_ms - before_ms)

    def _note(self, touched: Touched) -> None:
        if self._since is not None:
            self._since |= touched

    async def bring(self, desired: Desired, touched: Touched) -> None:
        """Install what ``touched`` concerns, and read it back.

        Raises:
            BackendError: The firewall did not take it; ``settle`` with the old rules in ``desired`` undoes what it did take.
            LaneFullError: Nothing was changed.
        """
        self._note(touched)
        if self._rebuild_due:
            await self._rebuild(desired)
            return
        step = self._plan(desired, touched)
        if not step.drift:
            return
        try:
            await self._apply(step)
        except BackendError as fault:
            if fault.code != "APPLY_FAILED":
                raise
            # Our table is not as we left it. A rebuild replaces it in one transaction, whatever is there now.
            await self._rebuild(desired)

    async def settle(self, desired: Desired, touched: Touched) -> None:
        """Go back after a failure, as far as the firewall lets us; the next audit finds the rest."""
        self._note(touched)
        if self._rebuild_due:
            return
        try:
            step = self._plan(desired, touched)
            if step.drift:
                await self._target.apply(step, self._now_ms())
                self._mirror.apply(step)
        except BackendError:
            self._rebuild_due = True

    async def check(self, desired: Desired) -> Finding:
        """Compare the firewall with what is desired, and repair it.

        Raises:
            BackendError: It could not be read or repaired.
        """
        self._mirror.forget_ended(self._now_ms())
        if self.is_fresh:
            # Built and read back a moment ago: listing it all would tell nothing new, and takes most of a second.
            return Finding()
        step, audit = await self._compare(desired, self._target)
        # A new process has promised nothing yet, so what it finds missing at its start is no drift.
        finding = Finding(0 if self._rebuild_due else step.drift, () if self._rebuild_due else audit.damage, audit.counters)
        if self._rebuild_due or audit.damage:
            await self._rebuild(desired)
        elif step.drift:
            self._mirror.replace(audit.elements.values())
            await self._apply(step)
        return finding

    async def difference(self, desired: Desired, mode: Mode) -> tuple[Plan, Audit]:
        """Return what would have to change in the real firewall, and what it holds; changes nothing.

        Raises:
            BackendError: It could not be read.
        """
        return await self._compare(desired if mode is Mode.ENFORCE else Desired(), self._real)

    async def _compare(self, desired: Desired, backend: Backend) -> tuple[Plan, Audit]:
        before_ms = self._now_ms()
        audit = await backend.audit(before_ms)
        return self._differences(desired, audit, before_ms), audit

    def _plan(self, desired: Desired, touched: Touched) -> Plan:
        now_ms = self._now_ms()
        return plan(desired.view(now_ms, touched), self._mirror.view(touched), now_ms)

    async def _apply(self, step: Plan) -> None:
        await self._target.apply(step, self._now_ms())
        self._mirror.apply(step)
        await self._confirm(step)

    async def _confirm(self, step: Plan) -> None:
        wanted = {element.match for element in itertools.chain(step.wanted(), *(areas for _, areas in step.areas))}
        await self._require(wanted)

    async def _require(self, wanted: set[Match]) -> None:
        missing = wanted - await self._target.read_back(wanted)
        if missing:
            raise BackendError("APPLY_FAILED", f"read back: {len(missing)} of {len(wanted)} are not there, as {min(missing)}")

    async def _rebuild(self, desired: Desired) -> None:
        # Whatever is being listed meanwhile is not what will be there.
        self._since = None
        elements = desired.view(self._now_ms())
        await self._target.rebuild(elements.values(), self._now_ms())
        self._mirror.replace(elements.values())
        self._rebuild_due = False
        await self._confirm_some(elements)
        self._is_fresh = True

    async def _confirm_some(self, elements: Mapping[Match, Element]) -> None:
        """Read back what one transaction has built: all of it, or an even sample; the next audit reads everything."""
        matches = list(elements)
        await self._require(set(matches[:: -(-len(matches) // _SAMPLE_MAX) or 1]))
