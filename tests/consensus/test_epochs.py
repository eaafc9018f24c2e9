"""A committee hands over to the next one at the same block on every node, and leads those who missed it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from cybermesh.consensus.certificates import CertificateVerifier, commits
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.driver import Driver, Shell
from cybermesh.consensus.events import Commit, ServeEpoch, Tick
from cybermesh.consensus.journal import Journal
from cybermesh.consensus.leader import Reputation
from cybermesh.consensus.mempool import Mempool
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.simulator.application import LogApplication, LogState
from cybermesh.consensus.sync import lead_on
from cybermesh.consensus.transport.memory import MemoryNetwork
from cybermesh.consensus.types import Header, QuorumCert, Sync
from cybermesh.keys import verify
from tests.consensus.test_driver import CHAIN, START_MS, Cluster, Store, run_inline

CHANGE = b"committee "


class ChangingApplication(LogApplication):
    """``committee`` with public keys behind it ends the epoch."""

    def execute(self, parent, context, payload):
        execution = super().execute(parent, context, payload)
        changes = [each[len(CHANGE) :] for each in payload if each.startswith(CHANGE)]
        if execution is None or not changes:
            return execution
        keys = changes[-1]
        return dataclasses.replace(execution, next_committee=tuple(keys[at : at + 32] for at in range(0, len(keys), 32)))


class EpochStore(Store):
    """Keeps the ends of epochs beside the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[int, tuple[Sequence[Header], QuorumCert]] = {}
        self.committees: dict[int, Committee] = {}

    async def on_commit(self, commit: Commit[LogState]) -> None:
        await super().on_commit(commit)
        if commit.next_committee is not None:
            last = commit.blocks[-1].block.header
            self.ends[last.epoch] = ((last, *commit.suffix), commit.certificate)

    async def epoch_end(self, epoch: int):
        return self.ends.get(epoch)


class EpochCluster(Cluster):
    """Validators that go on in the next epoch, by key; each committee has its own network."""

    def __init__(self, path: Path, n: int = 4) -> None:
        super().__init__(path, n)
        self.app = ChangingApplication()
        self.stores = [EpochStore() for _ in range(n)]
        self.networks = {self.committee: self.network}
        self.left: set[int] = set()

    async def run(self, index: int) -> None:
        public, store = self.committee.public_keys[index], self.stores[index]
        committee, root = self.committee, Root.genesis(self.committee, self.app.genesis())
        with Journal.open(self.paths[index], chain_id=CHAIN, public_key=public) as journal:
            while True:
                store.committees[committee.epoch] = committee
                position = committee.index_of(public)
                if position is None:
                    self.left.add(index)
                    return
                network = self.networks.setdefault(committee, MemoryNetwork(committee.n))
                with network.endpoint(position) as transport:
                    shell = Shell(transport, journal, store, store.on_commit, self.evidence.append, self._wall_ms, run_inline)
                    parts = Parts(
                        committee, position, self.app, Mempool(), Reputation(committee), verify, self.keys[public],
                        random.Random(index).random,
                    )  # fmt: skip
                    driver = self.drivers[index] = Driver(parts, root, shell)
                    end = await driver.run()
                committee, root = end.committee, end.root

    def _wall_ms(self) -> int:
        return START_MS + int(asyncio.get_running_loop().time() * 1000)

    def keys_of(self, *indices: int) -> bytes:
        return b"".join(self.committee.public_keys[index] for index in indices)


@pytest.fixture
def cluster(tmp_path: Path) -> EpochCluster:
    return EpochCluster(tmp_path)


