"""The bus of one host without Kafka: a durable queue in one SQLite file, shared by several processes.

Rules:

- ``publish`` returns when the record is flushed to the disk; concurrent publishes share a flush;
- a partition of a group belongs to one subscriber in all processes. When a process dies, its partitions go to the others within
  about a second; when it stands still, after ``lease_s``. A partition that changes hands starts again after the last
  acknowledged record;
- a partition is bounded. When it is full, the oldest record leaves it if no running subscriber still needs it; otherwise
  ``publish`` waits. A group without a subscriber holds nobody up: like on a broker, it loses what has left;
- a subscriber's buffer is bounded: records are fetched when it has taken most of the ones before;
- a failing disk makes ``publish`` raise; subscribers wait until it is mended. ``trouble`` says what is wrong now.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from cybermesh.bus import BusError, Delivery, Published
from cybermesh.bus.arrivals import Arrivals, Place
from cybermesh.bus.local_store import Bounds, Member
from cybermesh.bus.local_worker import FETCH_BYTES_MAX, Acknowledge, Close, Join, Leave, LocalWorker, Publish, Want
from cybermesh.messages import MIB

RECORD_MAX = 2 * MIB
PARTITIONS = 8
LEASE_S = 10.0
_FETCH_BELOW = 64


class LocalSubscription:
    """One subscriber of a group; made by ``LocalBus.subscribe``."""

    def __init__(self, worker: LocalWorker, member: Member) -> None:
        self._worker = worker
        self._member = member
        self._arrivals = Arrivals()
        self._has_asked = False

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        while True:
            self._ask()
            delivery = self._arrivals.take()
            if delivery is not None:
                return delivery
            if self._arrivals.has_ended:
                raise StopAsyncIteration
            await self._arrivals.arrived()

    async def take(self, count_max: int, bytes_max: int) -> list[Delivery]:
        """Return what has arrived; see ``bus.Subscription.take``."""
        while True:
            taken = self._arrivals.take_many(count_max, bytes_max)
            self._ask()
            if taken or self._arrivals.has_ended:
                return taken
            await self._arrivals.arrived()

    def _ask(self) -> None:
        """Ask for more when there is room for another batch."""
        arrivals = self._arrivals
        has_room = len(arrivals) < _FETCH_BELOW and arrivals.size_bytes < FETCH_BYTES_MAX
        if has_room and not self._has_asked and not arrivals.has_ended:
            self._has_asked = True
            self._worker.submit(Want(self._member))

    async def ack(self, delivery: Delivery) -> None:
        """Mark the delivery and the earlier ones of its partition as processed; the mark is durable a few milliseconds later.

        For a partition that has gone to another subscriber this does nothing: that one gets the record again.

        Raises:
            BusError: the subscription or the bus was left.
        """
        if self._arrivals.has_ended:
            raise BusError(f"{delivery.topic}: the subscription of group {self._member.group} was left before the ack")
        self._worker.submit(Acknowledge(self._member, (delivery.topic, delivery.partition), delivery.offset))

    def feed(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries that were asked for."""
        if not self._arrivals.has_ended:
            self._has_asked = False
            self._arrivals.feed(deliveries)

    def revoke(self, places: frozenset[Place]) -> None:
        """Forget what has arrived of partitions that changed hands."""
        self._arrivals.drop(places)

    def end(self) -> None:
        """End the iteration."""
        self._arrivals.end()


class LocalBus:
    """A durable bus for the processes of one host; see the module for its rules and ``bus.Bus`` for the contract.

    Args:
        path: The queue's file; made when it is not there, as is the directory PATH.wake beside it.
        now_ms: The clock of the records' timestamps, milliseconds since 1970.
        partitions: Of a topic that this process is the first to use.
        bounds: Of every partition; the same for all processes of the bus.
        lease_s: How long a process may stand still before its partitions go to others.
    """

    def __init__(
        self,
        path: Path,
        now_ms: Callable[[], int],
        *,
        partitions: int = PARTITIONS,
        bounds: Bounds | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        assert partitions > 0
        self._path = path
        self._now_ms = now_ms
        self._partitions = partitions
        self._bounds = bounds or Bounds()
        self._lease_s = lease_s
        self._worker: LocalWorker | None = None

    @property
    def trouble(self) -> str:
        """What keeps the bus from working now; empty when nothing does."""
        return self._worker.trouble if self._worker else "the bus is closed"

    async def __aenter__(self) -> Self:
        try:
            worker = LocalWorker(self._path, self._partitions, self._bounds, self._now_ms, self._lease_s)
        except OSError as error:
            raise BusError(f"{self._path}: {error.strerror}; the local bus needs a directory it can write") from error
        worker.start()
        await worker.ready
        self._worker = worker
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.submit(Close())
            await worker.closed
            worker.join()

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        """Append a record; waits while the partition is full and a subscriber still needs its oldest record.

        Raises:
            BusError: the bus is closed, the record is larger than 2 MB, or the disk refuses.
        """
        size = len(key) + len(value)
        if size > RECORD_MAX:
            raise BusError(f"{topic}: a record of {size} bytes is larger than {RECORD_MAX}")
        answer: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
        self._open_worker(topic).submit(Publish(topic, bytes(key), bytes(value), answer))
        return await answer

    @asynccontextmanager
    async def subscribe(
        self, topics: Sequence[str], group: str, *, from_start: bool = True
    ) -> AsyncIterator[LocalSubscription]:
        """Join ``group``; see ``bus.Bus.subscribe``.

        Raises:
            BusError: the bus is closed, or the disk refuses.
        """
        worker = self._open_worker(", ".join(topics))
        member = Member(secrets.token_hex(8), worker.wake.name, group, tuple(topics))
        subscription = LocalSubscription(worker, member)
        loop = asyncio.get_running_loop()
        try:
            joined: asyncio.Future[None] = loop.create_future()
            worker.submit(Join(member, subscription, from_start, joined))
            await joined
            yield subscription
        finally:
            subscription.end()
            if self._worker is worker:
                left: asyncio.Future[None] = loop.create_future()
                worker.submit(Leave(member, left))
                await left

    def _open_worker(self, topic: str) -> LocalWorker:
        if self._worker is None:
            raise BusError(f"{topic}: the bus is closed")
        return self._worker
