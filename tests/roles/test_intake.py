"""From the bus to the journal: every fault to the dead letters, and nothing lost or dropped while something is slow or away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cybermesh.bus import BusError, Delivery
from cybermesh.bus.memory import MemoryBus, MemorySubscription
from cybermesh.bus.topics import Topics
from cybermesh.consensus.mempool import Admission, Mempool, PendingTransaction
from cybermesh.envelope.signing import AnomalyContent, sign, sign_anomaly
from cybermesh.genesis import Budget, Genesis
from cybermesh.keys import KeyRing
from cybermesh.log import logger
from cybermesh.messages import DeadLetter, Transaction, TxKind
from cybermesh.roles.application import LedgerApplication
from cybermesh.roles.dead_letters import KEPT_ONE_OF, KEPT_WHOLE_MAX
from cybermesh.roles.deployment import Roster, create
from cybermesh.roles.intake import BATCH_MAX, Intake, Surroundings
from cybermesh.roles.patience import Patience
from cybermesh.store import StoreUnavailable
from cybermesh.store.store import Store, open_store
from cybermesh.wire.codec import decode_dead_letter, encode
from tests.wire import test_earlier_system as earlier
from tests.wire import test_faults as wire

TOPICS = Topics()
WAIT_S = 20.0
GENESIS = create(Roster("intake", 1, producers=1, agents=1, operators=1, budget=Budget())).genesis


class FixedClock:
    """A wall clock that stands where the messages of the wire's tests were signed."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        return 0.0


class Proposer:
    """Consensus reduced to its mempool; ``commit`` makes room as a block does."""

    def __init__(self, bytes_max: int) -> None:
        self.mempool = Mempool(bytes_max=bytes_max, producer_bytes_max=bytes_max)
        self.taken: list[PendingTransaction] = []
        self._room = asyncio.Event()

    def submit(self, transaction: PendingTransaction) -> Admission:
        admission = self.mempool.add(transaction)
        if admission is Admission.ADDED:
            self.taken.append(transaction)
        return admission

    async def room(self) -> None:
        self._room.clear()
        await self._room.wait()

    def commit(self) -> None:
        self.mempool.remove([transaction.digest for transaction in self.taken])
        self._room.set()


class FaultyBus(MemoryBus):
    """A memory bus that refuses records of one topic, or acknowledgements, as long as it is told to."""

    refuses_topic = ""
    refuses_acks = 0

    async def publish(self, topic: str, key: bytes, value: bytes):  # type: ignore[no-untyped-def]
        if topic == self.refuses_topic:
            raise BusError(f"{topic}: no broker")
        return await super().publish(topic, key, value)

    def acknowledge(self, member: MemorySubscription, delivery: Delivery) -> None:
        if self.refuses_acks:
            self.refuses_acks -= 1
            raise BusError("the mark was not taken")
        super().acknowledge(member, delivery)


class Desk:
    """An intake with its real store, on a bus in memory."""

    def __init__(self, bus: FaultyBus, store: Store, genesis: Genesis, ring: KeyRing, now_ms: int, bytes_max: int) -> None:
        self.bus, self.store = bus, store
        self.clock = FixedClock(now_ms)
        self.patience = Patience(logger(role="test"))
        self.proposer = Proposer(bytes_max)
        self.application = LedgerApplication(genesis, self.clock.monotonic_s)
        around = Surroundings("validator-1", "group", TOPICS, bus, store, self.clock, verify_threads=2)
        self.intake = Intake(genesis, around, self.application, self.patience)
        self.intake.ring = ring

    async def run(self) -> None:
        await self.intake.run(self.proposer)

    async def send(self, raw: bytes, kind: TxKind = TxKind.ANOMALY) -> int:
        return (await self.bus.publish(TOPICS.of_kind(kind), b"one entity", raw)).offset

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():  # noqa: ASYNC110 - a look is all there is
                await asyncio.sleep(0.002)

    async def letters(self, count: int) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        async with asyncio.timeout(WAIT_S), self.bus.subscribe((TOPICS.ai_dlq,), f"reader-{id(found)}") as deliveries:
            while len(found) < count:
                found.append(decode_dead_letter((await anext(aiter(deliveries))).value))
        return sorted(found, key=lambda letter: (letter.topic, letter.offset))

    def letters_now(self) -> int:
        return sum(partition.end for partition in self.bus._partitions(TOPICS.ai_dlq))

    def unacknowledged(self, topic: str = TOPICS.ai_anomalies) -> int:
        return sum(part.end - part.cursors["group"].acknowledged for part in self.bus._partitions(topic))


@asynccontextmanager
async def desk_in(
    folder: Path,
    *,
    genesis: Genesis = GENESIS,
    ring: KeyRing = wire.RING,
    now_ms: int = wire.NOW_MS,
    bytes_max: int = 64 * 2**20,
) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(FaultyBus(lambda: now_ms, records_max=2 * BATCH_MAX))
        store = await stack.enter_async_context(open_store(folder / "ledger.db"))
        desk = Desk(bus, store, genesis, ring, now_ms, bytes_max)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(desk.run(), name="intake")
            await desk.until(lambda: "group" in bus._members)
            yield desk
            running.cancel()


