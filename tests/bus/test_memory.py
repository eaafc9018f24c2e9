"""What is the memory bus' own: its bounds and its end."""

from __future__ import annotations

import asyncio

import pytest

from cybermesh.bus import BusError
from cybermesh.bus.memory import MemoryBus


def small(**bounds: int) -> MemoryBus:
    return MemoryBus(lambda: 5, partitions=1, **bounds)


async def settle() -> None:
    """Let every ready task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_full_partition_makes_publish_wait_until_the_subscriber_acknowledges() -> None:
    async with small(records_max=3) as bus, bus.subscribe(["t"], "g") as subscription, asyncio.TaskGroup() as tasks:
        for number in range(3):
            await bus.publish("t", b"k", b"%d" % number)
        waiting = tasks.create_task(bus.publish("t", b"k", b"3"), name="publisher")
        first = await anext(aiter(subscription))
        await settle()
        assert not waiting.done(), "delivered is not processed"
        await subscription.ack(first)
        await settle()
        assert waiting.result().offset == 3


async def test_the_bound_on_bytes_holds_too() -> None:
    async with small(bytes_max=100) as bus, bus.subscribe(["t"], "g") as subscription, asyncio.TaskGroup() as tasks:
        await bus.publish("t", b"", bytes(60))
        waiting = tasks.create_task(bus.publish("t", b"", bytes(60)), name="publisher")
        await settle()
        assert not waiting.done()
        await subscription.ack(await anext(aiter(subscription)))
        await settle()
        assert waiting.done()


async def test_a_record_larger_than_the_bound_on_bytes_passes_alone() -> None:
    async with small(bytes_max=100) as bus, bus.subscribe(["t"], "g") as subscription:
        await bus.publish("t", b"", bytes(1000))
        assert len((await anext(aiter(subscription))).value) == 1000


async def test_the_slowest_running_group_decides() -> None:
    async with (
        small(records_max=1) as bus,
        bus.subscribe(["t"], "fast") as fast,
        bus.subscribe(["t"], "slow") as slow,
        asyncio.TaskGroup() as tasks,
    ):
        await bus.publish("t", b"k", b"0")
        await fast.ack(await anext(aiter(fast)))
        waiting = tasks.create_task(bus.publish("t", b"k", b"1"), name="publisher")
        await settle()
        assert not waiting.done()
        await slow.ack(await anext(aiter(slow)))
        await settle()
        assert waiting.done()


async def test_a_group_without_a_subscriber_holds_nobody_up_and_keeps_its_place() -> None:
    async with small(records_max=3) as bus:
        async with bus.subscribe(["t"], "g") as subscription:
            await bus.publish("t", b"k", b"0")
            await subscription.ack(await anext(aiter(subscription)))
        for number in range(1, 3):
            await bus.publish("t", b"k", b"%d" % number)
        async with bus.subscribe(["t"], "g") as subscription:
            assert (await anext(aiter(subscription))).value == b"1"
        for number in range(3, 8):
            await bus.publish("t", b"k", b"%d" % number)
        async with bus.subscribe(["t"], "g") as subscription:
            assert (await anext(aiter(subscription))).value == b"5", "the oldest record that is still there"


async def test_leaving_frees_a_waiting_publisher() -> None:
    async with small(records_max=1) as bus, asyncio.TaskGroup() as tasks:
        async with bus.subscribe(["t"], "g"):
            await bus.publish("t", b"k", b"0")
            waiting = tasks.create_task(bus.publish("t", b"k", b"1"), name="publisher")
            await settle()
            assert not waiting.done()
        await settle()
        assert waiting.done()


async def test_closing_refuses_waiting_publishers_and_lets_subscribers_drain() -> None:
    bus = small(records_max=2)
    taken: list[bytes] = []

    async def publish_into_the_end() -> None:
        with pytest.raises(BusError):
            await bus.publish("t", b"k", b"2")

    async with asyncio.TaskGroup() as tasks, bus.subscribe(["t"], "g") as subscription:
        async with bus:
            await bus.publish("t", b"k", b"0")
            await bus.publish("t", b"k", b"1")
            tasks.create_task(publish_into_the_end(), name="publisher")
            await settle()
        async for delivery in subscription:
            taken.append(delivery.value)
    assert taken == [b"0", b"1"]


async def test_no_partition_starves_another() -> None:
    async with MemoryBus(lambda: 5, partitions=2, records_max=100) as bus, bus.subscribe(["t"], "g") as subscription:
        for number in range(20):
            await bus.publish("t", b"%d" % number, b"")
        first = {(await anext(aiter(subscription))).partition for _ in range(2)}
        assert first == {0, 1}
