"""The receipts' log against the published vectors of RFC 6962/9162, and against the definition itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.ledger import merkle

# The eight leaves and the roots of every prefix that the reference implementations of RFC 6962 publish.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# (index, size, path) and (old size, new size, path) of the same publication.
INCLUSION = [
    (0, 1, []),
    (
        0,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]
CONSISTENCY = [
    (1, 1, []),
    (
        1,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        6,
        8,
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (
        2,
        5,
        [
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]


def tree_hash(leaves: Sequence[bytes]) -> bytes:
    """The definition of RFC 9162 section 2.1.1, as it stands there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + tree_hash(leaves[:split]) + tree_hash(leaves[split:])).digest()


def hashes_of(leaves: Sequence[bytes]) -> list[bytes]:
    return [merkle.leaf_hash(leaf) for leaf in leaves]


def test_empty_log_has_the_hash_of_nothing() -> None:
    assert merkle.Frontier().root() == tree_hash([])


@pytest.mark.parametrize("size", range(1, 9))
def test_published_roots(size: int) -> None:
    assert merkle.Frontier().append(hashes_of(LEAVES[:size])).root().hex() == ROOTS[size - 1]


@pytest.mark.parametrize(("index", "size", "path"), INCLUSION)
def test_published_inclusion_paths(index: int, size: int, path: list[str]) -> None:
    made = merkle.inclusion_path(index, size, merkle.LeafHashes(hashes_of(LEAVES)))
    assert [node.hex() for node in made] == path
    assert merkle.is_included(index, size, merkle.leaf_hash(LEAVES[index]), made, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize(("old", "new", "path"), CONSISTENCY)
def test_published_consistency_paths(old: int, new: int, path: list[str]) -> None:
    made = merkle.consistency_path(old, new, merkle.LeafHashes(hashes_of(LEAVES)))
    assert [node.hex() for node in made] == path
    assert merkle.is_consistent(old, bytes.fromhex(ROOTS[old - 1]), new, bytes.fromhex(ROOTS[new - 1]), made)


@given(st.lists(st.binary(max_size=4), max_size=70), st.integers(0, 70))
def test_frontier_agrees_with_the_definition_however_the_log_was_appended(leaves: list[bytes], cut: int) -> None:
    before = merkle.Frontier().append(hashes_of(leaves[:cut]))
    whole = before.append(hashes_of(leaves[cut:]))
    assert whole.root() == tree_hash(leaves)
    assert whole == merkle.Frontier().append(hashes_of(leaves))
    assert before.root() == tree_hash(leaves[:cut])


def test_every_inclusion_of_small_logs_verifies_and_no_other_claim_does() -> None:
    leaves = hashes_of([bytes([i]) for i in range(20)])
    for size in range(1, 21):
        root = merkle.Frontier().append(leaves[:size]).root()
        source = merkle.LeafHashes(leaves[:size])
        for index in range(size):
            path = merkle.inclusion_path(index, size, source)
            assert merkle.is_included(index, size, leaves[index], path, root)
            assert not merkle.is_included(index, size, leaves[(index + 1) % 20], path, root)
            assert not merkle.is_included(index, size, leaves[index], (*path, path[0] if path else leaves[0]), root)
            if path:
                assert not merkle.is_included(index, size, leaves[index], path[:-1], root)
            for other in range(size):
                assert merkle.is_included(other, size, leaves[index], path, root) == (other == index)


def test_every_consistency_of_small_logs_verifies_and_a_rewritten_history_does_not() -> None:
    leaves = hashes_of([bytes([i]) for i in range(20)])
    forged = [*leaves[:3], merkle.leaf_hash(b"rewritten"), *leaves[4:]]
    for new in range(1, 21):
        root = merkle.Frontier().append(leaves[:new]).root()
        for old in range(1, new + 1):
            old_root = merkle.Frontier().append(leaves[:old]).root()
            path = merkle.consistency_path(old, new, merkle.LeafHashes(leaves[:new]))
            assert merkle.is_consistent(old, old_root, new, root, path)
            if path:
                assert not merkle.is_consistent(old, old_root, new, root, path[:-1])
            assert not merkle.is_consistent(old, old_root, new, root, (*path, leaves[0]))
            if 3 < old < new:
                rewritten = merkle.Frontier().append(forged[:new]).root()
                other = merkle.consistency_path(old, new, merkle.LeafHashes(forged[:new]))
                assert not merkle.is_consistent(old, old_root, new, rewritten, other)


@pytest.mark.parametrize(("old", "new"), [(0, 4), (5, 4), (-1, 3), (1, merkle.LEAVES_MAX + 1)])
def test_sizes_that_cannot_be_are_refused(old: int, new: int) -> None:
    assert not merkle.is_consistent(old, bytes(32), new, bytes(32), ())
    assert merkle.root_from_inclusion(new, old, bytes(32), ()) is None


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_added_entries_are_proved_from_the_old_frontier_alone(old: int, added: int, data: st.DataObject) -> None:
    leaves = hashes_of([i.to_bytes(2, "big") for i in range(old + added)])
    before = merkle.Frontier().append(leaves[:old])
    after = before.append(leaves[old:])
    index = data.draw(st.integers(old, old + added - 1))
    path = merkle.inclusion_path(index, after.size, merkle.AppendedHashes(before, leaves[old:]))
    assert merkle.is_included(index, after.size, leaves[index], path, after.root())
