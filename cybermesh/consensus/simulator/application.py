"""The smallest application with a state worth agreeing on: a hash chain over the blocks and the set of transactions applied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import immutables

from cybermesh.consensus.application import BlockContext, Execution, Selection
from cybermesh.consensus.mempool import PendingTransaction
from cybermesh.messages import tx_digest


@dataclass(frozen=True, slots=True)
class LogState:
    """``root`` covers every block so far; ``applied`` maps a transaction's digest to its height."""

    root: bytes
    applied: immutables.Map[bytes, int]


class LogApplication:
    """Applies each transaction once; an empty one is invalid; nothing is driven by time."""

    def genesis(self) -> LogState:
        """Return the state before the first block."""
        return LogState(bytes(32), immutables.Map())

    def is_valid(self, transaction: bytes) -> bool:
        """Every transaction but the empty one is valid."""
        return bool(transaction)

    def admit(self, committed: LogState, transaction: bytes, now_ms: int) -> PendingTransaction | None:
        """Return a valid transaction that is not applied yet, of the producer that its first byte names."""
        if not self.is_valid(transaction) or tx_digest(transaction) in committed.applied:
            return None
        return PendingTransaction(tx_digest(transaction), transaction[:1], 0, transaction)

    def select(self, parent: LogState, context: BlockContext, candidates: Sequence[bytes]) -> Selection:
        """Refuse what was applied already."""
        fresh = tuple(each for each in candidates if tx_digest(each) not in parent.applied)
        stale = tuple(each for each in candidates if tx_digest(each) in parent.applied)
        return Selection(fresh, stale)

    def is_within_limits(self, parent: LogState, context: BlockContext, payload: tuple[bytes, ...]) -> bool:
        """A block may not repeat a transaction."""
        return not any(tx_digest(each) in parent.applied for each in payload)

    def execute(self, parent: LogState, context: BlockContext, payload: tuple[bytes, ...]) -> Execution[LogState] | None:
        """Apply the transactions in order."""
        digests = [tx_digest(each) for each in payload]
        place = context.height.to_bytes(8, "big") + context.time_ms.to_bytes(8, "big")
        root = hashlib.sha256(parent.root + place + b"".join(digests)).digest()
        applied = parent.applied
        if digests:
            with applied.mutate() as draft:
                for digest in digests:
                    draft[digest] = context.height
                applied = draft.finish()
        return Execution(LogState(root, applied), root, len(applied), bool(payload), None)

    def next_due_ms(self, state: LogState) -> int | None:
        """Nothing is ever due."""
        return None
