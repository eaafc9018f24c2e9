"""The port between consensus and what it orders: consensus never looks inside a transaction.

An application is pure: the same arguments give the same answers on every node, and no call changes the state it was given.
Only ``admit`` and ``select`` may depend on the node (its clock, its key ring): they decide what this node proposes, never
what it votes for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cybermesh.consensus.mempool import PendingTransaction

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class BlockContext:
    """What a block tells its application beside the transactions; ``time_ms`` is block time, milliseconds since 1970."""

    epoch: int
    height: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Execution(Generic[S]):
    """Result of executing one block on its parent's state.

    ``state_root`` (32 bytes) and ``decision_seq`` go into the header; ``has_payload`` is true when the block holds transactions
    or caused system receipts; ``outcome`` is handed to whoever learns of the commit, unread by consensus. ``next_committee``
    (public keys of 32 bytes, all different) is given by the one block that ends the epoch.
    """

    state: S
    state_root: bytes
    decision_seq: int
    has_payload: bool
    outcome: object
    next_committee: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What a proposer does with its candidates; one that is in neither tuple waits for a later block.

    ``payload`` goes into the block in this order, ``refused`` (the candidates' bytes) leaves the mempool.
    """

    payload: tuple[bytes, ...]
    refused: tuple[bytes, ...] = ()


class Application(Protocol[S]):
    """What a replica needs from the state machine above it."""

    def is_valid(self, transaction: bytes) -> bool:
        """Return whether the transaction is intrinsically valid: no clock, no state, the same answer for ever."""
        ...

    def admit(self, committed: S, transaction: bytes, now_ms: int) -> PendingTransaction | None:
        """Return the transaction as the mempool wants it if this node would propose it now, else None.

        Asked about transactions that other validators forward; ``committed`` is the state after the last commit, ``now_ms``
        this node's clock.
        """
        ...

    def select(self, parent: S, context: BlockContext, candidates: Sequence[bytes]) -> Selection:
        """Return which candidates an honest proposer puts into this block, in order, and which it gives up."""
        ...

    def is_within_limits(self, parent: S, context: BlockContext, payload: tuple[bytes, ...]) -> bool:
        """Return whether the block keeps the limits that can be checked without a signature; asked before ``is_valid``."""
        ...

    def execute(self, parent: S, context: BlockContext, payload: tuple[bytes, ...]) -> Execution[S] | None:
        """Execute the block on ``parent``; None when the block as such is invalid (it then gets no vote)."""
        ...

    def next_due_ms(self, state: S) -> int | None:
        """Return the block time at which a time-driven effect falls due, if any is pending."""
        ...
