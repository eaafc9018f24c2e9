"""Whole validators over the memory transport, with real keys and real safety files, in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cybermesh.consensus.certificates import timeout_bytes
from cybermesh.consensus.codec import encode_message
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.driver import Driver, HaltedError, Shell
from cybermesh.consensus.events import Commit, SafetyRecord
from cybermesh.consensus.journal import Journal, JournalError, standing
from cybermesh.consensus.leader import LeaderElection, RoundRobin
from cybermesh.consensus.mempool import Admission, Mempool, PendingTransaction
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.simulator.application import LogApplication, LogState
from cybermesh.consensus.transport import Kind
from cybermesh.consensus.transport.memory import MemoryNetwork
from cybermesh.consensus.types import Block, Evidence, Forward, GetBlocks, Height, QuorumCert, Round, Timeout, Vote
from cybermesh.keys import SigningKey, verify

pytestmark = pytest.mark.looptime

CHAIN = bytes(range(32))
START_MS = 1_700_000_000_000


class Store:
    """What a validator's database is to its driver: the chain, which a restart finds again."""

    def __init__(self) -> None:
        self.chain: list[Block] = []
        self.state: LogState | None = None
        self.certificate: QuorumCert | None = None
        self.deliveries: list[int] = []
        self.delay_s = 0.0
        self.boot = 0
        self.voted_round = 0
        self.has_grown = asyncio.Event()

    async def on_commit(self, commit: Commit[LogState]) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        for each in commit.blocks:
            self.deliveries.append(each.block.height)
            if each.block.height > len(self.chain):
                self.chain.append(each.block)
        self.state = commit.blocks[-1].execution.state
        self.certificate = commit.certificate
        self.has_grown.set()

    async def until_it_holds(self, text: bytes) -> None:
        while text not in self.transactions:
            self.has_grown.clear()
            await self.has_grown.wait()

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        return self.chain[from_height - 1 : from_height - 1 + count_max]

    @property
    def transactions(self) -> list[bytes]:
        return [transaction for block in self.chain for transaction in block.payload]


async def run_inline(write: Callable[[], None]) -> None:
    """Virtual time would run away from a worker thread."""
    write()


