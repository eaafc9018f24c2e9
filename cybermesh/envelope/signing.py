"""Sign bytes and signing.

Rules (the layout is fixed by the earlier system):

- ``ai.*`` and ``control.operator``: Ed25519 over ``domain || ts u64 || len(producer_id) u16 || producer_id || nonce ||
  content_hash``, big-endian, no separator after the domain;
- several ``ai.*`` messages at once: ``envelope.batches``;
- other ``control.*``: Ed25519 over ``domain || message``, serialised deterministically with signature, pubkey and alg cleared;
- whatever those bytes do not cover is repeated in the content, and the functions here put it there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import orjson

from cybermesh.envelope.batches import batch_sign_bytes, leaf_of, root_and_places
from cybermesh.envelope.structure import content_of
from cybermesh.keys import SigningKey
from cybermesh.messages import (
    ED25519,
    Anomaly,
    ControlMessage,
    CustodyEntry,
    Evidence,
    OperatorAction,
    OperatorCommand,
    Policy,
    SignedMessage,
)

ANOMALY_DOMAIN = b"ai.anomaly.v1"
EVIDENCE_DOMAIN = b"ai.evidence.v1"
POLICY_DOMAIN = b"ai.policy.v1"
OPERATOR_DOMAIN = b"control.operator.v1"
CUSTODY_DOMAIN = b"evidence.custody.v1"
# Defaults; the genesis can name others.
COMMITS_DOMAIN = b"control.commits.v1"
CONTROL_POLICY_DOMAIN = b"control.policy.v1"
ACK_DOMAIN = b"control.policy.ack.v1"

_DOMAINS: dict[type, bytes] = {
    Anomaly: ANOMALY_DOMAIN,
    Evidence: EVIDENCE_DOMAIN,
    Policy: POLICY_DOMAIN,
    OperatorCommand: OPERATOR_DOMAIN,
}
_HEAD = struct.Struct(">QH")
_U64 = struct.Struct(">Q")

AiMessage = Anomaly | Evidence | Policy
S = TypeVar("S", bound=SignedMessage)
C = TypeVar("C", bound=ControlMessage)


def sign_bytes(message: SignedMessage) -> bytes:
    """Return what the signature of an ``ai.*`` message or operator command covers; ``ts`` must not be negative."""
    return (
        _DOMAINS[type(message)]
        + _HEAD.pack(message.ts, len(message.producer_id))
        + message.producer_id
        + message.nonce
        + message.content_hash
    )


def policy_sign_bytes_with_zero(message: Policy) -> bytes:
    """Return the earlier system's sign bytes of a policy: one zero byte follows the domain. Accepted, never sent."""
    return POLICY_DOMAIN + b"\x00" + sign_bytes(message)[len(POLICY_DOMAIN) :]


def custody_sign_bytes(ref_hash: bytes, actor_id: bytes, ts: int) -> bytes:
    """Return what a custody entry's signature covers."""
    return CUSTODY_DOMAIN + ref_hash + actor_id + _U64.pack(ts)


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who signs, when, and once: the key, ``ts`` in seconds since 1970, and a fresh nonce."""

    key: SigningKey
    ts: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class AnomalyContent:
    """What an anomaly says; ``details`` are further members of the payload, JSON values only."""

    id: str
    type: str
    source: str
    entity: str
    severity: int
    confidence: float
    model_version: str
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvidenceContent:
    """What a piece of evidence says; ``details`` are further members of the proof blob."""

    id: str
    evidence_type: str
    refs: tuple[bytes, ...]
    details: Mapping[str, object] = field(default_factory=dict)
    coc: tuple[CustodyEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyContent:
    """What a policy event asks for; ``policy`` holds the members of the policy schema."""

    id: str
    action: str
    rule: str
    anomaly_id: str
    evidence_id: str
    policy: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class OperatorContent:
    """What an operator orders; ``arguments`` are the action's own."""

    id: str
    action: OperatorAction
    arguments: Mapping[str, object] = field(default_factory=dict)


def _json(details: Mapping[str, object], bound: Mapping[str, object]) -> bytes:
    assert not details.keys() & bound.keys(), f"bound by the envelope: {sorted(details.keys() & bound.keys())}"
    return orjson.dumps({**details, **bound}, option=orjson.OPT_SORT_KEYS)


def sign(message: S, stamp: Stamp) -> S:
    """Return the message with hash, time, nonce and signature set anew; its content stays.

    Also for a message that waited too long and must be stamped again; it leaves its batch then.
    """
    stamped = _stamped(message, stamp)
    return dataclasses.replace(stamped, signature=stamp.key.sign(sign_bytes(stamped)))


