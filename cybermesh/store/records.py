"""Values that go into the store and come out of it: a class per table, with the names of its columns.

Times are milliseconds since 1970, hashes raw bytes. ``leaf`` is a receipt's index in the ledger's log.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A committed block without its transactions.

    ``header`` is the certified bytes; ``frame`` is the block as consensus encodes it, without its payload; ``first_leaf`` and
    ``receipt_count`` say which receipts it caused; ``last_voted_round`` is a copy from the safety file, ``committed_ms`` this
    node's clock.
    """

    height: int
    hash: bytes
    epoch: int
    round: int
    time_ms: int
    author: int
    header: bytes
    frame: bytes
    state_root: bytes
    decision_seq: int
    transaction_count: int
    first_leaf: int
    receipt_count: int
    last_voted_round: int
    committed_ms: int


@dataclass(frozen=True, slots=True)
class StoredTransaction:
    """A transaction of a committed block; ``payload`` is its kind and body as ordered."""

    height: int
    position: int
    digest: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """A leaf of the ledger's log; ``subject`` is the transaction's digest in hex or what fell due."""

    leaf: int
    height: int
    kind: str
    subject: str
    code: str
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision opened, renewed or ended; ``reporters`` and ``approvers`` are public keys in hex.

    ``is_active`` is the store's: true for the newest decision of a policy that has not ended, whatever is given.
    """

    decision_seq: int
    height: int
    leaf: int
    policy_id: str
    request_id: str
    change: str
    action: str
    rule_type: str
    rule_data: bytes
    rule_hash: bytes
    opened_at_ms: int
    expires_at_ms: int
    why: str
    ending: str
    reporters: tuple[str, ...]
    approvers: tuple[str, ...]
    is_active: bool = False


@dataclass(frozen=True, slots=True)
class StoredEvidence:
    """An evidence body under its content hash."""

    digest: bytes
    evidence_id: str
    producer: bytes
    height: int
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredEpoch:
    """A committee, the bytes of the EpochChange that brought it (empty for the first), and the step that proofs carry of it."""

    epoch: int
    first_height: int
    committee: bytes
    change: bytes
    step: bytes | None = None


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """A message to publish after the block is stored.

    ``event`` and ``subject`` name it on every validator (commit and height, policy and decision_seq, epoch and number), so that
    a copy of another validator can be recognised.
    """

    event: str
    subject: int
    topic: str
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An outbox row that is not published yet; ``id`` gives the order."""

    id: int
    height: int
    event: str
    subject: int
    topic: str
    key: bytes
    value: bytes
    created_ms: int


@dataclass(frozen=True, slots=True)
class CommittedBlock:
    """Everything one committed block writes, in one transaction.

    ``certificate`` is the quorum certificate that proves this block (empty for a block that was committed together with a later
    one, whose certificate proves both). ``mempool_done`` are digests that leave the journal: the block's, and those given up.
    """

    block: StoredBlock
    certificate: bytes
    transactions: tuple[StoredTransaction, ...] = ()
    receipts: tuple[StoredReceipt, ...] = ()
    decisions: tuple[StoredDecision, ...] = ()
    evidence: tuple[StoredEvidence, ...] = ()
    epochs: tuple[StoredEpoch, ...] = ()
    outbox: tuple[OutboxEvent, ...] = ()
    mempool_done: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class JournaledTransaction:
    """A transaction that was accepted and is not committed yet."""

    digest: bytes
    payload: bytes
    received_ms: int


@dataclass(frozen=True, slots=True)
class StoredAck:
    """What an agent (its public key) did with a decision; ``body`` is the signed message."""

    policy_id: str
    decision_seq: int
    agent: bytes
    result: str
    error_code: str
    reason: str
    height: int
    applied_at_ms: int
    acked_at_ms: int
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """An operator's judgement of an anomaly."""

    anomaly_id: str
    label: str
    operator: bytes
    note: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class LifecycleStep:
    """A stage that an anomaly or policy has reached; the first time counts."""

    subject: str
    stage: str
    at_ms: int
    height: int
    detail: str


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Something that a person or a node did and somebody may ask about later."""

    at_ms: int
    actor: str
    action: str
    subject: str
    detail: bytes


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """The ledger's state after a block, so that a start need not execute the whole chain."""

    height: int
    block_hash: bytes
    state_root: bytes
    body: bytes
    created_ms: int
