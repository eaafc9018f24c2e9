"""A commitment to all entries of the state whose cost follows the change, not the size (docs/adr/0006-state-commitment.md).

LtHash (Bellare and Micciancio's AdHash over lattices, the parameters of "lthash16"): each entry is expanded by SHAKE-128 to
1,024 integers of 16 bits, and a set's digest is their sum modulo 2**16. Adding and removing commute, so nobody has to agree on
an order. Entries must be distinct: the caller's encoding names table and key, and a key holds one value.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

LATTICE_BYTES: Final = 2_048
_ENTRY_DOMAIN: Final = b"cm/entry/1"
_DIGEST_DOMAIN: Final = b"cm/lattice/1"
_WORD: Final = np.dtype("<u2")
_STACKED: Final = 64  # 128 KiB at a time stay in the cache of a core


@dataclass(frozen=True, slots=True)
class LatticeHash:
    """The sum over a set of entries: 2,048 bytes, 1,024 little-endian integers of 16 bits."""

    words: bytes = bytes(LATTICE_BYTES)

    def __post_init__(self) -> None:
        assert len(self.words) == LATTICE_BYTES

    def updated(self, removed: Iterable[bytes], added: Iterable[bytes]) -> LatticeHash:
        """Return the sum without the ``removed`` entries and with the ``added`` ones; this one stays as it is."""
        total = np.frombuffer(self.words, dtype=_WORD).copy()
        total += _sum_of(added)
        total -= _sum_of(removed)
        return LatticeHash(total.tobytes())

    def digest(self) -> bytes:
        """Return the 32 bytes that stand for the sum in a root."""
        return hashlib.sha256(_DIGEST_DOMAIN + self.words).digest()


def _sum_of(entries: Iterable[bytes]) -> NDArray[np.uint16]:
    """Return the sum of the expanded entries; numpy is called once for many, since a call costs more than an addition."""
    total = np.zeros(LATTICE_BYTES // _WORD.itemsize, dtype=_WORD)
    waiting = iter(entries)
    while streams := [_expand(entry) for entry in itertools.islice(waiting, _STACKED)]:
        words = np.frombuffer(b"".join(streams), dtype=_WORD).reshape(len(streams), -1)
        total += words.sum(axis=0, dtype=_WORD)
    return total


def _expand(entry: bytes) -> bytes:
    return hashlib.shake_128(_ENTRY_DOMAIN + entry).digest(LATTICE_BYTES)
