"""Quorum arithmetic for every size, and what a committee accepts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.consensus.committee import Committee, faults, quorum


@pytest.mark.parametrize("n", range(1, 201))
def test_two_quorums_share_an_honest_validator_and_the_honest_ones_form_one(n: int):
    q, f = quorum(n), faults(n)
    assert 2 * q - n > f
    assert q <= n - f
    assert 3 * f < n <= 3 * f + 3


@pytest.mark.parametrize(
    ("n", "f", "q"), [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 3), (5, 1, 4), (6, 1, 5), (7, 2, 5), (9, 2, 7)]
)
def test_the_table_of_the_specification(n: int, f: int, q: int):
    assert (faults(n), quorum(n)) == (f, q)


@given(st.sets(st.binary(min_size=32, max_size=32), min_size=1, max_size=64), st.randoms())
def test_the_order_of_the_keys_does_not_matter(keys: set[bytes], random):
    shuffled = list(keys)
    random.shuffle(shuffled)
    committee = Committee.of(bytes(32), shuffled)
    assert committee == Committee.of(bytes(32), sorted(keys))
    assert [committee.index_of(key) for key in committee.public_keys] == list(range(committee.n))
    assert committee.index_of(bytes(31)) is None


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([], id="nobody"),
        pytest.param([bytes(32), bytes(32)], id="a key twice"),
        pytest.param([bytes(31)], id="a short key"),
        pytest.param([index.to_bytes(32, "big") for index in range(65)], id="more than a header's bitmap holds"),
    ],
)
def test_an_impossible_committee_is_refused(keys: list[bytes]):
    with pytest.raises(ValueError):
        Committee.of(bytes(32), keys)


def test_genesis_depends_on_chain_epoch_members_and_last_block_and_on_nothing_else():
    keys = [index.to_bytes(32, "big") for index in range(4)]
    hashes = {
        Committee.of(bytes(32), keys).genesis_hash(),
        Committee.of(b"\x01" * 32, keys).genesis_hash(),
        Committee.of(bytes(32), keys, epoch=2).genesis_hash(),
        Committee.of(bytes(32), keys[:3]).genesis_hash(),
        Committee.of(bytes(32), keys, epoch=2).genesis_hash(b"\x07" * 32),
    }
    assert len(hashes) == 5
    assert Committee.of(bytes(32), keys[::-1]).genesis_hash() in hashes
