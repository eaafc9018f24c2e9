"""The lattice hash: a sum over entries that forgets nothing but their order."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from cybermesh.ledger.lattice import LATTICE_BYTES, LatticeHash

entries = st.sets(st.binary(max_size=12), max_size=8)


def words(entry: bytes) -> list[int]:
    stream = hashlib.shake_128(b"cm/entry/1" + entry).digest(LATTICE_BYTES)
    return [int.from_bytes(stream[i : i + 2], "little") for i in range(0, LATTICE_BYTES, 2)]


@given(entries)
def test_sum_is_that_of_the_definition_word_by_word(chosen: set[bytes]) -> None:
    expected = [sum(column) % 65_536 for column in zip([0] * 1_024, *map(words, chosen), strict=True)]
    made = LatticeHash().updated((), chosen)
    assert made.words == b"".join(word.to_bytes(2, "little") for word in expected)
    assert made.digest() == hashlib.sha256(b"cm/lattice/1" + made.words).digest()


@given(entries, entries)
def test_path_to_a_set_does_not_matter(kept: set[bytes], passing: set[bytes]) -> None:
    direct = LatticeHash().updated((), kept)
    detour = LatticeHash().updated((), passing).updated((), kept - passing).updated(passing - kept, ())
    assert detour == direct


@given(entries, st.binary(max_size=12))
def test_one_entry_more_is_another_digest(chosen: set[bytes], entry: bytes) -> None:
    without = LatticeHash().updated((), chosen - {entry})
    assert without.updated((), [entry]).digest() != without.digest()
