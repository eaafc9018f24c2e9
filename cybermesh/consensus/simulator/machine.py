"""One simulated machine: its disk, which survives, and its process, which does not."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Effect, Event, SafetyRecord
from cybermesh.consensus.forensics import Testimony
from cybermesh.consensus.journal import standing
from cybermesh.consensus.mempool import Mempool
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.simulator.application import LogState
from cybermesh.consensus.simulator.oracles import NodeOracle
from cybermesh.consensus.types import Block, BlockHash, Header, QuorumCert

if TYPE_CHECKING:
    from cybermesh.consensus.simulator.traitor import Traitor

BACKLOG_MAX: Final = 512


@dataclass(slots=True)
class Disk:
    """What survives a crash: the safety file (``record``, ``journal``) and the store, which may be behind it."""

    record: SafetyRecord
    journal: dict[BlockHash, Block] = field(default_factory=dict)
    chain: list[Block] = field(default_factory=list)
    certificate: QuorumCert | None = None
    state: LogState | None = None
    stored_boot: int = 0
    stored_voted_round: int = 0
    epoch_ends: dict[int, tuple[tuple[Header, ...], QuorumCert]] = field(default_factory=dict)

    @property
    def fault(self) -> str | None:
        """Why the safety file must not be used to vote, None when it may."""
        return standing(
            self.record,
            stored_boot=self.stored_boot,
            stored_voted_round=self.stored_voted_round,
            stored_epoch=self.chain[-1].header.epoch if self.chain else self.record.epoch,
        )


@dataclass(slots=True)
class Machine:
    """``position`` numbers machines, ``index`` validators; a twin shares its index. ``lives`` counts starts.

    ``committee`` is that of the epoch it is in.

    While a write waits for room on the disk, ``stuck`` holds what is to be done after it and ``backlog`` what came meanwhile.
    ``committed`` is all that it has ever committed, across its lives.
    """

    position: int
    index: int
    name: str
    committee: Committee
    disk: Disk
    oracle: NodeOracle
    skew_ms: int
    peers: tuple[int, ...]
    traitor: Traitor | None = None
    is_honest: bool = True
    is_observer: bool = False
    replica: Replica[LogState] | None = None
    mempool: Mempool = field(default_factory=Mempool)
    wake_at: int | None = None
    lives: int = 0
    stuck: Sequence[Effect[LogState]] | None = None
    backlog: deque[Event] = field(default_factory=lambda: deque(maxlen=BACKLOG_MAX))
    committed: list[Block] = field(default_factory=list)
    certificate: QuorumCert | None = None

    @property
    def testimony(self) -> Testimony | None:
        """All that it has committed, the block whose certificate proves it, and that certificate."""
        if self.certificate is None:
            return None
        proof = self.disk.journal.get(self.certificate.block_hash)
        return Testimony([*self.committed, *(() if proof is None else (proof,))], self.certificate)
