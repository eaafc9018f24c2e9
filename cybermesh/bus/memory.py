"""The bus in one process: real partitions, groups and acknowledgements, nothing durable.

Rules:

- a partition is a bounded buffer. When it is full, the oldest record leaves it if no running subscriber still needs it;
  otherwise ``publish`` waits. A group without a subscriber holds nobody up: like on a broker, it loses what has left;
- a group's partitions are spread over its subscribers; whoever joins or leaves causes a new spread, and a partition that
  changes hands starts again after the last acknowledged record;
- a closed bus refuses to publish; its subscribers still get what is buffered, then their iteration ends.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from cybermesh.bus import BusError, Delivery, Published
from cybermesh.messages import MIB

RECORD_MAX = 2 * MIB
PARTITIONS = 8
RECORDS_MAX = 10_000
BYTES_MAX = 32 * MIB


class _Cursor:
    """How far one group has come in one partition."""

    __slots__ = ("acknowledged", "owner", "position")

    def __init__(self, position: int) -> None:
        self.acknowledged = position  # the first offset that is not acknowledged
        self.position = position  # the first offset that the owner has not been given
        self.owner: MemorySubscription | None = None


class _Partition:
    __slots__ = ("base", "cursors", "number", "records", "room", "size_bytes", "topic")

    def __init__(self, topic: str, number: int) -> None:
        self.topic = topic
        self.number = number
        self.records: deque[Delivery] = deque()
        self.base = 0  # offset of the oldest record still here
        self.size_bytes = 0
        self.cursors: dict[str, _Cursor] = {}
        self.room = asyncio.Event()

    @property
    def end(self) -> int:
        return self.base + len(self.records)

    def has_room(self, size: int, records_max: int, bytes_max: int) -> bool:
        """Return whether a record of ``size`` bytes fits, after dropping what no running subscriber needs."""
        needed = min((c.acknowledged for c in self.cursors.values() if c.owner is not None), default=self.end)
        while self.records and (len(self.records) >= records_max or self.size_bytes + size > bytes_max):
            if self.base >= needed:
                return False
            dropped = self.records.popleft()
            self.base += 1
            self.size_bytes -= len(dropped.key) + len(dropped.value)
        return True

    def next_for(self, group: str, count_max: int, bytes_max: int) -> list[Delivery]:
        """Return the group's next records within the bounds and step past them."""
        cursor = self.cursors[group]
        cursor.position = max(cursor.position, self.base)
        taken: list[Delivery] = []
        size_bytes = 0
        while cursor.position < self.end and len(taken) < count_max and size_bytes < bytes_max:
            record = self.records[cursor.position - self.base]
            taken.append(record)
            size_bytes += len(record.value)
            cursor.position += 1
        return taken


class MemorySubscription:
    """One subscriber of a group; made by ``MemoryBus.subscribe``."""

    def __init__(self, bus: MemoryBus, topics: Sequence[str], group: str) -> None:
        self._bus = bus
        self.topics = frozenset(topics)
        self.group = group
        self.partitions: deque[_Partition] = deque()
        self.wake = asyncio.Event()
        self.is_open = True

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        taken = await self.take(1, 1)
        if not taken:
            raise StopAsyncIteration
        return taken[0]

    async def take(self, count_max: int, bytes_max: int) -> list[Delivery]:
        """Return what has arrived; see ``bus.Subscription.take``."""
        while self.is_open:
            self.wake.clear()
            taken: list[Delivery] = []
            size_bytes = 0
            for _ in range(len(self.partitions)):
                # Turning the deque gives every partition its turn, whatever the others hold.
                self.partitions.rotate(-1)
                found = self.partitions[-1].next_for(self.group, count_max - len(taken), bytes_max - size_bytes)
                taken += found
                size_bytes += sum(len(record.value) for record in found)
                if len(taken) >= count_max or size_bytes >= bytes_max:
                    break
            if taken or self._bus.is_closed:
                return taken
            await self.wake.wait()
        return []

    async def ack(self, delivery: Delivery) -> None:
        """Mark the delivery and the earlier ones of its partition as processed.

        For a partition that has gone to another subscriber this does nothing: that one gets the record again.

        Raises:
            BusError: the subscription was left.
        """
        if not self.is_open:
            raise BusError(f"{delivery.topic}: the subscription of group {self.group} was left before the ack")
        self._bus.acknowledge(self, delivery)


