"""What is the Kafka bus' own: protection, topics, codecs, back-pressure, partitions that move, a broker that goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from cybermesh.bus import BusError, Delivery, Subscription
from cybermesh.bus import kafka_producer as producer_module
from cybermesh.bus import kafka_subscription as subscription_module
from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.kafka_client import Compression, KafkaOptions, Mechanism, Sasl, TopicPlan, make_tls
from cybermesh.bus.kafka_subscription import BUFFER_BYTES_MAX, FETCH_RECORDS_MAX
from tools.kafka_broker import Broker
from tools.kafka_certificates import make_certificates

WAIT_S = 30.0


@pytest.fixture
def topic() -> str:
    return f"test.{uuid.uuid4().hex}"


def plain(broker: Broker, plan: TopicPlan | None = None) -> KafkaOptions:
    return KafkaOptions((broker.access.plain,), topics=plan or TopicPlan(), heartbeat_ms=100)


async def take(subscription: Subscription) -> Delivery:
    async with asyncio.timeout(WAIT_S):
        return await anext(aiter(subscription))


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.02)


# Protection


def sasl(broker: Broker, mechanism: Mechanism, password: str | None = None) -> KafkaOptions:
    access = broker.access
    user = Sasl(mechanism, access.username, access.password if password is None else password)
    return KafkaOptions((access.sasl,), tls=make_tls(Path(access.ca_file)), sasl=user)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_every_mechanism_gets_in_with_the_right_password(kafka_broker: Broker, topic: str, mechanism: Mechanism) -> None:
    async with KafkaBus(sasl(kafka_broker, mechanism)) as bus:
        assert (await bus.publish(topic, b"k", b"v")).offset == 0


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_a_wrong_password_is_an_error_and_not_a_long_wait(kafka_broker: Broker, topic: str, mechanism: Mechanism) -> None:
    async with asyncio.timeout(WAIT_S), KafkaBus(sasl(kafka_broker, mechanism, "wrong")) as bus:
        with pytest.raises(BusError, match="SaslAuthenticationFailed"):
            await bus.publish(topic, b"k", b"v")
        with pytest.raises(BusError, match="SaslAuthenticationFailed"):
            async with bus.subscribe([topic], "g"):
                pytest.fail("subscribed")


async def test_a_broker_with_a_certificate_of_somebody_else_is_refused(
    kafka_broker: Broker, topic: str, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    options = KafkaOptions((kafka_broker.access.tls,), tls=make_tls(tmp_path / "ca.pem"))
    async with asyncio.timeout(WAIT_S), KafkaBus(options) as bus:
        with pytest.raises(BusError, match="CERTIFICATE_VERIFY_FAILED"):
            await bus.publish(topic, b"k", b"v")


def test_a_password_is_never_sent_in_the_clear_and_never_shown() -> None:
    user = Sasl("PLAIN", "u", "hush")
    assert "hush" not in repr(user)
    with pytest.raises(BusError, match=r"kafka\.sasl_mechanism"):
        KafkaOptions(("localhost:9092",), sasl=user)


@pytest.mark.parametrize(
    ("ca_file", "cert_file", "named"),
    [
        ("none.pem", None, "ca_file"),
        ("text.pem", None, "ca_file"),
        (None, "none.pem", "cert_file"),
        (None, "text.pem", "cert_file"),
    ],
)
def test_a_certificate_file_that_is_none_is_named(
    tmp_path: Path, ca_file: str | None, cert_file: str | None, named: str
) -> None:
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(BusError, match=rf"kafka\.{named}: .*\.pem"):
        make_tls(tmp_path / ca_file if ca_file else None, tmp_path / cert_file if cert_file else None)


# Topics and records


async def test_a_missing_topic_is_made_with_partitions_retention_and_record_size(kafka_broker: Broker, topic: str) -> None:
    plan = TopicPlan(partitions=3, retention_s={topic: 172_800})
    async with KafkaBus(plain(kafka_broker, plan)) as bus:
        await bus.publish(topic, b"k", b"v")
    admin = AIOKafkaAdminClient(**plain(kafka_broker).connection())
    await admin.start()
    try:
        (described,) = await admin.describe_topics([topic])
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    finally:
        await admin.close()
    settings = {entry[0]: entry[1] for entry in answer.resources[0][4]}
    assert len(described["partitions"]) == 3
    assert (settings["retention.ms"], settings["max.message.bytes"]) == ("172800000", "2097152")


async def test_a_topic_that_may_not_be_made_is_an_error(kafka_broker: Broker) -> None:
    async with asyncio.timeout(WAIT_S), KafkaBus(plain(kafka_broker)) as bus:
        with pytest.raises(BusError, match="InvalidTopic"):
            await bus.publish("no spaces in names", b"k", b"v")


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_every_codec_carries_records(kafka_broker: Broker, topic: str, compression: Compression) -> None:
    options = KafkaOptions((kafka_broker.access.plain,), compression=compression)
    value = b"compressible " * 1000
    async with KafkaBus(options) as bus:
        await bus.publish(topic, b"k", value)
        async with bus.subscribe([topic], "g") as subscription:
            assert (await take(subscription)).value == value


async def test_a_slow_role_is_given_no_more_than_the_buffer_holds_and_loses_nothing(kafka_broker: Broker, topic: str) -> None:
    size, count = 512 * 1024, 48
    async with KafkaBus(plain(kafka_broker)) as bus:
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(bus.publish(topic, b"%d" % number, bytes(size)), name=f"publish {number}")
        async with bus.subscribe([topic], topic) as subscription:
            await take(subscription)
            await until(lambda: subscription.buffered_bytes > BUFFER_BYTES_MAX)
            with pytest.raises(TimeoutError):
                # Long enough to fetch all the rest, if it were fetched.
                await until(lambda: subscription.buffered_bytes > BUFFER_BYTES_MAX + FETCH_RECORDS_MAX * size, 0.5)
            buffered = subscription.buffered_bytes
            assert BUFFER_BYTES_MAX < buffered <= BUFFER_BYTES_MAX + FETCH_RECORDS_MAX * size < size * count
            for _ in range(count - 1):
                await take(subscription)


# Partitions that change hands


async def test_an_ack_after_the_partition_was_taken_away_does_nothing(kafka_broker: Broker, topic: str) -> None:
    async with KafkaBus(plain(kafka_broker, TopicPlan(partitions=1))) as bus:
        await bus.publish(topic, b"k", b"0")
        async with bus.subscribe([topic], topic) as subscription:
            delivery = await take(subscription)
            await subscription.on_partitions_revoked([TopicPartition(topic, 0)])
            await subscription.ack(delivery)
        async with bus.subscribe([topic], topic) as subscription:
            assert (await take(subscription)).value == b"0"


async def test_what_was_acknowledged_is_committed_before_the_partition_is_taken_away(kafka_broker: Broker, topic: str) -> None:
    async with KafkaBus(plain(kafka_broker, TopicPlan(partitions=2))) as bus, bus.subscribe([topic], topic) as first:
        for number in range(20):
            await bus.publish(topic, b"%d" % number, b"old %d" % number)
        for _ in range(20):
            await first.ack(await take(first))
        async with bus.subscribe([topic], topic) as second:
            places = {(await bus.publish(topic, b"%d" % number, b"new")).partition for number in range(20)}
            assert places == {0, 1}
            assert (await take(first)).value == b"new"
            assert (await take(second)).value == b"new"


# A broker that dies


@asynccontextmanager
async def stopped(broker: Broker) -> AsyncIterator[None]:
    await asyncio.to_thread(broker.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(broker.start)


async def publish_steadily(bus: KafkaBus, topic: str, key: bytes, accepted: dict[bytes, list[int]]) -> None:
    number = 0
    while True:
        await bus.publish(topic, key, b"%d" % number)
        accepted[key].append(number)
        number += 1


async def read_steadily(subscription: Subscription, received: dict[bytes, list[int]]) -> None:
    async for delivery in subscription:
        received[delivery.key].append(int(delivery.value))
        await subscription.ack(delivery)


async def reached(numbers: dict[bytes, list[int]], targets: Sequence[tuple[bytes, int]]) -> None:
    await until(lambda: all(numbers[key] and numbers[key][-1] >= target for key, target in targets))


async def test_killing_the_broker_under_load_loses_nothing_and_keeps_the_order(kafka_broker: Broker, topic: str) -> None:
    keys = [b"10.0.0.%d" % number for number in range(4)]
    accepted: dict[bytes, list[int]] = defaultdict(list)
    received: dict[bytes, list[int]] = defaultdict(list)
    async with (
        KafkaBus(plain(kafka_broker)) as bus,
        bus.subscribe([topic], topic) as subscription,
        asyncio.TaskGroup() as tasks,
    ):
        writers = [tasks.create_task(publish_steadily(bus, topic, key, accepted), name=f"writer {key!r}") for key in keys]
        reader = tasks.create_task(read_steadily(subscription, received), name="reader")
        for _ in range(2):
            await reached(accepted, [(key, len(accepted[key]) + 50) for key in keys])
            async with stopped(kafka_broker):
                before = {key: len(accepted[key]) for key in keys}
            await reached(accepted, [(key, before[key] + 50) for key in keys])
        for writer in writers:
            writer.cancel()
        last = [(key, accepted[key][-1]) for key in keys]
        await reached(received, last)
        reader.cancel()
    for key in keys:
        assert set(accepted[key]) <= set(received[key])
        first_seen = list(dict.fromkeys(received[key]))
        assert first_seen == sorted(first_seen)
    async with KafkaBus(plain(kafka_broker)) as bus, bus.subscribe([topic], topic) as subscription:
        end = await bus.publish(topic, keys[0], b"-1")
        while (delivery := await take(subscription)).offset != end.offset or delivery.partition != end.partition:
            # A cancelled publish may have happened after the reader had seen the last accepted one.
            assert int(delivery.value) > accepted[delivery.key][-1], "acknowledged, and came again"


async def test_a_broker_that_is_away_stalls_the_bus_says_so_and_is_found_again(
    kafka_broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer_module, "STALL_S", 0.2)
    monkeypatch.setattr(subscription_module, "PROBE_S", 0.2)
    async with KafkaBus(plain(kafka_broker)) as bus, bus.subscribe([topic], topic) as subscription:
        await bus.publish(topic, b"k", b"0")
        assert (await take(subscription)).value == b"0"
        assert bus.trouble == ""
        async with asyncio.TaskGroup() as tasks:
            async with stopped(kafka_broker):
                waiting = tasks.create_task(bus.publish(topic, b"k", b"1"), name="publisher")
                await until(lambda: "publish" in bus.trouble and "subscribe" in bus.trouble)
                assert not waiting.done()
                late = tasks.create_task(start_while_away(kafka_broker, topic), name="a role that starts now")
                await assert_leaving_is_quick(kafka_broker, topic)
            assert (await waiting).offset == 1
            assert (await take(subscription)).value == b"1"
            assert await late == b"2"
        await until(lambda: not bus.trouble)


async def start_while_away(broker: Broker, topic: str) -> bytes:
    async with KafkaBus(plain(broker)) as bus, bus.subscribe([topic], "late", from_start=False) as subscription:
        await bus.publish(topic, b"k", b"2")
        while (delivery := await take(subscription)).value != b"2":
            pass
        return delivery.value


async def assert_leaving_is_quick(broker: Broker, topic: str) -> None:
    async with asyncio.TaskGroup() as tasks:
        async with KafkaBus(plain(broker)) as bus:
            publisher = tasks.create_task(refused_on_close(bus.publish(topic, b"k", b"never")), name="publisher that waits")
            subscriber = tasks.create_task(refused_on_close(enter(bus, topic)), name="subscriber that waits")
            await asyncio.wait([publisher, subscriber], timeout=0.3)
            leaving_s = time.monotonic()
        assert time.monotonic() - leaving_s < 2.5
    assert time.monotonic() - leaving_s < 2.5, "whoever waits is told at once"


async def enter(bus: KafkaBus, topic: str) -> None:
    async with bus.subscribe([topic], "never"):
        pytest.fail("subscribed")


async def refused_on_close(waiting: Awaitable[object]) -> None:
    with pytest.raises(BusError, match="closed"):
        await waiting


def test_a_broker_that_hangs_does_not_keep_anybody_from_leaving(kafka_broker: Broker, topic: str) -> None:
    # In an event loop of its own, as in a process: what the client still waits for ends with it.
    asyncio.run(leave_while_it_hangs(kafka_broker, topic))


async def leave_while_it_hangs(kafka_broker: Broker, topic: str) -> None:
    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as hanging:
        async with KafkaBus(plain(kafka_broker)) as bus, bus.subscribe([topic], topic) as subscription:
            await bus.publish(topic, b"k", b"v")
            await subscription.ack(await take(subscription))
            os.kill(kafka_broker.pid or 0, signal.SIGSTOP)
            hanging.callback(os.kill, kafka_broker.pid or 0, signal.SIGCONT)
            publisher = tasks.create_task(refused_on_close(bus.publish(topic, b"k", b"never")), name="publisher that waits")
            await asyncio.wait([publisher], timeout=0.3)
            await assert_leaving_is_quick(kafka_broker, topic)
            leaving_s = time.monotonic()
        assert time.monotonic() - leaving_s < 5.0