@pytest.mark.looptime
async def test_the_next_committee_goes_on_where_the_last_block_of_the_epoch_ended(cluster: EpochCluster):
    async with cluster.running(0, 1, 2, 3):
        await asyncio.sleep(0.5)
        cluster.submit(b"before", 0)
        await cluster.until_committed(b"before", 0, 1, 2, 3)
        change = CHANGE + cluster.keys_of(0, 2, 3)
        cluster.submit(change, 0, 1, 2, 3)
        await cluster.until_committed(change, 0, 1, 2, 3)
        await asyncio.sleep(1)
        assert cluster.left == {1}
        cluster.submit(b"after", 2)
        await cluster.until_committed(b"after", 0, 2, 3)
    chain = cluster.stores[0].chain
    last = next(position for position, block in enumerate(chain) if change in block.payload)
    assert [block.height for block in chain] == list(range(1, len(chain) + 1))
    assert {block.header.epoch for block in chain[: last + 1]} == {1}
    assert {block.header.epoch for block in chain[last + 1 :]} == {2}
    assert chain[last + 1].header.parent_hash == cluster.stores[0].committees[2].genesis_hash()
    assert len(cluster.stores[1].chain) == last + 1
    cluster.assert_agreement()
    assert cluster.evidence == []


@pytest.mark.looptime
async def test_who_missed_the_end_of_an_epoch_is_led_to_it_and_takes_part_in_the_next(cluster: EpochCluster):
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cluster.run(index), name=f"validator-{index}") for index in (0, 1, 2)]
        await asyncio.sleep(1)
        for number in range(150):
            cluster.submit(b"tx %d" % number, 0, 1, 2)
            await cluster.until_committed(b"tx %d" % number, 0, 1, 2)
        change = CHANGE + cluster.keys_of(0, 1, 2, 3)
        cluster.submit(change, 0, 1, 2)
        await cluster.until_committed(change, 0, 1, 2)
        await asyncio.sleep(1)
        assert set(cluster.stores[0].committees) == {1, 2}
        # All four share one network from here on, so that the one behind meets the others as it would over TCP.
        second = cluster.stores[0].committees[2]
        cluster.networks[cluster.committee] = cluster.networks[second]
        tasks.append(group.create_task(cluster.run(3), name="validator-3"))
        await cluster.until_committed(change, 3)
        await asyncio.sleep(1)
        cluster.submit(b"together", 3)
        await cluster.until_committed(b"together", 0, 1, 2, 3)
        for task in tasks:
            task.cancel()
    assert cluster.drivers[3].status.problem is None
    cluster.assert_agreement()


def test_the_blocks_above_the_last_of_an_epoch_change_nothing_and_are_dropped(make_bench, make_talk):
    bench = make_bench(application=ChangingApplication())
    change = CHANGE + b"".join(bench.committee.public_keys)
    talk = make_talk(bench, 0)
    talk.start()
    rounds = iter([round_ for round_ in range(2, 40) if bench.leader(round_) != 0])
    first = next(rounds)
    last = bench.block(first, tc=bench.tc(1), payload=[change])
    effects = talk.hear(last)
    assert any(getattr(each, "message", None) and each.message == bench.vote(last, 0) for each in effects)
    qc = bench.qc(last)
    # Someone skips a round, so that no certificate names the last block as its parent in the round before.
    tc = bench.tc(first + 1, [qc] * bench.committee.quorum)
    root = last.header.state_root
    above = bench.block(first + 2, qc, tc=tc, state_root=root, decision_seq=last.header.decision_seq)
    top = bench.block(first + 3, bench.qc(above), state_root=root, decision_seq=last.header.decision_seq)
    talk.hear(Sync(1, qc, tc, last.height, 1, wants_reply=False))
    for block in (above, top):
        if bench.leader(block.round) != 0:
            talk.hear(block)
    effects = talk.hear(bench.sync(bench.qc(top)))
    commit = next(each for each in effects if isinstance(each, Commit))
    assert [each.block for each in commit.blocks] == [last]
    assert commit.suffix == (above.header,)
    assert commit.next_committee == bench.committee.public_keys
    assert commits(last.header, commit.suffix, commit.certificate)
    assert talk.event(Tick()) == []
    assert talk.replica.wake_ms() is None
    answer = lead_on(ServeEpoch(1, 1, last.height), [last], ((last.header, *commit.suffix), commit.certificate))
    assert answer is not None
    verifier = CertificateVerifier(bench.committee, bench.check, bench.genesis)
    assert verifier.certified_fault(last, answer.certificate, answer.headers) is None
    assert verifier.certified_fault(last, answer.certificate) == "certificate"
