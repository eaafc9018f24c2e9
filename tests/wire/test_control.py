"""Control messages: golden bytes, the canonical rule, and every fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace

import nacl.signing
import pytest

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.keys import KeyHolder, KeyRing, SigningKey
from cybermesh.messages import (
    Ack,
    Commit,
    CommitteeMember,
    ControlMessage,
    EpochChange,
    MessageType,
    PolicyUpdate,
    Rejected,
)
from cybermesh.wire.codec import encode, is_epoch_change
from cybermesh.wire.control import ControlDomains, open_ack, open_commit, open_policy, seal

KEY = SigningKey(b"\x0c" * 32)
STRANGER = SigningKey(b"\x0d" * 32)
DOMAINS = ControlDomains()
RING = KeyRing([KeyHolder("node", KEY.public, frozenset(MessageType)), KeyHolder("other", STRANGER.public, frozenset())])
RULE = b'{"policy_id":"p"}'

COMMIT = Commit(
    height=7,
    block_hash=b"\x01" * 32,
    state_root=b"\x02" * 32,
    tx_count=3,
    anomaly_count=1,
    evidence_count=1,
    policy_count=1,
    timestamp=1_700_000_000,
    producer_id=b"",
    signature=b"",
    pubkey=b"",
    anomaly_ids=("a-1", "a-2"),
    rejected=(Rejected(b"\x03" * 32, "STALE"),),
    proof=b"proof",
)
UPDATE = PolicyUpdate(
    policy_id="p",
    action="add",
    rule_type="block",
    rule_data=RULE,
    rule_hash=hashlib.sha256(RULE).digest(),
    requires_ack=True,
    rollback_policy_id="",
    timestamp=1_700_000_000,
    effective_height=7,
    expiration_height=0,
    producer_id=b"",
    signature=b"",
    pubkey=b"",
    proof=b"proof",
    decision_seq=12,
    expires_at_ms=1_700_000_900_000,
    epoch=1,
)
CHANGE = EpochChange(
    epoch=2,
    last_height=99,
    headers=(b"header 1", b"header 2"),
    certificate=b"certificate",
    committee=(CommitteeMember("v1", KEY.public),),
    timestamp=1_700_000_000,
    producer_id=b"",
    signature=b"",
    pubkey=b"",
)
ACK = Ack(
    policy_id="p",
    scope_identifier="edge-3",
    tenant="",
    region="eu",
    result="applied",
    reason="",
    error_code="",
    applied_at=1_700_000_000,
    acked_at=1_700_000_001,
    qc_reference="",
    controller_instance="agent-1",
    fast_path=False,
    rule_hash=b"\x04" * 32,
    producer_id=b"",
    applied_at_ms=1_700_000_000_123,
    acked_at_ms=1_700_000_001_456,
    trace_id="t",
    nonce=bytes(16),
    height=815,
    decision_seq=12,
)


def open_any(raw: bytes, message: ControlMessage) -> ControlMessage:
    if isinstance(message, Commit):
        return open_commit(raw, RING, DOMAINS)
    return open_ack(raw, RING, DOMAINS) if isinstance(message, Ack) else open_policy(raw, RING, DOMAINS)


DRAFTS: dict[str, ControlMessage] = {type(draft).__name__: draft for draft in (COMMIT, UPDATE, CHANGE, ACK)}
SEALED = {name: seal(draft, KEY, DOMAINS) for name, draft in DRAFTS.items()}


def fault(raw: bytes, message: ControlMessage) -> EnvelopeError:
    with pytest.raises(EnvelopeError) as refused:
        open_any(raw, message)
    return refused.value


@pytest.mark.parametrize("message", SEALED.values(), ids=SEALED)
def test_a_sealed_message_opens_to_itself(message: ControlMessage) -> None:
    assert open_any(encode(message), message) == message
    assert is_epoch_change(encode(message)) == isinstance(message, EpochChange)


def text(number: int, value: bytes) -> bytes:
    tag = number << 3 | 2
    head = bytes((tag,)) if tag < 128 else bytes((tag & 0x7F | 0x80, tag >> 7))
    return head + bytes((len(value),)) + value


def test_golden_bytes_of_a_commit_and_what_its_signature_covers() -> None:
    public = KEY.public
    cleared_head = (
        b"\x08\x07"
        + text(2, b"\x01" * 32)
        + text(3, b"\x02" * 32)
        + b"\x20\x03\x28\x01\x30\x01\x38\x01"
        + b"\x40\x80\xe2\xcf\xaa\x06"
        + text(9, public)
    )
    tail = text(13, b"a-1") + text(13, b"a-2") + text(100, text(1, b"\x03" * 32) + text(2, b"STALE")) + text(101, b"proof")
    signature = nacl.signing.SigningKey(KEY.seed).sign(b"control.commits.v1" + cleared_head + tail).signature
    expected = cleared_head + text(10, signature) + text(11, public) + text(12, b"Ed25519") + tail
    assert encode(SEALED["Commit"]) == expected


def test_golden_sign_bytes_of_an_ack_and_an_update_use_their_own_domains() -> None:
    for name, domain in (("Ack", b"control.policy.ack.v1"), ("PolicyUpdate", b"control.policy.v1")):
        message = SEALED[name]
        signed = domain + encode(replace(message, signature=b"", pubkey=b"", alg=""))
        assert message.signature == nacl.signing.SigningKey(KEY.seed).sign(signed).signature


def test_domains_of_the_genesis_separate_chains() -> None:
    raw = encode(SEALED["Commit"])
    with pytest.raises(EnvelopeError) as refused:
        open_commit(raw, RING, ControlDomains(commits=b"another.chain"))
    assert refused.value.code is Code.SIGNATURE


@pytest.mark.parametrize("message", SEALED.values(), ids=SEALED)
def test_every_altered_field_is_refused(message: ControlMessage) -> None:
    for entry in fields(message):
        value = getattr(message, entry.name)
        match value:
            case bool():
                other: object = not value
            case int():
                other = value + 1
            case str():
                other = value + "x"
            case bytes():
                other = bytes([value[0] ^ 1]) + value[1:] if value else b"x"
            case _:
                other = value[:-1] if len(value) > 1 else value * 2
        altered = replace(message, **{entry.name: other})  # type: ignore[arg-type]
        assert fault(encode(altered), message).code in {
            Code.SIGNATURE,
            Code.KEY_MISMATCH,
            Code.CONTENT_HASH,
            Code.ALGORITHM,
            Code.STRUCTURE,
        }, entry.name


def swap_first_fields(raw: bytes) -> bytes:
    """The same fields in another order: height after block_hash."""
    return raw[2:36] + raw[:2] + raw[36:]


NON_CANONICAL: dict[str, Callable[[bytes], bytes]] = {
    "unknown field": lambda raw: raw + b"\xfa\x3f\x01x",
    "fields in another order": swap_first_fields,
    "a field twice": lambda raw: b"\x08\x07" + raw,
    "a number in more bytes than needed": lambda raw: b"\x08\x87\x00" + raw[2:],
    "a default written out": lambda raw: raw + b"\xaa\x06\x00",
}


@pytest.mark.parametrize("change", NON_CANONICAL.values(), ids=NON_CANONICAL)
def test_only_the_canonical_encoding_is_accepted(change: Callable[[bytes], bytes]) -> None:
    message = SEALED["Commit"]
    assert fault(change(encode(message)), message).code is Code.NON_CANONICAL


def sealed(draft: ControlMessage, **values: object) -> bytes:
    return encode(seal(replace(draft, **values), KEY, DOMAINS))  # type: ignore[arg-type]


FAULTS: dict[str, tuple[ControlMessage, Callable[[], bytes], Code, str]] = {
    "too large": (COMMIT, lambda: sealed(COMMIT, proof=bytes(2**20)), Code.TOO_LARGE, "Commit"),
    "not protobuf": (COMMIT, lambda: b"\x00\x00", Code.MALFORMED, "Commit"),
    "empty": (COMMIT, lambda: b"", Code.STRUCTURE, "producer_id"),
    "stranger": (COMMIT, lambda: encode(seal(COMMIT, STRANGER, DOMAINS)), Code.UNKNOWN_PRODUCER, "pubkey"),
    "short block hash": (COMMIT, lambda: sealed(COMMIT, block_hash=b"x"), Code.STRUCTURE, "block_hash"),
    "negative height": (COMMIT, lambda: sealed(COMMIT, height=-1), Code.STRUCTURE, "height"),
    "empty anomaly id": (COMMIT, lambda: sealed(COMMIT, anomaly_ids=("a", "")), Code.STRUCTURE, "anomaly_ids[1]"),
    "short rejected digest": (
        COMMIT,
        lambda: sealed(COMMIT, rejected=(Rejected(b"", "STALE"),)),
        Code.STRUCTURE,
        "rejected[0].tx_digest",
    ),
    "unknown action": (UPDATE, lambda: sealed(UPDATE, action="burn"), Code.STRUCTURE, "action"),
    "rule altered": (UPDATE, lambda: sealed(UPDATE, rule_data=b"{}"), Code.CONTENT_HASH, "rule_hash"),
    "rule too large": (
        UPDATE,
        lambda: sealed(UPDATE, rule_data=bytes(512 * 1024 + 1)),
        Code.CONTENT_TOO_LARGE,
        "rule_data",
    ),
    "no headers": (CHANGE, lambda: sealed(CHANGE, headers=()), Code.STRUCTURE, "headers"),
    "no committee": (CHANGE, lambda: sealed(CHANGE, committee=()), Code.STRUCTURE, "committee"),
    "member without a key": (
        CHANGE,
        lambda: sealed(CHANGE, committee=(CommitteeMember("v", b""),)),
        Code.STRUCTURE,
        "committee[0].pubkey",
    ),
    "unknown result": (ACK, lambda: sealed(ACK, result="maybe"), Code.STRUCTURE, "result"),
    "reason too long": (ACK, lambda: sealed(ACK, reason="x" * 257), Code.STRUCTURE, "reason"),
    "not signed": (ACK, lambda: encode(replace(ACK, producer_id=KEY.public)), Code.STRUCTURE, "signature"),
}


@pytest.mark.parametrize(("message", "make", "code", "place"), FAULTS.values(), ids=FAULTS)
def test_each_fault_has_its_code_and_place(message: ControlMessage, make: Callable[[], bytes], code: Code, place: str) -> None:
    error = fault(make(), message)
    assert (error.code, error.place) == (code, place)


def test_an_epoch_change_and_an_update_cannot_be_mixed() -> None:
    mixed = encode(SEALED["PolicyUpdate"]) + encode(SEALED["EpochChange"])
    assert fault(mixed, UPDATE).code is Code.NON_CANONICAL


def test_an_epoch_change_with_4096_headers_fits() -> None:
    long = seal(replace(CHANGE, headers=(b"h" * 450,) * 4096), KEY, DOMAINS)
    assert open_policy(encode(long), RING, DOMAINS) == long
