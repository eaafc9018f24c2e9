from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.keys import KeyHolder, KeyRing, SigningKey, verify
from cybermesh.messages import MessageType

# RFC 8032, section 7.1, tests 1 and 2.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
]
KEY = SigningKey(b"\x07" * 32)


@pytest.mark.parametrize(("seed", "public", "message", "signature"), VECTORS)
def test_signatures_are_those_of_rfc_8032(seed: str, public: str, message: str, signature: str) -> None:
    key = SigningKey(bytes.fromhex(seed))
    assert key.public.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert verify(key.public, bytes.fromhex(message), bytes.fromhex(signature))


def test_a_key_never_shows_its_secret() -> None:
    assert KEY.seed.hex() not in repr(KEY)
    assert SigningKey(KEY.seed).public == KEY.public


@given(st.binary(max_size=40), st.binary(max_size=80), st.binary(max_size=80))
def test_verify_answers_false_for_any_bytes_that_are_no_signature(public: bytes, message: bytes, signature: bytes) -> None:
    assert not verify(public, message, signature)


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32], ids=["order 4", "order 1", "not a point"])
def test_weak_keys_verify_nothing(public: bytes) -> None:
    # With a small-order key and this signature a careless verifier accepts many messages.
    assert not verify(public, b"message", b"\x01" + bytes(63))


@given(st.integers(min_value=0, max_value=64 * 8 - 1))
def test_no_flipped_signature_verifies(bit: int) -> None:
    signature = bytearray(KEY.sign(b"message"))
    signature[bit // 8] ^= 1 << (bit % 8)
    assert not verify(KEY.public, b"message", bytes(signature))


def holder(name: str, seed: int, *types: MessageType) -> KeyHolder:
    return KeyHolder(name, SigningKey(bytes([seed]) * 32).public, frozenset(types))


def test_a_key_may_sign_only_the_types_it_was_given() -> None:
    sensor = holder("sensor", 1, MessageType.ANOMALY, MessageType.EVIDENCE)
    ring = KeyRing([sensor, holder("validator", 2, MessageType.COMMIT)])
    allowed = {kind for kind in MessageType if ring.allows(sensor.public, kind)}
    assert allowed == {MessageType.ANOMALY, MessageType.EVIDENCE}
    assert not any(ring.allows(b"\x09" * 32, kind) for kind in MessageType)


def test_changing_a_ring_gives_a_new_one() -> None:
    sensor = holder("sensor", 1, MessageType.ANOMALY)
    ring = KeyRing([sensor])
    wider = ring.with_holder(holder("sensor", 1, MessageType.POLICY))
    assert (ring.allows(sensor.public, MessageType.ANOMALY), ring.allows(sensor.public, MessageType.POLICY)) == (True, False)
    assert (wider.allows(sensor.public, MessageType.ANOMALY), wider.allows(sensor.public, MessageType.POLICY)) == (False, True)
    assert len(ring.without(sensor.public)) == 0
    assert [entry.name for entry in ring] == ["sensor"]


def test_two_holders_cannot_share_a_key() -> None:
    with pytest.raises(ValueError, match=r"second and first share"):
        KeyRing([holder("first", 1), holder("second", 1)])
