"""What enters a replica and what leaves it: the whole interface between the pure core and the shell around it.

A replica is stepped with one event at a time and answers with effects. The shell performs them in the order given, each
before the next: a ``Persist`` is on the disk before the ``Broadcast`` that follows it leaves the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from cybermesh.consensus.application import Execution
from cybermesh.consensus.types import (
    Block,
    Evidence,
    Header,
    Height,
    Message,
    QuorumCert,
    Round,
    Timeout,
    TimeoutCert,
    Vote,
)

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Now:
    """The time of an event: ``mono_ms`` of a clock that never jumps (timers), ``wall_ms`` since 1970 (block time)."""

    mono_ms: int
    wall_ms: int


@dataclass(frozen=True, slots=True)
class SafetyRecord:
    """What a validator must never forget. ``boot`` numbers the starts of its key; rounds are of ``epoch``.

    The last vote, timeout and proposal are kept whole, so that a repetition sends the same bytes.
    """

    epoch: int
    boot: int
    last_voted_round: Round
    locked_round: Round
    last_proposed_round: Round
    high_qc: QuorumCert
    last_tc: TimeoutCert | None
    last_vote: Vote | None
    last_timeout: Timeout | None

    @classmethod
    def fresh(cls, genesis_cert: QuorumCert, *, boot: int = 0) -> SafetyRecord:
        """Return the memory of a key that has never signed in this epoch."""
        zero = Round(0)
        return cls(genesis_cert.epoch, boot, zero, zero, zero, genesis_cert, None, None, None)


# Events


@dataclass(frozen=True, slots=True)
class Started:
    """The shell is ready to send; the first event of every life."""


@dataclass(frozen=True, slots=True)
class Received:
    """A well-formed message from the validator ``sender``, whose identity the transport vouches for."""

    sender: int
    message: Message


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection to ``peer`` was made or made again; whatever was sent before may be lost."""

    peer: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed, or the mempool has changed."""


Event = Started | Received | Connected | Tick

# Effects


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the record durable, and the block with it, in one transaction."""

    record: SafetyRecord
    block: Block | None


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to one validator."""

    to: int
    message: Message


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send a message to every other validator."""

    message: Message


@dataclass(frozen=True, slots=True)
class CommittedBlock(Generic[S]):
    """A committed block and what executing it gave."""

    block: Block
    execution: Execution[S]


@dataclass(frozen=True, slots=True)
class Commit(Generic[S]):
    """Consecutive blocks, oldest first, committed by one certificate, whose parent is the last of them.

    The headers of the later blocks lead from an earlier one to the certificate: that is its proof of commit. The last block of
    an epoch names the ``next_committee``; where rounds were skipped behind it, the headers of the dropped blocks in ``suffix``
    lead on to the certificate's parent.
    """

    blocks: tuple[CommittedBlock[S], ...]
    certificate: QuorumCert
    suffix: tuple[Header, ...] = ()

    @property
    def next_committee(self) -> tuple[bytes, ...] | None:
        """Who takes over after the last block, None within an epoch."""
        return self.blocks[-1].execution.next_committee


@dataclass(frozen=True, slots=True)
class ServeBlocks:
    """Answer ``to`` with the committed blocks of a range of heights, followed by ``tail``, as far as one message holds.

    The range is empty when ``from_height`` is above ``stored_to``; ``certificate`` is over the last block of the tail.
    """

    to: int
    from_height: Height
    stored_to: Height
    tail: tuple[Block, ...]
    certificate: QuorumCert


@dataclass(frozen=True, slots=True)
class ServeEpoch:
    """Lead ``to``, which is in an epoch that has ended, from a height on towards the end of that epoch."""

    to: int
    epoch: int
    from_height: Height


@dataclass(frozen=True, slots=True)
class Accuse:
    """Somebody broke the protocol and signed it."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Refuse:
    """A message was not what it should be: count it, blame ``sender``, go on."""

    sender: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopVoting:
    """The key has signed what this safety record does not know: the node is an observer until it has a new key."""

    reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    """This node executes a certified block differently from the quorum; going on would fork its state."""

    reason: str


Effect = Persist | Send | Broadcast | Commit[S] | ServeBlocks | ServeEpoch | Accuse | Refuse | StopVoting | Halt
