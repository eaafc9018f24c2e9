"""The branch a replica is on: blocks executed and committed, leaders told from what was committed, what there is to wait for.

It does what the rules decided and decides nothing about them: whether a block may be voted for, or a certificate commits, is
the replica's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from cybermesh.consensus.application import BlockContext, Execution
from cybermesh.consensus.blocktree import BlockTree, Position
from cybermesh.consensus.events import Commit, CommittedBlock, Now
from cybermesh.consensus.execution import Draft, Horizon, Outlook, choose, compose, judge, node_of, oldest_worthy
from cybermesh.consensus.mempool import PendingTransaction
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.types import Block, BlockHash, Header, QuorumCert, Round

S = TypeVar("S")


class Chain(Generic[S]):
    """The last committed block, the executed ones above it, and the mempool that feeds them."""

    def __init__(self, parts: Parts[S], root: Root[S]) -> None:
        self.tree = BlockTree(root, parts.application.next_due_ms(root.state))
        self._parts = parts
        self._committed: deque[Header] = deque(root.recent, maxlen=parts.leaders.window)
        self._horizon: Horizon[S] = Horizon(self.tree, parts.mempool)

    def leader(self, round_: Round) -> int:
        """Return who leads a round, as far as this node knows."""
        return self._parts.leaders.leader(round_, self._committed)

    def restore(self, journal: Sequence[Block]) -> None:
        """Execute again what was persisted above the root and still fits."""
        for block in sorted(journal, key=lambda each: each.round):
            if block.header.parent_hash in self.tree and block.hash not in self.tree:
                self.add(block)

    def add(self, block: Block) -> str | None:
        """Execute a block whose parent is here and keep it, or return why it is invalid (R3, R8)."""
        parent = self.tree.position(block.header.parent_hash)
        assert parent is not None
        judged = judge(self._parts.application, self._parts.mempool, parent, block)
        if isinstance(judged, str):
            return judged
        self.tree.insert(judged)
        return None

    def commit(self, qc: QuorumCert, block_hash: BlockHash, above: Sequence[Header]) -> Commit[S]:
        """Commit a block of the tree; ``above`` are headers that lead from it to the certificate's parent, if it is another."""
        path = self.tree.path(block_hash)
        nodes = self.tree.commit(block_hash)
        for node in nodes:
            self._parts.mempool.remove(node.digests)
            self._committed.append(node.block.header)
        suffix = tuple(above) or tuple(node.block.header for node in path[len(nodes) :])
        return Commit(tuple(CommittedBlock(node.block, node.execution) for node in nodes), qc, suffix)

    def context(self, parent: Position[S], now: Now) -> BlockContext:
        """Return when and where a block proposed now would stand (R8)."""
        return BlockContext(self._parts.committee.epoch, parent.height + 1, max(now.wall_ms, parent.time_ms))

    def outlook(self, proposal: Block | None, certified: BlockHash) -> Outlook:
        """Return what there is to wait for on the branch of the round's proposal, or else of a certified block."""
        return self._horizon.look(None if proposal is None else proposal.hash, certified)

    def leave(self, proposal: Block | None, high_qc: QuorumCert, now: Now) -> None:
        """Note that a round ended with this proposal: what failed in it too often is set aside."""
        if proposal is not None and proposal.header.author == self._parts.index and high_qc.block_hash != proposal.hash:
            node = self.tree.node(proposal.hash)
            self._parts.mempool.abandoned(() if node is None else node.digests, now.mono_ms)

    def choose(self, parent: Position[S], context: BlockContext, outlook: Outlook, now: Now) -> tuple[bytes, ...]:
        """Return the transactions to propose."""
        self._parts.mempool.take_back(now.mono_ms)
        return choose(self._parts.application, self._parts.mempool, parent, context, outlook.digests)

    def oldest_worthy(self, parent: Position[S], context: BlockContext, outlook: Outlook) -> PendingTransaction | None:
        """Return the oldest transaction that would be proposed now."""
        return oldest_worthy(self._parts.application, self._parts.mempool, parent, context, outlook.digests)

    def compose(self, parent: Position[S], draft: Draft) -> tuple[Header, Execution[S]]:
        """Execute what is to be proposed and return its header."""
        return compose(self._parts.application, parent, draft)

    def insert(self, block: Block, execution: Execution[S]) -> None:
        """Keep a block that was executed here."""
        self.tree.insert(node_of(self._parts.application, block, execution))
