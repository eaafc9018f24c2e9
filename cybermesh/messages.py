"""Values that cross role borders: one immutable class per message of the wire contract, and nothing else.

A class has exactly the fields of its protobuf message, under the same names; ``wire.codec`` converts both ways. Digests are
plain SHA-256 with a domain, so the same content has the same identity on every node.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

ED25519 = "Ed25519"
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


class MessageType(enum.StrEnum):
    """Every signed message; a key ring says which key may sign which."""

    ANOMALY = "anomaly"
    EVIDENCE = "evidence"
    POLICY = "policy"
    OPERATOR = "operator"
    COMMIT = "commit"
    POLICY_UPDATE = "policy_update"
    EPOCH_CHANGE = "epoch_change"
    ACK = "ack"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """A signed detection (topic ``ai.anomalies.v1``); ``ts`` in seconds since 1970, ``severity`` 1-10, ``confidence`` 0-1."""

    id: str
    type: str
    source: str
    severity: int
    confidence: float
    ts: int
    content_hash: bytes
    payload: bytes
    model_version: str
    producer_id: bytes
    nonce: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519
    batch: bytes = b""  # the place in a batch that was signed at once; empty: signed by itself


@dataclass(frozen=True, slots=True)
class CustodyEntry:
    """Who held a piece of evidence: ``actor_id`` (a public key) vouches for ``ref_hash`` at ``ts`` seconds."""

    ref_hash: bytes
    actor_id: bytes
    ts: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """What fired and why (topic ``ai.evidence.v1``); ``refs`` are 32-byte digests."""

    id: str
    evidence_type: str
    refs: tuple[bytes, ...]
    proof_blob: bytes
    coc: tuple[CustodyEntry, ...]
    ts: int
    content_hash: bytes
    producer_id: bytes
    nonce: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519
    batch: bytes = b""  # the place in a batch that was signed at once; empty: signed by itself


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that a detector proposes (topic ``ai.policy.v1``); ``params`` holds the policy as JSON."""

    id: str
    action: str
    rule: str
    params: bytes
    ts: int
    content_hash: bytes
    producer_id: bytes
    nonce: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519
    batch: bytes = b""  # the place in a batch that was signed at once; empty: signed by itself


@dataclass(frozen=True, slots=True)
class OperatorCommand:
    """An operator's signed command (topic ``control.operator.v1``); ``action`` is a name of ``OperatorAction``."""

    id: str
    action: str
    params: bytes
    ts: int
    content_hash: bytes
    producer_id: bytes
    nonce: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519


