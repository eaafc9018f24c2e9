"""What concerns this node and not the chain: its starts, snapshots of the ledger's state, and who did what."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import tables
from cybermesh.store.database import Database, insert_new
from cybermesh.store.queries import fetch, fetch_one, select_records, values_of
from cybermesh.store.records import AuditEntry, StoredSnapshot

_PAGE_MAX = 10_000


class NodeRecords:
    """Boots, snapshots and the audit trail; every method raises StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def last_boot(self) -> int:
        """Return the highest boot number that was recorded, 0 in an empty store."""

        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(select(func.max(tables.boots.c.boot)))).scalar() or 0

        return await self._database.read(work)

    async def record_boot(self, boot: int, started_ms: int) -> None:
        """Record a start under the number that the safety file gave it; doing it twice changes nothing."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert_new(connection, tables.boots), [{"boot": boot, "started_ms": started_ms}])

        await self._database.write(work)

    async def last_voted_round(self) -> int:
        """Return the highest voted round that was copied with a block of the newest epoch, 0 in an empty store."""
        blocks = tables.blocks.c

        async def work(connection: AsyncConnection) -> int:
            newest = select(func.max(blocks.epoch)).scalar_subquery()
            query = select(func.max(blocks.last_voted_round)).where(blocks.epoch == newest)
            return (await connection.execute(query)).scalar() or 0

        return await self._database.read(work)

    async def save_snapshot(self, snapshot: StoredSnapshot, keep: int = 2) -> None:
        """Store a snapshot and drop all but the ``keep`` newest."""
        table = tables.snapshots

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(delete(table).where(table.c.height == snapshot.height))
            await connection.execute(insert(table), values_of([snapshot]))
            heights = list(await connection.scalars(select(table.c.height).order_by(table.c.height.desc())))
            if len(heights) > keep:
                await connection.execute(delete(table).where(table.c.height <= heights[keep]))

        await self._database.write(work)

    async def newest_snapshot(self) -> StoredSnapshot | None:
        """Return the snapshot of the greatest height."""
        table = tables.snapshots
        query = select_records(table, StoredSnapshot).order_by(table.c.height.desc())
        return await self._database.read(lambda connection: fetch_one(connection, StoredSnapshot, query))

    async def add_audit(self, entry: AuditEntry) -> None:
        """Append to the audit trail."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(tables.audit), values_of([entry]))

        await self._database.write(work)

    async def audit_trail(self, limit: int, *, since_ms: int = 0) -> Sequence[AuditEntry]:
        """Return up to ``limit`` entries from ``since_ms`` on, oldest first."""
        table = tables.audit
        query = select_records(table, AuditEntry).where(table.c.at_ms >= since_ms).order_by(table.c.at_ms, table.c.id)
        limited = query.limit(max(0, min(limit, _PAGE_MAX)))
        return await self._database.read(lambda connection: fetch(connection, AuditEntry, limited))
