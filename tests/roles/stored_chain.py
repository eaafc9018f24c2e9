"""A chain as a validator stores it, made without running consensus: real blocks, certificates, receipts and outbox rows."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from cybermesh.bus.topics import Topics
from cybermesh.consensus.application import Execution
from cybermesh.consensus.certificates import timeout_bytes, vote_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Commit, CommittedBlock
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
from cybermesh.ledger.snapshot import encode_snapshot
from cybermesh.ledger.state import Applied, State
from cybermesh.proof import decode_step
from cybermesh.roles import records
from cybermesh.store.records import CommittedBlock as StoredCommit
from cybermesh.store.records import StoredSnapshot
from cybermesh.store.store import Store, open_store
from tests.ledger.history import History
from tests.ledger.world import World, key, policy


class StoredChain:
    """Makes commits; ``rows`` are the records of all of them, each list one call of ``append``."""

    def __init__(self, world: World | None = None) -> None:
        self.world = World() if world is None else world
        genesis = self.world.genesis
        self.committee = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
        self.keys = sorted((key(member.name) for member in genesis.validators), key=lambda signer: signer.public)
        self.author = records.Author(genesis, key("v0"), Topics())
        self.certificate = self.committee.genesis_cert()
        self.waiting: list[CommittedBlock[State]] = []
        self.rows: list[list[StoredCommit]] = []
        self.snapshots: list[StoredSnapshot] = []

    def add(self, *transactions: bytes, skipped: int = 0, commits: bool = True, above: int = 0) -> Applied:
        """Execute a block after ``skipped`` rounds without one; it stays uncommitted until the next that ``commits``.

        ``above`` it, in rounds that do not follow each other, come empty blocks until a certificate commits it.
        """
        before = self.certificate
        applied = self.world.try_apply(*transactions)
        assert isinstance(applied, Applied), applied
        self.world.apply(*transactions)
        round_ = Round(before.round + 1 + skipped)
        tc = self._timeout(Round(round_ - 1), before) if skipped else None
        header = Header(
            version=PROTOCOL_VERSION, chain_id=self.world.genesis.chain_id, epoch=self.committee.epoch, round=round_,
            height=Height(self.world.height), author=round_ % self.committee.n, time_ms=self.world.now_ms,
            parent_hash=before.block_hash, parent_round=before.round, parent_signers=before.signers, qc_digest=before.digest,
            tc_digest=NO_CERT if tc is None else tc.digest, payload_root=merkle_root(transactions),
            state_root=applied.state.root, decision_seq=applied.state.decision_seq,
        )  # fmt: skip
        block = Block(header, before, tc, tuple(transactions), self.keys[header.author].sign(header.hash))
        state = applied.state
        execution = Execution(state, state.root, state.decision_seq, bool(applied.receipts), applied, applied.next_committee)
        self.waiting.append(CommittedBlock(block, execution))
        self.certificate = self.certify(header)
        if commits:
            self._commit(header, above)
        return applied

    def _commit(self, block: Header, above: int) -> None:
        """Commit what waits by a certificate of a child in the next round, as a replica gets it."""
        suffix = [block]
        for _ in range(above):
            top = suffix[-1]
            qc, skipped = self.certify(top), Round(top.round + 1)
            child = dataclasses.replace(
                top, round=Round(top.round + 2), height=Height(top.height + 1), parent_hash=BlockHash(top.hash),
                parent_round=top.round, parent_signers=qc.signers, qc_digest=qc.digest,
                tc_digest=self._timeout(skipped, qc).digest, payload_root=merkle_root(()),
            )  # fmt: skip
            suffix.append(child)
        last = suffix[-1]
        child = BlockHash(bytes([7]) * 32)
        message = vote_bytes(self.committee, Round(last.round + 1), child, last.round, last.hash)
        signatures = tuple((voter, self.keys[voter].sign(message)) for voter in range(self.committee.quorum))
        certificate = QuorumCert(self.committee.epoch, Round(last.round + 1), child, last.round, last.hash, signatures)
        commit = Commit(tuple(self.waiting), certificate, tuple(suffix[1:]))
        self.rows.append(records.of_commit(commit, self.author, records.Moment(self.world.now_ms + 7, last.round)))
        self.waiting = []
        steps = tuple(decode_step(epoch.step) for epoch in self.rows[-1][-1].epochs if epoch.step is not None)
        self.author = dataclasses.replace(self.author, steps=(*self.author.steps, *steps))
        members = commit.blocks[-1].execution.next_committee
        if members is not None:
            names = [name for _, name in self.world.state.committee]
            self.keys = sorted((key(name) for name in names), key=lambda signer: signer.public)
            self.committee = self.committee.successor(members, block.hash)
            self.certificate = self.committee.genesis_cert()

    def certify(self, header: Header) -> QuorumCert:
        message = vote_bytes(self.committee, header.round, header.hash, header.parent_round, header.parent_hash)
        signatures = tuple((voter, self.keys[voter].sign(message)) for voter in range(self.committee.quorum))
        named = (header.round, BlockHash(header.hash), header.parent_round, header.parent_hash)
        return QuorumCert(self.committee.epoch, *named, signatures)

    def _timeout(self, round_: Round, high: QuorumCert) -> TimeoutCert:
        message = timeout_bytes(self.committee, round_, high.round)
        return TimeoutCert(
            self.committee.epoch,
            round_,
            high,
            tuple((voter, high.round, self.keys[voter].sign(message)) for voter in range(self.committee.quorum)),
        )

    def snapshot(self) -> None:
        """Take a snapshot of the state as it is now."""
        state, block = self.world.state, self.certificate.block_hash
        self.snapshots.append(StoredSnapshot(self.world.height, block, state.root, encode_snapshot(state), self.world.now_ms))

    async def write(self, store: Store) -> None:
        for rows in self.rows:
            await store.append(rows)
        for snapshot in self.snapshots:
            await store.node.save_snapshot(snapshot)


def usual_chain() -> StoredChain:
    """Decisions opened and ended, evidence that comes twice, skipped rounds, a commit of several blocks, a snapshot."""
    chain = StoredChain()
    world = chain.world
    chain.add(*world.case("solo", "one", policy("203.0.113.5", ttl=60), "203.0.113.5"))
    world.after(1)
    chain.add(*world.case("north-1", "two"), world.anomaly("south-1", "agrees"), skipped=2, commits=False)
    chain.add(*world.case("solo", "three", policy("203.0.113.6"), "203.0.113.6"))
    world.after(2)
    chain.add(world.command("alice", "allow_list", add=["192.0.2.7/32"]))
    chain.snapshot()
    world.after(70)
    chain.add(commits=False)
    chain.add(*world.case("solo", "four", policy("203.0.113.5", ttl=60), "203.0.113.5"), skipped=1)
    world.after(1)
    chain.add(world.evidence("north-2", "e-five"), world.policy("north-2", "refused", policy("127.0.0.1")))
    chain.add()
    return chain


def random_chain(seed: int, blocks: int) -> StoredChain:
    """What any mixture of signers may have put into blocks."""
    rng = random.Random(seed)
    history = History(rng)
    chain = StoredChain(history.world)
    for number in range(blocks):
        chain.add(*history.draw(), skipped=rng.choice((0, 0, 0, 1, 5)), commits=number == blocks - 1 or rng.random() < 0.7)
    return chain


async def stored(chain: StoredChain, where: Path) -> Path:
    async with open_store(where) as store:
        await chain.write(store)
    return where
