"""The open flows: their states, keys and deadlines in rows of fixed arrays, and an index from key to row.

The arrays are as large as they may ever become, but the system lends memory only for rows that were used, and freed rows are
used again first. Keys are looked up as bytes in a dict: exact, and hashed with a secret of the process, so that nobody can
choose addresses that collide.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.meter_group import KEY_WORDS, U64
from cybermesh.telemetry.meter_state import WIDTH

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_KEY_BYTES = np.dtype((np.void, 8 * KEY_WORDS))


class FlowTable:
    """Rows of open flows; ``state`` is int64[capacity, WIDTH]."""

    def __init__(self, capacity: int) -> None:
        self.state: I64 = np.empty((capacity, WIDTH), np.int64)
        self.words: U64 = np.empty((capacity, KEY_WORDS), np.uint64)
        self.deadline_us: I64 = np.empty(capacity, np.int64)  # watermark beyond which no packet can belong to the flow
        self.seen: I64 = np.empty(capacity, np.int64)  # number of the flow's last packet
        self._live: Bools = np.zeros(capacity, np.bool_)
        self._rows: dict[bytes, int] = {}
        self._free: I64 = np.arange(capacity - 1, -1, -1)
        self._free_count = capacity

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, words: U64) -> I64:
        """Return the row of each key, -1 where there is none."""
        get = self._rows.get
        return np.fromiter((get(key, -1) for key in _as_bytes(words)), np.int64, len(words))

    def claim(self, words: U64) -> I64:
        """Give rows to new keys."""
        count = len(words)
        assert count <= self._free_count, "the hard cap keeps the table from filling up"
        rows = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        self._rows.update(zip(_as_bytes(words), rows.tolist(), strict=True))
        self.words[rows] = words
        self._live[rows] = True
        return rows

    def release(self, rows: I64) -> None:
        """Take the rows back; their contents may be read until the next ``claim``."""
        for key in _as_bytes(self.words[rows]):
            del self._rows[key]
        self._live[rows] = False
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)

    def live(self) -> I64:
        """Return the rows in use."""
        return np.flatnonzero(self._live)


def _as_bytes(words: U64) -> list[bytes]:
    keys: Any = np.ascontiguousarray(words).view(_KEY_BYTES).ravel().tolist()
    return cast("list[bytes]", keys)
