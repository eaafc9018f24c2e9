"""Reading from Kafka: one consumer for each subscription, kept alive by a task of the bus.

Rules:

- a position is committed only after ``ack``; commits are gathered for ``COMMIT_DELAY_S`` and made before a partition is given
  up and before leaving. What is lost with them comes again;
- a partition that is taken away is forgotten at once: its deliveries are dropped from the buffer, and an ``ack`` for them does
  nothing. Given back, it starts again after the last committed record;
- above its bound the buffer pauses the partitions; the consumer stays in its group however long the role needs;
- a new group that is to start at the end has its positions committed before it joins, so that what is published while it joins
  is not missed;
- when the consumer cannot go on, a new one takes its place; when the brokers are away it waits for them. Only the first attempt
  reports a fault that needs a person (``joined``); afterwards that is trouble, and may pass.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition, errors
from aiokafka.abc import ConsumerRebalanceListener

from cybermesh.bus import BusError, Delivery
from cybermesh.bus.arrivals import Arrivals
from cybermesh.bus.kafka_client import (
    LEAVE_S,
    PAUSE_FIRST_S,
    PAUSE_MAX_S,
    RECORD_MAX,
    KafkaOptions,
    Troubles,
    explain,
    patiently,
)
from cybermesh.messages import MIB

COMMIT_DELAY_S = 0.1
COMMIT_LAST_S = 5.0
# Taken from the client at a time; it holds compressed batches, so only the number of records bounds what they become.
FETCH_RECORDS_MAX = 16
# While records are small, more and more of them, because every turn costs as much as several records.
FETCH_SMALL_RECORDS_MAX = 512
FETCH_SMALL_BYTES = 1 * MIB
FETCH_BYTES_MAX = 8 * MIB
BUFFER_RECORDS_MAX = 10_000
BUFFER_BYTES_MAX = 8 * MIB
POLL_MS = 1_000
# How long a broker keeps an empty fetch; over TLS it answers that before it lets go of the connection, so leaving waits for it.
FETCH_WAIT_MS = 200
PROBE_S = 5.0
# The client's own limit on the time between two fetches would throw a paused role out of its group.
_NEVER_MS = 2**31 - 1


class KafkaSubscription(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """One subscriber of a group; made by ``KafkaBus.subscribe``, which runs ``run`` in a task."""

    def __init__(self, options: KafkaOptions, topics: Sequence[str], group: str, troubles: Troubles) -> None:
        self._options = options
        self._topics = tuple(topics)
        self._group = group
        self._troubles = troubles
        self._part = f"subscribe {group} to {', '.join(topics)}"
        self._arrivals = Arrivals()
        self._room = asyncio.Event()
        self._has_marks = asyncio.Event()
        self._consumer: AIOKafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}  # of owned partitions: the first offset that was not buffered
        self._marks: dict[TopicPartition, int] = {}  # the first offset that is not acknowledged
        self._committed: dict[TopicPartition, int] = {}
        self._heard_s = time.monotonic()
        self.joined = asyncio.Event()
        self.fault: BusError | None = None  # why it could not join, once ``joined`` is set

    # The role's side

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        while True:
            delivery = self._arrivals.take()
            if delivery is not None:
                self._say_room()
                return delivery
            if self._arrivals.has_ended:
                raise StopAsyncIteration
            await self._arrivals.arrived()

    async def take(self, count_max: int, bytes_max: int) -> list[Delivery]:
        """Return what has arrived; see ``bus.Subscription.take``."""
        await self._arrivals.arrived()
        taken = self._arrivals.take_many(count_max, bytes_max)
        self._say_room()
        return taken

    def _say_room(self) -> None:
        if not self._is_above(0.5):
            self._room.set()

    async def ack(self, delivery: Delivery) -> None:
        """Mark the delivery and the earlier ones of its partition as processed; the position is committed soon after.

        For a partition that has gone to another subscriber this does nothing: that one gets the record again.

        Raises:
            BusError: the subscription was left.
        """
        if self._arrivals.has_ended:
            raise BusError(f"{delivery.topic}: the subscription of group {self._group} was left before the ack")
        place = TopicPartition(delivery.topic, delivery.partition)
        if delivery.offset < self._positions.get(place, 0):
            self._marks[place] = max(self._marks.get(place, 0), delivery.offset + 1)
            self._has_marks.set()

    @property
    def buffered_bytes(self) -> int:
        """Keys and values that were fetched and not taken yet."""
        return self._arrivals.size_bytes

    def end(self) -> None:
        """End the iteration; deliveries that were not acknowledged come again to the next subscriber."""
        self._arrivals.end()

    # The task

    async def run(self, ensure: Callable[[Sequence[str]], Awaitable[None]], *, from_start: bool) -> None:
        """Keep a consumer going until cancelled; end only if it cannot join at all.

        Args:
            ensure: Makes sure that the topics are there.
            from_start: Where a new group starts.
        """
        try:
            await self._keep_going(ensure, is_anchored=from_start)
        except asyncio.CancelledError:
            self.fault = BusError(f"{', '.join(self._topics)}: the bus is closed")
            raise
        finally:
            self._arrivals.end()
            self._troubles.clear(self._part)
            self.joined.set()

    async def _keep_going(self, ensure: Callable[[Sequence[str]], Awaitable[None]], *, is_anchored: bool) -> None:
        pause_s = PAUSE_FIRST_S
        while True:
            try:
                await ensure(self._topics)
                if not is_anchored:
                    await patiently(self._anchor, self._options, self._troubles, self._part)
                    is_anchored = True
                consumer = await patiently(self._start, self._options, self._troubles, self._part)
            except BusError as error:
                # Later on, a right or a password that was taken away may be given back: the role must not end for it.
                if not self.joined.is_set():
                    self.fault = error
                    return
            else:
                pause_s = PAUSE_FIRST_S
                self.joined.set()
                await self._serve(consumer)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    def _make(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            **self._options.connection(),
            group_id=self._group,
            enable_auto_commit=False,
            # Never "latest": a group whose positions are gone must not skip what it has not seen.
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=RECORD_MAX,
            fetch_max_bytes=FETCH_BYTES_MAX,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            session_timeout_ms=self._options.session_ms,
            heartbeat_interval_ms=self._options.heartbeat_ms,
            max_poll_interval_ms=_NEVER_MS,
        )

    async def _start(self) -> AIOKafkaConsumer:
        consumer = self._make()
        self._consumer = consumer
        consumer.subscribe(self._topics, listener=self)
        try:
            await consumer.start()
        except BaseException:  # supervisor: whatever it was, the half-open consumer is closed
            await self._stop(consumer)
            raise
        return consumer

    async def _anchor(self) -> None:
        """Commit the ends of topics where the group has no position, so that a new group starts there and nowhere later."""
        consumer = self._make()
        try:
            # Only to learn how many partitions the topics have.
            consumer.assign([TopicPartition(topic, 0) for topic in self._topics])
            await consumer.start()
            places = [TopicPartition(topic, number) for topic in self._topics for number in _partitions(consumer, topic)]
            consumer.assign(places)
            known = {place.topic for place in places if await consumer.committed(place) is not None}
            new = [place for place in places if place.topic not in known]
            if new:
                await consumer.commit(await consumer.end_offsets(new))
        except errors.CommitFailedError:
            pass  # the group has members already, so it is not new
        finally:
            await consumer.stop()

    async def _serve(self, consumer: AIOKafkaConsumer) -> None:
        """Fetch and commit until cancelled or until the consumer cannot go on."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._fetch(consumer), name=f"{self._part} fetch")
                tasks.create_task(self._commit_steadily(consumer), name=f"{self._part} commit")
                tasks.create_task(self._watch(consumer), name=f"{self._part} watch")
        except* (errors.KafkaError, OSError) as faults:
            self._troubles.note(self._part, explain(faults.exceptions[0]))
        finally:
            await self._commit_last(consumer, self._marks, LEAVE_S)
            await self._stop(consumer)

    async def _stop(self, consumer: AIOKafkaConsumer) -> None:
        self._forget(set(self._positions))
        self._consumer = None
        try:
            async with asyncio.timeout(LEAVE_S):
                await consumer.stop()
        except TimeoutError:
            await consumer._client.close()  # noqa: SLF001 (aiokafka has no other way)

    async def _fetch(self, consumer: AIOKafkaConsumer) -> None:
        records_max = FETCH_RECORDS_MAX
        while True:
            if self._is_above(1.0):
                await self._wait_for_room(consumer)
            fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=records_max)
            before = self._arrivals.size_bytes
            for place, records in fetched.items():
                if place in self._positions:
                    self._heard()
                    self._arrivals.feed(map(_delivery, records))
                    self._positions[place] = records[-1].offset + 1
            is_small = self._arrivals.size_bytes - before < FETCH_SMALL_BYTES
            records_max = min(2 * records_max, FETCH_SMALL_RECORDS_MAX) if is_small else FETCH_RECORDS_MAX
            await asyncio.sleep(0)  # the client does not wait while it has records, and the role must get its turn

    async def _wait_for_room(self, consumer: AIOKafkaConsumer) -> None:
        self._room.clear()
        consumer.pause(*consumer.assignment())
        await self._room.wait()
        # A rebalance in between has unpaused some and taken others.
        consumer.resume(*(consumer.paused() & consumer.assignment()))

    def _is_above(self, share: float) -> bool:
        arrivals = self._arrivals
        return len(arrivals) > share * BUFFER_RECORDS_MAX or arrivals.size_bytes > share * BUFFER_BYTES_MAX

    # Positions

    async def _commit_steadily(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            await self._has_marks.wait()
            await asyncio.sleep(COMMIT_DELAY_S)
            self._has_marks.clear()
            # They mean that a rebalance is under way: what it takes away comes again to whoever gets it.
            with suppress(errors.CommitFailedError, errors.IllegalStateError):
                await self._commit(consumer, dict(self._marks))

    async def _commit(self, consumer: AIOKafkaConsumer, marks: dict[TopicPartition, int]) -> None:
        new = {place: offset for place, offset in marks.items() if self._committed.get(place, 0) < offset}
        if new:
            await consumer.commit(new)
            for place, offset in new.items():
                if place in self._positions:
                    self._committed[place] = offset

    async def _commit_last(self, consumer: AIOKafkaConsumer, marks: dict[TopicPartition, int], wait_s: float) -> None:
        """Commit before partitions are given up; not for long, because what is lost here only comes again."""
        try:
            async with asyncio.timeout(wait_s):
                await self._commit(consumer, dict(marks))
        except (errors.KafkaError, OSError, TimeoutError) as error:
            self._troubles.note(self._part, f"the last positions were not committed: {explain(error)}")

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Commit, then forget partitions that others may get; aiokafka calls this before a rebalance."""
        if self._consumer is not None:
            marks = {place: offset for place, offset in self._marks.items() if place in revoked}
            await self._commit_last(self._consumer, marks, COMMIT_LAST_S)
        self._forget(revoked)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Start on partitions; aiokafka calls this after a rebalance."""
        self._heard()
        self._positions.update(dict.fromkeys(assigned, 0))
        if self._consumer is not None and self._is_above(1.0):
            self._consumer.pause(*assigned)

    def _forget(self, places: Collection[TopicPartition]) -> None:
        for place in places:
            self._positions.pop(place, None)
            self._marks.pop(place, None)
            self._committed.pop(place, None)
        self._arrivals.drop({(place.topic, place.partition) for place in places})
        self._room.set()

    # Whether the brokers are there

    def _heard(self) -> None:
        self._heard_s = time.monotonic()
        self._troubles.clear(self._part)

    async def _watch(self, consumer: AIOKafkaConsumer) -> None:
        """Ask for a sign of life when nothing has come for a while: a consumer does not say that the brokers are away."""
        while True:
            await asyncio.sleep(PROBE_S)
            fetching = consumer._fetcher.error_future  # noqa: SLF001 (otherwise the end of that task is seen by nobody)
            if fetching.done() and not fetching.cancelled():
                raise errors.KafkaError(f"fetching ended: {fetching.exception()}")
            silent_s = time.monotonic() - self._heard_s
            if silent_s >= PROBE_S and self._positions:
                try:
                    async with asyncio.timeout(PROBE_S):
                        await consumer.end_offsets([min(self._positions)])
                except (TimeoutError, errors.KafkaError):
                    self._troubles.note(self._part, f"no broker has answered for {silent_s + PROBE_S:.0f} s")
                else:
                    self._heard()


def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[int]:
    """Return the numbers of a topic's partitions."""
    found = consumer.partitions_for_topic(topic)
    if not found:
        raise errors.UnknownTopicOrPartitionError(topic)
    return sorted(found)


def _delivery(record: ConsumerRecord) -> Delivery:
    return Delivery(record.topic, record.partition, record.offset, record.key or b"", record.value or b"", record.timestamp)
