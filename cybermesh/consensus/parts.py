"""What a replica is made of and where it starts; the composition root chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cybermesh.consensus.application import Application
from cybermesh.consensus.certificates import SignatureCheck, Signer
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.leader import LeaderElection
from cybermesh.consensus.mempool import Mempool
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.types import BlockHash, Header, Height, QuorumCert, Round

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Parts(Generic[S]):
    """``index`` is this validator's number, ``signer`` its key (None for an observer), ``jitter`` gives numbers in [0, 1)."""

    committee: Committee
    index: int
    application: Application[S]
    mempool: Mempool
    leaders: LeaderElection
    check: SignatureCheck
    signer: Signer | None
    jitter: Callable[[], float]
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True)
class Root(Generic[S]):
    """The last committed block, or genesis: what a replica starts from.

    ``certificate`` is the one that committed the block (its parent is the block), the epoch's root certificate for genesis.
    ``recent`` are committed headers up to this one, oldest first, for the election of leaders.
    """

    hash: BlockHash
    round: Round
    height: Height
    time_ms: int
    state: S
    certificate: QuorumCert
    recent: tuple[Header, ...] = ()

    @classmethod
    def genesis(cls, committee: Committee, state: S) -> Root[S]:
        """Return the root of a chain without blocks."""
        certificate = committee.genesis_cert()
        return cls(certificate.block_hash, Round(0), Height(0), 0, state, certificate)
