"""The publisher with the memory bus: order, retries, the f + 1 rule, and what a crash may repeat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from cybermesh.bus import Bus, BusError, Published, Subscription
from cybermesh.bus.memory import MemoryBus
from cybermesh.store import outbox
from cybermesh.store.outbox import (
    BACKOFF_MAX_S,
    COPY_WAIT_MS,
    OutboxPublisher,
    PublisherParts,
    backoff_s,
    publishes_at_once,
)
from cybermesh.store.records import CommittedBlock, OutboxEvent, StoredBlock
from cybermesh.store.store import Store, open_store

CREATED_MS = 1_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus(lambda: 5, partitions=1) as opened:
        yield opened


class Clock:
    def __init__(self) -> None:
        self.ms = CREATED_MS

    def __call__(self) -> int:
        return self.ms


class FailingBus:
    """A real bus behind a broker that refuses some publishes."""

    def __init__(self, bus: Bus, refuse: Callable[[bytes], bool]) -> None:
        self._bus = bus
        self._refuse = refuse

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        if self._refuse(value):
            raise BusError("the broker is away")
        return await self._bus.publish(topic, key, value)

    def subscribe(
        self, topics: Sequence[str], group: str, *, from_start: bool = True
    ) -> AbstractAsyncContextManager[Subscription]:
        return self._bus.subscribe(topics, group, from_start=from_start)


async def commit(store: Store, *heights: int) -> None:
    for height in heights:
        digest = bytes([height]) * 32
        block = StoredBlock(height, digest, 1, height, 0, 0, b"", b"", digest, 0, 0, 0, 0, 0, CREATED_MS)
        events = tuple(OutboxEvent(event, height, "t", b"k", f"{event} {height}".encode()) for event in ("commit", "policy"))
        await store.append([CommittedBlock(block, b"", outbox=events)])


async def published(bus: Bus, count: int) -> list[bytes]:
    """The records on the topic, which must be ``count``."""
    await bus.publish("t", b"k", b"end")
    found = []
    async with bus.subscribe(["t"], "reader") as subscription:
        async for delivery in subscription:
            await subscription.ack(delivery)
            if delivery.value == b"end":
                break
            found.append(delivery.value)
    assert len(found) == count
    return found


def parts(clock: Clock, is_first: Callable[[int], bool] = lambda _: True) -> PublisherParts:
    return PublisherParts(is_first=is_first, now_ms=clock, chance=lambda: 0.0)


async def test_rows_are_published_in_order_and_marked_with_their_place(store: Store, bus: MemoryBus) -> None:
    await commit(store, 1, 2)
    publisher = OutboxPublisher(store.outbox, bus, parts(Clock()))
    assert await publisher.publish_due() is None
    assert await published(bus, 4) == [b"commit 1", b"policy 1", b"commit 2", b"policy 2"]
    assert await store.outbox.pending_count() == 0
    assert await publisher.publish_due() is None
    assert await published(bus, 0) == []


async def test_a_failing_publish_keeps_its_place_and_marks_those_before(store: Store, bus: MemoryBus) -> None:
    await commit(store, 1, 2)
    broken = FailingBus(bus, lambda value: value == b"commit 2")
    with pytest.raises(BusError):
        await OutboxPublisher(store.outbox, broken, parts(Clock())).publish_due()
    assert await store.outbox.pending_count() == 2
    assert await published(bus, 2) == [b"commit 1", b"policy 1"]
    await OutboxPublisher(store.outbox, bus, parts(Clock())).publish_due()
    assert await published(bus, 2) == [b"commit 2", b"policy 2"]


async def test_a_crash_between_publish_and_mark_publishes_again_and_loses_nothing(store: Store, bus: MemoryBus) -> None:
    await commit(store, 1)
    crashed = Exception("killed")

    def clock_that_dies() -> int:
        # Asked a second time when the rows are marked: the process ends between the bus and the database.
        if clock_that_dies.asked:  # type: ignore[attr-defined]
            raise crashed
        clock_that_dies.asked = True  # type: ignore[attr-defined]
        return CREATED_MS

    clock_that_dies.asked = False  # type: ignore[attr-defined]
    dying = PublisherParts(is_first=lambda _: True, now_ms=clock_that_dies, chance=lambda: 0.0)
    with pytest.raises(Exception, match="killed"):
        await OutboxPublisher(store.outbox, bus, dying).publish_due()
    await OutboxPublisher(store.outbox, bus, parts(Clock())).publish_due()
    assert await published(bus, 4) == [b"commit 1", b"policy 1"] * 2


async def test_a_later_publisher_waits_a_second_for_a_copy(store: Store, bus: MemoryBus) -> None:
    await commit(store, 1, 2)
    clock = Clock()
    publisher = OutboxPublisher(store.outbox, bus, parts(clock, lambda height: height == 2))
    clock.ms += 400
    assert await publisher.publish_due() == pytest.approx((COPY_WAIT_MS - 400) / 1000)
    assert await published(bus, 2) == [b"commit 2", b"policy 2"]
    await store.outbox.mark_copy("commit", 1, (0, 7), clock.ms)
    clock.ms = CREATED_MS + COPY_WAIT_MS
    assert await publisher.publish_due() is None
    assert await published(bus, 1) == [b"policy 1"]


@pytest.mark.parametrize(("committee_size", "faults"), [(1, 0), (4, 1), (5, 1), (7, 2), (10, 3)])
def test_exactly_f_plus_one_validators_publish_a_height_at_once_and_they_take_turns(committee_size: int, faults: int) -> None:
    shares = [0] * committee_size
    for height in range(100 * committee_size):
        first = [index for index in range(committee_size) if publishes_at_once(index, height, committee_size, faults)]
        assert first == sorted((height + step) % committee_size for step in range(faults + 1))
        for index in first:
            shares[index] += 1
    assert len(set(shares)) == 1


def test_the_wait_doubles_up_to_a_cap_and_is_jittered() -> None:
    waits = [backoff_s(failures, 0.5) for failures in range(12)]
    assert waits[:4] == [0.1, 0.2, 0.4, 0.8]
    assert waits[-1] == BACKOFF_MAX_S == backoff_s(10_000, 0.5)
    assert backoff_s(0, 0.0) == 0.05
    assert backoff_s(0, 0.999) < 0.15


async def test_running_it_retries_until_the_broker_is_back_and_wakes_for_new_blocks(
    store: Store, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BACKOFF_FIRST_S", 0.001)
    refusals = [3]
    failures: list[Exception] = []

    def refuse(_: bytes) -> bool:
        refusals[0] -= 1
        return refusals[0] >= 0

    running = PublisherParts(is_first=lambda _: True, now_ms=Clock(), chance=lambda: 0.5, on_failure=failures.append)
    publisher = OutboxPublisher(store.outbox, FailingBus(bus, refuse), running)
    await commit(store, 1)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks, bus.subscribe(["t"], "reader") as subscription:
        task = tasks.create_task(publisher.run(), name="publisher")
        deliveries = aiter(subscription)
        assert [(await anext(deliveries)).value for _ in range(2)] == [b"commit 1", b"policy 1"]
        assert [str(failure) for failure in failures] == ["the broker is away"] * 3
        await commit(store, 2)
        publisher.notify()
        assert [(await anext(deliveries)).value for _ in range(2)] == [b"commit 2", b"policy 2"]
        task.cancel()


async def test_running_it_publishes_what_falls_due(store: Store, bus: MemoryBus) -> None:
    await commit(store, 1)
    clock = Clock()
    clock.ms += COPY_WAIT_MS - 20
    publisher = OutboxPublisher(store.outbox, bus, parts(clock, lambda _: False))
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks, bus.subscribe(["t"], "reader") as subscription:
        task = tasks.create_task(publisher.run(), name="publisher")
        clock.ms += 20
        assert (await anext(aiter(subscription))).value == b"commit 1"
        task.cancel()
