"""The contract of ``cybermesh.bus``: the same suite for every implementation.

An implementation joins by a line in ``KINDS``: a name and an async context manager that yields a ``Ground``, the place where
buses can be opened and opened again, as after a restart.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cybermesh.bus import Bus, BusError, Delivery, Subscription
from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.kafka_client import KafkaOptions, Mechanism, Sasl, make_tls
from cybermesh.bus.local import LocalBus
from cybermesh.bus.memory import MemoryBus
from tools.kafka_broker import Broker

WAIT_S = 20.0
HEARTBEAT_MS = 100  # a group notices a new member as late as this


@dataclass(frozen=True)
class Ground:
    open: Callable[[], AbstractAsyncContextManager[Bus]]


@asynccontextmanager
async def memory_ground() -> AsyncIterator[Ground]:
    yield Ground(lambda: MemoryBus(lambda: 1_700_000_000_000))


@asynccontextmanager
async def local_ground() -> AsyncIterator[Ground]:
    with tempfile.TemporaryDirectory() as folder:
        yield Ground(lambda: LocalBus(Path(folder) / "bus.db", lambda: 1_700_000_000_000))


@asynccontextmanager
async def kafka_ground(options: KafkaOptions) -> AsyncIterator[Ground]:
    yield Ground(lambda: KafkaBus(options))


KINDS: dict[str, Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Ground]]] = {
    "memory": lambda _: memory_ground(),
    "local": lambda _: local_ground(),
    "mock-cluster": lambda request: kafka_ground(request.getfixturevalue("mock_cluster")),
    "kafka": lambda request: kafka_ground(plain_options(request.getfixturevalue("kafka_broker"))),
    "kafka-tls": lambda request: kafka_ground(tls_options(request.getfixturevalue("kafka_broker"))),
    "kafka-sasl": lambda request: kafka_ground(sasl_options(request.getfixturevalue("kafka_broker"), "SCRAM-SHA-512")),
    "kafka-scram-256": lambda request: kafka_ground(sasl_options(request.getfixturevalue("kafka_broker"), "SCRAM-SHA-256")),
    "kafka-sasl-plain": lambda request: kafka_ground(sasl_options(request.getfixturevalue("kafka_broker"), "PLAIN")),
    "kafka-mutual-tls": lambda request: kafka_ground(mutual_tls_options(request.getfixturevalue("kafka_broker"))),
}


@pytest.fixture
def mock_cluster() -> Iterator[KafkaOptions]:
    """librdkafka's mock cluster of three brokers; it makes topics by itself and knows neither TLS nor SASL."""
    confluent_kafka = pytest.importorskip("confluent_kafka")
    keeper = confluent_kafka.Producer({"test.mock.num.brokers": 3, "log_level": 0})
    brokers = tuple(f"{one.host}:{one.port}" for one in keeper.list_topics(timeout=WAIT_S).brokers.values())
    # A new member waits until the sessions of those before it have run out, though they have left; too short breaks the join.
    yield KafkaOptions(brokers, topics=None, session_ms=6_000, heartbeat_ms=HEARTBEAT_MS)
    del keeper


def plain_options(broker: Broker) -> KafkaOptions:
    return KafkaOptions((broker.access.plain,), heartbeat_ms=HEARTBEAT_MS)


def tls_options(broker: Broker) -> KafkaOptions:
    access = broker.access
    return KafkaOptions((access.tls,), tls=make_tls(Path(access.ca_file)), compression="zstd", heartbeat_ms=HEARTBEAT_MS)


def mutual_tls_options(broker: Broker) -> KafkaOptions:
    access = broker.access
    context = make_tls(Path(access.ca_file), Path(access.cert_file), Path(access.key_file))
    return KafkaOptions((access.mtls,), tls=context, compression="gzip", heartbeat_ms=HEARTBEAT_MS)


def sasl_options(broker: Broker, mechanism: Mechanism) -> KafkaOptions:
    access = broker.access
    sasl = Sasl(mechanism, access.username, access.password)
    return KafkaOptions(
        (access.sasl,), tls=make_tls(Path(access.ca_file)), sasl=sasl, compression="lz4", heartbeat_ms=HEARTBEAT_MS
    )


