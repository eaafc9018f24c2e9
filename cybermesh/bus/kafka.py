"""The bus on Apache Kafka: what the roles of several hosts meet on.

Rules:

- the brokers are not trusted with anything but delivery: what crosses the bus is signed by those who wrote it;
- ``publish`` returns when all replicas in sync have the record; it waits as long as the brokers are away, and so does
  ``subscribe``. Nothing is given up in the meantime and no restart is needed afterwards; ``trouble`` says what is missing;
- what a person has to mend (credentials, certificates, rights, a record above the limit) raises ``BusError``;
- missing topics are made on first use, if ``KafkaOptions.topics`` says how;
- leaving the bus ends its subscriptions; their acknowledged positions are committed first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from cybermesh.bus import BusError, Published
from cybermesh.bus.kafka_client import RECORD_MAX, KafkaOptions, Troubles
from cybermesh.bus.kafka_producer import KafkaPublisher
from cybermesh.bus.kafka_subscription import KafkaSubscription
from cybermesh.bus.kafka_topics import KafkaTopics


class KafkaBus:
    """A bus on a Kafka cluster; see the module for its rules and ``bus.Bus`` for the contract.

    It connects when it is first used, so a role can start while the brokers are away.
    """

    def __init__(self, options: KafkaOptions) -> None:
        self._options = options
        self._troubles = Troubles()
        self._topics = KafkaTopics(options, self._troubles)
        self._publisher = KafkaPublisher(options, self._topics, self._troubles)
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()

    @property
    def trouble(self) -> str:
        """What keeps the bus from working now; empty when nothing does."""
        return str(self._troubles)

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        for task in self._running:
            task.cancel()
        try:
            await self._publisher.close()
        finally:
            # Without the error: the caller's own exception passes as it is, not inside a group.
            await tasks.__aexit__(None, None, None)

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        """Append a record; waits while the brokers are away.

        Raises:
            BusError: the bus is closed, the record is larger than 2 MB, or the brokers refuse it for good.
        """
        size = len(key) + len(value)
        if size > RECORD_MAX:
            raise BusError(f"{topic}: a record of {size} bytes is larger than {RECORD_MAX}")
        return await self._publisher.publish(topic, key, value)

    @asynccontextmanager
    async def subscribe(
        self, topics: Sequence[str], group: str, *, from_start: bool = True
    ) -> AsyncIterator[KafkaSubscription]:
        """Join ``group``; waits while the brokers are away. See ``bus.Bus.subscribe``.

        Raises:
            BusError: the bus is closed, or the brokers refuse for good.
        """
        tasks = self._open_tasks(", ".join(topics))
        subscription = KafkaSubscription(self._options, topics, group, self._troubles)
        task = tasks.create_task(subscription.run(self._topics.ensure, from_start=from_start), name=f"subscribe {group}")
        self._running.add(task)
        try:
            await subscription.joined.wait()
            if subscription.fault is not None:
                raise subscription.fault
            yield subscription
        finally:
            subscription.end()
            task.cancel()
            await asyncio.wait([task])
            self._running.discard(task)

    def _open_tasks(self, topic: str) -> asyncio.TaskGroup:
        if self._tasks is None:
            raise BusError(f"{topic}: the bus is closed")
        return self._tasks