def sign_batch(messages: Sequence[AiMessage], stamps: Sequence[Stamp]) -> list[AiMessage]:
    """Return the messages, 1 to 65,536, stamped anew by one key and signed at once (``envelope.batches``)."""
    stamped = [_stamped(message, stamp) for message, stamp in zip(messages, stamps, strict=True)]
    root, places = root_and_places([leaf_of(sign_bytes(message)) for message in stamped])
    signature = stamps[0].key.sign(batch_sign_bytes(len(places), root))
    assert len({stamp.key.public for stamp in stamps}) == 1
    return [
        dataclasses.replace(message, signature=signature, batch=place) for message, place in zip(stamped, places, strict=True)
    ]


def _stamped(message: S, stamp: Stamp) -> S:
    fields: dict[str, object] = {
        "ts": stamp.ts,
        "content_hash": hashlib.sha256(content_of(message)).digest(),
        "producer_id": stamp.key.public,
        "nonce": stamp.nonce,
        "pubkey": stamp.key.public,
        "alg": ED25519,
    }
    if not isinstance(message, OperatorCommand):
        fields["batch"] = b""
    return dataclasses.replace(message, **fields)  # type: ignore[arg-type]  # the names are those of the class


def sign_anomaly(content: AnomalyContent, stamp: Stamp) -> Anomaly:
    """Return the signed anomaly; its payload repeats every field."""
    bound = {entry.name: getattr(content, entry.name) for entry in dataclasses.fields(content) if entry.name != "details"}
    draft = Anomaly(
        id=content.id,
        type=content.type,
        source=content.source,
        severity=content.severity,
        confidence=content.confidence,
        ts=0,
        content_hash=b"",
        payload=_json(content.details, bound),
        model_version=content.model_version,
        producer_id=b"",
        nonce=b"",
        signature=b"",
        pubkey=b"",
    )
    return sign(draft, stamp)


def sign_evidence(content: EvidenceContent, stamp: Stamp) -> Evidence:
    """Return the signed evidence; its proof blob repeats every field, the custody entries included."""
    bound: dict[str, object] = {
        "id": content.id,
        "evidence_type": content.evidence_type,
        "refs": [ref.hex() for ref in content.refs],
        # Also when there are none: otherwise a relay could add some.
        "coc": [entry.signature.hex() for entry in content.coc],
    }
    draft = Evidence(
        id=content.id,
        evidence_type=content.evidence_type,
        refs=content.refs,
        proof_blob=_json(content.details, bound),
        coc=content.coc,
        ts=0,
        content_hash=b"",
        producer_id=b"",
        nonce=b"",
        signature=b"",
        pubkey=b"",
    )
    return sign(draft, stamp)


def sign_custody(ref_hash: bytes, ts: int, key: SigningKey) -> CustodyEntry:
    """Return a custody entry: the key's holder vouches for ``ref_hash`` at ``ts`` seconds."""
    return CustodyEntry(ref_hash, key.public, ts, key.sign(custody_sign_bytes(ref_hash, key.public, ts)))


def sign_policy(content: PolicyContent, stamp: Stamp) -> Policy:
    """Return the signed policy event; its params repeat every field."""
    bound = {entry.name: getattr(content, entry.name) for entry in dataclasses.fields(content) if entry.name != "policy"}
    # The policy schema has an action of its own (drop, reject …); it is the event's.
    policy = {name: value for name, value in content.policy.items() if (name, value) != ("action", content.action)}
    draft = Policy(
        id=content.id,
        action=content.action,
        rule=content.rule,
        params=_json(policy, bound),
        ts=0,
        content_hash=b"",
        producer_id=b"",
        nonce=b"",
        signature=b"",
        pubkey=b"",
    )
    return sign(draft, stamp)


def sign_operator(content: OperatorContent, stamp: Stamp) -> OperatorCommand:
    """Return the signed command; its params repeat every field."""
    draft = OperatorCommand(
        id=content.id,
        action=content.action.value,
        params=_json(content.arguments, {"id": content.id, "action": content.action.value}),
        ts=0,
        content_hash=b"",
        producer_id=b"",
        nonce=b"",
        signature=b"",
        pubkey=b"",
    )
    return sign(draft, stamp)


def with_signer(message: C, key: SigningKey) -> C:
    """Return a control message that names its signer, with what the sign bytes leave out cleared."""
    return dataclasses.replace(message, producer_id=key.public, signature=b"", pubkey=b"", alg="")


def sign_control(message: C, cleared: bytes, domain: bytes, key: SigningKey) -> C:
    """Sign a message made by ``with_signer``, given its deterministic serialisation; ``wire.control`` joins the two."""
    return dataclasses.replace(message, signature=key.sign(domain + cleared), pubkey=key.public, alg=ED25519)
