"""Publishing what a block decided: rows of the block's transaction, sent after it, retried for ever.

Rules:

- a row leaves the outbox only when the bus has confirmed it, or when a verified copy of another validator was read; a crash in
  between publishes again, and whoever reads drops duplicates;
- f + 1 validators publish a height at once, the others a second later unless they have read a copy, so one honest validator
  always publishes and not all of them do. Nobody is elected;
- rows that are due go out in order; the first that fails stops the pass, which is repeated after a growing, jittered wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.bus import Bus, BusError, Published
from cybermesh.store import StoreUnavailable, tables
from cybermesh.store.database import Database
from cybermesh.store.queries import fetch, select_records
from cybermesh.store.records import PendingEvent

COPY_WAIT_MS = 1_000
BATCH = 256
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 30.0


def publishes_at_once(index: int, height: int, committee_size: int, faults: int) -> bool:
    """Return whether validator ``index`` is one of the ``faults + 1`` that publish this height without waiting."""
    return (index - height) % committee_size <= faults


class Outbox:
    """The rows; every method raises StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def pending(self, limit: int, *, after: int = 0) -> Sequence[PendingEvent]:
        """Return up to ``limit`` rows that are not published, with an id above ``after``, in order."""
        table = tables.outbox
        query = select_records(table, PendingEvent).where(table.c.published_ms.is_(None), table.c.id > after)
        query = query.order_by(table.c.id).limit(limit)
        return await self._database.read(lambda connection: fetch(connection, PendingEvent, query))

    async def pending_count(self) -> int:
        """Return how many rows wait; for /ready."""
        table = tables.outbox

        async def work(connection: AsyncConnection) -> int:
            query = select(func.count()).select_from(table).where(table.c.published_ms.is_(None))
            return int((await connection.execute(query)).scalar_one())

        return await self._database.read(work)

    async def event(self, event: str, subject: int) -> bytes | None:
        """Return the message of an event, published or not; None when this store does not have it."""
        table = tables.outbox
        same = (table.c.event == event) & (table.c.subject == subject)

        async def work(connection: AsyncConnection) -> bytes | None:
            found: bytes | None = (await connection.execute(select(table.c.value).where(same).limit(1))).scalar()
            return found

        return await self._database.read(work)

    async def mark(self, published: Sequence[tuple[int, Published]], now_ms: int) -> None:
        """Record where rows, by id, were published; a row that has a place keeps it."""
        table = tables.outbox
        mine = (table.c.id == bindparam("row")) & table.c.published_ms.is_(None)
        statement = (
            update(table)
            .where(mine)
            .values(published_ms=now_ms, partition=bindparam("to_partition"), offset=bindparam("to_offset"), is_own=True)
        )

        async def work(connection: AsyncConnection) -> None:
            places = [{"row": row, "to_partition": place.partition, "to_offset": place.offset} for row, place in published]
            await connection.execute(statement, places)

        if published:
            await self._database.write(work)

    async def mark_copy(self, event: str, subject: int, place: tuple[int, int], now_ms: int) -> bool:
        """Record that a **verified** copy was read at ``place`` (partition, offset); return whether a row waited for it."""
        table = tables.outbox
        same = (table.c.event == event) & (table.c.subject == subject) & table.c.published_ms.is_(None)

        async def work(connection: AsyncConnection) -> bool:
            values = {"published_ms": now_ms, "partition": place[0], "offset": place[1], "is_own": False}
            return (await connection.execute(update(table).where(same).values(values))).rowcount > 0

        return await self._database.write(work)


@dataclass(frozen=True, slots=True)
class PublisherParts:
    """What a publisher needs from outside.

    ``is_first`` says for a height whether this validator publishes without waiting (see ``publishes_at_once``); ``on_failure``
    is told of each failed pass, to count and log it.
    """

    is_first: Callable[[int], bool]
    now_ms: Callable[[], int]
    chance: Callable[[], float]
    on_failure: Callable[[Exception], None] = lambda _: None


class OutboxPublisher:
    """Publishes the outbox until it is cancelled; one per process."""

    def __init__(self, outbox: Outbox, bus: Bus, parts: PublisherParts) -> None:
        self._outbox = outbox
        self._bus = bus
        self._parts = parts
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Say that a block was stored or a copy was marked; to be called after it is durable."""
        self._changed.set()

    async def run(self) -> None:
        """Publish what is due, wait for more, for ever."""
        failures = 0
        while True:
            self._changed.clear()
            try:
                wait_s = await self.publish_due()
                failures = 0
            except (BusError, StoreUnavailable) as error:
                self._parts.on_failure(error)
                wait_s = backoff_s(failures, self._parts.chance())
                failures += 1
                # Not ended by ``notify``: more work is no reason to ask a broken bus sooner.
                await asyncio.sleep(wait_s)
                continue
            await self._wait(wait_s)

    async def publish_due(self) -> float | None:
        """Publish every row that is due, in order; return the seconds until the next one is, None when none waits.

        Raises:
            BusError: a row was refused; the earlier ones are marked.
            StoreUnavailable: the outbox cannot be read or marked now.
        """
        waiting: list[int] = []
        after = 0
        while rows := await self._outbox.pending(BATCH, after=after):
            waiting += await self._publish(rows)
            after = rows[-1].id
        return max(0, min(waiting) - self._parts.now_ms()) / 1000 if waiting else None

    async def _publish(self, rows: Sequence[PendingEvent]) -> list[int]:
        """Publish the rows that are due and mark them in one write; return when the others are due."""
        published: list[tuple[int, Published]] = []
        waiting: list[int] = []
        now_ms = self._parts.now_ms()
        try:
            for row in rows:
                due_ms = row.created_ms if self._parts.is_first(row.height) else row.created_ms + COPY_WAIT_MS
                if due_ms > now_ms:
                    waiting.append(due_ms)
                else:
                    published.append((row.id, await self._bus.publish(row.topic, row.key, row.value)))
        finally:
            # Also after a failure or a cancellation: what the bus has confirmed need not go out again.
            await self._outbox.mark(published, self._parts.now_ms())
        return waiting

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass


def backoff_s(failures: int, chance: float) -> float:
    """Return the wait after this many failures in a row: doubling to a cap, times 0.5 to 1.5 by ``chance`` in [0, 1)."""
    return min(BACKOFF_FIRST_S * float(2 ** min(failures, 16)), BACKOFF_MAX_S) * (0.5 + chance)