def good(number: int, pad: int = 0) -> bytes:
    """A valid anomaly of the wire's sensor; the number is its nonce's counter."""
    details = {"pad": "x" * pad}
    content = AnomalyContent(f"good-{number}", "port_scan", "s", "10.0.0.1", 7, 0.93, "m1", details)
    return encode(sign_anomaly(content, wire.stamp(counter=1_000 + number)))


async def journal(desk: Desk) -> list[bytes]:
    return [entry.payload[1:] for entry in await desk.store.mempool.load()]


async def test_every_fault_is_a_dead_letter_with_its_code_and_the_next_good_message_is_admitted(tmp_path: Path) -> None:
    replayed = sign(replace(wire.ANOMALY), wire.stamp(counter=1_000))  # the nonce of good(0), other content
    faults = [(*make(), code.value) for make, code, _ in wire.FAULTS.values()]
    faults.append((TxKind.ANOMALY, encode(replayed), "NONCE_REPLAY"))
    assert len(faults) >= 25
    expected: dict[tuple[str, int], str] = {}
    async with desk_in(tmp_path) as desk:
        await desk.send(good(0))
        await desk.until(lambda: desk.intake.counts.admitted == 1)
        for number, (kind, raw, code) in enumerate(faults, start=1):
            expected[TOPICS.of_kind(kind), await desk.send(raw, kind)] = code
            await desk.send(good(number))
            await desk.until(lambda number=number: desk.intake.counts.admitted == number + 1)  # type: ignore[misc]
        letters = await desk.letters(len(faults))
        await desk.until(lambda: desk.unacknowledged() == 0)
        assert await journal(desk) == [good(number) for number in range(len(faults) + 1)]
    assert {(letter.topic, letter.offset): letter.code for letter in letters} == expected
    assert desk.intake.counts.refused == Counter(code for _, _, code in faults)


