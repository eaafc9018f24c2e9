"""The executed blocks above the last committed one, and the order in which they are committed (rule R5).

R5 commit   a certificate whose round follows its parent's commits the parent and every uncommitted ancestor, oldest first,
            each exactly once, without gaps in height.
R12 epoch   such a commit stops at the block that ends the epoch; what was built on it is dropped.
Only executed blocks live here, a parent always before its children. The tree is bounded: what does not descend from a newly
committed block goes, and so do side branches of rounds long past.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from cybermesh.consensus.application import Execution
from cybermesh.consensus.parts import Root
from cybermesh.consensus.types import Block, BlockHash, Height, Round

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Node(Generic[S]):
    """An executed block in the tree; ``digests`` identify its transactions, ``due_ms`` is the next time-driven effect."""

    block: Block
    execution: Execution[S]
    digests: frozenset[bytes]
    due_ms: int | None


@dataclass(frozen=True, slots=True)
class Position(Generic[S]):
    """What a child needs to know of its parent, be it a block or the root; ``ended`` when it may not change the state (R12)."""

    hash: BlockHash
    round: Round
    height: Height
    time_ms: int
    state: S
    due_ms: int | None
    ended: Execution[S] | None = None


class BlockTree(Generic[S]):
    """Every block that could still be committed."""

    def __init__(self, root: Root[S], due_ms: int | None) -> None:
        self._root = Position(root.hash, root.round, root.height, root.time_ms, root.state, due_ms)
        self._nodes: dict[BlockHash, Node[S]] = {}

    @property
    def root(self) -> Position[S]:
        """The last committed block."""
        return self._root

    def __contains__(self, block_hash: object) -> bool:
        return block_hash == self._root.hash or block_hash in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def position(self, block_hash: BlockHash) -> Position[S] | None:
        """Return where a child of this block would stand, None for an unknown block."""
        if block_hash == self._root.hash:
            return self._root
        node = self._nodes.get(block_hash)
        return None if node is None else _position(node)

    def node(self, block_hash: BlockHash) -> Node[S] | None:
        """Return a block above the root."""
        return self._nodes.get(block_hash)

    def insert(self, node: Node[S]) -> None:
        """Add an executed block whose parent is here."""
        header = node.block.header
        assert header.parent_hash in self
        assert header.hash not in self
        self._nodes[header.hash] = node

    def path(self, block_hash: BlockHash) -> list[Node[S]]:
        """Return the blocks above the root up to this one, oldest first; none for the root and for unknown blocks."""
        path: list[Node[S]] = []
        node = self._nodes.get(block_hash)
        while node is not None:
            path.append(node)
            node = self._nodes.get(node.block.header.parent_hash)
        path.reverse()
        return path

    def commit(self, block_hash: BlockHash) -> list[Node[S]]:
        """Make the block, or the epoch's last one below it (R12), the root and return what that commits, oldest first (R5).

        Nothing if the block is the root or unknown.
        """
        path = self.path(block_hash)
        if not path:
            return []
        ends = [count for count, node in enumerate(path, start=1) if node.execution.next_committee is not None]
        path = path[: ends[0]] if ends else path
        assert path[0].block.header.parent_hash == self._root.hash
        heights = [node.block.height for node in path]
        assert heights == list(range(self._root.height + 1, self._root.height + 1 + len(path)))
        self._root = _position(path[-1])
        self._keep_descendants()
        return path

    def _keep_descendants(self) -> None:
        kept: dict[BlockHash, Node[S]] = {}
        for block_hash, node in self._nodes.items():  # parents come before their children
            parent = node.block.header.parent_hash
            if parent == self._root.hash or parent in kept:
                kept[block_hash] = node
        self._nodes = kept

    def prune(self, keep: BlockHash, below: Round) -> None:
        """Drop blocks of rounds below ``below`` that are not on the way to ``keep``; none while that block is missing."""
        if keep not in self or not any(node.block.round < below for node in self._nodes.values()):
            return
        needed = {node.block.hash for node in self.path(keep)}
        dropped = {h for h, node in self._nodes.items() if node.block.round < below and h not in needed}
        kept: dict[BlockHash, Node[S]] = {}
        for block_hash, node in self._nodes.items():
            parent = node.block.header.parent_hash
            if block_hash not in dropped and (parent == self._root.hash or parent in kept):
                kept[block_hash] = node
        self._nodes = kept


def _position(node: Node[S]) -> Position[S]:
    header = node.block.header
    ended = None if node.execution.next_committee is None else node.execution
    return Position(header.hash, header.round, header.height, header.time_ms, node.execution.state, node.due_ms, ended)
