"""The table of open flows: rows of one array, found through an index with open addressing.

A row is a flow's state (the columns of ``meter_state``), then its key's words: ten cache lines. The index holds for each key
half of its hash and the row, in the first free place from the hash on; removing one moves later ones up, so there are no gaps
to search through. Rows that are not in use have the deadline ``FREE``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba.core import types

from cybermesh.telemetry.kernels import kernel, part, record
from cybermesh.telemetry.kernels.keys import KEY_WORDS, hash_key
from cybermesh.telemetry.meter_state import WIDTH

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]

ROW_WIDTH = WIDTH + KEY_WORDS
FREE = (1 << 63) - 1

# Columns of ``counts``: rows on the free list, keys in the index, finished flows waiting to be handed out.
UNUSED, OPEN, FINISHED = range(3)
COUNTS = 3

_LOW = np.uint64(0xFFFF_FFFF)
_TO_PLACE = np.uint64(32)


class Table(NamedTuple):
    """The arrays of a table.

    ``rows`` int64[capacity, ROW_WIDTH]; ``deadline_us`` and ``seen`` int64[capacity]; ``places``, the index, uint64[2**n]: an
    entry is half of the hash and, below it, the row + 1; 0 is an empty place; ``free`` a stack of unused rows; ``finished`` and
    ``reasons`` the rows waiting to be handed out and why they are; ``counts`` see above; ``secret`` the hash's key.
    """

    rows: I64
    deadline_us: I64
    seen: I64
    places: U64
    free: U32
    finished: U32
    reasons: npt.NDArray[np.uint8]
    counts: I64
    secret: U64


_WIDE, _NUMBERS, _ROWS = types.int64[::1], types.uint64[::1], types.uint32[::1]
TABLE = record(Table, types.int64[:, ::1], _WIDE, _WIDE, _NUMBERS, _ROWS, _ROWS, types.uint8[::1], _WIDE, _NUMBERS)


@part
def take_row(table: Table) -> np.uint32:
    """Return an unused row."""
    table.counts[UNUSED] -= 1
    row: np.uint32 = table.free[table.counts[UNUSED]]
    return row


@part
def finish(table: Table, row: np.uint32, reason: int) -> None:
    """Set a row aside to be handed out."""
    at = table.counts[FINISHED]
    table.finished[at] = row
    table.reasons[at] = reason
    table.counts[FINISHED] = at + 1


@part
def first_place(table: Table, hashed: np.uint64) -> np.int64:
    """Return where the search for a key begins."""
    return np.int64((hashed >> _TO_PLACE) & np.uint64(len(table.places) - 1))


@part
def find_or_claim(table: Table, hashed: np.uint64, words: U64, k: int) -> np.uint32:
    """Return the row of the key ``words[k]``; a new key gets one with the deadline still at ``FREE``."""
    mask = np.uint64(len(table.places) - 1)
    place = (hashed >> _TO_PLACE) & mask
    while True:
        entry = table.places[place]
        if entry == np.uint64(0):
            break
        if (entry ^ hashed) & ~_LOW == np.uint64(0):
            row = np.uint32((entry & _LOW) - np.uint64(1))
            same = True
            for word in range(KEY_WORDS):
                same &= table.rows[row, WIDTH + word] == np.int64(words[k, word])
            if same:
                return row
        place = (place + np.uint64(1)) & mask
    row = take_row(table)
    for word in range(KEY_WORDS):
        table.rows[row, WIDTH + word] = np.int64(words[k, word])
    table.places[place] = (hashed & ~_LOW) | np.uint64(np.uint64(row) + np.uint64(1))
    table.counts[OPEN] += 1
    return row


@part
def _hash_of(table: Table, row: np.uint32) -> np.uint64:
    words = table.rows[row]
    return hash_key(
        np.uint64(words[WIDTH]),
        np.uint64(words[WIDTH + 1]),
        np.uint64(words[WIDTH + 2]),
        np.uint64(words[WIDTH + 3]),
        np.uint64(words[WIDTH + 4]),
        table.secret,
    )


@part
def _forget(table: Table, row: np.uint32) -> None:
    """Take a row out of the index, and move up what lies behind it and does not belong there."""
    mask = np.uint64(len(table.places) - 1)
    hole = (_hash_of(table, row) >> _TO_PLACE) & mask
    while (table.places[hole] & _LOW) != np.uint64(row) + np.uint64(1):
        hole = (hole + np.uint64(1)) & mask
    place = (hole + np.uint64(1)) & mask
    while table.places[place] != np.uint64(0):
        home = (table.places[place] >> _TO_PLACE) & mask
        if ((place - home) & mask) >= ((place - hole) & mask):
            table.places[hole] = table.places[place]
            hole = place
        place = (place + np.uint64(1)) & mask
    table.places[hole] = np.uint64(0)
    table.deadline_us[row] = FREE
    table.counts[OPEN] -= 1


@kernel(types.void(TABLE, types.uint32[::1], types.uint8[::1]))
def remove(table: Table, chosen: U32, why: npt.NDArray[np.uint8]) -> None:
    """Take ``chosen`` rows out of the index and set them aside as finished, with their reasons."""
    for i in range(len(chosen)):
        _forget(table, chosen[i])
        finish(table, chosen[i], np.int64(why[i]))