@pytest.mark.parametrize("accepts", [False, True], ids=["bound fields required", "unbound fields accepted"])
async def test_messages_of_the_earlier_system_end_by_what_the_genesis_says(tmp_path: Path, accepts: bool) -> None:
    genesis = replace(GENESIS, wire=replace(GENESIS.wire, accept_unbound_fields=accepts))
    # One nonce for all of them is the earlier test's; here each goes to an intake of its own.
    for number, (kind, raw) in enumerate(earlier.OLD.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with desk_in(folder, genesis=genesis, ring=earlier.RING, now_ms=earlier.TS * 1000) as desk:
            await desk.send(raw, kind)
            if accepts:
                await desk.until(lambda desk=desk: len(desk.proposer.taken) == 1)  # type: ignore[misc]
                assert desk.proposer.taken[0].data == Transaction(kind, raw).encode()
                assert LedgerApplication(genesis, desk.clock.monotonic_s).is_valid(desk.proposer.taken[0].data)
                assert desk.letters_now() == 0
            else:
                (letter,) = await desk.letters(1)
                assert letter.code == "FIELD_MISMATCH"
                assert await journal(desk) == []


async def test_many_messages_keep_their_order_through_several_threads(tmp_path: Path) -> None:
    count = 3 * BATCH_MAX
    async with desk_in(tmp_path) as desk:
        for number in range(count):
            await desk.send(good(number))
        await desk.until(lambda: desk.intake.counts.admitted == count)
        assert await journal(desk) == [good(number) for number in range(count)]
        await desk.until(lambda: desk.unacknowledged() == 0)


async def flood(desk: Desk, numbers: Sequence[int]) -> None:
    for number in numbers:
        await desk.send(good(number))


async def test_a_slow_disk_pauses_consumption_and_nothing_is_lost_or_a_dead_letter(tmp_path: Path) -> None:
    count = 8 * BATCH_MAX
    async with desk_in(tmp_path) as desk, asyncio.TaskGroup() as group:
        add, is_quick = desk.store.mempool.add, asyncio.Event()

        async def slow(entries):  # type: ignore[no-untyped-def]
            await is_quick.wait()
            await add(entries)

        desk.store.mempool.add = slow  # type: ignore[method-assign]
        publisher = group.create_task(flood(desk, range(count)), name="publisher")
        # Three batches are in the intake at most; the rest waits on the bus, and then the publisher does.
        await desk.until(lambda: desk.unacknowledged() == 2 * BATCH_MAX)
        for _ in range(200):
            await asyncio.sleep(0)
        assert not publisher.done()
        assert (desk.unacknowledged(), desk.intake.counts.admitted) == (2 * BATCH_MAX, 0)
        is_quick.set()
        await desk.until(lambda: desk.intake.counts.admitted == count)
        assert desk.letters_now() == 0


async def test_a_disk_that_refuses_is_told_and_waited_for(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as desk:
        add, is_away = desk.store.mempool.add, True

        async def refusing(entries):  # type: ignore[no-untyped-def]
            if is_away:
                raise StoreUnavailable("disk full")
            await add(entries)

        desk.store.mempool.add = refusing  # type: ignore[method-assign]
        await desk.send(good(1))
        await desk.until(lambda: desk.patience.problem == "disk full")
        assert desk.unacknowledged() == 1
        is_away = False
        await desk.until(lambda: desk.unacknowledged() == 0)
        assert (desk.patience.problem, desk.letters_now(), await journal(desk)) == (None, 0, [good(1)])


async def test_a_full_mempool_pauses_consumption_until_blocks_make_room(tmp_path: Path) -> None:
    count = 40
    async with desk_in(tmp_path, bytes_max=10 * len(good(0, 1_000))) as desk, asyncio.TaskGroup() as group:
        for number in range(count):
            await desk.send(good(number, 1_000))
        await desk.until(lambda: "mempool is full" in (desk.patience.problem or ""))
        assert len(desk.proposer.taken) < count
        assert desk.unacknowledged() > 0
        before = desk.intake.counts.admitted
        await flood(desk, range(count, count + 5))
        for _ in range(200):
            await asyncio.sleep(0)
        assert desk.intake.counts.admitted == before, "nothing is taken while it is full"

        async def commit_steadily() -> None:
            while len(desk.proposer.taken) < count + 5:
                desk.proposer.commit()
                await asyncio.sleep(0.002)

        group.create_task(commit_steadily(), name="blocks")
        await desk.until(lambda: desk.unacknowledged() == 0 and len(desk.proposer.taken) == count + 5)
        assert (desk.patience.problem, desk.letters_now()) == (None, 0)
        assert [taken.data[1:] for taken in desk.proposer.taken[:count]] == [good(number, 1_000) for number in range(count)]


async def test_dead_letters_that_the_bus_refuses_pause_consumption(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as desk:
        desk.bus.refuses_topic = TOPICS.ai_dlq
        await desk.send(b"\xff")
        await desk.until(lambda: "no broker" in (desk.patience.problem or ""))
        await desk.send(good(1))
        for _ in range(200):
            await asyncio.sleep(0)
        assert (desk.intake.counts.admitted, desk.unacknowledged()) == (0, 2)
        desk.bus.refuses_topic = ""
        (letter,) = await desk.letters(1)
        assert letter.code == "MALFORMED"
        await desk.until(lambda: desk.unacknowledged() == 0)
        assert desk.intake.counts.admitted == 1


async def test_an_acknowledgement_that_the_bus_refuses_is_repeated_and_ends_nothing(tmp_path: Path) -> None:
    async with desk_in(tmp_path) as desk:
        desk.bus.refuses_acks = 2
        await desk.send(good(1))
        await desk.until(lambda: desk.patience.problem == "the mark was not taken")
        await desk.until(lambda: desk.unacknowledged() == 0)
        await desk.send(good(2))
        await desk.until(lambda: desk.intake.counts.admitted == 2)


async def test_a_flood_of_faults_is_sampled_and_counted(tmp_path: Path) -> None:
    more = 3 * KEPT_ONE_OF
    async with desk_in(tmp_path) as desk:
        for _ in range(KEPT_WHOLE_MAX + more):
            await desk.send(b"\xff")
        await desk.send(good(1))
        await desk.until(lambda: desk.intake.counts.admitted == 1)
        counts = desk.intake.counts
        assert counts.refused == {"MALFORMED": KEPT_WHOLE_MAX + more}
        assert counts.letters_left_out == more - 3
        letters = await desk.letters(KEPT_WHOLE_MAX + 3)
        assert desk.letters_now() == KEPT_WHOLE_MAX + 3
    assert [letter.text.count("99 like it were left out before") for letter in letters] == [0] * KEPT_WHOLE_MAX + [1] * 3


async def test_a_switched_off_dead_letter_topic_gets_none_and_stops_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(FaultyBus(lambda: wire.NOW_MS))
        store = await stack.enter_async_context(open_store(tmp_path / "ledger.db"))
        desk = Desk(bus, store, GENESIS, wire.RING, wire.NOW_MS, 2**20)
        topics = Topics(ai_evidence="", ai_policy="", control_policy_ack="", ai_dlq="", telemetry_features="")
        around = Surroundings("validator-1", "group", topics, bus, store, desk.clock)
        desk.intake = Intake(GENESIS, around, desk.application, desk.patience)
        desk.intake.ring = wire.RING
        async with asyncio.TaskGroup() as group:
            running = group.create_task(desk.run(), name="intake")
            await desk.send(b"\xff")
            await desk.send(good(1))
            await desk.until(lambda: desk.intake.counts.admitted == 1)
            running.cancel()
        assert desk.intake.counts.refused == {"MALFORMED": 1}
        assert set(bus._topics) == {TOPICS.ai_anomalies, TOPICS.control_operator}
