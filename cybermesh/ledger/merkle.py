"""The append-only log under every receipt: RFC 9162 section 2.1, kept as a frontier.

Why a frontier: appending needs only the roots of the complete subtrees on the right edge (at most 64 hashes), so a state
carries the whole log of any length as one small immutable value. Proofs need more; whoever stores the leaf hashes gives them
through the ``Hashes`` port. Rules:

- leaf = SHA-256(0x00 || bytes), node = SHA-256(0x01 || left || right), empty = SHA-256(""), split at the largest power of two
  below the size;
- verification takes nothing on trust: sizes and indexes out of range and proofs of any other length are false, not errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
LEAVES_MAX: Final = 1 << 62


def leaf_hash(leaf: bytes) -> bytes:
    """Return the hash of one entry of the log (32 bytes)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of two neighbouring subtrees."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """A log of ``size`` entries by the roots of its complete subtrees, largest (leftmost) first: one per set bit of it."""

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def append(self, hashes: Sequence[bytes]) -> Frontier:
        """Return the log with these leaf hashes added in order; this one stays as it is."""
        size, peaks = self.size, list(self.peaks)
        for added in hashes:
            node = added
            # The trailing ones of the old size are the subtrees that the new leaf completes.
            bits = size
            while bits & 1:
                node = node_hash(peaks.pop(), node)
                bits >>= 1
            peaks.append(node)
            size += 1
        return Frontier(size, tuple(peaks))

    def root(self) -> bytes:
        """Return the Merkle tree hash of the whole log."""
        if not self.peaks:
            return EMPTY_ROOT
        *left, node = self.peaks
        for peak in reversed(left):
            node = node_hash(peak, node)
        return node

    def peak_ranges(self) -> dict[tuple[int, int], bytes]:
        """Return the peaks by the range of entries, [start, end), that each is the root of."""
        found: dict[tuple[int, int], bytes] = {}
        position = 0
        for peak, bit in zip(self.peaks, _bits(self.size), strict=True):
            found[position, position + bit] = peak
            position += bit
        return found


class Hashes(Protocol):
    """Where proofs take subtree roots from."""

    def over(self, start: int, end: int) -> bytes:
        """Return the Merkle tree hash of entries [start, end), 0 ≤ start < end ≤ size of the log."""
        ...


class LeafHashes:
    """All leaf hashes in a sequence. Complete subtrees are remembered, so many proofs over one log cost its size once."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._leaves = leaves
        self._known: dict[tuple[int, int], bytes] = {}

    def over(self, start: int, end: int) -> bytes:
        """Return the root over [start, end)."""
        if end - start == 1:
            return self._leaves[start]
        known = self._known.get((start, end))
        if known is None:
            middle = start + _split(end - start)
            known = node_hash(self.over(start, middle), self.over(middle, end))
            if (end - start).bit_count() == 1:
                self._known[start, end] = known
        return known


class AppendedHashes:
    """What a log knows right after an append: the old frontier and the leaves added. Enough to prove the added ones.

    Subtrees are remembered, so proving every leaf of a block costs the block once.
    """

    def __init__(self, before: Frontier, added: Sequence[bytes]) -> None:
        self._size = before.size
        self._added = added
        self._known = before.peak_ranges()

    def over(self, start: int, end: int) -> bytes:
        """Return the root over [start, end); ranges inside the old log are known only where they are its peaks.

        Raises:
            LookupError: the range lies inside the old log and is none of its peaks.
        """
        known = self._known.get((start, end))
        if known is None:
            if end <= self._size:
                raise LookupError(f"entries {start} to {end} lie before the append")
            if end - start == 1:
                return self._added[start - self._size]
            middle = start + _split(end - start)
            known = self._known[start, end] = node_hash(self.over(start, middle), self.over(middle, end))
        return known


def inclusion_path(index: int, size: int, hashes: Hashes) -> tuple[bytes, ...]:
    """Return the proof that entry ``index`` is in the log of ``size`` entries (RFC 9162, 2.1.3.1), leaf's sibling first."""
    assert 0 <= index < size
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(hashes.over(middle, end))
            end = middle
        else:
            path.append(hashes.over(start, middle))
            start = middle
    return tuple(reversed(path))


def root_from_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes]) -> bytes | None:
    """Return the root that the path leads to from a leaf hash, or None when its length does not fit (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size <= LEAVES_MAX:
        return None
    position, last, node = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return None
        if position & 1 or position == last:
            node = node_hash(sibling, node)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            node = node_hash(node, sibling)
        position >>= 1
        last >>= 1
    return node if last == 0 else None


def is_included(index: int, size: int, leaf: bytes, path: Sequence[bytes], root: bytes) -> bool:
    """Return whether the path proves the leaf hash at ``index`` of the log with this size and root."""
    return root_from_inclusion(index, size, leaf, path) == root


def consistency_path(old_size: int, new_size: int, hashes: Hashes) -> tuple[bytes, ...]:
    """Return the proof that the log of ``new_size`` entries begins with the one of ``old_size`` (RFC 9162, 2.1.4.1)."""
    assert 0 < old_size <= new_size
    path: list[bytes] = []
    start, end, is_whole = 0, new_size, True
    while end != old_size:
        middle = start + _split(end - start)
        if old_size <= middle:
            path.append(hashes.over(middle, end))
            end = middle
        else:
            path.append(hashes.over(start, middle))
            start, is_whole = middle, False
    if not is_whole:
        path.append(hashes.over(start, end))
    return tuple(reversed(path))


def is_consistent(old_size: int, old_root: bytes, new_size: int, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Return whether the path proves that the old log is a prefix of the new one (RFC 9162, 2.1.4.2)."""
    if not 0 < old_size <= new_size <= LEAVES_MAX:
        return False
    if old_size == new_size:
        return not path and old_root == new_root
    nodes = [old_root, *path] if old_size.bit_count() == 1 else list(path)
    if not nodes:
        return False
    position, last = old_size - 1, new_size - 1
    while position & 1:
        position >>= 1
        last >>= 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            new = node_hash(new, node)
        position >>= 1
        last >>= 1
    return last == 0 and old == old_root and new == new_root


def _split(size: int) -> int:
    """Return the largest power of two below ``size`` (≥ 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def _bits(size: int) -> list[int]:
    """Return the powers of two in ``size``, largest first."""
    return [1 << bit for bit in range(size.bit_length() - 1, -1, -1) if size >> bit & 1]