class OperatorAction(enum.StrEnum):
    """What an operator can order; everything goes through consensus."""

    APPROVE = "approve"
    REJECT = "reject"
    REVOKE = "revoke"
    ADD = "add"
    LABEL = "label"
    MUTE = "mute"
    ALLOW_LIST = "allow_list"
    KEY_RING = "key_ring"
    VALIDATOR_SET = "validator_set"
    PROTECTED_NETWORKS = "protected_networks"
    KILL_SWITCH = "kill_switch"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A transaction of a committed block that had no effect, and the receipt's code."""

    tx_digest: bytes
    code: str


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed block as published by one validator (topic ``control.commits.v1``); ``timestamp`` in seconds."""

    height: int
    block_hash: bytes
    state_root: bytes
    tx_count: int
    anomaly_count: int
    evidence_count: int
    policy_count: int
    timestamp: int
    producer_id: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519
    anomaly_ids: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    proof: bytes = b""


class PolicyAction(enum.StrEnum):
    """What a PolicyUpdate orders: a decision opened is ADD, renewed UPDATE, ended REMOVE."""

    ADD = "add"
    REMOVE = "remove"
    UPDATE = "update"
    ENABLE = "enable"
    DISABLE = "disable"


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """A decision for the agents (topic ``control.policy.v1``) with its quorum proof; nothing in it is trusted without."""

    policy_id: str
    action: str
    rule_type: str
    rule_data: bytes
    rule_hash: bytes
    requires_ack: bool
    rollback_policy_id: str
    timestamp: int
    effective_height: int
    expiration_height: int
    producer_id: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519
    proof: bytes = b""
    decision_seq: int = 0
    expires_at_ms: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class CommitteeMember:
    """A validator of a committee."""

    name: str
    pubkey: bytes


@dataclass(frozen=True, slots=True)
class EpochChange:
    """The committee of ``epoch`` with its proof (topic ``control.policy.v1``).

    ``headers`` and ``certificate`` are consensus' canonical bytes: the epoch-ending block's header and those after it up to the
    certificate's parent. ``last_height`` is that of the epoch before; ``committee`` stands in order of public key. ``step``
    proves it: the receipt that names the committee, in the log of a block that the committee before has committed.
    """

    epoch: int
    last_height: int
    headers: tuple[bytes, ...]
    certificate: bytes
    committee: tuple[CommitteeMember, ...]
    timestamp: int
    producer_id: bytes
    signature: bytes
    pubkey: bytes
    alg: str = ED25519
    step: bytes = b""


@dataclass(frozen=True, slots=True)
class Ack:
    """What an agent did with a decision (topic ``control.policy.ack.v1``); ``result`` is ``applied`` or ``failed``."""

    policy_id: str
    scope_identifier: str
    tenant: str
    region: str
    result: str
    reason: str
    error_code: str
    applied_at: int
    acked_at: int
    qc_reference: str
    controller_instance: str
    fast_path: bool
    rule_hash: bytes
    producer_id: bytes
    applied_at_ms: int
    acked_at_ms: int
    trace_id: str = ""
    source_event_id: str = ""
    sentinel_event_id: str = ""
    ack_event_id: str = ""
    request_id: str = ""
    command_id: str = ""
    workflow_id: str = ""
    signature: bytes = b""
    pubkey: bytes = b""
    alg: str = ED25519
    nonce: bytes = b""
    height: int = 0
    decision_seq: int = 0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was refused for good (topic ``ai.dlq.v1``), with where it stood and why."""

    topic: str
    partition: int
    offset: int
    code: str
    text: str
    time_ms: int
    node: str
    raw: bytes
    raw_sha256: bytes
    raw_length: int


@dataclass(frozen=True, slots=True)
class FlowFeatures:
    """A batch of ``count`` metered flows (topic ``telemetry.features.v1``) as columns of little-endian fixed-width values.

    Shapes are those of ``telemetry.flows.FlowBatch``: ``start_us``, ``end_us`` i64[n]; ``src``, ``dst`` u8[n, 16]; ``sport``,
    ``dport`` u16[n]; ``features`` f64[n, 79]; ``known`` u8[79]; the others u8[n]. ``schema`` is 1.
    """

    schema: int
    sensor: str
    count: int
    start_us: bytes
    end_us: bytes
    src: bytes
    dst: bytes
    family: bytes
    sport: bytes
    dport: bytes
    proto: bytes
    klass: bytes
    icmp_type: bytes
    icmp_code: bytes
    end_reason: bytes
    features: bytes
    known: bytes


SignedMessage = Anomaly | Evidence | Policy | OperatorCommand
ControlMessage = Commit | PolicyUpdate | EpochChange | Ack


class TxKind(enum.IntEnum):
    """First byte of a transaction: which message follows."""

    ANOMALY = 1
    EVIDENCE = 2
    POLICY = 3
    OPERATOR = 4


@dataclass(frozen=True, slots=True)
class Transaction:
    """A signed message on its way through consensus: its kind and its bytes exactly as received."""

    kind: TxKind
    body: bytes
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", tx_digest(self.encode()))

    def encode(self) -> bytes:
        """Return the opaque payload bytes that consensus orders."""
        return bytes((self.kind,)) + self.body


def tx_digest(encoded: bytes) -> bytes:
    """Return the identity of a transaction's payload bytes."""
    return hashlib.sha256(b"cm/tx/1" + encoded).digest()