# The mock cluster lets a group wait seconds for company before it lets anybody in, so it gets the contract's heart only; so do
# the ways to the real broker that differ from another one only in how a client shows who it is.
HEART_ONLY = frozenset({"mock-cluster", "kafka-scram-256", "kafka-sasl-plain", "kafka-mutual-tls"})
HEART = frozenset(
    {
        "test_records_of_one_key_keep_their_order_in_one_partition",
        "test_what_was_not_acknowledged_comes_again",
    }
)
DURABLE_ONLY = frozenset({"test_records_and_acknowledgements_survive_a_restart"})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test on every kind of bus that it is for."""
    if "ground" in metafunc.fixturenames:
        name = metafunc.function.__name__
        left_out = set() if name in HEART else set(HEART_ONLY)
        if name in DURABLE_ONLY:
            left_out.add("memory")
        metafunc.parametrize("ground", [kind for kind in KINDS if kind not in left_out], indirect=True)


@pytest.fixture
async def ground(request: pytest.FixtureRequest) -> AsyncIterator[Ground]:
    async with KINDS[request.param](request) as made:
        yield made


@pytest.fixture
async def bus(ground: Ground) -> AsyncIterator[Bus]:
    async with ground.open() as opened:
        yield opened


@pytest.fixture
def topic() -> str:
    return f"test.{uuid.uuid4().hex}"


async def take(subscription: Subscription, count: int) -> list[Delivery]:
    """The next ``count`` deliveries, not acknowledged."""
    taken: list[Delivery] = []
    if count == 0:
        return taken
    async with asyncio.timeout(WAIT_S):
        async for delivery in subscription:
            taken.append(delivery)
            if len(taken) == count:
                break
    return taken


async def test_a_record_arrives_as_it_was_published(bus: Bus, topic: str) -> None:
    published = await bus.publish(topic, b"10.0.0.1", b"\x00\xffvalue")
    async with bus.subscribe([topic], "g") as subscription:
        (delivery,) = await take(subscription, 1)
    assert (delivery.topic, delivery.key, delivery.value) == (topic, b"10.0.0.1", b"\x00\xffvalue")
    assert (delivery.topic, delivery.partition, delivery.offset) == (published.topic, published.partition, published.offset)
    assert delivery.timestamp_ms > 0
    assert bus.trouble == ""


async def test_records_of_one_key_keep_their_order_in_one_partition(bus: Bus, topic: str) -> None:
    for number in range(50):
        await bus.publish(topic, b"attacker-%d" % (number % 5), b"%d" % number)
    async with bus.subscribe([topic], "g") as subscription:
        taken = await take(subscription, 50)
    for key in {delivery.key for delivery in taken}:
        own = [delivery for delivery in taken if delivery.key == key]
        assert len({delivery.partition for delivery in own}) == 1
        assert [int(delivery.value) for delivery in own] == sorted(int(delivery.value) for delivery in own)
    assert {int(delivery.value) for delivery in taken} == set(range(50))


async def test_offsets_of_a_partition_are_dense_and_rise(bus: Bus, topic: str) -> None:
    published = [await bus.publish(topic, b"one key", b"%d" % number) for number in range(10)]
    assert [record.offset - published[0].offset for record in published] == list(range(10))


async def test_every_group_gets_every_record(bus: Bus, topic: str) -> None:
    for number in range(10):
        await bus.publish(topic, b"%d" % number, b"%d" % number)
    for group in ("validator-1", "validator-2"):
        async with bus.subscribe([topic], group) as subscription:
            assert {delivery.value for delivery in await take(subscription, 10)} == {b"%d" % number for number in range(10)}


async def test_one_subscription_reads_several_topics(bus: Bus, topic: str) -> None:
    await bus.publish(f"{topic}.a", b"k", b"1")
    await bus.publish(f"{topic}.b", b"k", b"2")
    async with bus.subscribe([f"{topic}.a", f"{topic}.b"], "g") as subscription:
        assert {(d.topic, d.value) for d in await take(subscription, 2)} == {(f"{topic}.a", b"1"), (f"{topic}.b", b"2")}


async def test_what_was_not_acknowledged_comes_again(bus: Bus, topic: str) -> None:
    for number in range(6):
        await bus.publish(topic, b"k", b"%d" % number)
    async with bus.subscribe([topic], "g") as subscription:
        taken = await take(subscription, 5)
        await subscription.ack(taken[1])  # and with it the one before
    async with bus.subscribe([topic], "g") as subscription:
        assert [delivery.value for delivery in await take(subscription, 4)] == [b"2", b"3", b"4", b"5"]


async def test_what_was_acknowledged_does_not_come_again(bus: Bus, topic: str) -> None:
    await bus.publish(topic, b"k", b"old")
    async with bus.subscribe([topic], "g") as subscription:
        (delivery,) = await take(subscription, 1)
        await subscription.ack(delivery)
        await subscription.ack(delivery)  # twice is harmless
    await bus.publish(topic, b"k", b"new")
    async with bus.subscribe([topic], "g") as subscription:
        assert [delivery.value for delivery in await take(subscription, 1)] == [b"new"]


async def test_an_older_acknowledgement_does_not_take_back_a_newer_one(bus: Bus, topic: str) -> None:
    for number in range(3):
        await bus.publish(topic, b"k", b"%d" % number)
    async with bus.subscribe([topic], "g") as subscription:
        taken = await take(subscription, 3)
        await subscription.ack(taken[1])
        await subscription.ack(taken[0])
    async with bus.subscribe([topic], "g") as subscription:
        assert [delivery.value for delivery in await take(subscription, 1)] == [b"2"]


async def test_acknowledgements_of_one_partition_do_not_touch_another(bus: Bus, topic: str) -> None:
    keys = [b"%d" % number for number in range(40)]
    places = {key: (await bus.publish(topic, key, key)).partition for key in keys}
    assert len(set(places.values())) > 1, "the topic needs several partitions"
    async with bus.subscribe([topic], "g") as subscription:
        taken = await take(subscription, len(keys))
        chosen = taken[0].partition
        for delivery in taken:
            if delivery.partition == chosen:
                await subscription.ack(delivery)
    rest = {key for key, partition in places.items() if partition != chosen}
    async with bus.subscribe([topic], "g") as subscription:
        assert {delivery.key for delivery in await take(subscription, len(rest))} == rest


async def test_a_new_group_may_start_at_the_end(bus: Bus, topic: str) -> None:
    await bus.publish(topic, b"k", b"before")
    async with bus.subscribe([topic], "late", from_start=False) as subscription:
        await bus.publish(topic, b"k", b"after")
        assert [delivery.value for delivery in await take(subscription, 1)] == [b"after"]


async def test_a_waiting_subscriber_gets_a_record_published_later(bus: Bus, topic: str) -> None:
    async with bus.subscribe([topic], "g") as subscription, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(take(subscription, 1), name="waiting subscriber")
        await bus.publish(topic, b"k", b"later")
    assert [delivery.value for delivery in waiting.result()] == [b"later"]


async def test_members_of_a_group_share_the_records_and_lose_none(bus: Bus, topic: str) -> None:
    seen: set[bytes] = set()
    everything = {b"%d" % number for number in range(60)}
    done = asyncio.Event()

    async def read(subscription: Subscription) -> None:
        async for delivery in subscription:
            seen.add(delivery.value)
            await subscription.ack(delivery)
            if seen == everything:
                done.set()

    async with (
        asyncio.timeout(WAIT_S),
        bus.subscribe([topic], "g") as first,
        bus.subscribe([topic], "g") as second,
        asyncio.TaskGroup() as tasks,
    ):
        readers = [tasks.create_task(read(first), name="first"), tasks.create_task(read(second), name="second")]
        for value in everything:
            await bus.publish(topic, value, value)
        await done.wait()
        for reader in readers:
            reader.cancel()
    async with bus.subscribe([topic], "g") as third:
        await bus.publish(topic, b"k", b"end")
        assert [delivery.value for delivery in await take(third, 1)] == [b"end"], "something acknowledged came again"


async def test_a_member_that_leaves_hands_its_unacknowledged_records_to_the_others(bus: Bus, topic: str) -> None:
    values = {b"%d" % number for number in range(40)}
    async with bus.subscribe([topic], "g") as stays:
        async with bus.subscribe([topic], "g") as leaves:
            for value in values:
                await bus.publish(topic, value, value)
            await take(leaves, 1)
        seen: set[bytes] = set()
        async with asyncio.timeout(WAIT_S):
            while seen != values:
                seen.update(delivery.value for delivery in await take(stays, 1))


async def test_leaving_the_subscription_ends_its_iteration(bus: Bus, topic: str) -> None:
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks, bus.subscribe([topic], "g") as subscription:
        reader = tasks.create_task(_collect(subscription), name="reader")
        await asyncio.sleep(0)
    assert reader.result() == []


async def _collect(subscription: Subscription) -> list[Delivery]:
    return [delivery async for delivery in subscription]


async def test_what_has_arrived_can_be_taken_at_once_within_bounds(bus: Bus, topic: str) -> None:
    values = [b"%03d" % number for number in range(100)]
    for value in values:
        await bus.publish(topic, b"k", value)
    async with asyncio.timeout(WAIT_S), bus.subscribe([topic], "g") as subscription:
        taken: list[Delivery] = []
        while len(taken) < 40:
            several = await subscription.take(40 - len(taken), 9)
            assert 1 <= len(several) <= 3, "the third one brings the sum to nine bytes"
            taken += several
        while len(taken) < 100:
            several = await subscription.take(7, 1_000)
            assert 1 <= len(several) <= 7
            taken += several
        assert [delivery.value for delivery in taken] == values
        await subscription.ack(taken[59])
    async with bus.subscribe([topic], "g") as subscription:
        assert [delivery.value for delivery in await take(subscription, 40)] == values[60:]


async def test_taking_from_several_partitions_and_one_by_one_loses_and_repeats_nothing(bus: Bus, topic: str) -> None:
    values = {b"%d" % number for number in range(50)}
    for value in values:
        await bus.publish(topic, value, value)
    seen = []
    async with asyncio.timeout(WAIT_S), bus.subscribe([topic], "g") as subscription:
        while len(seen) < 50:
            seen += [delivery.value for delivery in await subscription.take(11, 1_000)]
            if len(seen) < 50:
                seen += [delivery.value for delivery in await take(subscription, 1)]
    assert len(seen) == 50
    assert set(seen) == values


async def test_whoever_waits_to_take_gets_nothing_once_the_subscription_is_left(bus: Bus, topic: str) -> None:
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks, bus.subscribe([topic], "g") as subscription:
        waiting = tasks.create_task(subscription.take(10, 1_000), name="waiting")
        await asyncio.sleep(0)
    assert waiting.result() == []


async def test_acknowledging_after_leaving_is_refused(bus: Bus, topic: str) -> None:
    await bus.publish(topic, b"k", b"v")
    async with bus.subscribe([topic], "g") as subscription:
        (delivery,) = await take(subscription, 1)
    with pytest.raises(BusError):
        await subscription.ack(delivery)


async def test_a_cancelled_reader_loses_nothing(bus: Bus, topic: str) -> None:
    async with bus.subscribe([topic], "g") as subscription:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await subscription.__aiter__().__anext__()
        await bus.publish(topic, b"k", b"v")
        assert [delivery.value for delivery in await take(subscription, 1)] == [b"v"]


async def test_a_record_above_the_limit_is_refused_and_the_next_one_passes(bus: Bus, topic: str) -> None:
    with pytest.raises(BusError):
        await bus.publish(topic, b"k", bytes(2 * 1024 * 1024 + 1))
    await bus.publish(topic, b"k", bytes(1024 * 1024))
    async with bus.subscribe([topic], "g") as subscription:
        assert [len(delivery.value) for delivery in await take(subscription, 1)] == [1024 * 1024]


async def test_a_closed_bus_refuses_to_publish(ground: Ground, topic: str) -> None:
    async with ground.open() as bus:
        await bus.publish(topic, b"k", b"v")
    with pytest.raises(BusError):
        await bus.publish(topic, b"k", b"v")


async def test_records_and_acknowledgements_survive_a_restart(ground: Ground, topic: str) -> None:
    async with ground.open() as bus:
        for number in range(3):
            await bus.publish(topic, b"k", b"%d" % number)
        async with bus.subscribe([topic], "g") as subscription:
            await subscription.ack((await take(subscription, 1))[0])
    async with ground.open() as bus, bus.subscribe([topic], "g") as subscription:
        assert [delivery.value for delivery in await take(subscription, 2)] == [b"1", b"2"]
