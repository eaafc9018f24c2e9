"""What falls due when: a persistent priority queue, so that uncommitted blocks share it like the rest of the state.

A leftist heap (Crane 1972): insertion and removal copy O(log n) nodes and leave every older heap as it was. Entries are never
taken out early. Whoever pops one asks the state whether it still holds; that keeps renewals cheap. The order is total, (time,
kind, key), so what comes out never depends on how the heap was built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Due(NamedTuple):
    """One thing that falls due; ``kind`` says what, ``key`` names it within its kind."""

    due_ms: int
    kind: int
    key: bytes


class _Node(NamedTuple):
    """A subtree; a tuple, because an insertion makes one per level and a frozen dataclass takes five times as long to make."""

    rank: int
    due: Due
    left: _Node | None
    right: _Node | None


@dataclass(frozen=True, slots=True)
class Schedule:
    """An immutable queue of ``Due``."""

    _root: _Node | None = None

    def first(self) -> Due | None:
        """Return the earliest entry, None when there is none."""
        return None if self._root is None else self._root.due

    def added(self, due: Due) -> Schedule:
        """Return the queue with one entry more."""
        return Schedule(_merged(self._root, _Node(1, due, None, None)))

    def added_all(self, dues: Iterable[Due]) -> Schedule:
        """Return the queue with all of these; costs their sorting and one insertion, not an insertion each.

        In order they make a heap that has only left children, which is a leftist heap as good as any.
        """
        chain: _Node | None = None
        for due in sorted(dues, reverse=True):
            chain = _Node(1, due, chain, None)
        return Schedule(_merged(self._root, chain))

    def without_first(self) -> Schedule:
        """Return the queue without its earliest entry."""
        assert self._root is not None
        return Schedule(_merged(self._root.left, self._root.right))


def _merged(one: _Node | None, two: _Node | None) -> _Node | None:
    """Merge two heaps along their right spines, whose length is at most log2 of their size."""
    spine: list[_Node] = []
    while one is not None and two is not None:
        if two.due < one.due:
            one, two = two, one
        spine.append(one)
        one = one.right
    merged = one if two is None else two
    for above in reversed(spine):
        left, right = above.left, merged
        left_rank, right_rank = _rank(left), _rank(right)
        if left_rank < right_rank:
            left, right, right_rank = right, left, left_rank
        merged = _Node(right_rank + 1, above.due, left, right)
    return merged


def _rank(node: _Node | None) -> int:
    return 0 if node is None else node.rank
