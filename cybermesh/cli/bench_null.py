"""The application that ``cybermesh bench consensus`` orders blocks for: signed transactions, and no state but a hash chain.

A transaction is what a small detection costs to verify: 32 bytes of public key, 64 of signature, and a numbered body.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.application import BlockContext, Execution, Selection
from cybermesh.consensus.mempool import PendingTransaction
from cybermesh.keys import PUBLIC_BYTES, SIGNATURE_BYTES, SigningKey, verify
from cybermesh.messages import tx_digest

TRANSACTION_BYTES: Final = 437
PRODUCERS: Final = 8
_SIGNED_FROM: Final = PUBLIC_BYTES + SIGNATURE_BYTES
_NUMBER_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class NullState:
    """``root`` covers every transaction so far, ``count`` is their number."""

    root: bytes
    count: int


GENESIS: Final = NullState(bytes(32), 0)


def make_transaction(key: SigningKey, number: int) -> bytes:
    """Return a signed transaction of ``TRANSACTION_BYTES``."""
    body = number.to_bytes(_NUMBER_BYTES, "big").ljust(TRANSACTION_BYTES - _SIGNED_FROM, b".")
    return key.public + key.sign(body) + body


def number_of(transaction: bytes) -> int:
    """Return the transaction's number."""
    return int.from_bytes(transaction[_SIGNED_FROM : _SIGNED_FROM + _NUMBER_BYTES], "big")


def is_signed(transaction: bytes) -> bool:
    """Return whether the transaction's own key has signed it."""
    body = transaction[_SIGNED_FROM:]
    return verify(transaction[:PUBLIC_BYTES], body, transaction[PUBLIC_BYTES:_SIGNED_FROM])


def pending(transaction: bytes) -> PendingTransaction:
    """Return a verified transaction as the mempool wants it."""
    return PendingTransaction(tx_digest(transaction), transaction[:PUBLIC_BYTES], 0, transaction)


class NullApplication:
    """Takes whatever is signed; ``verified`` counts signatures, so that a benchmark can show that none was saved."""

    def __init__(self) -> None:
        self.verified = 0
        self._known: set[bytes] = set()

    def is_known(self, digest: bytes) -> bool:
        """Return whether a transaction was verified already."""
        return digest in self._known

    def remember(self, digest: bytes) -> None:
        """Take a transaction as verified, and count it."""
        self._known.add(digest)
        self.verified += 1

    def is_valid(self, transaction: bytes) -> bool:
        """Check the signature, once for every transaction."""
        digest = tx_digest(transaction)
        if digest in self._known:
            return True
        if not is_signed(transaction):
            return False
        self.remember(digest)
        return True

    def admit(self, committed: NullState, transaction: bytes, now_ms: int) -> PendingTransaction | None:
        """Return a forwarded transaction if it is signed."""
        return pending(transaction) if self.is_valid(transaction) else None

    def select(self, parent: NullState, context: BlockContext, candidates: Sequence[bytes]) -> Selection:
        """Take all."""
        return Selection(tuple(candidates))

    def is_within_limits(self, parent: NullState, context: BlockContext, payload: tuple[bytes, ...]) -> bool:
        """Know no limits."""
        return True

    def execute(self, parent: NullState, context: BlockContext, payload: tuple[bytes, ...]) -> Execution[NullState]:
        """Extend the hash chain."""
        root = hashlib.sha256(b"".join((parent.root, *payload))).digest() if payload else parent.root
        state = NullState(root, parent.count + len(payload))
        return Execution(state, root, state.count, bool(payload), None)

    def next_due_ms(self, state: NullState) -> int | None:
        """Return None: nothing ever falls due."""
        return None
