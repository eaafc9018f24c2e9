"""The state while one block changes it: every write goes through here, so that tables and their index never part.

Rules: reducers read tables freely and change them only by the methods below; a record is put whole; nothing is undone, because
a reducer checks first and writes last. ``finish`` gives the parts of the next state; the draft is then spent. Reading a
snapshot uses the same methods, which is what makes an index rebuilt from entries equal to one kept up to date.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import immutables

from cybermesh.genesis import Genesis
from cybermesh.ledger.index import ENTITY, UNBLOCKABLE_SPANS, VICTIM, Index, Span, Subject, Tally, spans_of, spans_of_rule
from cybermesh.ledger.records import (
    AnomalyRecord,
    DecisionRecord,
    EvidenceRecord,
    OffenceRecord,
    ProposalRecord,
    RegistersRecord,
    RequestRecord,
    ShieldRecord,
    Stage,
    WindowRecord,
)
from cybermesh.ledger.schedule import Due, Schedule
from cybermesh.ledger.tables import REGISTERS, Table, Tables

KEY_BYTES: Final = 32
SEQ_BYTES: Final = 8

DUE_DECISION: Final = 1
DUE_DEFERRED: Final = 2
DUE_PROPOSAL: Final = 3
DUE_REQUEST: Final = 4

FORGET_ANOMALY: Final = 1
FORGET_EVIDENCE: Final = 2
FORGET_OFFENCE: Final = 3

NOW: Final = 0
"""Due time of what is to be looked at at once; it is before every deadline."""

K = TypeVar("K", bytes, Subject)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a finished draft leaves: the tables, their index, and the entries by which the digest changes."""

    tables: Tables
    index: Index
    removed: list[bytes]
    added: list[bytes]


