"""Every fault a message can have ends with its own code, at its own place in the order, and the next good message passes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import orjson
import pytest

from cybermesh.envelope import LOCAL_CODES, Code, EnvelopeError
from cybermesh.envelope.intrinsic import verify_intrinsic
from cybermesh.envelope.local import verify_local
from cybermesh.envelope.nonces import Nonce, NonceTable
from cybermesh.envelope.signing import (
    AnomalyContent,
    EvidenceContent,
    OperatorContent,
    PolicyContent,
    Stamp,
    sign,
    sign_anomaly,
    sign_bytes,
    sign_custody,
    sign_evidence,
    sign_operator,
    sign_policy,
)
from cybermesh.keys import KeyHolder, KeyRing, SigningKey
from cybermesh.messages import (
    Anomaly,
    MessageType,
    OperatorAction,
    SignedMessage,
    Transaction,
    TxKind,
)
from cybermesh.wire.admission import AdmissionRules, read_transaction, split_transaction, verify_on_wire, verify_transaction
from cybermesh.wire.codec import decode_signed, encode

NOW_MS = 1_700_000_000_000
NOW = NOW_MS // 1000
KEY = SigningKey(b"\x01" * 32)
STRANGER = SigningKey(b"\x02" * 32)
ACTOR = SigningKey(b"\x03" * 32)
OPERATOR = SigningKey(b"\x04" * 32)
AI_TYPES = frozenset({MessageType.ANOMALY, MessageType.EVIDENCE, MessageType.POLICY})
RING = KeyRing(
    [
        KeyHolder("sensor", KEY.public, AI_TYPES),
        KeyHolder("operator", OPERATOR.public, frozenset({MessageType.OPERATOR})),
        KeyHolder("narrow", ACTOR.public, frozenset({MessageType.EVIDENCE})),
    ]
)
RULES = AdmissionRules()
KINDS = {"Anomaly": TxKind.ANOMALY, "Evidence": TxKind.EVIDENCE, "Policy": TxKind.POLICY, "OperatorCommand": TxKind.OPERATOR}


def stamp(key: SigningKey = KEY, ts: int = NOW, counter: int = 0) -> Stamp:
    return Stamp(key, ts, Nonce(ts * 1000, 1, counter).encode())


ANOMALY = sign_anomaly(AnomalyContent("a-1", "port_scan", "sensor-1", "10.0.0.1", 7, 0.93, "m1", {"ports": [22, 80]}), stamp())
EVIDENCE = sign_evidence(
    EvidenceContent("e-1", "window", (b"\x05" * 32, b"\x06" * 32), {"flows": 9}, (sign_custody(b"\x05" * 32, NOW, ACTOR),)),
    stamp(counter=1),
)
POLICY = sign_policy(
    PolicyContent("p-1", "drop", "block", "a-1", "e-1", {"action": "drop", "target": {"ips": ["10.0.0.1"]}}), stamp(counter=2)
)
COMMAND = sign_operator(OperatorContent("o-1", OperatorAction.REVOKE, {"policy_id": "p-1"}), stamp(OPERATOR))
GOOD: dict[str, SignedMessage] = {type(message).__name__: message for message in (ANOMALY, EVIDENCE, POLICY, COMMAND)}


def kind_of(message: SignedMessage) -> TxKind:
    return KINDS[type(message).__name__]


def receive(kind: TxKind, raw: bytes, rules: AdmissionRules = RULES, nonces: NonceTable | None = None) -> SignedMessage:
    """What a validator does with a record, up to the mempool."""
    admitted = verify_on_wire(kind, raw, NOW_MS, RING, rules)
    if nonces is not None:
        message = admitted.message
        nonces.check(message.pubkey, message.nonce, message.content_hash, NOW_MS)
        nonces.record(message.pubkey, message.nonce, message.content_hash, NOW_MS)
    return admitted.message


def fault(kind: TxKind, raw: bytes, rules: AdmissionRules = RULES) -> EnvelopeError:
    with pytest.raises(EnvelopeError) as refused:
        receive(kind, raw, rules)
    return refused.value


@pytest.mark.parametrize("message", GOOD.values(), ids=GOOD)
def test_a_good_message_passes_everywhere(message: SignedMessage) -> None:
    kind = kind_of(message)
    assert receive(kind, encode(message)) == message
    transaction = Transaction(kind, encode(message))
    assert verify_transaction(transaction.encode()) == message
    assert read_transaction(transaction.encode()) == message
    assert verify_intrinsic(message) == message
    verify_local(message, NOW_MS, RING, NonceTable())
    assert verify_on_wire(kind, encode(message), NOW_MS, RING, RULES).payload == transaction.encode()


def raw(message: SignedMessage, **fields: object) -> tuple[TxKind, bytes]:
    return kind_of(message), encode(replace(message, **fields))  # type: ignore[arg-type]


def with_content(content: bytes, key: SigningKey = KEY, ts: int = NOW) -> tuple[TxKind, bytes]:
    """An anomaly with this payload, hash and signature right."""
    return TxKind.ANOMALY, encode(sign(replace(ANOMALY, payload=content), stamp(key, ts)))


def padded(message: SignedMessage, size: int) -> bytes:
    """A valid message padded by an unknown field to ``size`` bytes."""
    body = encode(message)
    rest = size - len(body) - 2 - 3
    padding = b"\xfa\x07" + bytes(((rest & 0x7F) | 0x80, ((rest >> 7) & 0x7F) | 0x80, rest >> 14)) + bytes(rest)
    assert len(body + padding) == size
    return body + padding


def signed_under(domain: bytes) -> tuple[TxKind, bytes]:
    body = sign_bytes(ANOMALY)[len(b"ai.anomaly.v1") :]
    return raw(ANOMALY, signature=KEY.sign(domain + body))


FLIPPED = bytes([ANOMALY.signature[0] ^ 1]) + ANOMALY.signature[1:]
FAULTS: dict[str, tuple[Callable[[], tuple[TxKind, bytes]], Code, str]] = {
    "one byte over 1 MB": (lambda: (TxKind.ANOMALY, padded(ANOMALY, 2**20 + 1)), Code.TOO_LARGE, "Anomaly"),
    "padded to exactly 1 MB": (lambda: (TxKind.ANOMALY, padded(ANOMALY, 2**20)), Code.NON_CANONICAL, "Anomaly"),
    "1 MB of zeros": (lambda: (TxKind.ANOMALY, bytes(2**20)), Code.MALFORMED, "Anomaly"),
    "truncated": (lambda: (TxKind.ANOMALY, encode(ANOMALY)[:-1]), Code.MALFORMED, "Anomaly"),
    "text that is not UTF-8": (lambda: (TxKind.ANOMALY, b"\x0a\x02\xff\xfe"), Code.MALFORMED, "Anomaly"),
    "empty": (lambda: (TxKind.ANOMALY, b""), Code.STRUCTURE, "id"),
    "unknown field": (lambda: (TxKind.ANOMALY, encode(ANOMALY) + b"\xf8\x07\x01"), Code.NON_CANONICAL, "Anomaly"),
    "unknown field in a custody entry": (
        lambda: (TxKind.EVIDENCE, encode(EVIDENCE) + b"\x2a\x03\xf8\x07\x01"),
        Code.NON_CANONICAL,
        "Evidence",
    ),
    "another message's bytes": (lambda: (TxKind.EVIDENCE, encode(ANOMALY)), Code.MALFORMED, "Evidence"),
    "id missing": (lambda: raw(ANOMALY, id=""), Code.STRUCTURE, "id"),
    "id with a zero": (lambda: raw(ANOMALY, id="a\0b"), Code.STRUCTURE, "id"),
    "source with a zero": (lambda: raw(ANOMALY, source="\0"), Code.STRUCTURE, "source"),
    "id too long": (lambda: raw(ANOMALY, id="x" * 129), Code.STRUCTURE, "id"),
    "id too long in bytes": (lambda: raw(ANOMALY, id="é" * 65), Code.STRUCTURE, "id"),
    "type missing": (lambda: raw(ANOMALY, type=""), Code.STRUCTURE, "type"),
    "source too long": (lambda: raw(ANOMALY, source="x" * 257), Code.STRUCTURE, "source"),
    "severity 0": (lambda: raw(ANOMALY, severity=0), Code.STRUCTURE, "severity"),
    "severity 11": (lambda: raw(ANOMALY, severity=11), Code.STRUCTURE, "severity"),
    "confidence above 1": (lambda: raw(ANOMALY, confidence=1.0001), Code.STRUCTURE, "confidence"),
    "confidence not a number": (lambda: raw(ANOMALY, confidence=float("nan")), Code.STRUCTURE, "confidence"),
    "negative time": (lambda: raw(ANOMALY, ts=-1), Code.STRUCTURE, "ts"),
    "payload missing": (lambda: raw(ANOMALY, payload=b""), Code.STRUCTURE, "payload"),
    "short hash": (lambda: raw(ANOMALY, content_hash=bytes(31)), Code.STRUCTURE, "content_hash"),
    "short nonce": (lambda: raw(ANOMALY, nonce=bytes(15)), Code.STRUCTURE, "nonce"),
    "no signature": (lambda: raw(ANOMALY, signature=b""), Code.STRUCTURE, "signature"),
    "key of another kind": (lambda: raw(ANOMALY, pubkey=bytes(33), producer_id=bytes(33)), Code.STRUCTURE, "producer_id"),
    "algorithm": (lambda: raw(ANOMALY, alg="ECDSA"), Code.ALGORITHM, "alg"),
    "algorithm missing": (lambda: raw(ANOMALY, alg=""), Code.ALGORITHM, "alg"),
    "1001 references": (lambda: raw(EVIDENCE, refs=(bytes(32),) * 1001), Code.STRUCTURE, "refs"),
    "short reference": (lambda: raw(EVIDENCE, refs=(bytes(32), bytes(31))), Code.STRUCTURE, "refs[1]"),
    "101 custody entries": (lambda: raw(EVIDENCE, coc=EVIDENCE.coc * 101), Code.STRUCTURE, "coc"),
    "short custody hash": (
        lambda: raw(EVIDENCE, coc=(replace(EVIDENCE.coc[0], ref_hash=b"x"),)),
        Code.STRUCTURE,
        "coc[0].ref_hash",
    ),
    "unknown operator action": (lambda: raw(COMMAND, action="format_disk"), Code.STRUCTURE, "action"),
    "stale by a second": (lambda: with_content(ANOMALY.payload, ts=NOW - 301), Code.STALE, "ts"),
    "future by a second": (lambda: with_content(ANOMALY.payload, ts=NOW + 301), Code.FUTURE, "ts"),
    "payload one byte over 512 KB": (
        lambda: with_content(b'{"x":"' + b"y" * (512 * 1024 - 7) + b'"}'),
        Code.CONTENT_TOO_LARGE,
        "payload",
    ),
    "proof blob one byte over 256 KB": (
        lambda: raw(EVIDENCE, proof_blob=b"{" + b" " * (256 * 1024 - 1) + b"}"),
        Code.CONTENT_TOO_LARGE,
        "proof_blob",
    ),
    "params one byte over 512 KB": (
        lambda: raw(POLICY, params=b"{" + b" " * (512 * 1024 - 1) + b"}"),
        Code.CONTENT_TOO_LARGE,
        "params",
    ),
    "payload altered": (lambda: raw(ANOMALY, payload=ANOMALY.payload + b" "), Code.CONTENT_HASH, "content_hash"),
    "hash altered": (lambda: raw(ANOMALY, content_hash=bytes(32)), Code.CONTENT_HASH, "content_hash"),
    "producer altered": (lambda: raw(ANOMALY, producer_id=STRANGER.public), Code.KEY_MISMATCH, "producer_id"),
    "key altered": (lambda: raw(ANOMALY, pubkey=STRANGER.public), Code.KEY_MISMATCH, "producer_id"),
    "both altered": (
        lambda: raw(ANOMALY, pubkey=STRANGER.public, producer_id=STRANGER.public),
        Code.SIGNATURE,
        "signature",
    ),
    "signature altered": (lambda: raw(ANOMALY, signature=FLIPPED), Code.SIGNATURE, "signature"),
    "time altered": (lambda: raw(ANOMALY, ts=NOW + 1), Code.SIGNATURE, "signature"),
    "nonce altered": (lambda: raw(ANOMALY, nonce=bytes(16)), Code.SIGNATURE, "signature"),
    "wrong domain": (lambda: signed_under(b"ai.policy.v1"), Code.SIGNATURE, "signature"),
    "zero byte after another domain than the policy's": (
        lambda: signed_under(b"ai.anomaly.v1\x00"),
        Code.SIGNATURE,
        "signature",
    ),
    "custody time altered": (
        lambda: raw(EVIDENCE, coc=(replace(EVIDENCE.coc[0], ts=NOW + 1),)),
        Code.CUSTODY_SIGNATURE,
        "coc[0].signature",
    ),
    "custody actor altered": (
        lambda: raw(EVIDENCE, coc=(replace(EVIDENCE.coc[0], actor_id=KEY.public),)),
        Code.CUSTODY_SIGNATURE,
        "coc[0].signature",
    ),
    "stranger's key": (lambda: with_content(ANOMALY.payload, STRANGER), Code.UNKNOWN_PRODUCER, "pubkey"),
    "key of a holder that may not sign this type": (
        lambda: with_content(ANOMALY.payload, ACTOR),
        Code.UNKNOWN_PRODUCER,
        "pubkey",
    ),
    "payload is not JSON": (lambda: with_content(b"\x80"), Code.CONTENT_FORMAT, "payload"),
    "payload is a list": (lambda: with_content(b"[]"), Code.CONTENT_FORMAT, "payload"),
    "payload does not bind": (lambda: with_content(b'{"entity":"10.0.0.1"}'), Code.FIELD_MISMATCH, "id"),
    "payload binds a number as text": (
        lambda: with_content(orjson.dumps({**orjson.loads(ANOMALY.payload), "severity": "7"})),
        Code.FIELD_MISMATCH,
        "severity",
    ),
    "payload binds a number as true": (
        lambda: (
            TxKind.ANOMALY,
            encode(
                sign(
                    replace(
                        ANOMALY, confidence=1.0, payload=ANOMALY.payload.replace(b'"confidence":0.93', b'"confidence":true')
                    ),
                    stamp(),
                )
            ),
        ),
        Code.FIELD_MISMATCH,
        "confidence",
    ),
}
for _message, _name, _value in (
    (ANOMALY, "id", "a-2"),
    (ANOMALY, "type", "beacon"),
    (ANOMALY, "source", "sensor-2"),
    (ANOMALY, "severity", 8),
    (ANOMALY, "confidence", 0.94),
    (ANOMALY, "model_version", "m2"),
    (EVIDENCE, "id", "e-2"),
    (EVIDENCE, "evidence_type", "flow"),
    (EVIDENCE, "refs", EVIDENCE.refs[:1]),
    (EVIDENCE, "refs", EVIDENCE.refs[::-1]),
    (EVIDENCE, "coc", ()),
    (EVIDENCE, "coc", EVIDENCE.coc * 2),
    (POLICY, "id", "p-2"),
    (POLICY, "action", "reject"),
    (POLICY, "rule", "rate_limit"),
    (COMMAND, "id", "o-2"),
    (COMMAND, "action", "approve"),
):
    FAULTS[f"{type(_message).__name__}.{_name} altered to {str(_value)[:20]}"] = (
        lambda message=_message, name=_name, value=_value: raw(message, **{name: value}),
        Code.FIELD_MISMATCH,
        _name,
    )


@pytest.mark.parametrize(("make", "code", "place"), FAULTS.values(), ids=FAULTS)
def test_each_fault_has_its_code_and_place(make: Callable[[], tuple[TxKind, bytes]], code: Code, place: str) -> None:
    kind, body = make()
    error = fault(kind, body)
    assert (error.code, error.place) == (code, place)
    assert str(error) == f"{code}: {place}: {error.text}"
    assert error.text
    assert receive(TxKind.ANOMALY, encode(ANOMALY)) == ANOMALY


@pytest.mark.parametrize(("make", "code", "place"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_intrinsic_or_local_by_its_code(make: Callable[[], tuple[TxKind, bytes]], code: Code, place: str) -> None:
    kind, body = make()
    transaction = Transaction(kind, body).encode()
    if code in LOCAL_CODES:
        verify_transaction(transaction)
        return
    with pytest.raises(EnvelopeError) as refused:
        verify_transaction(transaction)
    assert (refused.value.code, refused.value.place) == (code, place)


def test_there_are_at_least_25_faults_of_most_codes() -> None:
    assert len(FAULTS) >= 25
    covered = {code for _, code, _ in FAULTS.values()}
    elsewhere = {Code.UNKNOWN_KIND, Code.DUPLICATE, Code.NONCE_REPLAY, Code.TOO_MANY_INSTANCES, Code.NONCES_EXHAUSTED}
    assert covered | elsewhere == set(Code)


def test_a_replayed_nonce_with_other_content_is_told_from_a_repeated_message() -> None:
    nonces = NonceTable()
    receive(TxKind.ANOMALY, encode(ANOMALY), nonces=nonces)
    with pytest.raises(EnvelopeError) as again:
        receive(TxKind.ANOMALY, encode(ANOMALY), nonces=nonces)
    other = sign(replace(POLICY), stamp(counter=0))
    with pytest.raises(EnvelopeError) as replayed:
        receive(TxKind.POLICY, encode(other), nonces=nonces)
    assert (again.value.code, replayed.value.code) == (Code.DUPLICATE, Code.NONCE_REPLAY)


def test_the_order_on_the_wire_is_the_specified_one() -> None:
    """A message with every fault shows them one after the other, each time the one before is mended."""
    broken = replace(
        ANOMALY,
        severity=0,
        ts=NOW - 1000,
        payload=bytes(512 * 1024 + 1),
        content_hash=bytes(32),
        signature=bytes(64),
        pubkey=STRANGER.public,
        producer_id=STRANGER.public,
    )
    bad_content = b'{"id":"other"}'
    seen = []
    for mend in (
        {},
        {"severity": 7},
        {"ts": NOW},
        {"payload": bad_content},
        {"content_hash": hashlib.sha256(bad_content).digest()},
    ):
        broken = replace(broken, **mend)  # type: ignore[arg-type]
        seen.append(fault(TxKind.ANOMALY, encode(broken)).code)
    broken = sign(broken, stamp(STRANGER))
    seen.append(fault(TxKind.ANOMALY, encode(broken)).code)
    seen.append(fault(TxKind.ANOMALY, encode(sign(broken, stamp()))).code)
    assert seen == [
        Code.STRUCTURE,
        Code.STALE,
        Code.CONTENT_TOO_LARGE,
        Code.CONTENT_HASH,
        Code.SIGNATURE,
        Code.UNKNOWN_PRODUCER,
        Code.FIELD_MISMATCH,
    ]


@pytest.mark.parametrize("offset", [-300, 300])
def test_the_ends_of_the_time_window_are_inside(offset: int) -> None:
    receive(*with_content(ANOMALY.payload, ts=NOW + offset))


def test_sizes_at_the_limit_pass() -> None:
    content = orjson.loads(ANOMALY.payload)
    content["pad"] = "x" * (512 * 1024 - len(orjson.dumps({**content, "pad": ""})))
    receive(*with_content(orjson.dumps(content)))
    refs = tuple(bytes([number & 255]) * 32 for number in range(1000))
    coc = tuple(sign_custody(refs[0], NOW, ACTOR) for _ in range(100))
    evidence = sign_evidence(EvidenceContent("x" * 128, "é" * 128, refs, {}, coc), stamp())
    assert receive(TxKind.EVIDENCE, encode(evidence)) == evidence


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x05abc", b"\xff" + encode(ANOMALY)])
def test_a_transaction_of_no_kind_is_refused(payload: bytes) -> None:
    with pytest.raises(EnvelopeError) as refused:
        split_transaction(payload)
    assert refused.value.code is Code.UNKNOWN_KIND


def test_a_window_of_the_genesis_replaces_the_default() -> None:
    kind, body = with_content(ANOMALY.payload, ts=NOW - 301)
    receive(kind, body, AdmissionRules(timestamp_window_ms=301_000))


def test_stamping_an_old_message_anew_makes_it_fresh() -> None:
    old = sign(ANOMALY, stamp(ts=NOW - 1000))
    assert fault(TxKind.ANOMALY, encode(old)).code is Code.STALE
    fresh = sign(old, stamp(counter=7))
    assert receive(TxKind.ANOMALY, encode(fresh)) == replace(fresh)
    assert isinstance(fresh, Anomaly)
    assert fresh.payload == old.payload


def test_what_is_bound_cannot_be_given_as_a_detail() -> None:
    with pytest.raises(AssertionError, match="severity"):
        sign_anomaly(AnomalyContent("a", "t", "s", "e", 5, 0.5, "m", {"severity": 9}), stamp())


def test_decoding_keeps_every_field() -> None:
    for message in GOOD.values():
        assert decode_signed(kind_of(message), encode(message)) == message
