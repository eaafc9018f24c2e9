"""What a replica asks of its application: to judge a block, to choose transactions, to compute the roots of a new header.

A block is judged from cheap to dear, so that junk costs little: its place in the chain, the limits that need no signature, the
signatures of transactions not admitted before, then the execution, whose roots must be those of the header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from cybermesh.consensus.application import Application, BlockContext, Execution
from cybermesh.consensus.blocktree import BlockTree, Node, Position
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Now
from cybermesh.consensus.mempool import Mempool, PendingTransaction
from cybermesh.consensus.types import (
    NO_CERT,
    PROTOCOL_VERSION,
    Block,
    BlockHash,
    Header,
    Height,
    QuorumCert,
    Round,
    TimeoutCert,
    merkle_root,
)
from cybermesh.messages import tx_digest

S = TypeVar("S")

PROPOSAL_COUNT_MAX: Final = 1_000
PROPOSAL_BYTES_MAX: Final = 1024 * 1024


def judge(application: Application[S], mempool: Mempool, parent: Position[S], block: Block) -> Node[S] | str:
    """Return the executed block, or which of its parts is invalid."""
    header = block.header
    if header.height != parent.height + 1:
        return "height"
    if header.time_ms < parent.time_ms:
        return "time"
    context = BlockContext(header.epoch, header.height, header.time_ms)
    digests = [tx_digest(transaction) for transaction in block.payload]
    has_repetition = len(set(digests)) < len(digests)
    if has_repetition or not (parent.ended or application.is_within_limits(parent.state, context, block.payload)):
        return "limits"
    if parent.ended and block.payload:
        return "epoch"
    for digest, transaction in zip(digests, block.payload, strict=True):
        if digest not in mempool and not application.is_valid(transaction):
            return "transaction"
    execution = _execute(application, parent, context, block.payload)
    if execution is None:
        return "execution"
    if (execution.state_root, execution.decision_seq) != (header.state_root, header.decision_seq):
        return "state root"
    return Node(block, execution, frozenset(digests), application.next_due_ms(execution.state))


def _execute(
    application: Application[S], parent: Position[S], context: BlockContext, payload: tuple[bytes, ...]
) -> Execution[S] | None:
    """Execute a block; above the end of an epoch nothing happens any more (R12)."""
    if parent.ended is None:
        return application.execute(parent.state, context, payload)
    return dataclasses.replace(parent.ended, has_payload=False, outcome=None)


def choose(
    application: Application[S], mempool: Mempool, parent: Position[S], context: BlockContext, exclude: Set[bytes]
) -> tuple[bytes, ...]:
    """Return the transactions to propose; what the application refuses leaves the mempool."""
    while parent.ended is None:
        candidates = mempool.candidates(count_max=PROPOSAL_COUNT_MAX, bytes_max=PROPOSAL_BYTES_MAX, exclude=exclude)
        if not candidates:
            return ()
        selection = application.select(parent.state, context, [candidate.data for candidate in candidates])
        digest_of = {candidate.data: candidate.digest for candidate in candidates}
        mempool.remove([digest_of[refused] for refused in selection.refused])
        if selection.payload or not selection.refused:
            return selection.payload
    return ()


def oldest_worthy(
    application: Application[S], mempool: Mempool, parent: Position[S], context: BlockContext, exclude: Set[bytes]
) -> PendingTransaction | None:
    """Return the oldest transaction that would be proposed now; older ones, which the application refuses, are removed."""
    while (oldest := mempool.oldest(exclude)) is not None:
        if oldest.data not in application.select(parent.state, context, [oldest.data]).refused:
            return oldest
        mempool.remove([oldest.digest])
    return None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a leader has decided about its proposal before executing it."""

    committee: Committee
    round: Round
    author: int
    context: BlockContext
    qc: QuorumCert
    tc: TimeoutCert | None
    payload: tuple[bytes, ...]


def compose(application: Application[S], parent: Position[S], draft: Draft) -> tuple[Header, Execution[S]]:
    """Execute what is to be proposed and return the header that commits to the result."""
    committee, context, qc, tc = draft.committee, draft.context, draft.qc, draft.tc
    execution = _execute(application, parent, context, draft.payload)
    assert execution is not None, "an application must be able to execute what it selected"
    header = Header(
        PROTOCOL_VERSION, committee.chain_id, committee.epoch, draft.round, Height(context.height), draft.author,
        context.time_ms, qc.block_hash, qc.round, qc.signers, qc.digest, NO_CERT if tc is None else tc.digest,
        merkle_root(draft.payload), execution.state_root, execution.decision_seq,
    )  # fmt: skip
    return header, execution


def node_of(application: Application[S], block: Block, execution: Execution[S]) -> Node[S]:
    """Return the tree's entry for a block executed here."""
    digests = frozenset(tx_digest(transaction) for transaction in block.payload)
    return Node(block, execution, digests, application.next_due_ms(execution.state))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What there is to wait for above the last commit, on one branch.

    ``digests`` identify the branch's transactions; ``has_transactions`` tells whether others wait for a block.
    """

    digests: frozenset[bytes]
    has_payload: bool
    has_transactions: bool
    due_ms: int | None

    def waits_from(self, now: Now, heartbeat_at: int) -> int:
        """Return since or from when a proposal is waited for, on the clock that never jumps (R7)."""
        if self.has_payload or self.has_transactions:
            return now.mono_ms
        due_at, idle_until = self.due_at(now), max(now.mono_ms, heartbeat_at)
        return idle_until if due_at is None else min(due_at, idle_until)

    def due_at(self, now: Now) -> int | None:
        """Return when the next time-driven effect falls due, on the clock that never jumps."""
        return None if self.due_ms is None else now.mono_ms + max(0, self.due_ms - now.wall_ms)


class Horizon(Generic[S]):
    """Looks along a branch, and looks again only when something has changed."""

    def __init__(self, tree: BlockTree[S], mempool: Mempool) -> None:
        self._tree = tree
        self._mempool = mempool
        self._key: tuple[BlockHash, BlockHash, int] | None = None
        self._outlook = Outlook(frozenset(), has_payload=False, has_transactions=False, due_ms=None)

    def look(self, proposal: BlockHash | None, certified: BlockHash) -> Outlook:
        """Return the outlook on the branch of the round's proposal if it was executed, else of the highest certificate."""
        head = proposal if proposal is not None and proposal in self._tree else certified
        key = (head, self._tree.root.hash, self._mempool.version)
        if key != self._key:
            path = self._tree.path(head)
            digests = frozenset[bytes]().union(*(node.digests for node in path))
            self._key = key
            self._outlook = Outlook(
                digests,
                has_payload=any(node.execution.has_payload for node in path),
                has_transactions=self._mempool.oldest(digests) is not None,
                due_ms=path[-1].due_ms if path else self._tree.root.due_ms,
            )
        return self._outlook
