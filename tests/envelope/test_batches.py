"""A batch signed once gives each of its messages what a signature of its own would give, and verifies at the cost of one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope import intrinsic as intrinsic_module
from cybermesh.envelope.batches import leaf_of, root_and_places, signed_root
from cybermesh.envelope.intrinsic import verify_intrinsic
from cybermesh.envelope.signing import AiMessage, sign, sign_batch
from cybermesh.ledger.merkle import Frontier, leaf_hash
from cybermesh.messages import Anomaly, Transaction, TxKind
from cybermesh.wire.admission import verify_on_wire, verify_transaction
from cybermesh.wire.codec import encode
from tests.wire import test_faults as wire


def batch(size: int) -> list[AiMessage]:
    """Messages of all kinds in turn, signed at once."""
    kinds = (wire.ANOMALY, wire.EVIDENCE, wire.POLICY)
    messages = [kinds[number % 3] for number in range(size)]
    return sign_batch(messages, [wire.stamp(counter=100 + number) for number in range(size)])


@given(st.integers(1, 70))
def test_the_tree_is_that_of_the_ledger_and_every_place_leads_to_its_root(size: int) -> None:
    data = [number.to_bytes(4, "big") for number in range(size)]
    leaves = [leaf_of(entry) for entry in data]
    root, places = root_and_places(leaves)
    assert root == Frontier().append([leaf_hash(entry) for entry in data]).root()
    assert {signed_root(leaf, place) for leaf, place in zip(leaves, places, strict=True)} == {signed_root(leaves[0], places[0])}


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_every_message_of_a_batch_passes_on_the_wire_and_in_a_block(size: int) -> None:
    intrinsic_module._verify_root.cache_clear()
    for message in batch(size):
        kind = wire.kind_of(message)
        raw = encode(message)
        assert verify_on_wire(kind, raw, wire.NOW_MS, wire.RING, wire.RULES).message == message
        assert verify_transaction(Transaction(kind, raw).encode()) == message
    assert intrinsic_module._verify_root.cache_info().misses == 1, "one signature is verified, once"


@given(st.integers(1, 9), st.data())
def test_no_altered_place_passes_but_the_message_s_own(size: int, data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(batch(size)))
    place = bytearray(message.batch)
    at = data.draw(st.integers(0, len(place) - 1))
    place[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(EnvelopeError) as refused:
        verify_intrinsic(replace(message, batch=bytes(place)))
    assert refused.value.code in {Code.SIGNATURE, Code.STRUCTURE}


FAULTS = {
    "no place": (lambda first, _: replace(first, batch=b""), Code.SIGNATURE),
    "another's place": (lambda first, second: replace(first, batch=second.batch), Code.SIGNATURE),
    "a longer path": (lambda first, _: replace(first, batch=first.batch + bytes(32)), Code.SIGNATURE),
    "a shorter path": (lambda first, _: replace(first, batch=first.batch[:-32]), Code.SIGNATURE),
    "half a hash": (lambda first, _: replace(first, batch=first.batch[:-1]), Code.STRUCTURE),
    "no size": (lambda first, _: replace(first, batch=first.batch[:4]), Code.STRUCTURE),
    "seventeen hashes": (lambda first, _: replace(first, batch=first.batch[:8] + bytes(32 * 17)), Code.STRUCTURE),
    "a place behind the last": (lambda first, _: replace(first, batch=first.batch[4:8] * 2 + first.batch[8:]), Code.STRUCTURE),
    "another nonce": (lambda first, second: replace(first, nonce=second.nonce), Code.SIGNATURE),
    "another payload": (lambda first, _: replace(first, payload=b"{}"), Code.CONTENT_HASH),
    "another key": (
        lambda first, _: replace(first, pubkey=wire.STRANGER.public, producer_id=wire.STRANGER.public),
        Code.SIGNATURE,
    ),
}


@pytest.mark.parametrize(("alter", "code"), FAULTS.values(), ids=FAULTS)
def test_each_fault_of_a_batched_message_has_its_code(alter, code: Code) -> None:  # type: ignore[no-untyped-def]
    first, second = batch(3)[0], batch(3)[1]
    with pytest.raises(EnvelopeError) as refused:
        verify_on_wire(TxKind.ANOMALY, encode(alter(first, second)), wire.NOW_MS, wire.RING, wire.RULES)
    assert refused.value.code is code


def test_a_message_that_is_signed_anew_leaves_its_batch() -> None:
    anew = sign(batch(3)[0], wire.stamp(counter=7))
    assert isinstance(anew, Anomaly)
    assert anew.batch == b""
    assert verify_intrinsic(anew) == anew
