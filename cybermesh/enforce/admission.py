"""Admission: every step between a proven event and a plan, on values. Pure; nothing skips the guard.

The steps, in order: proof, fields equal to what was proven, parse, time, order and duplicates, guard, and the conditions under
which a decision has to wait. The book changes as events pass; a ``Batch`` remembers how to undo it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from cybermesh.addresses import Network
from cybermesh.enforce import decisions as steps
from cybermesh.enforce import guard, rules
from cybermesh.enforce.acks import Outcome, Result
from cybermesh.enforce.book import Book, Entry
from cybermesh.enforce.decisions import Decision, EpochUnknownError, Mode, Order, ProofError, Proven, RefusedError
from cybermesh.enforce.packed import unpack
from cybermesh.enforce.reconcile import Touched
from cybermesh.enforce.rules import Rule
from cybermesh.messages import PolicyAction, PolicyUpdate
from cybermesh.policy import PolicySpec, parse

OBSERVED = "observed only, nothing is in the firewall"
DRY_RUN = "dry run, nothing is in the firewall"
_MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Conditions:
    """What holds on this host right now, besides the decisions themselves."""

    mode: Mode = Mode.OBSERVE
    kill_switch: bool = False
    confirm_by_ms: int = 0
    protected: guard.Protected = field(default_factory=guard.Protected)


@dataclass(slots=True)
class Batch:
    """A batch in the making: answers with their decisions, whom they concern, and how to undo the book.

    ``taken_back`` holds the decisions that stood in the book before it was put back.
    """

    now_ms: int
    answers: list[tuple[Outcome, Decision]] = field(default_factory=list)
    parked: list[PolicyUpdate] = field(default_factory=list)
    touched: Touched = field(default_factory=Touched)
    undo: dict[str, Entry] = field(default_factory=dict)
    taken_back: dict[str, Decision] = field(default_factory=dict)
    rules: int = 0
    height: int = 0


class Admission:
    """The way into the book."""

    def __init__(self, book: Book, limits: guard.Limits) -> None:
        self._book = book
        self._limits = limits
        self._added: deque[tuple[int, int]] = deque()
        self._added_rules = 0
        self.conditions = Conditions()
        self.newest_block_ms = 0
        self.legacy_keys: Counter[str] = Counter()

    def admit(self, update: PolicyUpdate, proof: Proven | ProofError, batch: Batch) -> None:
        """Take one event through the steps; the answer, good or bad, is added to the batch."""
        decision = Decision(update.policy_id, update.decision_seq, b"", update.rule_hash, 0, 0, "")
        try:
            if isinstance(proof, ProofError):
                raise proof
            steps.check_fields(update, proof)
            self.newest_block_ms = max(self.newest_block_ms, proof.block_time_ms)
            batch.height = max(batch.height, proof.height)
            decision = Decision(
                policy_id=update.policy_id,
                decision_seq=proof.decision_seq,
                rule_data=update.rule_data,
                rule_hash=proof.rule_hash,
                ends_at_ms=proof.expires_at_ms,
                height=proof.height,
                reference=proof.reference,
                requires_ack=update.requires_ack,
            )
            outcome = (
                self._end(decision, batch) if update.action == PolicyAction.REMOVE else self._open(update, decision, batch)
            )
        except EpochUnknownError as fault:
            batch.parked.append(update)
            outcome = Outcome(update.policy_id, update.decision_seq, Result.PARKED, fault.code, fault.detail)
        except RefusedError as fault:
            outcome = Outcome(update.policy_id, update.decision_seq, Result.FAILED, fault.code, fault.detail)
        batch.answers.append((outcome, decision))

    def retry(self, decision: Decision, batch: Batch) -> None:
        """Try a held decision again; it is answered only when it gets through."""
        outcome = self._judge(parse(decision.rule_data), decision, batch)
        if outcome.result is Result.APPLIED:
            batch.answers.append((outcome, decision))

    def withdraw(self, fresh: tuple[tuple[str, Network], ...], batch: Batch) -> None:
        """Hold standing decisions that touch one of the networks that have just become protected."""
        protected = guard.Protected(fresh)
        for decision in list(self._book.standing()):
            found = self._book.desired.rules_of(decision.policy_id)
            refusal = guard.hits({rule.element.match.network for rule in found}, protected)
            if refusal is not None:
                self._remember(decision.policy_id, batch)
                batch.touched |= self._book.hold(decision, refusal.code.value, withdraw=True)
                batch.answers.append((self._failed(decision, refusal.code.value, refusal.detail), decision))

    def after_failure(self, decision: Decision, *, is_removal: bool, fault: RefusedError, batch: Batch) -> None:
        """Answer for a decision that the firewall did not take: a removal stands, anything else is held and tried again."""
        self._remember(decision.policy_id, batch)
        if is_removal:
            self._book.end(decision.policy_id, decision.decision_seq, decision.ends_at_ms)
        else:
            self._book.hold(decision, fault.code, withdraw=False)
        batch.answers.append((self._failed(decision, fault.code, fault.detail), decision))

    def expire(self, batch: Batch) -> int:
        """End what has reached its time; return how many."""
        over = self._book.ended(batch.now_ms)
        for decision in over:
            self._remember(decision.policy_id, batch)
            batch.touched |= self._book.end(decision.policy_id, decision.decision_seq, decision.ends_at_ms)
        return len(over)

    def reload(self, stored: Iterable[tuple[str, bytes | None, int]], rule_data: Callable[[str], bytes], batch: Batch) -> None:
        """Ask for the rules of all standing decisions again, after a start: those stored, or made from ``rule_data``."""
        # What was admitted once is asserted again even where the surroundings cannot be read now; only new rules are refused.
        known = guard.Protected(self.conditions.protected.networks)
        for policy_id, packed, end_ms in stored:
            # The book's own text, not its copy in the row: one for all that keep it.
            decision = self._book.decisions[policy_id]
            policy_id, until_ms = decision.policy_id, self._until(decision)
            # A renewal that waits gives the rules before it no more time than they had.
            until_ms = min(until_ms, end_ms or until_ms)
            if packed is None:
                found = self._made_again(parse(rule_data(policy_id)), decision, known)
            else:
                found = unpack(packed, policy_id, until_ms)
            code = found if isinstance(found, guard.Code) else self._hits(found, known)
            if code is not None:
                self._remember(policy_id, batch)
                batch.touched |= self._book.hold(decision, code.value, withdraw=True)
                batch.answers.append(
                    (self._failed(decision, code.value, "is so by what is protected on this host now"), decision)
                )
            elif not isinstance(found, guard.Code):
                self._book.desired.fill(policy_id, found)

    def restate(self, batch: Batch) -> None:
        """Give the rules of all standing decisions the end they have now, after a change of the time to confirm."""
        for decision in self._book.standing():
            until_ms = self._until(decision)
            rules_ = self._book.desired.rules_of(decision.policy_id)
            fresh = tuple(rule._replace(element=rule.element._replace(expires_at_ms=until_ms)) for rule in rules_)
            if fresh != rules_:
                batch.touched |= self._book.desired.put(decision.policy_id, fresh)

    def _made_again(self, spec: PolicySpec, decision: Decision, known: guard.Protected) -> tuple[Rule, ...] | guard.Code:
        verdict = guard.judge(spec, known, self._limits, guard.Load())
        if isinstance(verdict, guard.Refusal):
            return verdict.code
        return () if spec.guardrails.dry_run else self._rules(spec, verdict, decision)

    def _hits(self, found: tuple[Rule, ...], known: guard.Protected) -> guard.Code | None:
        for rule in found:
            match = rule.element.match
            code = guard.hits_prefix(match.version, match.base, match.length, known, self._limits)
            if code is not None:
                return code
        return None

    def count(self, batch: Batch) -> None:
        """Let the rules of an installed batch count towards the limit per minute."""
        if batch.rules:
            self._added.append((batch.now_ms, batch.rules))
            self._added_rules += batch.rules

    def _open(self, update: PolicyUpdate, decision: Decision, batch: Batch) -> Outcome:
        spec = steps.read_policy(update)
        self.legacy_keys.update(spec.legacy)
        decision = replace(decision, ends_at_ms=steps.end_of(spec, decision.ends_at_ms, batch.now_ms))
        duplicate = self._check_order(decision)
        if duplicate is not None:
            return duplicate
        return self._judge(spec, decision, batch)

    def _end(self, decision: Decision, batch: Batch) -> Outcome:
        """End a policy: neither guard nor kill switch nor clock may stand in the way of a removal."""
        duplicate = self._check_order(decision)
        if duplicate is not None:
            return duplicate
        self._remember(decision.policy_id, batch)
        batch.touched |= self._book.end(decision.policy_id, decision.decision_seq, decision.ends_at_ms)
        return Outcome(decision.policy_id, decision.decision_seq, Result.APPLIED, "", "removed")

    def _check_order(self, decision: Decision) -> Outcome | None:
        placed = steps.order(decision.decision_seq, self._book.known_seq(decision.policy_id))
        if placed is Order.REPLAYED:
            raise RefusedError("REPLAYED", "a later decision of this policy is known")
        if placed is Order.DUPLICATE:
            return Outcome(decision.policy_id, decision.decision_seq, Result.DUPLICATE)
        return None

    def _judge(self, spec: PolicySpec, decision: Decision, batch: Batch) -> Outcome:
        """Ask the guard, then whether the host may install now; install, hold or refuse in the book."""
        self._remember(decision.policy_id, batch)
        verdict = guard.judge(spec, self.conditions.protected, self._limits, self._load(decision.policy_id, batch))
        if isinstance(verdict, guard.Refusal):
            if verdict.code is guard.Code.SURROUNDINGS_UNKNOWN or decision.held:
                return self._wait(decision, verdict.code.value, verdict.detail, batch)
            self._book.refuse(decision.policy_id, decision.decision_seq, decision.ends_at_ms)
            return self._failed(decision, verdict.code.value, verdict.detail)
        waiting = self._must_wait(batch.now_ms)
        if waiting is not None:
            return self._wait(decision, *waiting, batch)
        wanted = () if spec.guardrails.dry_run else self._rules(spec, verdict, decision)
        batch.touched |= self._book.install(decision, wanted)
        batch.rules += len(wanted)
        if self.conditions.mode is Mode.OFF:
            return self._failed(decision, "ENFORCEMENT_OFF", "switched off on this host; kept for when it is on again")
        detail = DRY_RUN if spec.guardrails.dry_run else OBSERVED if self.conditions.mode is Mode.OBSERVE else ""
        return Outcome(decision.policy_id, decision.decision_seq, Result.APPLIED, "", detail)

    def _must_wait(self, now_ms: int) -> tuple[str, str] | None:
        if self.conditions.kill_switch:
            return "KILL_SWITCH", "new rules are stopped on this host"
        if steps.is_clock_behind(self.newest_block_ms, now_ms):
            return "CLOCK_BEHIND", f"block time is {self.newest_block_ms - now_ms} ms ahead of this clock"
        return None

    def _wait(self, decision: Decision, code: str, detail: str, batch: Batch) -> Outcome:
        batch.touched |= self._book.hold(decision, code, withdraw=False)
        return self._failed(decision, code, detail)

    def _rules(self, spec: PolicySpec, networks: tuple[Network, ...], decision: Decision) -> tuple[Rule, ...]:
        return rules.make(spec, networks, self._until(decision))

    def _until(self, decision: Decision) -> int:
        # Until the operator has confirmed, the kernel itself takes the rules back, even if this process dies.
        return min(decision.ends_at_ms, self.conditions.confirm_by_ms or decision.ends_at_ms)

    def _load(self, policy_id: str, batch: Batch) -> guard.Load:
        while self._added and self._added[0][0] <= batch.now_ms - _MINUTE_MS:
            self._added_rules -= self._added.popleft()[1]
        desired = self._book.desired
        installed = len(desired) - len(desired.rules_of(policy_id))
        return guard.Load(installed, batch.rules + self._added_rules)

    def _remember(self, policy_id: str, batch: Batch) -> None:
        if policy_id not in batch.undo:
            batch.undo[policy_id] = self._book.entry(policy_id)

    def _failed(self, decision: Decision, code: str, detail: str) -> Outcome:
        return Outcome(decision.policy_id, decision.decision_seq, Result.FAILED, code, detail)