class Draft:
    """Tables and index of one block in the making; ``time_ms`` and ``height`` are the block's."""

    def __init__(self, genesis: Genesis, tables: Tables, index: Index, *, height: int, time_ms: int) -> None:
        self.genesis = genesis
        self.height = height
        self.time_ms = time_ms
        self.published: dict[int, bytes] = {}
        self.producers = Table("producers", tables.producers)
        self.operators = Table("operators", tables.operators)
        self.committee = Table("committee", tables.committee)
        self.next_committee: tuple[bytes, ...] | None = None
        self.windows = Table("windows", tables.windows)
        self.anomalies = Table("anomalies", tables.anomalies)
        self.evidence = Table("evidence", tables.evidence)
        self.requests = Table("requests", tables.requests)
        self.decisions = Table("decisions", tables.decisions)
        self.offences = Table("offences", tables.offences)
        self.protected = Table("protected", tables.protected)
        self.allowed = Table("allowed", tables.allowed)
        self.proposals = Table("proposals", tables.proposals)
        self.spending = Table("spending", tables.spending)
        self._registers = Table("registers", tables.registers)
        registers = tables.registers.get(REGISTERS, EMPTY_REGISTERS)
        self._admission_seq = registers.admission_seq
        self._decision_seq = registers.decision_seq
        self.is_killed = registers.is_killed
        self.opened = registers.opened
        self.served = registers.served
        self._instances = index.instances.mutate()
        self._tallies = index.tallies.mutate()
        self._reports = index.reports.mutate()
        self._missing = index.missing.mutate()
        self._pending_on = index.pending_on.mutate()
        self._pending_rules = index.pending_rules.mutate()
        self._rules = index.rules.mutate()
        self._targets = index.targets.mutate()
        self._deferred = index.deferred
        self._held = index.held.mutate()
        self.protected_spans = index.protected
        self.allowed_spans = index.allowed
        self.targets_detectors = index.targets_detectors
        self.targets_operators = index.targets_operators
        self._due = index.due
        self._forget = index.forget
        self._new_due: list[Due] = []
        self._new_forget: list[Due] = []

    # Single values

    @property
    def nonces_kept_ms(self) -> int:
        """How long a nonce window outlives its last use: long enough that what it refused has become stale by its time."""
        return 2 * self.genesis.wire.timestamp_window_ms

    @property
    def references_kept_ms(self) -> int:
        """How long an anomaly or evidence can be named: a policy may wait for it, and another site for the anomaly."""
        return self.genesis.governance.corroboration_window_ms + self.genesis.governance.waiting_ms

    @property
    def due(self) -> Schedule:
        """What gives a receipt when its time comes; what the block has added so far joins the queue when it is looked at."""
        if self._new_due:
            self._due = self._due.added_all(self._new_due)
            self._new_due = []
        return self._due

    @due.setter
    def due(self, queue: Schedule) -> None:
        assert not self._new_due
        self._due = queue

    @property
    def forget(self) -> Schedule:
        """What goes without a receipt when its time comes."""
        if self._new_forget:
            self._forget = self._forget.added_all(self._new_forget)
            self._new_forget = []
        return self._forget

    @forget.setter
    def forget(self, queue: Schedule) -> None:
        assert not self._new_forget
        self._forget = queue

    def next_admission(self) -> int:
        """Return the next number in the order of admission."""
        self._admission_seq += 1
        return self._admission_seq

    def next_decision(self, rule_data: bytes) -> int:
        """Return the next decision's number and remember the rule it is about."""
        self._decision_seq += 1
        self.published[self._decision_seq] = rule_data
        return self._decision_seq

    def tally(self, producer: bytes) -> Tally:
        """Return how much the producer holds."""
        return self._tallies.get(producer, Tally())

    def _count(self, producer: bytes, name: str, count: int) -> None:
        tally = self.tally(producer).plus(name, count)
        if any(tally):
            self._tallies[producer] = tally
        else:
            del self._tallies[producer]

    # Nonce windows

    def windows_of(self, producer: bytes) -> list[bytes]:
        """Return the keys of the producer's nonce windows in ascending order."""
        return sorted(self._instances.get(producer, frozenset()))

    def put_window(self, key: bytes, record: WindowRecord) -> None:
        """Set one nonce window."""
        if key not in self.windows:
            _include(self._instances, key[:KEY_BYTES], key)
        self.windows.put(key, record)

    def drop_window(self, key: bytes) -> None:
        """Forget one nonce window."""
        self.windows.drop(key)
        _exclude(self._instances, key[:KEY_BYTES], key)

    # Anomalies and evidence

    def put_anomaly(self, key: bytes, record: AnomalyRecord) -> None:
        """Admit an anomaly; its producer's newest report of a subject is the one that counts."""
        producer = key[:KEY_BYTES]
        self.anomalies.put(key, record)
        self._count(producer, "references", 1)
        for subject in subjects_of(record):
            reports = self._reports.get(subject, immutables.Map())
            known = reports.get(producer)
            if known is None or known.seq < record.seq:
                self._reports[subject] = reports.set(producer, record)
        # Of equal times the oldest goes first, so that the report that counts is the last to go.
        place = record.seq.to_bytes(SEQ_BYTES, "big") + key
        self._new_forget.append(Due(record.admitted_ms + self.references_kept_ms, FORGET_ANOMALY, place))

    def drop_anomaly(self, key: bytes) -> None:
        """Forget an anomaly."""
        record = self.anomalies.get(key)
        assert record is not None
        producer = key[:KEY_BYTES]
        self.anomalies.drop(key)
        self._count(producer, "references", -1)
        for subject in subjects_of(record):
            reports = self._reports[subject]
            if reports[producer].seq == record.seq:
                reports = reports.delete(producer)
                if reports:
                    self._reports[subject] = reports
                else:
                    del self._reports[subject]

    def reports(self, subject: Subject) -> list[tuple[bytes, AnomalyRecord]]:
        """Return each producer's newest anomaly of the subject, by producer."""
        return sorted(self._reports.get(subject, immutables.Map()).items(), key=lambda item: item[0])

    def put_evidence(self, key: bytes, record: EvidenceRecord) -> None:
        """Admit evidence."""
        self.evidence.put(key, record)
        self._count(key[:KEY_BYTES], "references", 1)
        self._new_forget.append(Due(record.admitted_ms + self.references_kept_ms, FORGET_EVIDENCE, key))

    def drop_evidence(self, key: bytes) -> None:
        """Forget evidence."""
        self.evidence.drop(key)
        self._count(key[:KEY_BYTES], "references", -1)

    # Requests

    def put_request(self, record: RequestRecord) -> None:
        """Keep a policy that is not decided yet; one under the same id is replaced."""
        self.drop_request(record.policy_id)
        self.requests.put(record.policy_id, record)
        self._count(record.producer, record.stage, 1)
        key = record.policy_id.encode()
        if record.stage is Stage.DEFERRED:
            queue = (record.severity, record.producer)
            waiting = self._deferred.get(queue, Schedule()).added(Due(record.seq, DUE_DEFERRED, key))
            self._deferred = self._deferred.set(queue, waiting)
            self._new_due.append(Due(NOW if record.is_woken else record.deadline_ms, DUE_DEFERRED, key))
            return
        if record.stage is Stage.WAITING:
            for reference in references_of(record):
                _include(self._missing, reference, record.policy_id)
        else:
            if record.is_corroborable:
                _include(self._pending_on, subject_of(record), record.policy_id)
            _include(self._pending_rules, record.rule_key, record.policy_id)
        self._new_due.append(Due(NOW if record.is_woken else record.deadline_ms, DUE_REQUEST, key))

    def drop_request(self, policy_id: str) -> None:
        """Stop keeping a policy, if it is kept."""
        record = self.requests.get(policy_id)
        if record is None:
            return
        self.requests.drop(policy_id)
        self._count(record.producer, record.stage, -1)
        if record.stage is Stage.WAITING:
            for reference in references_of(record):
                _exclude(self._missing, reference, policy_id)
        elif record.stage is Stage.PENDING:
            if record.is_corroborable:
                _exclude(self._pending_on, subject_of(record), policy_id)
            _exclude(self._pending_rules, record.rule_key, policy_id)

    def waiting_for(self, reference: bytes) -> list[str]:
        """Return the policies that wait for a reference."""
        return sorted(self._missing.get(reference, frozenset()))

    def pending_on(self, subject: Subject) -> list[str]:
        """Return the policies that wait for agreement about a subject."""
        return sorted(self._pending_on.get(subject, frozenset()))

    def pending_with(self, rule_key: bytes) -> list[str]:
        """Return the policies with this rule that wait for agreement."""
        return sorted(self._pending_rules.get(rule_key, frozenset()))

    def deferred_queues(self) -> list[tuple[int, bytes]]:
        """Return (severity, producer) of every queue of deferred policies."""
        return sorted(self._deferred)

    def first_deferred(self, queue: tuple[int, bytes]) -> RequestRecord | None:
        """Return the oldest policy of a queue; entries that are no longer deferred go on the way, an empty queue too."""
        schedule = self._deferred.get(queue)
        while schedule is not None and (first := schedule.first()) is not None:
            record = self.requests.get(first.key.decode())
            if record is not None and record.stage is Stage.DEFERRED and record.seq == first.due_ms:
                self._deferred = self._deferred.set(queue, schedule)
                return record
            schedule = schedule.without_first()
        if schedule is not None:
            self._deferred = self._deferred.delete(queue)
        return None

    # Decisions

    def put_decision(self, record: DecisionRecord) -> None:
        """Set a decision in force; one under the same id is replaced."""
        before = self.decisions.get(record.policy_id)
        self._leave_index(record.policy_id)
        self.decisions.put(record.policy_id, record)
        self._rules[record.rule_key] = record.policy_id
        if before is None or before.rule_data != record.rule_data:
            self._targets[record.policy_id] = spans_of_rule(record.rule_data)
        self._count_targets(record, 1)
        when = NOW if record.ending else record.expires_at_ms
        self._new_due.append(Due(when, DUE_DECISION, record.policy_id.encode()))

    def drop_decision(self, policy_id: str) -> None:
        """Remove a decision that has ended."""
        self._leave_index(policy_id)
        self.decisions.drop(policy_id)
        del self._targets[policy_id]

    def _leave_index(self, policy_id: str) -> None:
        record = self.decisions.get(policy_id)
        if record is not None:
            del self._rules[record.rule_key]
            self._count_targets(record, -1)

    def _count_targets(self, record: DecisionRecord, sign: int) -> None:
        if record.is_operators:
            self.targets_operators += sign * record.targets
        else:
            self.targets_detectors += sign * record.targets
        if record.holder:
            self._count(record.holder, "budget_targets", sign * record.targets)
            (_include if sign > 0 else _exclude)(self._held, record.holder, record.policy_id)

    def decisions_meeting(self, shields: tuple[Span, ...]) -> list[DecisionRecord]:
        """Return the decisions with a target that meets one of the networks, by id; costs the number of decisions."""
        found = []
        for name in self.decisions.keys() if shields else ():
            record = self.decisions.get(name)
            if record is not None and any(own.meets(shield) for own in self._targets[name] for shield in shields):
                found.append(record)
        return found

    def held_by(self, producer: bytes) -> list[str]:
        """Return the decisions that the producer's budget carries."""
        return sorted(self._held.get(producer, frozenset()))

    def decision_on(self, rule_key: bytes) -> DecisionRecord | None:
        """Return the decision in force with this rule."""
        policy_id = self._rules.get(rule_key)
        return None if policy_id is None else self.decisions.get(policy_id)

    def put_offence(self, rule_key: bytes, record: OffenceRecord) -> None:
        """Remember what a rule's last decision came to."""
        self.offences.put(rule_key, record)
        self._new_forget.append(Due(record.until_ms, FORGET_OFFENCE, rule_key))

    # Shields and proposals

    def change_protected(self, added: Mapping[str, ShieldRecord], removed: Iterable[str] = ()) -> None:
        """Stop protecting some networks that operators or the genesis named, then protect others."""
        _change(self.protected, added, removed)
        self.protected_spans = (*UNBLOCKABLE_SPANS, *spans_of(self.protected.keys()))

    def change_allowed(self, added: Mapping[str, ShieldRecord], removed: Iterable[str] = ()) -> None:
        """Stop allowing some networks, then allow others."""
        _change(self.allowed, added, removed)
        self.allowed_spans = spans_of(self.allowed.keys())

    def put_proposal(self, key: bytes, record: ProposalRecord) -> None:
        """Keep a change that gathers operators."""
        self.proposals.put(key, record)
        self._new_due.append(Due(record.deadline_ms, DUE_PROPOSAL, key))

    # What falls due

    def prune_due(self) -> None:
        """Take entries off the head of the queue that no longer mean anything, so that its head is the next real one."""
        while (first := self.due.first()) is not None and not self.is_live(first):
            self.due = self.due.without_first()

    def is_live(self, due: Due) -> bool:
        """Return whether a popped entry still stands for something: its record is there and has not moved to a later time."""
        if due.kind == DUE_PROPOSAL:
            proposal = self.proposals.get(due.key)
            return proposal is not None and proposal.deadline_ms == due.due_ms
        name = due.key.decode()
        if due.kind == DUE_DECISION:
            decision = self.decisions.get(name)
            when = None if decision is None else NOW if decision.ending else decision.expires_at_ms
            return when == due.due_ms
        request = self.requests.get(name)
        if request is None or (request.stage is Stage.DEFERRED) != (due.kind == DUE_DEFERRED):
            return False
        return due.due_ms == (NOW if request.is_woken else request.deadline_ms)

    # End

    def finish(self, release_ms: int | None) -> Parts:
        """Return what the block made of the state; ``release_ms`` is ``timers.release_due_ms``."""
        registers = RegistersRecord(
            admission_seq=self._admission_seq,
            decision_seq=self._decision_seq,
            is_killed=self.is_killed,
            opened=self.opened,
            served=self.served,
        )
        self._registers.put(REGISTERS, registers)
        self.prune_due()
        changed = (
            self.producers, self.operators, self.committee, self.windows, self.anomalies, self.evidence, self.requests,
            self.decisions, self.offences, self.protected, self.allowed, self.proposals, self.spending, self._registers,
        )  # fmt: skip
        removed = [entry for table in changed for entry in table.removed()]
        added = [entry for table in changed for entry in table.added()]
        tables = Tables(
            producers=self.producers.finish(), operators=self.operators.finish(), committee=self.committee.finish(),
            windows=self.windows.finish(),
            anomalies=self.anomalies.finish(), evidence=self.evidence.finish(), requests=self.requests.finish(),
            decisions=self.decisions.finish(), offences=self.offences.finish(), protected=self.protected.finish(),
            allowed=self.allowed.finish(), proposals=self.proposals.finish(), spending=self.spending.finish(),
            registers=self._registers.finish(),
        )  # fmt: skip
        index = Index(
            instances=self._instances.finish(), tallies=self._tallies.finish(), reports=self._reports.finish(),
            missing=self._missing.finish(), pending_on=self._pending_on.finish(), held=self._held.finish(),
            pending_rules=self._pending_rules.finish(), rules=self._rules.finish(), deferred=self._deferred,
            targets=self._targets.finish(),
            protected=self.protected_spans, allowed=self.allowed_spans, targets_detectors=self.targets_detectors,
            targets_operators=self.targets_operators, release_ms=release_ms, due=self.due, forget=self.forget,
        )  # fmt: skip
        return Parts(tables, index, removed, added)


