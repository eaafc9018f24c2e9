"""The ledger as consensus sees it: opaque transactions in, roots out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from cybermesh.consensus.application import BlockContext, Execution, Selection
from cybermesh.consensus.mempool import PendingTransaction
from cybermesh.genesis import Genesis
from cybermesh.ledger import execution
from cybermesh.ledger.state import Applied, LedgerBlock, State
from cybermesh.messages import Anomaly, OperatorCommand, SignedMessage, tx_digest

VERIFIED_MAX = 65_536
OPERATOR_PRIORITY = 100
FOLLOW_UP_PRIORITY = 9  # evidence and policies wait for nothing but their anomaly, so they do not queue behind later ones


def pending(raw: bytes, message: SignedMessage, digest: bytes) -> PendingTransaction:
    """Return a verified transaction as the mempool wants it: operators first, then by severity."""
    match message:
        case OperatorCommand():
            priority = OPERATOR_PRIORITY
        case Anomaly():
            priority = message.severity
        case _:
            priority = FOLLOW_UP_PRIORITY
    return PendingTransaction(digest, message.producer_id, priority, raw)


class LedgerApplication:
    """Adapts the ledger to consensus' ``Application`` port; remembers which transactions were verified.

    ``monotonic_s`` (a clock that never jumps, seconds) bounds the choice of a proposal to a quarter of the round timer: it
    decides what this node proposes, never what it votes for.
    """

    def __init__(self, genesis: Genesis, monotonic_s: Callable[[], float]) -> None:
        self._genesis = genesis
        self._monotonic_s = monotonic_s
        self._choice_s = genesis.timing.base_ms / 4_000
        self._given_up: list[bytes] = []
        self._verified: OrderedDict[bytes, None] = OrderedDict()

    def remember(self, digest: bytes) -> None:
        """Take a transaction as intrinsically valid: its signature was checked at admission."""
        self._verified[digest] = None
        if len(self._verified) > VERIFIED_MAX:
            self._verified.popitem(last=False)

    def is_valid(self, transaction: bytes) -> bool:
        """Return whether the transaction is intrinsically valid; each is checked once while it is remembered."""
        digest = tx_digest(transaction)
        if digest in self._verified:
            return True
        if not execution.is_valid(self._genesis, transaction):
            return False
        self.remember(digest)
        return True

    def admit(self, committed: State, transaction: bytes, now_ms: int) -> PendingTransaction | None:
        """Return a forwarded transaction as the mempool wants it, None if this node would not propose it."""
        message = execution.would_admit(committed, transaction, now_ms)
        if message is None or not self.is_valid(transaction):
            return None
        return pending(transaction, message, tx_digest(transaction))

    def select(self, parent: State, context: BlockContext, candidates: Sequence[bytes]) -> Selection:
        """Return which candidates an honest proposer puts into this block, and which it gives up."""
        end_s = self._monotonic_s() + self._choice_s
        choice = execution.choose(
            parent,
            height=context.height,
            time_ms=context.time_ms,
            candidates=candidates,
            is_time_up=lambda: self._monotonic_s() >= end_s,
        )
        self._given_up.extend(tx_digest(raw) for raw in choice.refused)
        return Selection(choice.payload, choice.refused)

    def take_given_up(self) -> tuple[bytes, ...]:
        """Return, once, the digests of transactions that left the mempool without a block; the journal drops them too."""
        given_up = tuple(self._given_up)
        self._given_up.clear()
        return given_up

    def is_within_limits(self, parent: State, context: BlockContext, payload: tuple[bytes, ...]) -> bool:
        """Return whether the block keeps the limits that need no signature."""
        return execution.is_within_limits(parent, LedgerBlock(context.height, context.time_ms, payload))

    def execute(self, parent: State, context: BlockContext, payload: tuple[bytes, ...]) -> Execution[State] | None:
        """Execute the block on its parent's state; the outcome is the ledger's ``Applied``."""
        applied: Applied | None = execution.execute(parent, LedgerBlock(context.height, context.time_ms, payload))
        if applied is None:
            return None
        state = applied.state
        return Execution(state, state.root, state.decision_seq, bool(applied.receipts), applied, applied.next_committee)

    def next_due_ms(self, state: State) -> int | None:
        """Return the block time from which a block would hold a system receipt."""
        return state.next_due_ms
