"""What the ai role reads: sources in worker threads, and flows that sensors publish on the bus, behind one shape.

A feed hands over one batch at a time and is told when the batch's effect is durable; only then does it move its mark: the kept
position of a file, the committed offset of a topic. So a role that is killed at any moment reads again what had no effect yet,
and nothing else. A feed never retries; the role does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from cybermesh.bus import Bus, Delivery, Subscription
from cybermesh.envelope import EnvelopeError
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.flow_messages import from_message
from cybermesh.telemetry.sources import Batch, Source
from cybermesh.wire import codec

TELEMETRY_GROUP = "cybermesh-telemetry"  # one for the deployment: its ai processes share the partitions
_SETTLE_S = 2.0  # for a read in a worker thread that is not wanted any more; sources that follow look up several times a second

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Given:
    """A batch, and what to call when everything found up to it is durable."""

    batch: Batch
    done: Callable[[], Awaitable[None]]


class Feed(Protocol):
    """One input of the role.

    Contract: ``batches`` opens the input anew at its mark each time; leaving its context closes it. A packet batch's payload is
    valid until the next batch is asked for. ``SourceError`` and ``BusError`` say that the input cannot be read now.
    """

    @property
    def name(self) -> str:
        """The input as it is configured."""
        ...

    @property
    def is_endless(self) -> bool:
        """Whether the input goes on for ever: if it ends, that is a failure; and its rows are wanted promptly."""
        ...

    @property
    def counters(self) -> Counters:
        """What was read and what was left out since the input was last opened."""
        ...

    def batches(self) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Given]]:
        """Open the input and yield its batches."""
        ...


class Marks(Protocol):
    """Where inputs go on after a restart."""

    def of(self, name: str) -> str:
        """Return the kept position of an input, empty for its start."""
        ...

    def keep(self, name: str, position: str) -> None:
        """Keep a position durably."""
        ...


class SourceFeed:
    """A source of telemetry, opened and read in a worker thread."""

    def __init__(self, name: str, open_at: Callable[[str], Source], marks: Marks, *, is_endless: bool = False) -> None:
        """Describe the input; ``open_at`` opens it at a position and may raise ``SourceError``."""
        self.name = name
        self.is_endless = is_endless
        self.counters = Counters()
        self._open_at, self._marks = open_at, marks
        self._kept = ""

    @asynccontextmanager
    async def batches(self) -> AsyncIterator[AsyncIterator[Given]]:
        """Open the source where its kept position says and yield its batches.

        Raises:
            SourceError: It cannot be opened.
        """
        self._kept = self._marks.of(self.name)
        source = await in_thread(partial(self._open_at, self._kept))
        try:
            self.counters = source.counters
            async with aclosing(self._read(source)) as given:
                yield given
        finally:
            source.close()

    async def _read(self, source: Source) -> AsyncGenerator[Given, None]:
        batches = source.batches()
        while (batch := await in_thread(partial(next, batches, None))) is not None:
            yield Given(batch, partial(self._keep, source.position))

    async def _keep(self, position: str) -> None:
        if position != self._kept:
            await in_thread(partial(self._marks.keep, self.name, position))
            self._kept = position


class BusFeed:
    """Flow batches of ``telemetry.features.v1``; the mark is the group's committed offset."""

    is_endless = True

    def __init__(self, name: str, bus: Bus, topic: str, most: int) -> None:
        """Describe the input; ``most`` is the number of flows in a batch."""
        assert most >= 1
        self.name = name
        self.counters = Counters(unit="flows")
        self._bus, self._topic, self._most = bus, topic, most

    @asynccontextmanager
    async def batches(self) -> AsyncIterator[AsyncIterator[Given]]:
        """Join the group and yield the flows of its share of the topic.

        Raises:
            BusError: The bus cannot be used.
        """
        async with self._bus.subscribe([self._topic], TELEMETRY_GROUP) as deliveries, aclosing(self._read(deliveries)) as given:
            yield given

    async def _read(self, deliveries: Subscription) -> AsyncGenerator[Given, None]:
        async for delivery in deliveries:
            acknowledge = partial(deliveries.ack, delivery)
            flows = self._flows(delivery)
            if flows is None or not len(flows):
                await acknowledge()  # nothing to do for it; what came before is done
                continue
            starts = range(0, len(flows), self._most)
            for at in starts:
                yield Given(flows.take(slice(at, at + self._most)), acknowledge if at == starts[-1] else _nothing)

    def _flows(self, delivery: Delivery) -> Batch | None:
        """Return a message's flows, or None for one that cannot be read: that is counted as one, by reason."""
        try:
            message = codec.decode_flow_features(delivery.value)
        except EnvelopeError as error:
            self.counters.packets += 1
            self.counters.skip(f"message refused: {error.code.value}")
            return None
        return from_message(message, self.counters)


async def in_thread(work: Callable[[], T]) -> T:
    """Do blocking work in a thread; when cancelled, wait a moment for it, so that nobody closes what it still uses."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running], timeout=_SETTLE_S)
        raise


async def _nothing() -> None:
    """Stand for an acknowledgement that comes with a later part of the same message."""
