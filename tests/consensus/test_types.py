"""The bytes that are hashed and signed: pinned, complete, unambiguous."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.consensus.types import HEADER_BYTES, Header, MalformedError, Round, merkle_root

digests = st.binary(min_size=32, max_size=32)
u64 = st.integers(0, 2**64 - 1)
headers = st.builds(
    Header,
    version=st.integers(0, 2**16 - 1),
    chain_id=digests,
    epoch=st.integers(0, 2**32 - 1),
    round=u64,
    height=u64,
    author=st.integers(0, 2**16 - 1),
    time_ms=u64,
    parent_hash=digests,
    parent_round=u64,
    parent_signers=u64,
    qc_digest=digests,
    tc_digest=digests,
    payload_root=digests,
    state_root=digests,
    decision_seq=u64,
)

GOLDEN = Header(
    1, b"\x01" * 32, 2, 3, 4, 5, 6, b"\x07" * 32, 8, 9, b"\x0a" * 32, b"\x0b" * 32, b"\x0c" * 32, b"\x0d" * 32, 14
)  # fmt: skip


def test_the_encoding_of_a_header_never_changes():
    parts = [
        (1, 2), (b"\x01" * 32, 32), (2, 4), (3, 8), (4, 8), (5, 2), (6, 8), (b"\x07" * 32, 32), (8, 8), (9, 8),
        (b"\x0a" * 32, 32), (b"\x0b" * 32, 32), (b"\x0c" * 32, 32), (b"\x0d" * 32, 32), (14, 8),
    ]  # fmt: skip
    by_hand = b"".join(value if isinstance(value, bytes) else value.to_bytes(width, "big") for value, width in parts)
    assert GOLDEN.encode() == by_hand
    assert len(by_hand) == HEADER_BYTES == 248
    assert GOLDEN.hash == hashlib.sha256(b"cm/block/1" + by_hand).digest()


@given(headers)
def test_a_header_survives_its_encoding(header: Header):
    assert Header.decode(header.encode()) == header
    assert Header.decode(header.encode()).hash == header.hash


@pytest.mark.parametrize("name", [entry.name for entry in dataclasses.fields(Header) if entry.init])
def test_the_hash_covers_every_field(name: str):
    value = getattr(GOLDEN, name)
    other = bytes(32) if isinstance(value, bytes) else value + 1
    assert dataclasses.replace(GOLDEN, **{name: other}).hash != GOLDEN.hash


@given(st.binary(max_size=600).filter(lambda data: len(data) != HEADER_BYTES))
def test_bytes_of_another_length_are_no_header(data: bytes):
    with pytest.raises(MalformedError):
        Header.decode(data)


@pytest.mark.parametrize("change", [{"round": Round(2**64)}, {"author": -1}, {"chain_id": b"short"}])
def test_a_value_that_does_not_fit_is_refused(change: dict):
    with pytest.raises(MalformedError):
        dataclasses.replace(GOLDEN, **change)


def rfc9162(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, as it is written there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + rfc9162(leaves[:split]) + rfc9162(leaves[split:])).digest()


@given(st.lists(st.binary(max_size=8), max_size=70))
def test_the_payload_root_is_the_tree_hash_of_rfc_9162(leaves: list[bytes]):
    assert merkle_root(leaves) == rfc9162(leaves)
