"""Decoders give a value or their one error for any bytes, and no change of a valid message passes as another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cybermesh.envelope import EnvelopeError
from cybermesh.envelope.intrinsic import verify_control
from cybermesh.envelope.nonces import Nonce
from cybermesh.envelope.signing import (
    AnomalyContent,
    EvidenceContent,
    OperatorContent,
    PolicyContent,
    Stamp,
    sign_anomaly,
    sign_custody,
    sign_evidence,
    sign_operator,
    sign_policy,
)
from cybermesh.keys import SigningKey
from cybermesh.messages import Ack, DeadLetter, FlowFeatures, OperatorAction, SignedMessage, Transaction, TxKind
from cybermesh.wire import codec
from cybermesh.wire.admission import split_transaction, verify_transaction
from cybermesh.wire.codec import encode
from cybermesh.wire.control import ControlDomains, seal
from cybermesh.wire.unsigned import FEATURES, make_dead_letter

KEY = SigningKey(b"\x01" * 32)
STAMP = Stamp(KEY, 1_700_000_000, Nonce(1_700_000_000_000, 1, 1).encode())
REF = b"\x05" * 32
VALID: dict[TxKind, SignedMessage] = {
    TxKind.ANOMALY: sign_anomaly(AnomalyContent("a-1", "scan", "s", "10.0.0.1", 7, 0.5, "m", {"n": 1}), STAMP),
    TxKind.EVIDENCE: sign_evidence(EvidenceContent("e-1", "window", (REF,), {}, (sign_custody(REF, 1, KEY),)), STAMP),
    TxKind.POLICY: sign_policy(PolicyContent("p-1", "drop", "block", "a-1", "e-1", {}), STAMP),
    TxKind.OPERATOR: sign_operator(OperatorContent("o-1", OperatorAction.APPROVE, {"policy_id": "p-1"}), STAMP),
}
ENCODED = {kind: encode(message) for kind, message in VALID.items()}
DECODERS: dict[str, Callable[[bytes], object]] = {
    **{kind.name: (lambda raw, kind=kind: codec.decode_signed(kind, raw)) for kind in TxKind},
    "commit": codec.COMMIT.decode,
    "policy update": codec.POLICY_UPDATE.decode,
    "epoch change": codec.EPOCH_CHANGE.decode,
    "ack": codec.ACK.decode,
    "flow features": codec.decode_flow_features,
    "dead letter": codec.decode_dead_letter,
    "transaction": split_transaction,
    "verified transaction": verify_transaction,
    "first tag": codec.is_epoch_change,
}


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.sampled_from(list(ENCODED.values())).flatmap(lambda raw: st.integers(0, len(raw)).map(lambda n: raw[:n])),
    )
)
def test_a_decoder_gives_a_value_or_its_one_error(decode: Callable[[bytes], object], raw: bytes) -> None:
    with suppress(EnvelopeError):  # anything else it raises fails the test
        decode(raw)


@pytest.mark.parametrize("kind", list(TxKind))
def test_no_flipped_bit_of_a_valid_message_passes_as_another_message(kind: TxKind) -> None:
    raw, message = ENCODED[kind], VALID[kind]
    passed = 0
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        try:
            found = verify_transaction(Transaction(kind, bytes(changed)).encode())
        except EnvelopeError:
            continue
        assert found == message, f"bit {bit}"
        passed += 1
    assert passed == 0, "today no flipped bit gives an equal message; if one does, look at it"


@given(
    st.sampled_from(list(TxKind)),
    st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 255)), min_size=1, max_size=4),
    st.binary(max_size=12),
)
def test_no_changed_bytes_of_a_valid_message_pass_as_another_message(
    kind: TxKind, changes: list[tuple[int, int]], tail: bytes
) -> None:
    changed = bytearray(ENCODED[kind])
    for place, value in changes:
        changed[place % len(changed)] = value
    try:
        found = verify_transaction(Transaction(kind, bytes(changed) + tail).encode())
    except EnvelopeError:
        return
    assert found == VALID[kind]


ACK = seal(
    Ack("p", "edge", "", "", "applied", "", "", 1, 2, "", "agent", True, REF, b"", 1000, 2000, nonce=bytes(16), height=3),
    KEY,
    ControlDomains(),
)


def open_signed_ack(raw: bytes) -> None:
    message = codec.ACK.decode(raw)
    verify_control(message, codec.encode_cleared(message), ControlDomains().ack)


def test_no_flipped_bit_of_a_control_message_passes() -> None:
    raw = encode(ACK)
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(EnvelopeError):
            open_signed_ack(bytes(changed))


SAFE_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | SAFE_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SAFE_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.builds(
        AnomalyContent,
        id=SAFE_TEXT.filter(bool).map(lambda text: text[:32]),
        type=SAFE_TEXT.filter(bool),
        source=SAFE_TEXT,
        entity=SAFE_TEXT,
        severity=st.integers(1, 10),
        confidence=st.floats(0, 1),
        model_version=SAFE_TEXT,
        details=st.dictionaries(SAFE_TEXT.map(lambda text: f"detail {text}"), JSON, max_size=3),
    )
)
@example(AnomalyContent("é", "t", "", "", 1, 1e-309, "", {}))
@example(AnomalyContent("id", "t", "", "", 10, 0.1 + 0.2, "", {}))
def test_whatever_is_signed_verifies_after_the_wire(content: AnomalyContent) -> None:
    message = sign_anomaly(content, STAMP)
    assert verify_transaction(Transaction(TxKind.ANOMALY, encode(message)).encode()) == message


def flows(count: int) -> FlowFeatures:
    return FlowFeatures(
        schema=1,
        sensor="sensor-1",
        count=count,
        start_us=bytes(8 * count),
        end_us=bytes(8 * count),
        src=bytes(16 * count),
        dst=bytes(16 * count),
        family=bytes(count),
        sport=bytes(2 * count),
        dport=bytes(2 * count),
        proto=bytes(count),
        klass=bytes(count),
        icmp_type=bytes(count),
        icmp_code=bytes(count),
        end_reason=bytes(count),
        features=bytes(8 * FEATURES * count),
        known=b"\x01" * FEATURES,
    )


@pytest.mark.parametrize("count", [0, 1, 1000, 1518])
def test_flow_batches_survive_the_wire_up_to_the_limit(count: int) -> None:
    assert codec.decode_flow_features(encode(flows(count))) == flows(count)


def test_a_flow_batch_with_a_column_of_another_length_is_refused() -> None:
    for entry in fields(FlowFeatures):
        if entry.type != "bytes":
            continue
        broken = replace(flows(3), **{entry.name: getattr(flows(3), entry.name) + b"\x00"})
        with pytest.raises(EnvelopeError) as refused:
            codec.decode_flow_features(encode(broken))
        assert refused.value.place == entry.name


@given(st.binary(max_size=64), SAFE_TEXT.filter(bool))
def test_a_dead_letter_keeps_the_message_and_the_reason(raw: bytes, topic: str) -> None:
    with pytest.raises(EnvelopeError) as refused:
        codec.decode_signed(TxKind.ANOMALY, b"\x00" + raw)
    letter = make_dead_letter((topic, 3, 2**40), refused.value, raw, 5, "v1")
    assert codec.decode_dead_letter(encode(letter)) == letter
    assert (letter.code, letter.raw_sha256) == ("MALFORMED", hashlib.sha256(raw).digest())


def test_a_dead_letter_cuts_a_long_message_and_keeps_its_hash_and_length() -> None:
    raw = bytes(range(256)) * 4096
    letter = make_dead_letter(("t", 0, 0), EnvelopeError(codec.Code.TOO_LARGE, "Anomaly", "x"), raw, 5, "v1")
    assert (len(letter.raw), letter.raw_length, letter.raw_sha256) == (512 * 1024, 2**20, hashlib.sha256(raw).digest())
    assert codec.decode_dead_letter(encode(letter)) == letter


@pytest.mark.parametrize("broken", [{"raw": b"y"}, {"raw": b"xx"}, {"raw_sha256": b""}, {"topic": ""}, {"code": ""}])
def test_a_dead_letter_that_contradicts_itself_is_refused(broken: dict[str, object]) -> None:
    letter = DeadLetter("t", 0, 0, "STALE", "", 0, "v", b"x", hashlib.sha256(b"x").digest(), 1)
    with pytest.raises(EnvelopeError):
        codec.decode_dead_letter(encode(replace(letter, **broken)))  # type: ignore[arg-type]
