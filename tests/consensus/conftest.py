"""A committee of known keys, and blocks, votes and certificates made by hand: transcripts start from these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.certificates import CertificateVerifier, timeout_bytes, vote_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Event, Now, Received, SafetyRecord, Started, Tick
from cybermesh.consensus.leader import RoundRobin
from cybermesh.consensus.mempool import Mempool
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.simulator.application import LogApplication
from cybermesh.consensus.simulator.tokens import make_keys
from cybermesh.consensus.types import (
    NO_CERT,
    PROTOCOL_VERSION,
    Block,
    Header,
    Height,
    Message,
    QuorumCert,
    Round,
    Sync,
    Timeout,
    TimeoutCert,
    Vote,
    merkle_root,
)

WALL_MS = 1_700_000_000_000


class Bench:
    """Everything a test needs to talk to one replica as if it were the rest of the committee."""

    def __init__(self, n: int = 4, *, epoch: int = 1, application: LogApplication | None = None) -> None:
        self.signers, self.check = make_keys(n, is_real=False)
        self.committee = Committee.of(bytes(range(32)), self.signers, epoch=epoch)
        self.app = application or LogApplication()
        self.leaders = RoundRobin(self.committee)
        self.genesis = self.committee.genesis_cert()
        self.states = {self.genesis.block_hash: (0, 0, self.app.genesis())}
        self.me: int | None = None
        """The validator under test: certificates made here do without it, it knows what it has signed."""
        self.verifier = CertificateVerifier(self.committee, self.check, self.genesis)

    def quorum(self) -> list[int]:
        others = [index for index in range(self.committee.n) if index != self.me]
        return others[: self.committee.quorum] if len(others) >= self.committee.quorum else list(range(self.committee.n))

    def leader(self, round_: int) -> int:
        return self.leaders.leader(Round(round_), ())

    def rounds_led_by(self, index: int, *, above: int = 0) -> list[int]:
        return [round_ for round_ in range(above + 1, above + 30) if self.leader(round_) == index]

    def signer(self, index: int):
        return self.signers[self.committee.public_keys[index]]

    def block(
        self,
        round_: int,
        qc: QuorumCert | None = None,
        *,
        payload: Sequence[bytes] = (),
        tc: TimeoutCert | None = None,
        time_ms: int | None = None,
        author: int | None = None,
        **fields,
    ) -> Block:
        qc = qc or self.genesis
        height, parent_time, state = self.states[qc.block_hash]
        time_ms = max(WALL_MS, parent_time) if time_ms is None else time_ms
        payload = tuple(payload)
        execution = self.app.execute(state, BlockContext(self.committee.epoch, height + 1, time_ms), payload)
        header = Header(
            version=PROTOCOL_VERSION,
            chain_id=self.committee.chain_id,
            epoch=self.committee.epoch,
            round=Round(round_),
            height=Height(height + 1),
            author=self.leader(round_) if author is None else author,
            time_ms=time_ms,
            parent_hash=qc.block_hash,
            parent_round=qc.round,
            parent_signers=qc.signers,
            qc_digest=qc.digest,
            tc_digest=NO_CERT if tc is None else tc.digest,
            payload_root=merkle_root(payload),
            state_root=execution.state_root,
            decision_seq=execution.decision_seq,
        )
        header = dataclasses.replace(header, **fields)
        block = Block(header, qc, tc, payload, self.signer(header.author).sign(header.hash))
        self.states[block.hash] = (height + 1, time_ms, execution.state)
        return block

    def vote(self, block: Block, voter: int) -> Vote:
        header = block.header
        message = vote_bytes(self.committee, header.round, header.hash, header.parent_round, header.parent_hash)
        signature = self.signer(voter).sign(message)
        return Vote(header.epoch, header.round, header.hash, header.parent_round, header.parent_hash, voter, signature)

    def qc(self, block: Block, voters: Sequence[int] | None = None) -> QuorumCert:
        voters = self.quorum() if voters is None else voters
        votes = [self.vote(block, voter) for voter in voters]
        header = block.header
        signatures = tuple((vote.voter, vote.signature) for vote in votes)
        return QuorumCert(header.epoch, header.round, header.hash, header.parent_round, header.parent_hash, signatures)

    def timeout(
        self, round_: int, voter: int, high_qc: QuorumCert | None = None, last_tc: TimeoutCert | None = None
    ) -> Timeout:
        high_qc = high_qc or self.genesis
        signature = self.signer(voter).sign(timeout_bytes(self.committee, Round(round_), high_qc.round))
        return Timeout(self.committee.epoch, Round(round_), high_qc, last_tc, voter, signature)

    def tc(self, round_: int, high_qcs: Sequence[QuorumCert] | None = None) -> TimeoutCert:
        high_qcs = high_qcs or [self.genesis] * self.committee.quorum
        timeouts = [self.timeout(round_, voter, qc) for voter, qc in zip(self.quorum(), high_qcs, strict=True)]
        signatures = tuple((each.voter, each.high_qc.round, each.signature) for each in timeouts)
        return TimeoutCert(self.committee.epoch, Round(round_), max(high_qcs, key=lambda qc: qc.round), signatures)

    def sync(self, high_qc: QuorumCert | None = None, last_tc: TimeoutCert | None = None) -> Sync:
        return Sync(self.committee.epoch, high_qc or self.genesis, last_tc, Height(0), 1, wants_reply=False)

    def fresh_record(self) -> SafetyRecord:
        return SafetyRecord.fresh(self.genesis, boot=1)


class Talk:
    """One replica and its transcript: each call is an event, its result the effects."""

    def __init__(
        self, bench: Bench, index: int, *, record: SafetyRecord | None = None, journal: Sequence[Block] = (), is_observer=False
    ):
        bench.me = index
        self.bench = bench
        self.index = index
        self.mempool = Mempool()
        self.now_ms = 1_000
        self.skew_ms = 0
        parts = Parts(
            bench.committee,
            index,
            bench.app,
            self.mempool,
            bench.leaders,
            bench.check,
            None if is_observer else bench.signer(index),
            lambda: 0.0,
            Timing(),
        )
        root = Root.genesis(bench.committee, bench.app.genesis())
        self.replica = Replica(parts, root, record or bench.fresh_record(), self.now, journal)

    @property
    def now(self) -> Now:
        return Now(self.now_ms, WALL_MS + self.now_ms + self.skew_ms)

    def event(self, event: Event) -> list:
        return self.replica.step(event, self.now)

    def hear(self, message: Message, sender: int | None = None) -> list:
        if sender is None:
            sender = next(peer for peer in range(self.bench.committee.n) if peer != self.index)
        return self.event(Received(sender, message))

    def wait(self, ms: int) -> list:
        """Let time pass, waking the replica whenever it asked to be."""
        effects = []
        end = self.now_ms + ms
        while (wake := self.replica.wake_ms()) is not None and wake <= end:
            assert wake >= self.now_ms, "a wake-up in the past would spin"
            self.now_ms = max(wake, self.now_ms)
            effects += self.event(Tick())
        self.now_ms = end
        return effects

    def submit(self, transaction: bytes) -> list:
        pending = self.bench.app.admit(self.replica.root.state, transaction, 0)
        assert pending is not None
        self.mempool.add(pending)
        return self.event(Tick())

    def start(self, *, past_first_round: bool = True) -> list:
        """Start, hear from everybody, and go through the barred first round by a timeout certificate."""
        effects = self.event(Started())
        for peer in range(self.bench.committee.n):
            if peer != self.index:
                effects += self.hear(self.bench.sync(), peer)
        if past_first_round:
            effects += self.hear(self.bench.sync(last_tc=self.bench.tc(1)))
        return effects


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def make_bench():
    return Bench


@pytest.fixture
def talk(bench: Bench):
    """Makes transcripts with replicas of the bench's committee."""

    def make(index: int = 0, **options) -> Talk:
        return Talk(bench, index, **options)

    return make


@pytest.fixture
def make_talk():
    return Talk
