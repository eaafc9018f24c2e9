"""The enforcer: takes proven decisions to the firewall and answers for each of them.

The order of handling is fixed, and nothing skips a step: quorum proof, fields equal to what was proven, parse, time, order
and duplicates, guard (all in ``admission``), plan, apply atomically, read back (``installer``), persist, signed ack. The rules:

- Memory changes first, the firewall second, the database last; whatever refuses, all three go back to what they were and the
  ack says ``failed`` with a code. A batch that fails is tried again one by one, so one bad decision costs only itself.
- Ending and expiring need nobody's permission: they go on in every mode, with the kill switch on and the clock in doubt.
- A decision that must wait (kill switch, clock, unreadable surroundings, firewall trouble) is *held* and tried again at every
  reconciliation until its time is up.
- Ends are absolute: re-assertion gives an element the time that is left, never more.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from cybermesh.addresses import Network
from cybermesh.enforce import guard, memory, rules
from cybermesh.enforce.acks import Outcome, Place, draft
from cybermesh.enforce.admission import Admission, Batch
from cybermesh.enforce.backends import Audit, Backend, BackendError
from cybermesh.enforce.book import Book
from cybermesh.enforce.decisions import Mode, ProofError, Proven, RefusedError
from cybermesh.enforce.installer import Finding, Installer
from cybermesh.enforce.packed import PackedError, pack
from cybermesh.enforce.reconcile import LaneFullError, Plan
from cybermesh.enforce.state import Changes, Orders, Pending, State, StateError
from cybermesh.messages import Ack, PolicyAction, PolicyUpdate
from cybermesh.wire import codec

Event = tuple[PolicyUpdate, Proven | ProofError]


@dataclass(frozen=True, slots=True)
class Ports:
    """What the enforcer needs from its role; all of them synchronous.

    ``prove`` may take milliseconds and is called in a thread: it returns what the event's proof proves, or raises
    ``ProofError`` (``EpochUnknownError`` to park the event). ``seal`` signs an ack and encodes it for the wire; producer and
    nonce are its own; without it (the command line) nothing is answered and what is held stays held. ``look`` reads the
    surroundings; ``now_ms`` is wall-clock time in milliseconds since 1970.
    """

    prove: Callable[[PolicyUpdate], Proven]
    seal: Callable[[Ack], bytes] | None
    look: Callable[[], guard.Protected]
    now_ms: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What a reconciliation found: ``drift`` counts what others had changed, ``damage`` names what of it needed a rebuild.

    ``released`` counts decisions that were held and are installed now, ``withdrawn`` those whose address has become protected;
    ``problem`` says why the firewall is not as it should be, "" if it is.
    """

    drift: int = 0
    damage: tuple[str, ...] = ()
    ended: int = 0
    released: int = 0
    withdrawn: int = 0
    problem: str = ""


