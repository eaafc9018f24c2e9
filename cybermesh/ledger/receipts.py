"""Receipts: what the ledger says about each transaction, and about each thing that time alone caused.

They are the leaves of the proven log, so their bytes bind for ever. Rules:

- one receipt per transaction, in the block's order, then the block's system receipts ordered by (kind, id);
- a refusal is a code and never an exception; a receipt with another code than OK has no effect on the rules in force, though
  WAITING, PENDING and DEFERRED say that the ledger keeps the request;
- addresses do not stand in receipts: an entity appears as a digest salted with the message's own signature, which lives only
  in the body, so that bodies can be pruned and the proofs stay;
- a decision effect carries everything an agent must find equal in the update it was sent.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

from cybermesh.ledger import encoding
from cybermesh.ledger.merkle import leaf_hash

ReceiptError = encoding.EncodingError


class Code(enum.StrEnum):
    """What became of a transaction or of a waiting request."""

    OK = "OK"
    STALE = "STALE"
    UNKNOWN_PRODUCER = "UNKNOWN_PRODUCER"
    DUPLICATE = "DUPLICATE"
    TOO_MANY_INSTANCES = "TOO_MANY_INSTANCES"
    BAD_POLICY = "BAD_POLICY"
    BAD_COMMAND = "BAD_COMMAND"
    NOT_PERMITTED = "NOT_PERMITTED"
    PROTECTED_TARGET = "PROTECTED_TARGET"
    ALLOWED_TARGET = "ALLOWED_TARGET"
    OUT_OF_LIMITS = "OUT_OF_LIMITS"
    BELOW_FLOOR = "BELOW_FLOOR"
    POLICY_ID_TAKEN = "POLICY_ID_TAKEN"
    WAITING = "WAITING"
    UNKNOWN_REFERENCE = "UNKNOWN_REFERENCE"
    PENDING = "PENDING"
    PENDING_EXPIRED = "PENDING_EXPIRED"
    OVER_BUDGET = "OVER_BUDGET"
    DEFERRED = "DEFERRED"
    DEFERRED_EXPIRED = "DEFERRED_EXPIRED"
    QUEUE_FULL = "QUEUE_FULL"
    ALREADY_ACTIVE = "ALREADY_ACTIVE"
    KILL_SWITCH = "KILL_SWITCH"
    UNKNOWN_POLICY = "UNKNOWN_POLICY"
    AWAITING_OPERATORS = "AWAITING_OPERATORS"
    LAPSED = "LAPSED"
    NOT_READY = "NOT_READY"


JUNK = frozenset({Code.DUPLICATE, Code.STALE, Code.UNKNOWN_PRODUCER, Code.TOO_MANY_INSTANCES})
"""Codes that an honest proposer, which executes first, leaves out; more than a few of them make a block invalid."""

REQUEST_KEPT = frozenset({Code.WAITING, Code.PENDING, Code.DEFERRED})
"""Codes that say the policy is not decided yet: another receipt will follow."""


class Kind(enum.StrEnum):
    """What a receipt is about; the system's kinds stand in the order in which a block treats them."""

    ANOMALY = "anomaly"
    EVIDENCE = "evidence"
    OPERATOR = "operator"
    POLICY = "policy"
    SYSTEM_DECISION = "system_1_decision"
    SYSTEM_DEFERRED = "system_2_deferred"
    SYSTEM_PROPOSAL = "system_3_proposal"
    SYSTEM_REQUEST = "system_4_request"


class Change(enum.StrEnum):
    """What happened to a decision."""

    OPENED = "opened"
    RENEWED = "renewed"
    ENDED = "ended"


class Why(enum.StrEnum):
    """Who caused a decision: cases a, b and c of the governance."""

    CORROBORATED = "corroborated"
    APPROVED = "approved"
    BUDGET = "budget"


