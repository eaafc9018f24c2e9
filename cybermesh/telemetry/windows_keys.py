"""Grouping rows by wide keys, and giving each key a slot in columns of bounded length.

Keys are compared byte for byte: the 64-bit hash only speeds grouping up, so two keys never become one by collision, and the
slots' index is a dict over the key's bytes, whose hash is keyed by the interpreter.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_T = TypeVar("_T", bound=np.generic)


def group(keys: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Group the rows of uint8[n, 8k]: the first row of each group, intp[groups], and each row's group, intp[n]."""
    words = np.ascontiguousarray(keys).view(np.uint64)
    mixed = np.zeros(len(words), np.uint64)
    for column in range(words.shape[1]):
        mixed = (mixed ^ words[:, column]) * _MULTIPLIER
        mixed ^= mixed >> _SHIFT
    _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
    if not bool((words == words[first][inverse]).all()):
        _, first, inverse = np.unique(words, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
    return first, inverse


def as_bytes(keys: npt.NDArray[np.uint8]) -> list[bytes]:
    """Return each row as bytes."""
    rows = np.ascontiguousarray(keys)
    return [bytes(row) for row in rows.view(f"V{rows.shape[1]}").reshape(-1).tolist()] if len(rows) else []


class Slots:
    """Index from key bytes to a slot number below ``capacity``; the owner keeps the columns and frees slots when it is full."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._index: dict[bytes, int] = {}
        self._keys: list[bytes | None] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    @property
    def room(self) -> int:
        """How many more keys fit."""
        return self.capacity - len(self._index)

    @property
    def allocated(self) -> int:
        """One more than the largest slot ever used: the length the owner's columns need."""
        return len(self._keys)

    def find(self, keys: list[bytes]) -> npt.NDArray[np.int64]:
        """Return the slot of each key, -1 where there is none."""
        get = self._index.get
        return np.fromiter((get(key, -1) for key in keys), np.int64, len(keys))

    def insert(self, keys: list[bytes]) -> npt.NDArray[np.int64]:
        """Give each (distinct, absent) key a slot. There must be room."""
        assert len(keys) <= self.room
        reused = [self._free.pop() for _ in range(min(len(keys), len(self._free)))]
        start = len(self._keys)
        slots = reused + list(range(start, start + len(keys) - len(reused)))
        self._keys.extend([None] * (len(keys) - len(reused)))
        for key, slot in zip(keys, slots, strict=True):
            self._keys[slot] = key
        self._index.update(zip(keys, slots, strict=True))
        return np.array(slots, np.int64)

    def remove(self, slots: npt.NDArray[np.int64]) -> None:
        """Forget the keys of these slots."""
        for slot in slots.tolist():
            key = self._keys[slot]
            assert key is not None
            del self._index[key]
            self._keys[slot] = None
        self._free.extend(slots.tolist())


def grown(column: npt.NDArray[_T], length: int) -> npt.NDArray[_T]:
    """Return ``column`` with at least ``length`` rows, doubled as needed, new rows zero."""
    if len(column) >= length:
        return column
    bigger = np.zeros((max(length, 2 * len(column)), *column.shape[1:]), column.dtype)
    bigger[: len(column)] = column
    return bigger
