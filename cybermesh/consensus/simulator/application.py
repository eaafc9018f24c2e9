"""The smallest application worth agreeing on: a hash chain over the blocks, each transaction once, and alarms set by time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import immutables

from cybermesh.consensus.application import BlockContext, Execution, Selection
from cybermesh.consensus.mempool import PendingTransaction
from cybermesh.messages import tx_digest

ALARM: Final = b"alarm "
STAMP: Final = b"stamp "
EPOCH: Final = b"epoch "
WINDOW_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class LogState:
    """``root`` covers every block so far; ``applied`` maps a transaction's digest to its height.

    ``alarms`` are the block times, ascending, at which something falls due; ``rung`` counts those that did.
    """

    root: bytes
    applied: immutables.Map[bytes, int]
    alarms: tuple[int, ...] = ()
    rung: int = 0


class LogApplication:
    """Applies each transaction once; an empty one is invalid.

    ``alarm 700`` falls due 700 ms of block time later; ``stamp 1700000000000`` is proposed only by whoever's clock is within
    a minute of it, as a producer's message is, and is valid for all others; ``epoch 7`` ends the epoch, and the validators with
    the ``keys`` go on in the next one.
    """

    def __init__(self, keys: tuple[bytes, ...] = ()) -> None:
        self._keys = keys

    def genesis(self) -> LogState:
        """Return the state before the first block."""
        return LogState(bytes(32), immutables.Map())

    def is_valid(self, transaction: bytes) -> bool:
        """Every transaction is valid but the empty one and an alarm or a stamp without a number of milliseconds."""
        is_numbered = transaction.startswith((ALARM, STAMP))
        return bool(transaction) and (not is_numbered or transaction[len(ALARM) :].isdigit())

    def admit(self, committed: LogState, transaction: bytes, now_ms: int) -> PendingTransaction | None:
        """Return a valid transaction that is not applied yet, of the producer that its first byte names."""
        if not self.is_valid(transaction) or tx_digest(transaction) in committed.applied or not _is_timely(transaction, now_ms):
            return None
        return PendingTransaction(tx_digest(transaction), transaction[:1], 0, transaction)

    def select(self, parent: LogState, context: BlockContext, candidates: Sequence[bytes]) -> Selection:
        """Refuse what was applied already, and what is stamped outside the window."""
        fresh: list[bytes] = []
        refused: list[bytes] = []
        for each in candidates:
            is_wanted = tx_digest(each) not in parent.applied and _is_timely(each, context.time_ms)
            (fresh if is_wanted else refused).append(each)
        return Selection(tuple(fresh), tuple(refused))

    def is_within_limits(self, parent: LogState, context: BlockContext, payload: tuple[bytes, ...]) -> bool:
        """A block may not repeat a transaction."""
        return not any(tx_digest(each) in parent.applied for each in payload)

    def execute(self, parent: LogState, context: BlockContext, payload: tuple[bytes, ...]) -> Execution[LogState] | None:
        """Apply the transactions in order."""
        digests = [tx_digest(each) for each in payload]
        place = context.height.to_bytes(8, "big") + context.time_ms.to_bytes(8, "big")
        due = tuple(alarm for alarm in parent.alarms if alarm <= context.time_ms)
        root = hashlib.sha256(parent.root + place + b"".join(digests) + repr(due).encode()).digest()
        applied = parent.applied
        if digests:
            with applied.mutate() as draft:
                for digest in digests:
                    draft[digest] = context.height
                applied = draft.finish()
        fresh = [context.time_ms + int(each[len(ALARM) :]) for each in payload if each.startswith(ALARM)]
        alarms = tuple(sorted([*parent.alarms[len(due) :], *fresh]))
        state = LogState(root, applied, alarms, parent.rung + len(due))
        is_last = any(each.startswith(EPOCH) for each in payload)
        return Execution(state, root, len(applied), bool(payload or due), None, self._keys if is_last else None)

    def next_due_ms(self, state: LogState) -> int | None:
        """Return the next alarm."""
        return state.alarms[0] if state.alarms else None


def _is_timely(transaction: bytes, now_ms: int) -> bool:
    return not transaction.startswith(STAMP) or abs(now_ms - int(transaction[len(STAMP) :])) <= WINDOW_MS
