"""Messages of the earlier system, built byte by byte without the project's codec or signing.

Fields are written here by number and wire type, sign bytes by hand; so a change of either in the project shows.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import nacl.signing
import pytest

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.signing import custody_sign_bytes, policy_sign_bytes_with_zero, sign_bytes
from cybermesh.keys import KeyHolder, KeyRing
from cybermesh.messages import Anomaly, Evidence, MessageType, Policy, SignedMessage, TxKind
from cybermesh.wire.admission import AdmissionRules, verify_on_wire
from cybermesh.wire.codec import decode_signed, encode

TS = 1_700_000_000
KEY = nacl.signing.SigningKey(b"\x0b" * 32)
PUBLIC = bytes(KEY.verify_key)
NONCE = struct.pack(">QII", TS * 1000, 4, 9)
RING = KeyRing([KeyHolder("old sensor", PUBLIC, frozenset(MessageType))])


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return out + bytes((value,))


def field(number: int, value: int | bytes | str | float) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def signature(domain: bytes, content: bytes) -> bytes:
    signed = domain + TS.to_bytes(8, "big") + b"\x00\x20" + PUBLIC + NONCE + hashlib.sha256(content).digest()
    return KEY.sign(signed).signature


def anomaly(payload: bytes) -> bytes:
    return (
        field(1, "0b8f8c35-4cf0-4f1a-9a53-0f5f3b9f6a10")
        + field(2, "ddos")
        + field(3, "ai-service")
        + field(4, 8)
        + field(5, 0.97)
        + field(6, TS)
        + field(7, hashlib.sha256(payload).digest())
        + field(8, payload)
        + field(9, "v2.1")
        + field(10, PUBLIC)
        + field(11, NONCE)
        + field(12, signature(b"ai.anomaly.v1", payload))
        + field(13, PUBLIC)
        + field(14, "Ed25519")
    )


def evidence(blob: bytes) -> bytes:
    ref = b"\x11" * 32
    custody = KEY.sign(b"evidence.custody.v1" + ref + PUBLIC + TS.to_bytes(8, "big")).signature
    return (
        field(1, "e-7")
        + field(2, "pcap")
        + field(3, ref)
        + field(4, blob)
        + field(5, field(1, ref) + field(2, PUBLIC) + field(3, TS) + field(4, custody))
        + field(6, TS)
        + field(7, hashlib.sha256(blob).digest())
        + field(8, PUBLIC)
        + field(9, NONCE)
        + field(10, signature(b"ai.evidence.v1", blob))
        + field(11, PUBLIC)
        + field(12, "Ed25519")
    )


def policy(params: bytes, domain: bytes = b"ai.policy.v1") -> bytes:
    return (
        field(1, "p-7")
        + field(2, "drop")
        + field(3, "block")
        + field(4, params)
        + field(5, TS)
        + field(6, hashlib.sha256(params).digest())
        + field(7, PUBLIC)
        + field(8, NONCE)
        + field(9, signature(domain, params))
        + field(10, PUBLIC)
        + field(11, "Ed25519")
    )


OLD = {
    "anomaly": (TxKind.ANOMALY, anomaly(b'{"src_ip": "10.0.0.9", "score": 0.97}')),
    "evidence": (TxKind.EVIDENCE, evidence(b'{"flows": 12}')),
    "policy": (TxKind.POLICY, policy(b'{"target": "10.0.0.9"}')),
    "policy with a zero byte after the domain": (
        TxKind.POLICY,
        policy(b'{"target": "10.0.0.9"}', b"ai.policy.v1\x00"),
    ),
}


def receive(kind: TxKind, raw: bytes, *, accept: bool = False) -> SignedMessage:
    return verify_on_wire(kind, raw, TS * 1000, RING, AdmissionRules(accept_unbound_fields=accept)).message


@pytest.mark.parametrize(("kind", "raw"), OLD.values(), ids=OLD)
def test_they_pass_structure_hash_and_signature_and_end_as_field_mismatch(kind: TxKind, raw: bytes) -> None:
    with pytest.raises(EnvelopeError) as refused:
        receive(kind, raw)
    assert refused.value.code is Code.FIELD_MISMATCH


@pytest.mark.parametrize(("kind", "raw"), OLD.values(), ids=OLD)
def test_our_encoding_of_them_is_theirs(kind: TxKind, raw: bytes) -> None:
    assert encode(decode_signed(kind, raw)) == raw


def test_they_are_admitted_with_the_outer_fields_discarded() -> None:
    message = receive(*OLD["anomaly"], accept=True)
    assert isinstance(message, Anomaly)
    assert message.id == hashlib.sha256(message.payload).hexdigest()
    assert (message.type, message.source, message.severity, message.confidence, message.model_version) == ("", "", 0, 0.0, "")
    proof = receive(*OLD["evidence"], accept=True)
    assert isinstance(proof, Evidence)
    assert (proof.evidence_type, proof.refs, proof.coc) == ("", (), ())
    for name in ("policy", "policy with a zero byte after the domain"):
        order = receive(*OLD[name], accept=True)
        assert isinstance(order, Policy)
        assert (order.action, order.rule) == ("", "")


def test_discarded_fields_are_taken_from_the_content_where_it_names_them() -> None:
    raw = anomaly(b'{"type": "beacon", "severity": 3, "confidence": 1, "source": 5, "id": "' + b"x" * 200 + b'"}')
    message = receive(TxKind.ANOMALY, raw, accept=True)
    assert isinstance(message, Anomaly)
    assert (message.type, message.severity, message.confidence, message.source) == ("beacon", 3, 1.0, "")
    assert message.id == message.content_hash.hex(), "an id beyond the limit is no id"


@pytest.mark.parametrize("content", ['{"severity": 11, "confidence": 2}', '{"severity": -1, "confidence": -0.5}'])
def test_values_out_of_range_are_not_taken_from_the_content(content: str) -> None:
    message = receive(TxKind.ANOMALY, anomaly(content.encode()), accept=True)
    assert isinstance(message, Anomaly)
    assert (message.severity, message.confidence) == (0, 0.0)


def test_accepting_unbound_fields_accepts_no_other_fault() -> None:
    kind, raw = OLD["anomaly"]
    message = decode_signed(kind, raw)
    for broken in (replace(message, nonce=bytes(16)), replace(message, content_hash=bytes(32))):
        with pytest.raises(EnvelopeError) as refused:
            receive(kind, encode(broken), accept=True)
        assert refused.value.code in {Code.SIGNATURE, Code.CONTENT_HASH}


def test_sign_bytes_are_the_specified_ones() -> None:
    payload = b'{"a":1}'
    tail = (
        bytes.fromhex("000000006553f100")  # 1,700,000,000
        + bytes.fromhex("0020")
        + PUBLIC
        + bytes.fromhex("0000018bcfe56800" + "00000004" + "00000009")
        + hashlib.sha256(payload).digest()
    )
    assert sign_bytes(decode_signed(TxKind.ANOMALY, anomaly(payload))) == b"ai.anomaly.v1" + tail
    assert sign_bytes(decode_signed(TxKind.EVIDENCE, evidence(payload))) == b"ai.evidence.v1" + tail
    order = decode_signed(TxKind.POLICY, policy(payload))
    assert isinstance(order, Policy)
    assert sign_bytes(order) == b"ai.policy.v1" + tail
    assert policy_sign_bytes_with_zero(order) == b"ai.policy.v1\x00" + tail
    assert (
        custody_sign_bytes(b"\x11" * 32, PUBLIC, 258) == b"evidence.custody.v1" + b"\x11" * 32 + PUBLIC + bytes(6) + b"\x01\x02"
    )


def test_operator_commands_are_signed_like_policies_under_their_own_domain() -> None:
    params = b'{"action":"revoke","id":"o-1","policy_id":"p"}'
    raw = (
        field(1, "o-1")
        + field(2, "revoke")
        + field(4, params)
        + field(5, TS)
        + field(6, hashlib.sha256(params).digest())
        + field(7, PUBLIC)
        + field(8, NONCE)
        + field(9, signature(b"control.operator.v1", params))
        + field(10, PUBLIC)
        + field(11, "Ed25519")
    )
    assert receive(TxKind.OPERATOR, raw).id == "o-1"