class Ending(enum.StrEnum):
    """Why a decision ended; NONE while it is in force."""

    NONE = ""
    EXPIRED = "expired"
    REVOKED = "revoked"
    ALLOWED = "allowed"
    PROTECTED = "protected"
    KEY_REVOKED = "key_revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalyEffect:
    """An anomaly was admitted; ``entity`` is its salted digest."""

    confidence_ppm: int
    effect: str = "anomaly"
    entity: bytes
    id: str
    producer: bytes
    severity: int
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceEffect:
    """Evidence was admitted; ``body`` is the content hash under which it is stored."""

    body: bytes
    effect: str = "evidence"
    id: str
    producer: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionEffect:
    """A decision was opened, renewed or ended; times are milliseconds of block time.

    ``decision_seq`` is dense over the chain; ``rule_hash`` is SHA-256 of the ``rule_data`` that ``Applied.rules`` holds.
    """

    action: str
    approvers: tuple[bytes, ...]
    change: Change
    decision_seq: int
    direction: str
    effect: str = "decision"
    ending: Ending
    expires_at_ms: int
    hosts: int
    networks: int
    opened_at_ms: int
    policy_id: str
    reporters: tuple[bytes, ...]
    request_id: str
    rule_hash: bytes
    rule_type: str
    ttl_s: int
    why: Why

    @property
    def is_single_sensor(self) -> bool:
        """Whether one producer alone caused it, out of its budget."""
        return self.why is Why.BUDGET


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorEffect:
    """An operator's command took effect or gathers signatures; ``subject`` names what it is about, ``detail`` the value."""

    action: str
    detail: str
    effect: str = "operator"
    operators: tuple[bytes, ...]
    subject: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitteeEffect:
    """The block ends the epoch; ``members`` are the keys of the next committee in ascending order, ``names`` theirs.

    This is what binds the next committee to the present one's quorum: a proof of this receipt is the step to the next epoch.
    """

    effect: str = "committee"
    members: tuple[bytes, ...]
    names: tuple[str, ...]


Effect = AnomalyEffect | CommitteeEffect | EvidenceEffect | DecisionEffect | OperatorEffect


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One leaf of the log. ``id`` is the transaction's digest in hex, for system receipts the id of what fell due.

    ``detail`` names the key of a policy or command that was refused, or the limit; never a value.
    """

    code: Code
    detail: str = ""
    effects: tuple[Effect, ...] = ()
    height: int
    id: str
    kind: Kind

    def encode(self) -> bytes:
        """Return the canonical bytes, the leaf of the log."""
        return encoding.encode(self)

    @property
    def leaf(self) -> bytes:
        """The leaf hash under which the log holds it."""
        return leaf_hash(self.encode())

    @property
    def is_system(self) -> bool:
        """Whether time caused it, not a transaction."""
        return self.kind not in _TRANSACTION_KINDS

    @property
    def decisions(self) -> tuple[DecisionEffect, ...]:
        """Its effects on decisions, in order of their number."""
        return tuple([effect for effect in self.effects if isinstance(effect, DecisionEffect)])

    @property
    def committee(self) -> CommitteeEffect | None:
        """The next committee, if this receipt ends the epoch."""
        return next((effect for effect in self.effects if isinstance(effect, CommitteeEffect)), None)


_TRANSACTION_KINDS = frozenset({Kind.ANOMALY, Kind.EVIDENCE, Kind.POLICY, Kind.OPERATOR})


def decode(data: bytes) -> Receipt:
    """Return the receipt these bytes encode.

    Raises:
        ReceiptError: they are not the canonical encoding of one.
    """
    receipt = encoding.restore(Receipt, encoding.load(data))
    assert isinstance(receipt, Receipt)
    if receipt.encode() != data:
        raise ReceiptError("not the canonical encoding (sorted keys, no spaces, lower-case hex)")
    return receipt


def entity_digest(signature: bytes, entity: str) -> bytes:
    """Return the salted digest of an entity: without the message's signature it cannot be found by trying addresses."""
    return hashlib.sha256(b"cm/entity/1" + signature + entity.encode()).digest()


def block_order(receipts: list[Receipt]) -> list[Receipt]:
    """Return a block's system receipts in the order in which they enter the log."""
    return sorted(receipts, key=lambda receipt: (receipt.kind, receipt.id.encode()))