class Cluster:
    """The machines of a committee: files and stores stay, drivers come and go."""

    def __init__(self, path: Path, n: int = 4) -> None:
        self.mempool_bytes = 1_000_000
        self.leaders: Callable[[Committee], LeaderElection] = RoundRobin
        keys = [SigningKey(hashlib.sha256(bytes([index])).digest()) for index in range(n)]
        self.committee = Committee.of(CHAIN, [key.public for key in keys])
        self.keys = {key.public: key for key in keys}
        self.app = LogApplication()
        self.network = MemoryNetwork(n)
        self.stores = [Store() for _ in range(n)]
        self.drivers: dict[int, Driver[LogState]] = {}
        self.evidence: list[Evidence] = []
        self.paths = [path / f"{index}.safety" for index in range(n)]
        record = SafetyRecord.fresh(self.committee.genesis_cert())
        for file, public in zip(self.paths, self.committee.public_keys, strict=True):
            Journal.create(file, chain_id=CHAIN, public_key=public, record=record)

    def root(self, store: Store) -> Root[LogState]:
        if not store.chain:
            return Root.genesis(self.committee, self.app.genesis())
        tip = store.chain[-1]
        assert store.state is not None
        assert store.certificate is not None
        recent = tuple(block.header for block in store.chain[-64:])
        return Root(tip.hash, tip.round, tip.height, tip.header.time_ms, store.state, store.certificate, recent)

    async def run(self, index: int) -> None:
        """Run one validator until cancelled."""
        public = self.committee.public_keys[index]
        store = self.stores[index]
        with (
            Journal.open(self.paths[index], chain_id=CHAIN, public_key=public) as journal,
            self.network.endpoint(index) as transport,
        ):
            old = standing(
                journal.load(),
                stored_boot=store.boot,
                stored_voted_round=store.voted_round,
                stored_epoch=1 if store.boot else 0,
            )
            store.boot = journal.boot
            loop = asyncio.get_running_loop()
            parts = Parts(
                self.committee,
                index,
                self.app,
                Mempool(bytes_max=self.mempool_bytes, producer_bytes_max=self.mempool_bytes),
                self.leaders(self.committee),
                verify,
                None if old else self.keys[public],
                random.Random(index).random,
            )
            shell = Shell(
                transport,
                journal,
                store,
                store.on_commit,
                self.evidence.append,
                lambda: START_MS + int(loop.time() * 1000),
                run_inline,
            )
            driver = Driver(parts, self.root(store), shell)
            self.drivers[index] = driver
            try:
                await driver.run()
            finally:
                store.voted_round = driver.record.last_voted_round

    @asynccontextmanager
    async def running(self, *indices: int) -> AsyncIterator[None]:
        """These validators run inside the block."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.run(index), name=f"validator-{index}") for index in indices]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    def submit(self, text: bytes, *indices: int) -> PendingTransaction:
        pending = self.app.admit(self.app.genesis(), text, 0)
        assert pending is not None
        for index in indices:
            assert self.drivers[index].submit(pending) is Admission.ADDED
        return pending

    async def until_committed(self, text: bytes, *indices: int, limit_s: float = 10) -> None:
        async with asyncio.timeout(limit_s):
            for index in indices:
                await self.stores[index].until_it_holds(text)

    def assert_agreement(self) -> None:
        longest = max((store.chain for store in self.stores), key=len)
        for store in self.stores:
            assert store.chain == longest[: len(store.chain)]
            assert len(set(store.transactions)) == len(store.transactions)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def settle() -> None:
    """Start, hear of each other, and leave the barred first round."""
    await asyncio.sleep(0.5)


async def test_four_validators_commit_what_any_of_them_learns(cluster: Cluster):
    async with cluster.running(0, 1, 2, 3):
        await settle()
        assert [driver.status.problem for driver in cluster.drivers.values()] == [None] * 4
        cluster.submit(b"known to all", 0, 1, 2, 3)
        cluster.submit(b"known to one", 2)
        await cluster.until_committed(b"known to all", 0, 1, 2, 3, limit_s=0.2)
        await cluster.until_committed(b"known to one", 0, 1, 2, 3, limit_s=0.5)
    cluster.assert_agreement()
    assert all(not driver.counters.refused for driver in cluster.drivers.values())
    assert cluster.evidence == []


async def test_one_of_four_stopped_the_others_go_on(cluster: Cluster):
    async with cluster.running(0, 1, 3):
        await settle()
        for number in range(8):
            cluster.submit(b"%d" % number, 0, 1, 3)
            await cluster.until_committed(b"%d" % number, 0, 1, 3, limit_s=3)
    cluster.assert_agreement()


async def test_two_of_four_stopped_nothing_is_committed_and_nobody_spins(cluster: Cluster):
    async with cluster.running(0, 1):
        await settle()
        cluster.submit(b"in vain", 0, 1)
        await asyncio.sleep(60)
        assert all(store.chain == [] for store in cluster.stores)
        assert [driver.status.problem for driver in cluster.drivers.values()] == ["waiting for a quorum"] * 2
        assert all(driver.counters.wakes < 1_000 for driver in cluster.drivers.values())


async def test_two_that_stop_and_come_back_resume_the_chain(cluster: Cluster):
    async with cluster.running(0, 1):
        async with cluster.running(2, 3):
            await settle()
            cluster.submit(b"before", 0)
            await cluster.until_committed(b"before", 0, 1, 2, 3, limit_s=1)
        cluster.submit(b"meanwhile", 0)
        await asyncio.sleep(20)
        assert b"meanwhile" not in cluster.stores[0].transactions
        async with cluster.running(2, 3):
            await cluster.until_committed(b"meanwhile", 0, 1, 2, 3, limit_s=5)
    cluster.assert_agreement()


async def test_a_validator_that_was_down_catches_up_by_height(cluster: Cluster):
    async with cluster.running(0, 1, 2):
        await settle()
        for number in range(150):
            cluster.submit(b"%d" % number, 0, 1, 2)
            if number % 10 == 9:
                await cluster.until_committed(b"%d" % number, 0, 1, 2, limit_s=5)
        behind = len(cluster.stores[0].chain)
        assert behind > 15
        async with cluster.running(3):
            await cluster.until_committed(b"149", 3, limit_s=2)
            cluster.submit(b"together", 3)
            await cluster.until_committed(b"together", 0, 1, 2, 3, limit_s=3)
    cluster.assert_agreement()
    assert cluster.stores[3].deliveries == sorted(set(cluster.stores[3].deliveries))
    assert not cluster.drivers[3].counters.refused


async def test_a_restart_of_everybody_loses_and_repeats_nothing(cluster: Cluster):
    for life in range(4):
        async with cluster.running(0, 1, 2, 3):
            await settle()
            text = b"life %d" % life
            cluster.submit(text, life)
            await cluster.until_committed(text, 0, 1, 2, 3, limit_s=5)
            cluster.submit(b"unfinished %d" % life, *range(4))
    cluster.assert_agreement()
    assert [store.boot for store in cluster.stores] == [4] * 4
    for store in cluster.stores:
        assert sorted(set(store.deliveries)) == list(range(1, len(store.chain) + 1))


async def test_a_slow_store_makes_consensus_wait_and_loses_nothing(cluster: Cluster):
    cluster.stores[0].delay_s = 0.3
    async with cluster.running(0, 1, 2, 3):
        await settle()
        for number in range(40):
            cluster.submit(b"%d" % number, *range(4))
            await asyncio.sleep(0.05)
        await cluster.until_committed(b"39", 0, 1, 2, 3, limit_s=60)
    cluster.assert_agreement()
    assert cluster.stores[0].deliveries == sorted(set(cluster.stores[0].deliveries))


async def test_an_old_copy_of_the_safety_file_makes_an_observer(cluster: Cluster):
    old = cluster.paths[0].read_bytes()
    async with cluster.running(0, 1, 2, 3):
        await settle()
        cluster.submit(b"first", 0)
        await cluster.until_committed(b"first", 0, 1, 2, 3)
    for leftover in cluster.paths[0].parent.glob("0.safety-*"):
        leftover.unlink()
    cluster.paths[0].write_bytes(old)
    async with cluster.running(0, 1, 2, 3):
        await settle()
        cluster.submit(b"second", 1)
        await cluster.until_committed(b"second", 0, 1, 2, 3)
        assert cluster.drivers[0].status.problem == "observer"
        assert cluster.drivers[0].counters.sent["vote"] == 0
    cluster.assert_agreement()


async def test_a_disk_that_is_full_for_a_while_silences_the_node_and_heals(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    async with cluster.running(0, 1, 2, 3):
        await settle()
        original = Journal.write
        broken = cluster.paths[2]

        def full(self: Journal, record: SafetyRecord, blocks: Sequence[Block]) -> None:
            if self._path == broken:
                raise JournalError("disk full")
            original(self, record, blocks)

        monkeypatch.setattr(Journal, "write", full)
        sent = cluster.drivers[2].counters.sent["vote"]
        cluster.submit(b"without it", 0, 1, 3)
        await cluster.until_committed(b"without it", 0, 1, 3, limit_s=3)
        assert cluster.drivers[2].counters.sent["vote"] == sent
        assert cluster.drivers[2].status.problem == "disk full"
        monkeypatch.setattr(Journal, "write", original)
        cluster.submit(b"with it", 0, 1, 3)
        await cluster.until_committed(b"with it", 0, 1, 2, 3, limit_s=10)
        assert cluster.drivers[2].counters.sent["vote"] > sent
        assert cluster.drivers[2].status.problem is None
    cluster.assert_agreement()


async def test_an_idle_committee_makes_at_most_twenty_thousand_blocks_a_day_and_hardly_wakes(cluster: Cluster):
    async with cluster.running(0, 1, 2, 3):
        await settle()
        before = [dataclasses.replace(driver.counters) for driver in cluster.drivers.values()]
        height = cluster.drivers[0].status.height
        pause_s = 900
        await asyncio.sleep(pause_s)
        blocks = cluster.drivers[0].status.height - height
        assert pause_s / 5 * 0.9 < blocks <= 20_000 * pause_s / 86_400
        for was, driver in zip(before, cluster.drivers.values(), strict=True):
            assert driver.counters.wakes - was.wakes <= blocks
            assert driver.counters.events - was.events <= 8 * blocks
    cluster.assert_agreement()


async def test_an_idle_committee_with_one_stopped_gives_up_one_round_in_four_and_no_more(cluster: Cluster):
    async with cluster.running(0, 1, 2):
        await settle()
        before = cluster.drivers[0].counters.sent["timeout"]
        await asyncio.sleep(300)
        rounds = cluster.drivers[0].status.round
        blocks = cluster.drivers[0].status.height
        assert blocks >= 300 / 5 * 0.7
        assert cluster.drivers[0].counters.sent["timeout"] - before <= rounds / 4 + 2
    cluster.assert_agreement()


async def test_what_falls_due_is_committed_then_and_not_with_the_next_heartbeat(cluster: Cluster):
    async with cluster.running(0, 1, 2, 3):
        await settle()
        cluster.submit(b"alarm 1500", 0)
        await cluster.until_committed(b"alarm 1500", 0, 1, 2, 3)
        await asyncio.sleep(1.4)
        assert [store.state.rung for store in cluster.stores] == [0] * 4
        await asyncio.sleep(0.3)
        assert [store.state.rung for store in cluster.stores] == [1] * 4
    cluster.assert_agreement()


async def test_garbage_from_a_peer_is_counted_and_hurts_nobody(cluster: Cluster):
    async with cluster.running(0, 1, 2):
        with cluster.network.endpoint(3) as attacker:
            await settle()
            for peer in (0, 1, 2):
                for number in range(300):
                    attacker.send(peer, Kind.VOTE, hashlib.sha256(b"%d" % number).digest())
            cluster.submit(b"still", 0)
            await cluster.until_committed(b"still", 0, 1, 2, limit_s=3)
            assert cluster.drivers[0].counters.refused[3, "malformed"] == 300


async def test_a_node_that_computes_another_state_stops_loudly(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    strange = LogApplication()
    original = strange.execute

    def execute(parent, context, payload):
        execution = original(parent, context, payload)
        return dataclasses.replace(execution, state_root=hashlib.sha256(execution.state_root).digest())

    async with cluster.running(0, 1, 2):
        await settle()
        for number in range(3):
            cluster.submit(b"%d" % number, 0, 1, 2)
            await cluster.until_committed(b"%d" % number, 0, 1, 2)
        monkeypatch.setattr(strange, "execute", execute)
        cluster.app = strange
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.timeout(10):
                await cluster.run(3)
        assert caught.group_contains(HaltedError)


async def test_a_full_mempool_says_so_and_room_comes_with_the_next_commit(cluster: Cluster):
    cluster.mempool_bytes = 10
    async with cluster.running(0, 1, 2, 3):
        await settle()
        driver = cluster.drivers[0]
        cluster.submit(b"0123456789", 0)
        late = cluster.app.admit(cluster.app.genesis(), b"more", 0)
        assert late is not None
        assert driver.submit(late) is Admission.FULL
        async with asyncio.timeout(5):
            while driver.submit(late) is Admission.FULL:
                await driver.room()
        await cluster.until_committed(b"more", 0, 1, 2, 3)


async def test_a_storm_of_questions_from_one_validator_leaves_room_for_another(cluster: Cluster):
    """Answers are made of the database: each peer has one under way, the rest of its questions are dropped and counted."""
    async with cluster.running(0, 1, 2, 3):
        await settle()
        cluster.submit(b"something to ask for", 0, 1, 2, 3)
        await cluster.until_committed(b"something to ask for", 0, 1, 2, 3, limit_s=1)
        driver = cluster.drivers[0]
        tip = cluster.stores[0].chain[-1]
        question = encode_message(GetBlocks(cluster.committee.epoch, Height(1), tip.hash))
        asked = asyncio.Event()
        release = asyncio.Event()

        async def slow(from_height: int, count_max: int) -> Sequence[Block]:
            asked.set()
            await release.wait()
            return cluster.stores[0].chain[from_height - 1 : from_height - 1 + count_max]

        cluster.stores[0].blocks = slow  # type: ignore[method-assign]
        for _ in range(50):
            cluster.network.peer(1).send(0, Kind.GET_BLOCKS, question)  # type: ignore[union-attr]
            await asyncio.sleep(0.002)
        await asked.wait()
        cluster.network.peer(2).send(0, Kind.GET_BLOCKS, question)  # type: ignore[union-attr]
        await asyncio.sleep(0.01)
        assert driver.counters.unserved == 49
        before = driver.counters.sent[Kind.BLOCKS.value]
        release.set()
        await asyncio.sleep(0.01)
        assert driver.counters.sent[Kind.BLOCKS.value] - before == 2


@pytest.mark.parametrize("n", [1, 2, 4, 7, 31])
async def test_committees_of_any_size_commit(tmp_path: Path, n: int):
    cluster = Cluster(tmp_path, n)
    async with cluster.running(*range(n)):
        await settle()
        for number in range(3):
            cluster.submit(b"tx %d" % number, number % n)
            await cluster.until_committed(b"tx %d" % number, *range(n))
        assert {driver.status.problem for driver in cluster.drivers.values()} == {None}
    cluster.assert_agreement()


async def test_a_node_says_so_when_the_quorum_is_lost_and_when_it_is_back(cluster: Cluster):
    async with cluster.running(0, 1):
        async with cluster.running(2):
            await settle()
            assert cluster.drivers[0].status.problem is None
        cluster.submit(b"waits", 0)
        await asyncio.sleep(2)
        assert cluster.drivers[0].status.problem == "waiting for a quorum"
        async with cluster.running(2):
            await cluster.until_committed(b"waits", 0, 1, 2)
            assert cluster.drivers[0].status.problem is None


async def test_a_peer_that_urges_without_end_gets_few_blocks_for_it(cluster: Cluster):
    """Forwards of junk, of the current round, every ten milliseconds of a minute: an idle chain stays nearly idle."""
    async with cluster.running(0, 1, 2):
        await settle()
        with cluster.network.endpoint(3) as culprit:
            before = cluster.drivers[0].status.height
            for _ in range(6_000):
                await asyncio.sleep(0.01)
                round_ = cluster.drivers[0].status.round
                for peer in range(3):
                    culprit.send(peer, Kind.FORWARD, encode_message(Forward(1, Round(round_), b"")))
            assert cluster.drivers[0].status.height - before < 120


async def test_a_flood_of_stale_rounds_is_bounded_and_harms_nobody(cluster: Cluster):
    """A member repeats what it once said about round 1, a hundred times a millisecond, and the others go on."""
    key = cluster.keys[cluster.committee.public_keys[3]]
    genesis = cluster.committee.genesis_cert()
    signature = key.sign(timeout_bytes(cluster.committee, Round(1), Round(0)))
    stale = encode_message(Timeout(1, Round(1), genesis, None, 3, signature))
    old_vote = encode_message(Vote(1, Round(1), genesis.block_hash, Round(0), genesis.block_hash, 3, bytes(64)))
    async with cluster.running(0, 1, 2):
        await settle()
        for number in range(5):
            cluster.submit(b"before %d" % number, 0)
            await cluster.until_committed(b"before %d" % number, 0, 1, 2, limit_s=3)
        with cluster.network.endpoint(3) as culprit:
            before = cluster.drivers[0].counters.sent["sync"]
            for number in range(50):
                for _ in range(100):
                    for peer in range(3):
                        culprit.send(peer, Kind.TIMEOUT, stale)
                        culprit.send(peer, Kind.VOTE, old_vote)
                cluster.submit(b"during %d" % number, 0)
                await cluster.until_committed(b"during %d" % number, 0, 1, 2, limit_s=3)
            elapsed_ms = 1000 * asyncio.get_running_loop().time()
            assert cluster.drivers[0].counters.sent["sync"] - before <= elapsed_ms / 50 + 2, "an answer now and then"
            replica = cluster.drivers[0]._replica
            assert replica is not None
            assert replica.held < 40
    cluster.assert_agreement()
    assert cluster.evidence == []
