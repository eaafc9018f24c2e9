"""What must hold whatever the network does, checked where it first shows: on each honest node's outgoing messages.

End-to-end agreement alone misses most protocol bugs for tens of thousands of scenarios; a double vote is seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from cybermesh.consensus.events import Commit, SafetyRecord
from cybermesh.consensus.types import Block, BlockHash, Message, QuorumCert, Round, Timeout, Vote
from cybermesh.messages import tx_digest

S = TypeVar("S")


class ViolationError(Exception):
    """A promise of the protocol was broken; the text says which and by whom."""


@dataclass(slots=True)
class NodeOracle:
    """Watches one node, across its crashes."""

    name: str
    is_retired: bool = False  # its safety file was lost, or is older than what the store has seen of its key
    epoch: int = 1
    committed: list[BlockHash] = field(default_factory=list)
    _votes: dict[Round, BlockHash] = field(default_factory=dict)
    _proposals: dict[Round, BlockHash] = field(default_factory=dict)
    _timeouts: dict[Round, Round] = field(default_factory=dict)
    _locked: int = 0
    _last_timeout: int = 0
    _transactions: set[bytes] = field(default_factory=set)

    def sent(self, message: Message, durable: SafetyRecord, block: Block | None) -> None:
        """Check a message that leaves the node; ``block`` is the one it concerns, None if the disk does not hold it."""
        is_signed = isinstance(message, Vote | Timeout | Block)
        self._require(not (self.is_retired and is_signed), "signs with an old safety file")
        if is_signed:
            self._enter(durable.epoch)
        match message:
            case Vote():
                self._voted(message, durable, block)
            case Timeout():
                self._timed_out(message, durable)
            case Block():
                self._proposed(message, durable, block is not None)
            case _:
                pass

    def _enter(self, epoch: int) -> None:
        """Rounds are those of an epoch, and nobody returns to an earlier one."""
        self._require(epoch >= self.epoch, f"signs in epoch {epoch} after epoch {self.epoch}")
        if epoch > self.epoch:
            self.epoch = epoch
            self._votes, self._proposals, self._timeouts = {}, {}, {}
            self._locked = self._last_timeout = 0

    def _voted(self, vote: Vote, durable: SafetyRecord, block: Block | None) -> None:
        first = self._votes.setdefault(vote.round, vote.block_hash)
        self._require(first == vote.block_hash, f"two votes in round {vote.round}")
        is_repetition = durable.last_vote == vote
        self._require(is_repetition or vote.round > self._last_timeout, f"vote in round {vote.round} after its timeout")
        self._require(
            durable.last_voted_round >= vote.round and block is not None, f"vote of round {vote.round} before its write"
        )
        self._require(durable.locked_round >= vote.parent_round, f"vote of round {vote.round} without its lock")
        if block is not None and block.qc.round + 1 != block.round:
            reported = None if block.tc is None else [high for _, high, _ in block.tc.signatures]
            self._require(
                reported is not None and block.qc.round >= max(reported),
                f"a vote in round {vote.round} for a block that leaves out what a timeout certificate reports",
            )
        self._require(durable.locked_round >= self._locked, f"a lock given up in round {vote.round}")
        self._locked = max(self._locked, durable.locked_round)

    def _timed_out(self, timeout: Timeout, durable: SafetyRecord) -> None:
        first = self._timeouts.setdefault(timeout.round, timeout.high_qc.round)
        self._require(first == timeout.high_qc.round, f"two timeouts in round {timeout.round}")
        self._require(durable.last_timeout == timeout, f"timeout of round {timeout.round} before its write")
        if timeout.round > self._last_timeout:
            self._require(timeout.high_qc.round >= self._locked, f"timeout of round {timeout.round} reports less than the lock")
            self._last_timeout = timeout.round

    def _proposed(self, block: Block, durable: SafetyRecord, has_block: bool) -> None:
        first = self._proposals.setdefault(block.round, block.hash)
        self._require(first == block.hash, f"two proposals in round {block.round}")
        is_durable = durable.last_proposed_round >= block.round and has_block
        self._require(is_durable, f"proposal of round {block.round} before its write")

    def commit(self, commit: Commit[S], is_first_life: bool) -> None:
        """Check a commit: heights without gaps, each block and each transaction once, by a certificate that proves it."""
        certificate = commit.certificate
        last = commit.blocks[-1].block
        proven = commit.suffix[-1] if commit.suffix else last.header
        is_over_last = (certificate.parent_hash, certificate.parent_round) == (proven.hash, proven.round)
        self._require(
            is_over_last and certificate.round == proven.round + 1,
            f"commit at height {last.height} without a consecutive certificate",
        )
        for each in commit.blocks:
            block = each.block
            self._require(block.header.state_root == each.execution.state_root, f"another state than block {block.height} says")
            if not is_first_life and block.height <= len(self.committed):
                self._require(self.committed[block.height - 1] == block.hash, f"another block at height {block.height}")
                continue
            self._require(block.height == len(self.committed) + 1, f"height {block.height} after {len(self.committed)}")
            is_first_of_epoch = block.header.parent_round == 0
            parent = block.header.parent_hash if is_first_of_epoch else self.committed[-1]
            self._require(block.header.parent_hash == parent, f"block {block.height} does not extend the one before")
            digests = {tx_digest(transaction) for transaction in block.payload}
            self._require(not digests & self._transactions, f"a transaction twice, at height {block.height}")
            self._transactions |= digests
            self.committed.append(block.hash)

    def _require(self, holds: bool, text: str) -> None:
        if not holds:
            raise ViolationError(f"{self.name}: {text}")


@dataclass(slots=True)
class Agreement:
    """Watches all honest nodes together. A patient one notes the first ``fault`` and lets the world go on."""

    is_patient: bool = False
    fault: str | None = None
    chain: dict[int, tuple[BlockHash, bytes, str]] = field(default_factory=dict)
    _certified: dict[tuple[int, Round], BlockHash] = field(default_factory=dict)

    def certified(self, qc: QuorumCert) -> None:
        """Check that a round has one certificate."""
        first = self._certified.setdefault((qc.epoch, qc.round), qc.block_hash)
        if first != qc.block_hash:
            self._blame(f"round {qc.round} has two certificates")

    def committed(self, name: str, commit: Commit[S]) -> None:
        """Check that honest nodes commit the same block and the same state at a height."""
        for each in commit.blocks:
            block = each.block
            here = (block.hash, each.execution.state_root)
            *there, other = self.chain.setdefault(block.height, (*here, name))
            if tuple(there) != here:
                self._blame(f"{name} and {other} committed different blocks at height {block.height}")

    def _blame(self, text: str) -> None:
        if not self.is_patient:
            raise ViolationError(text)
        self.fault = self.fault or text
