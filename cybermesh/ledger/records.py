"""The entries of the state: one immutable record per thing the ledger remembers.

Every record is committed to by the state's digest, so nothing here may depend on a machine: integers, strings, bytes. Times are
milliseconds of block time. Fields stand in the order of their names, which is their order in the canonical encoding.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cybermesh.ledger.receipts import Ending, Why


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRecord:
    """What a producer may have blocked alone."""

    max_active: int
    max_per_minute: int
    max_ttl_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerRecord:
    """A producer of the key ring; ``budget`` holds one record or none."""

    budget: tuple[BudgetRecord, ...]
    message_types: tuple[str, ...]
    name: str
    networks: tuple[str, ...]
    site: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRecord:
    """An operator of the key ring."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """A validator of the committee that the chain has now."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRecord:
    """The nonces of one instance of a producer: counters below ``floor`` are too old to judge.

    Bit i of ``bits`` (little-endian) is the counter ``start`` + i; no zero byte stands at either end of it.
    """

    bits: bytes
    floor: int
    start: int
    used_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalyRecord:
    """An admitted anomaly, kept as long as a policy may name it or another site may agree with it."""

    admitted_ms: int
    confidence_ppm: int
    entity: str
    seq: int
    severity: int
    type: str
    victim: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRecord:
    """Admitted evidence that a policy may name."""

    admitted_ms: int


class Stage(enum.StrEnum):
    """Where a policy that is not decided yet stands."""

    WAITING = "waiting"
    PENDING = "pending"
    DEFERRED = "deferred"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A policy that waits: for its references, for somebody's agreement, or for room.

    ``why``, ``reporters`` and ``approvers`` are what was granted when it was deferred (``why`` "" before). ``policy_id`` is
    the ledger's name of it, ``request_id`` the producer's. ``is_woken`` is set when something it waited for has happened and
    it is to be looked at in this block or, when many are, in one of the next; ``is_corroborable`` when another site's report
    of its subject can help it; that is the anomaly's entity, with ``is_about_victim`` its victim.
    """

    anomaly_id: str
    approvers: tuple[bytes, ...]
    confidence_ppm: int
    deadline_ms: int
    entity: str
    evidence_id: str
    is_about_victim: bool
    is_corroborable: bool
    is_woken: bool
    policy_id: str
    producer: bytes
    reporters: tuple[bytes, ...]
    request_id: str
    rule_data: bytes
    rule_key: bytes
    seq: int
    severity: int
    stage: Stage
    type: str
    victim: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    """A decision in force. ``holder`` is the producer whose budget carries it (empty: nobody's).

    ``ending`` is set when it is to end before its time, in this block or, when many end at once, in one of the next.
    """

    action: str
    approvers: tuple[bytes, ...]
    direction: str
    ending: Ending
    expires_at_ms: int
    holder: bytes
    hosts: int
    is_operators: bool
    level: int
    level_since_ms: int
    networks: int
    opened_at_ms: int
    policy_id: str
    producer: bytes
    reporters: tuple[bytes, ...]
    request_id: str
    rule_data: bytes
    rule_key: bytes
    rule_type: str
    ttl_s: int
    why: Why

    @property
    def targets(self) -> int:
        """How many targets it counts for in the limits."""
        return self.hosts + self.networks


@dataclass(frozen=True, slots=True, kw_only=True)
class OffenceRecord:
    """What a rule's last decision came to; an offender who is back before ``until_ms`` gets twice the time."""

    level: int
    ttl_s: int
    until_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShieldRecord:
    """A network that must not be blocked; ``origin`` says who put it there."""

    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalRecord:
    """A change that needs several operators, and who has signed it so far."""

    action: str
    deadline_ms: int
    operators: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingRecord:
    """When a producer spent its budget within the last minute, one entry per target, oldest first."""

    spent_ms: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistersRecord:
    """The state's single values.

    ``opened`` counts new targets of detectors per second of the last minute as (second, count) pairs, flattened; ``served``
    holds, for severity 1 to 10, the producer whose deferred policy was released last (empty: none yet).
    """

    admission_seq: int
    decision_seq: int
    is_killed: bool
    opened: tuple[int, ...]
    served: tuple[bytes, ...]