class Enforcer:
    """One host's enforcement: ``open`` first, then ``handle`` for events and ``run`` beside it.

    Methods may be called from any task; they wait for each other. ``counts`` has a number for every code that was answered and
    for legacy keys that were ignored. ``acks_ready`` is set while acks wait to be published.
    """

    def __init__(self, state: State, backend: Backend, ports: Ports, place: Place) -> None:
        self._state = state
        self._backend = backend
        self._installer = Installer(backend, ports.now_ms)
        self._ports = ports
        self._place = place
        self._lock = asyncio.Lock()
        self._reconciling = asyncio.Lock()
        self._book = Book()
        self._admission = Admission(self._book, place.limits)
        self._orders: Orders | None = None
        self._standing_orders = Orders(Mode.OBSERVE)
        self._trouble = ""
        self._height = 0
        self._drift_total = 0
        self._last = Reconciliation()
        self.counts: Counter[str] = Counter()
        self.acks_ready = asyncio.Event()
        self._changed = asyncio.Event()

    async def open(self) -> Reconciliation:
        """Load the state and bring the firewall to it: what has ended stays ended, the rest gets the time it has left.

        Raises:
            StateError: The database cannot be used.
        """
        async with self._lock:
            now_ms = self._ports.now_ms()
            await self._load()
            # Before any rule is made: what is loaded is judged by what is protected today.
            self._look()
            found = await self._finish(await self._prepare(now_ms), is_as_desired=False)
        await asyncio.to_thread(memory.give_back)
        return found

    async def difference(self) -> tuple[Plan, Audit]:
        """Return what a reconciliation would change, without changing it; instead of ``open``, for a look from outside.

        Raises:
            StateError: The database cannot be used.
            BackendError: The firewall cannot be read.
        """
        async with self._lock:
            now_ms = self._ports.now_ms()
            await self._load()
            self._look()
            orders = await asyncio.to_thread(self._state.orders)
            batch = Batch(now_ms)
            self._adopt(orders, batch)
            await self._reload(batch)
            return await self._installer.difference(self._book.desired, orders.mode)

    async def handle(self, updates: Sequence[PolicyUpdate]) -> list[Outcome]:
        """Handle events whose signature has been checked (``wire.control.open_policy``); all is durable on return.

        Raises:
            StateError: The database refused; nothing was changed, and the events must come again.
        """
        proofs = await asyncio.to_thread(lambda: [self._try_prove(update) for update in updates])
        async with self._lock:
            now_ms = self._ports.now_ms()
            await self._obey(now_ms)
            await self._look_around(now_ms)
            return await self._handle(list(zip(updates, proofs, strict=True)), now_ms)

    async def tick(self) -> int:
        """Notice what time and the operator of this host have done; return how many decisions ended."""
        async with self._lock:
            now_ms = self._ports.now_ms()
            await self._obey(now_ms)
            return await self._expire(now_ms)

    async def reconcile(self) -> Reconciliation:
        """Compare the firewall with what it should be, repair it, and try again what is held or parked."""
        # One after the other; decisions go on while the firewall is listed, which takes seconds when it holds much.
        async with self._reconciling:
            async with self._lock:
                found = await self._prepare(self._ports.now_ms())
                is_fresh = self._installer.is_fresh
            is_as_desired = not is_fresh and not self._trouble and await self._installer.glance(self._book.desired)
            async with self._lock:
                return await self._finish(found, is_as_desired=is_as_desired)

    async def run(self, tick_s: float = 1.0, reconcile_s: float = 30.0) -> None:
        """Tick and reconcile until cancelled, at once when ``listen`` has heard something; StateError is the supervisor's."""
        since_s = 0.0
        while True:
            await asyncio.sleep(tick_s)
            since_s += tick_s
            if since_s < reconcile_s and not self._changed.is_set():
                await self.tick()
                continue
            since_s = 0.0
            # Cleared before the look: a change during it is another one.
            self._changed.clear()
            await self.reconcile()

    async def listen(self, retry_s: float = 30.0) -> None:
        """Hear until cancelled that somebody has changed the firewall; runs beside ``run``, which looks within a tick."""
        while True:
            try:
                await self._backend.wait_changed()
                self._changed.set()
            except BackendError:
                # Deaf, not blind: reconciliation by time goes on.
                await asyncio.sleep(retry_s)

    async def release_parked(self) -> list[Outcome]:
        """Handle parked events again; to be called when the committee of a new epoch is known."""
        parked = await asyncio.to_thread(self._state.take_parked)
        return await self.handle([codec.POLICY_UPDATE.decode(body) for body in parked])

    async def pending_acks(self, count_max: int = 256) -> list[Pending]:
        """Return the oldest signed acks that are not published."""
        # Cleared before the look: an ack that arrives during it sets the event again.
        self.acks_ready.clear()
        pending = await asyncio.to_thread(self._state.pending_acks, count_max)
        if pending:
            self.acks_ready.set()
        return pending

    async def acks_published(self, ids: Iterable[int]) -> None:
        """Forget acks that the bus has."""
        await asyncio.to_thread(self._state.mark_published, tuple(ids))

    def status(self) -> dict[str, object]:
        """Return figures for people and metrics; no address is in them."""
        held = Counter(decision.held for decision in self._book.held())
        return {
            "backend": self._backend.name,
            "mode": self._admission.conditions.mode.value,
            "kill_switch": self._admission.conditions.kill_switch,
            "confirm_by_ms": self._admission.conditions.confirm_by_ms,
            "decisions": len(self._book.decisions),
            "held": dict(held),
            "rules": self._installer.installed,
            "drift": self._last.drift,
            "drift_total": self._drift_total,
            "damage": list(self._last.damage),
            "problem": self._trouble or "; ".join(self._admission.conditions.protected.problems),
            "height": self._height,
            "newest_block_ms": self._admission.newest_block_ms,
            "exceptions": len(self._orders.exemptions) if self._orders else 0,
        }

    # The way of a batch

    def _try_prove(self, update: PolicyUpdate) -> Proven | ProofError:
        try:
            return self._ports.prove(update)
        except ProofError as fault:
            return fault

    async def _handle(self, events: list[Event], now_ms: int) -> list[Outcome]:
        batch = Batch(now_ms)
        for update, proof in events:
            self._admission.admit(update, proof, batch)
        try:
            await self._install(batch)
        except RefusedError as fault:
            if len(events) > 1:
                return [outcome for event in events for outcome in await self._handle([event], now_ms)]
            batch = self._after_failure(events[0][0], batch, fault)
        await self._persist(batch)
        return [outcome for outcome, _ in batch.answers]

    async def _install(self, batch: Batch) -> None:
        """Bring the firewall to the book; on failure both are as before, and RefusedError has the code."""
        try:
            await self._installer.bring(self._book.desired, batch.touched)
        except BackendError as fault:
            await self._take_back(batch)
            raise RefusedError(fault.code, fault.detail) from fault
        except LaneFullError as fault:
            await self._take_back(batch)
            raise RefusedError("SET_FULL", str(fault)) from fault

    async def _take_back(self, batch: Batch) -> None:
        batch.taken_back = {item: self._book.decisions[item] for item in batch.undo if item in self._book.decisions}
        batch.touched |= self._book.restore(batch.undo)
        await self._installer.settle(self._book.desired, batch.touched)

    def _after_failure(self, update: PolicyUpdate, batch: Batch, fault: RefusedError) -> Batch:
        again = Batch(batch.now_ms, parked=batch.parked, height=batch.height)
        decision = batch.taken_back.get(update.policy_id) or batch.answers[0][1]
        is_removal = update.action == PolicyAction.REMOVE
        self._admission.after_failure(decision, is_removal=is_removal, fault=fault, batch=again)
        return again

    async def _persist(self, batch: Batch) -> None:
        """Store the batch and its acks in one transaction; if that fails, memory and firewall go back as well."""
        now_ms = self._ports.now_ms()
        acks: list[tuple[str, bytes]] = []
        for outcome, decision in batch.answers:
            ack = draft(outcome, decision, self._place, now_ms)
            if ack is not None and self._ports.seal is not None:
                acks.append((ack.policy_id, self._ports.seal(ack)))
        standing, tombstones = self._book.changes(batch.undo)
        found = {item: self._book.desired.rules_of(item.policy_id) for item in standing}
        packed = {item.policy_id: pack(rules_) for item, rules_ in found.items() if rules_ or not item.held}
        until = {item.policy_id: rules_[0].element.expires_at_ms for item, rules_ in found.items() if rules_ and item.held}
        changes = Changes(standing, packed, until, tombstones, tuple(acks), batch.height, self._admission.newest_block_ms)
        try:
            await asyncio.to_thread(self._store, changes, batch.parked)
        except StateError:
            await self._take_back(batch)
            raise
        self._book.lighten(batch.undo)
        self._admission.count(batch)
        self._height = max(self._height, batch.height)
        self.counts.update(outcome.code or outcome.result.value for outcome, _ in batch.answers)
        if acks:
            self.acks_ready.set()

    def _store(self, changes: Changes, parked: list[PolicyUpdate]) -> None:
        for update in parked:
            if not self._state.park(update.policy_id, update.decision_seq, codec.encode(update)):
                self.counts["PARKED_FULL"] += 1
        if changes.decisions or changes.tombstones or changes.acks:
            self._state.commit(changes)

    # Time, the operator of this host, and its surroundings

    async def _load(self) -> None:
        self._book.decisions, self._book.tombstones = await asyncio.to_thread(self._state.load)
        self._height = self._state.number("height")
        self._admission.newest_block_ms = self._state.number("newest_block_ms")
        self._drift_total = self._state.number("drift_total")
        if self._state.acks_waiting():
            self.acks_ready.set()

    async def _reload(self, batch: Batch) -> None:
        stored = await asyncio.to_thread(self._state.rules)
        # A hundred thousand rules are made at once and stay: looking for rubbish among them meanwhile doubles the time.
        gc.disable()
        try:
            self._admission.reload(stored, self._state.rule_data, batch)
        except PackedError as fault:
            raise StateError(f"{self._state.path}: the rules of {fault}") from fault
        finally:
            gc.enable()

    async def _obey(self, now_ms: int) -> None:
        """Follow what the operator of this host has ordered since the last look, and what is over by now."""
        if self._state.changed_outside() or self._orders is None:
            self._standing_orders = await asyncio.to_thread(self._state.orders)
        wanted = await self._without_what_is_over(self._standing_orders, now_ms)
        if wanted == self._orders:
            return
        before, batch = self._orders, Batch(now_ms)
        self._standing_orders = wanted
        self._adopt(wanted, batch)
        if before is None:
            await self._reload(batch)
        elif before.confirm_by_ms != wanted.confirm_by_ms:
            self._admission.restate(batch)
        try:
            if before is None or before.mode is not wanted.mode:
                await self._installer.enter(wanted.mode)
        except BackendError as fault:
            self._trouble = str(fault)
        await self._bring(batch)
        await self._persist(batch)

    def _adopt(self, wanted: Orders, batch: Batch) -> None:
        for exemption in self._orders.exemptions if self._orders else ():
            batch.touched |= self._book.desired.remove(rules.exception_id(exemption.address))
        for exemption in wanted.exemptions:
            lifted = rules.exception(exemption.address, exemption.until_ms)
            batch.touched |= self._book.desired.put(rules.exception_id(exemption.address), lifted)
        self._orders = wanted
        self._admission.conditions = replace(
            self._admission.conditions,
            mode=wanted.mode,
            kill_switch=wanted.kill_switch,
            confirm_by_ms=wanted.confirm_by_ms,
        )

    async def _without_what_is_over(self, wanted: Orders, now_ms: int) -> Orders:
        if wanted.confirm_by_ms and wanted.confirm_by_ms <= now_ms:
            await asyncio.to_thread(self._state.order_mode, Mode.OBSERVE)
            wanted = replace(wanted, mode=Mode.OBSERVE, confirm_by_ms=0)
        if any(exemption.until_ms <= now_ms for exemption in wanted.exemptions):
            await asyncio.to_thread(self._state.forget_exemptions, now_ms)
            left = tuple(exemption for exemption in wanted.exemptions if exemption.until_ms > now_ms)
            wanted = replace(wanted, exemptions=left)
        return wanted

    async def _look_around(self, now_ms: int) -> int:
        """Read the surroundings; take back what touches a network that was not protected before, and return how many."""
        fresh = self._look()
        batch = Batch(now_ms)
        if fresh:
            self._admission.withdraw(fresh, batch)
        if batch.undo:
            await self._bring(batch)
            await self._persist(batch)
        return len(batch.undo)

    def _look(self) -> tuple[tuple[str, Network], ...]:
        before = set(self._admission.conditions.protected.networks)
        protected = self._ports.look()
        self._admission.conditions = replace(self._admission.conditions, protected=protected)
        return tuple(item for item in protected.networks if item not in before)

    async def _expire(self, now_ms: int) -> int:
        batch = Batch(now_ms)
        ended = self._admission.expire(batch)
        self._book.forget_tombstones(now_ms)
        if ended:
            await self._bring(batch)
            await self._persist(batch)
        return ended

    async def _bring(self, batch: Batch) -> None:
        """Bring the firewall to a book that stands whether the firewall likes it or not; the next audit mends the rest."""
        try:
            await self._installer.bring(self._book.desired, batch.touched)
        except (BackendError, LaneFullError) as fault:
            self._trouble = str(fault)

    async def _prepare(self, now_ms: int) -> Reconciliation:
        """Do what a reconciliation does before it looks at the firewall."""
        self._trouble = ""
        self._installer.begin_round()
        await self._obey(now_ms)
        withdrawn = await self._look_around(now_ms)
        ended = await self._expire(now_ms)
        return Reconciliation(ended=ended, released=await self._release_held(now_ms), withdrawn=withdrawn)

    async def _finish(self, found: Reconciliation, *, is_as_desired: bool) -> Reconciliation:
        """Compare and repair, unless a glance has just found everything as it should be."""
        drift, damage = 0, tuple[str, ...]()
        try:
            await self._installer.leave_nothing_behind()
            finding = Finding() if is_as_desired else await self._installer.check(self._book.desired)
            drift, damage = finding.drift + len(finding.damage), finding.damage
        except (BackendError, LaneFullError) as fault:
            self._trouble = str(fault)
        self._drift_total += drift
        self._last = replace(found, drift=drift, damage=damage, problem=self._trouble)
        await asyncio.to_thread(self._report, self._ports.now_ms())
        return self._last

    async def _release_held(self, now_ms: int) -> int:
        """Try held decisions again, one by one so that none takes another along."""
        released = 0
        # Whoever cannot sign acks cannot answer for a decision either, and leaves them to the agent.
        for decision in self._book.held() if self._ports.seal is not None else ():
            batch = Batch(now_ms)
            rule = decision.rule_data or await asyncio.to_thread(self._state.rule_data, decision.policy_id)
            self._admission.retry(replace(decision, rule_data=rule), batch)
            after = self._book.decisions.get(decision.policy_id)
            if after is not None and replace(after, rule_data=b"") == decision:
                continue
            try:
                await self._install(batch)
            except RefusedError as fault:
                self._trouble = str(fault)
                continue
            await self._persist(batch)
            released += len(batch.answers)
        return released

    def _report(self, now_ms: int) -> None:
        self._state.forget_tombstones(now_ms)
        self._state.set_report({**self.status(), "at_ms": now_ms}, self._drift_total)
