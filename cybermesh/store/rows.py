"""Whole tables as rows, for those who check or move a store: every column, in the order of the key, by ranges of height.

Nothing here judges; ``roles.audit`` compares the rows with what the chain says they must be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Table, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import tables
from cybermesh.store.database import Database
from cybermesh.store.queries import fetch, fetch_one, select_records, values_of
from cybermesh.store.records import (
    AuditEntry,
    JournaledTransaction,
    LifecycleStep,
    StoredAck,
    StoredBlock,
    StoredDecision,
    StoredEpoch,
    StoredEvidence,
    StoredLabel,
    StoredReceipt,
    StoredSnapshot,
    StoredTransaction,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """A certificate and the height of the block it was stored with."""

    height: int
    body: bytes


@dataclass(frozen=True, slots=True)
class PublishedEvent:
    """An outbox row as far as the chain decides it, and when it was published."""

    event: str
    subject: int
    height: int
    topic: str
    key: bytes
    value: bytes
    published_ms: int | None


CHAIN: Final[Mapping[type, tuple[Table, tuple[str, ...]]]] = {
    StoredBlock: (tables.blocks, ("height",)),
    StoredTransaction: (tables.transactions, ("height", "position")),
    StoredReceipt: (tables.receipts, ("leaf",)),
    StoredDecision: (tables.decisions, ("decision_seq",)),
    StoredEvidence: (tables.evidence, ("digest",)),
    StoredCertificate: (tables.certificates, ("height",)),
    PublishedEvent: (tables.outbox, ("event", "subject")),
}
"""The tables that the blocks decide, all with a height, and the key that names a row."""

FEEDBACK: Final[Mapping[type, Table]] = {
    StoredAck: tables.acks,
    StoredLabel: tables.labels,
    LifecycleStep: tables.lifecycle,
    AuditEntry: tables.audit,
}
"""What came back and who did what; no block decides it."""

OTHERS: Final[Mapping[type, Table]] = {
    JournaledTransaction: tables.mempool,
    StoredSnapshot: tables.snapshots,
    StoredEpoch: tables.epochs,
}


def key_of(row: object) -> dict[str, object]:
    """Return the columns that name a row of the chain."""
    return {name: getattr(row, name) for name in CHAIN[type(row)][1]}


def difference(one: object, two: object, ignored: Sequence[str] = ()) -> str | None:
    """Return the first column in which two rows of a table differ."""
    names = (entry.name for entry in fields(cast(Any, one)) if entry.name not in ignored)
    return next((name for name in names if getattr(one, name) != getattr(two, name)), None)


class Rows:
    """The tables of one store; every method raises StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def bounds(self) -> tuple[int, int] | None:
        """Return the lowest and highest stored height, None when there is no block."""

        async def work(connection: AsyncConnection) -> tuple[int, int] | None:
            column = tables.blocks.c.height
            low, high = (await connection.execute(select(func.min(column), func.max(column)))).one()
            return None if low is None else (low, high)

        return await self._database.read(work)

    async def of_heights(self, record: type[T], first: int, last: int) -> list[T]:
        """Return the rows of a table of the chain with a height from ``first`` to ``last``, by height and key."""
        table, key = CHAIN[record]
        query = select_records(table, record).where(table.c.height.between(first, last))
        ordered = query.order_by(table.c.height, *(table.c[name] for name in key))
        return list(await self._database.read(lambda connection: fetch(connection, record, ordered)))

    async def outside(self, record: type[T], first: int) -> T | None:
        """Return a row of the chain below height ``first`` or above the head (looked at in the same moment)."""
        table, key = CHAIN[record]
        head = select(func.max(tables.blocks.c.height)).scalar_subquery()
        query = select_records(table, record).where(or_(table.c.height < first, table.c.height > head))
        limited = query.order_by(table.c.height, *(table.c[name] for name in key)).limit(1)

        async def work(connection: AsyncConnection) -> Sequence[T]:
            return await fetch(connection, record, limited)

        return next(iter(await self._database.read(work)), None)

    async def evidence_before(self, digest: bytes, height: int) -> StoredEvidence | None:
        """Return the body with this digest if it was stored below ``height``."""
        table = tables.evidence
        query = select_records(table, StoredEvidence).where(table.c.digest == digest, table.c.height < height)
        return await self._database.read(lambda connection: fetch_one(connection, StoredEvidence, query))

    async def all(self, record: type[T]) -> list[T]:
        """Return a whole table that no block decides."""
        table = {**FEEDBACK, **OTHERS}[record]
        query = select_records(table, record).order_by(*(column for column in table.primary_key))
        return list(await self._database.read(lambda connection: fetch(connection, record, query)))

    async def restore(self, row: object) -> None:
        """Put one row of a table that no block decides back, as it was exported."""
        table = FEEDBACK[type(row)]

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(table), values_of([row]))

        await self._database.write(work)

    async def prune_bodies(self, height: int) -> tuple[int, int]:
        """Empty the transactions and drop the evidence up to a height; return how many of each there were.

        The caller has made sure of a snapshot at or above it; without one the chain could never be executed again.
        """
        bodies, evidence = tables.transactions, tables.evidence
        old = (bodies.c.height <= height) & (bodies.c.payload != b"")

        async def work(connection: AsyncConnection) -> tuple[int, int]:
            emptied = await connection.execute(update(bodies).where(old).values(payload=b""))
            dropped = await connection.execute(delete(evidence).where(evidence.c.height <= height))
            return emptied.rowcount, dropped.rowcount

        return await self._database.write(work)

    async def prune_feedback(self, before_ms: int) -> dict[str, int]:
        """Drop acks, lifecycle steps and audit entries older than a time; return how many of each table."""
        old = {
            tables.acks: tables.acks.c.acked_at_ms,
            tables.lifecycle: tables.lifecycle.c.at_ms,
            tables.audit: tables.audit.c.at_ms,
        }

        async def work(connection: AsyncConnection) -> dict[str, int]:
            return {
                table.name: (await connection.execute(delete(table).where(column < before_ms))).rowcount
                for table, column in old.items()
            }

        return await self._database.write(work)

    async def height_before(self, time_ms: int) -> int:
        """Return the height of the newest block older than a block time, 0 when there is none."""
        query = select(func.max(tables.blocks.c.height)).where(tables.blocks.c.time_ms < time_ms)

        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(query)).scalar() or 0

        return await self._database.read(work)

    async def active(self) -> dict[str, int]:
        """Return the decisions marked as in force: policy id to number."""
        table = tables.decisions
        query = select(table.c.policy_id, table.c.decision_seq).where(table.c.is_active).order_by(table.c.decision_seq)

        async def work(connection: AsyncConnection) -> dict[str, int]:
            return {name: number for name, number in await connection.execute(query)}  # noqa: C416 - rows, not pairs

        return await self._database.read(work)

    async def pruned_height(self) -> int:
        """Return the greatest height whose transactions have lost their bodies, 0 when all have them."""
        table = tables.transactions

        async def work(connection: AsyncConnection) -> int:
            query = select(func.max(table.c.height)).where(table.c.payload == b"")
            return (await connection.execute(query)).scalar() or 0

        return await self._database.read(work)
