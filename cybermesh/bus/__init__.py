"""The bus: at-least-once delivery of opaque records, the same contract in memory, on one host, and on Kafka.

Contract (one test suite runs over every implementation):

- ``publish`` returns when the record is durable for that implementation; the caller decides about retries.
- ``subscribe`` yields each record of the topics to each *group* once or more, in order per partition; a key always maps to the
  same partition, so one entity's records stay in order.
- A delivery counts as processed only after ``ack``; what was not acknowledged comes again to the group's next subscriber.
  The mark may be made durable a moment later: what it was not when a process died comes again too.
- Buffers are bounded: a slow subscriber makes ``publish`` wait (memory, local) or lags (Kafka); nothing is dropped.
- Leaving the subscription's context stops delivery; leaving the bus's context flushes what was published.
- Cancellation is safe at every await: a cancelled ``publish`` may or may not have happened, as after a crash.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


class BusError(Exception):
    """The bus refused or lost the operation; the caller may retry."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One record as delivered; (topic, partition, offset) names it for ever."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Published:
    """Where a published record went."""

    topic: str
    partition: int
    offset: int


class Subscription(Protocol):
    """A running subscription of one group member."""

    def __aiter__(self) -> AsyncIterator[Delivery]:
        """Yield deliveries until the subscription is closed."""
        ...

    async def take(self, count_max: int, bytes_max: int) -> list[Delivery]:
        """Return what has arrived, having waited for the first one; empty once the subscription is closed.

        At most ``count_max``, and nothing after the delivery whose value brings the sum of values to ``bytes_max``.
        """
        ...

    async def ack(self, delivery: Delivery) -> None:
        """Mark the delivery, and every earlier one of its partition, as processed durably."""
        ...


class Bus(Protocol):
    """What roles need from a message bus."""

    @property
    def trouble(self) -> str:
        """What keeps the bus from working now, for /ready; empty when nothing does."""
        ...

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        """Append a record; return when it is durable.

        Raises:
            BusError: The record was not accepted.
        """
        ...

    def subscribe(
        self, topics: Sequence[str], group: str, *, from_start: bool = True
    ) -> AbstractAsyncContextManager[Subscription]:
        """Join ``group`` on ``topics``; a new group starts at the earliest record unless ``from_start`` is false."""
        ...