class MemoryBus:
    """An in-process bus; see the module for its rules and ``bus.Bus`` for the contract.

    Args:
        now_ms: The clock of the records' timestamps, milliseconds since 1970.
        partitions: Of every topic.
        records_max: Records that a partition buffers.
        bytes_max: Bytes of keys and values that a partition buffers; one record always fits.
    """

    def __init__(
        self,
        now_ms: Callable[[], int],
        *,
        partitions: int = PARTITIONS,
        records_max: int = RECORDS_MAX,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        assert partitions > 0
        assert records_max > 0
        self._now_ms = now_ms
        self._partitions_per_topic = partitions
        self._records_max = records_max
        self._bytes_max = bytes_max
        self._topics: dict[str, list[_Partition]] = {}
        self._members: dict[str, list[MemorySubscription]] = {}
        self.is_closed = False

    @property
    def trouble(self) -> str:
        """Empty: memory does not fail."""
        return ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_closed = True
        for partitions in self._topics.values():
            for partition in partitions:
                partition.room.set()
        for members in self._members.values():
            for member in members:
                member.wake.set()

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        """Append a record; waits while the partition is full and a subscriber still needs its oldest record.

        Raises:
            BusError: the bus is closed, or the record is larger than 2 MB.
        """
        size = len(key) + len(value)
        if size > RECORD_MAX:
            raise BusError(f"{topic}: a record of {size} bytes is larger than {RECORD_MAX}")
        partitions = self._partitions(topic)
        partition = partitions[zlib.crc32(key) % len(partitions)]
        await asyncio.sleep(0)  # a publisher that never waits must not starve the subscribers
        while not self.is_closed and not partition.has_room(size, self._records_max, self._bytes_max):
            partition.room.clear()
            await partition.room.wait()
        if self.is_closed:
            raise BusError(f"{topic}: the bus is closed")
        record = Delivery(topic, partition.number, partition.end, key, value, self._now_ms())
        partition.records.append(record)
        partition.size_bytes += size
        for cursor in partition.cursors.values():
            if cursor.owner is not None:
                cursor.owner.wake.set()
        return Published(topic, record.partition, record.offset)

    @asynccontextmanager
    async def subscribe(
        self, topics: Sequence[str], group: str, *, from_start: bool = True
    ) -> AsyncIterator[MemorySubscription]:
        """Join ``group``; see ``bus.Bus.subscribe``."""
        member = MemorySubscription(self, topics, group)
        for topic in topics:
            for partition in self._partitions(topic):
                partition.cursors.setdefault(group, _Cursor(partition.base if from_start else partition.end))
        members = self._members.setdefault(group, [])
        members.append(member)
        self._spread(group)
        try:
            yield member
        finally:
            member.is_open = False
            member.wake.set()
            members.remove(member)
            self._spread(group)

    def acknowledge(self, member: MemorySubscription, delivery: Delivery) -> None:
        """Move the group's mark past the delivery if ``member`` still owns its partition."""
        partition = self._partitions(delivery.topic)[delivery.partition]
        cursor = partition.cursors[member.group]
        if cursor.owner is member and delivery.offset < cursor.position:
            cursor.acknowledged = max(cursor.acknowledged, delivery.offset + 1)
            partition.room.set()

    def _partitions(self, topic: str) -> list[_Partition]:
        partitions = self._topics.get(topic)
        if partitions is None:
            partitions = [_Partition(topic, number) for number in range(self._partitions_per_topic)]
            self._topics[topic] = partitions
        return partitions

    def _spread(self, group: str) -> None:
        """Give each partition of the group's topics to one of the subscribers of that topic."""
        for member in self._members[group]:
            member.partitions.clear()
        for topic, partitions in self._topics.items():
            readers = [member for member in self._members[group] if topic in member.topics]
            for partition in partitions:
                cursor = partition.cursors.get(group)
                if cursor is None:
                    continue
                owner = readers[partition.number % len(readers)] if readers else None
                if owner is not cursor.owner:
                    cursor.owner = owner
                    cursor.position = cursor.acknowledged
                if owner is None:
                    partition.room.set()
                else:
                    owner.partitions.append(partition)
                    owner.wake.set()