EMPTY_REGISTERS: Final = RegistersRecord(admission_seq=0, decision_seq=0, is_killed=False, opened=(), served=(b"",) * 10)


def subjects_of(record: AnomalyRecord) -> tuple[Subject, ...]:
    """Return what an anomaly lets other sites agree with: its entity, and its victim where it names one."""
    entity: Subject = (record.type, ENTITY, record.entity)
    return (entity, (record.type, VICTIM, record.victim)) if record.victim else (entity,)


def subject_of(request: RequestRecord) -> Subject:
    """Return what other sites must report so that a request is corroborated."""
    if request.is_about_victim:
        return request.type, VICTIM, request.victim
    return request.type, ENTITY, request.entity


def references_of(record: RequestRecord) -> tuple[bytes, ...]:
    """Return the keys of what a request names, each behind one byte that says which table it is in."""
    anomaly = anomaly_reference(record.producer, record.anomaly_id)
    return (anomaly, evidence_reference(record.producer, record.evidence_id)) if record.evidence_id else (anomaly,)


def anomaly_reference(producer: bytes, anomaly_id: str) -> bytes:
    """Return the name under which policies wait for an anomaly."""
    return b"a" + producer + anomaly_id.encode()


def evidence_reference(producer: bytes, evidence_id: str) -> bytes:
    """Return the name under which policies wait for evidence."""
    return b"e" + producer + evidence_id.encode()


def _change(table: Table[str, ShieldRecord], added: Mapping[str, ShieldRecord], removed: Iterable[str]) -> None:
    for network in removed:
        if network in table:
            table.drop(network)
    for network, record in added.items():
        table.put(network, record)


_M = immutables.MapMutation
E = TypeVar("E", bytes, str)


def _include(groups: _M[K, frozenset[E]], key: K, member: E) -> None:
    groups[key] = groups.get(key, frozenset()) | {member}


def _exclude(groups: _M[K, frozenset[E]], key: K, member: E) -> None:
    left = groups[key] - {member}
    if left:
        groups[key] = left
    else:
        del groups[key]
