"""Transactions that wait for a block: bounded, fair to every producer, the most severe first.

Rules of this file:
* Bytes are bounded in total and per producer, so one loud producer cannot shut the others out. A transaction that does not
  fit is refused, never swapped for another one: the caller stops consuming until there is room (back-pressure, not loss).
* Candidates come by descending priority, and within a priority one from each producer in turn, each producer's oldest first.
* A transaction stays until it is committed or refused by the application, so an abandoned block loses nothing.
* One that was in three blocks of this node which the others did not certify is set aside for ten minutes: something about it
  may be what they refuse. It can still be in blocks of others.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

BYTES_MAX: Final = 64 * 1024 * 1024
FAILURES_MAX: Final = 3
ASIDE_MS: Final = 600_000


@dataclass(frozen=True, slots=True)
class PendingTransaction:
    """An admitted transaction: its identity, who made it, how urgent it is (more is sooner), and its opaque bytes."""

    digest: bytes
    producer: bytes
    priority: int
    data: bytes


class Admission(enum.Enum):
    """What became of a transaction that was offered."""

    ADDED = "added"
    DUPLICATE = "duplicate"
    FULL = "full"


class Mempool:
    """The waiting transactions of one replica. ``version`` changes with every change of the content."""

    def __init__(self, *, bytes_max: int = BYTES_MAX, producer_bytes_max: int | None = None) -> None:
        self._bytes_max = bytes_max
        self._producer_bytes_max = bytes_max // 4 if producer_bytes_max is None else producer_bytes_max
        self._by_digest: dict[bytes, PendingTransaction] = {}
        self._levels: dict[int, dict[bytes, dict[bytes, PendingTransaction]]] = {}
        self._producer_bytes: dict[bytes, int] = {}
        self._failures: dict[bytes, int] = {}
        self._aside: dict[bytes, int] = {}
        self.size_bytes = 0
        self.version = 0

    def __len__(self) -> int:
        return len(self._by_digest)

    def __contains__(self, digest: object) -> bool:
        return digest in self._by_digest

    def get(self, digest: bytes) -> PendingTransaction | None:
        """Return a waiting transaction."""
        return self._by_digest.get(digest)

    def add(self, transaction: PendingTransaction) -> Admission:
        """Keep the transaction if it is new and fits."""
        if transaction.digest in self._by_digest:
            return Admission.DUPLICATE
        size = len(transaction.data)
        held = self._producer_bytes.get(transaction.producer, 0)
        if self.size_bytes + size > self._bytes_max or held + size > self._producer_bytes_max:
            return Admission.FULL
        self._by_digest[transaction.digest] = transaction
        level = self._levels.setdefault(transaction.priority, {})
        level.setdefault(transaction.producer, {})[transaction.digest] = transaction
        self._producer_bytes[transaction.producer] = held + size
        self.size_bytes += size
        self.version += 1
        return Admission.ADDED

    def remove(self, digests: Iterable[bytes]) -> None:
        """Forget these transactions; unknown ones are ignored."""
        for digest in digests:
            transaction = self._by_digest.pop(digest, None)
            if transaction is not None:
                self._forget(transaction)

    def abandoned(self, digests: Iterable[bytes], now_ms: int) -> None:
        """Note that a block of this node with these transactions was given up; ``now_ms`` is of a clock that never jumps."""
        for digest in digests:
            if digest in self._by_digest:
                failures = self._failures[digest] = self._failures.get(digest, 0) + 1
                if failures == FAILURES_MAX:
                    del self._failures[digest]
                    self._aside[digest] = now_ms + ASIDE_MS
                    self.version += 1

    def take_back(self, now_ms: int) -> None:
        """Offer again what was set aside long enough."""
        while self._aside and (first := next(iter(self._aside.items())))[1] <= now_ms:
            del self._aside[first[0]]
            self.version += 1

    @property
    def aside(self) -> int:
        """How many transactions are set aside."""
        return len(self._aside)

    def _forget(self, transaction: PendingTransaction) -> None:
        self._failures.pop(transaction.digest, None)
        self._aside.pop(transaction.digest, None)
        level = self._levels[transaction.priority]
        queue = level[transaction.producer]
        del queue[transaction.digest]
        if not queue:
            del level[transaction.producer]
        if not level:
            del self._levels[transaction.priority]
        left = self._producer_bytes[transaction.producer] - len(transaction.data)
        if left:
            self._producer_bytes[transaction.producer] = left
        else:
            del self._producer_bytes[transaction.producer]
        self.size_bytes -= len(transaction.data)
        self.version += 1

    def candidates(self, *, count_max: int, bytes_max: int, exclude: Container[bytes]) -> list[PendingTransaction]:
        """Return what to put into the next block, at least one if any is left; ``exclude`` holds digests to pass over."""
        chosen: list[PendingTransaction] = []
        size = 0
        for transaction in self._in_order():
            if transaction.digest in exclude or transaction.digest in self._aside:
                continue
            size += len(transaction.data)
            if chosen and (size > bytes_max or len(chosen) >= count_max):
                break
            chosen.append(transaction)
        return chosen

    def _in_order(self) -> Iterator[PendingTransaction]:
        for priority in sorted(self._levels, reverse=True):
            turns = [iter(queue.values()) for queue in self._levels[priority].values()]
            while turns:
                still: list[Iterator[PendingTransaction]] = []
                for turn in turns:
                    transaction = next(turn, None)
                    if transaction is not None:
                        yield transaction
                        still.append(turn)
                turns = still

    def oldest(self, exclude: Container[bytes]) -> PendingTransaction | None:
        """Return the transaction that has waited longest, passing over the digests in ``exclude`` and what is set aside."""
        for digest, transaction in self._by_digest.items():
            if digest not in exclude and digest not in self._aside:
                return transaction
        return None
