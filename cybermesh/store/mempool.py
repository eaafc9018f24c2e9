"""The journal of accepted transactions: what a bus offset was committed for is in here or in a block.

Rules: what ``add`` returned from survives a crash; the removal of a committed transaction is part of its block's transaction,
so one is never in neither place. The mempool's own bounds are consensus' business; the journal holds what that one admitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import tables
from cybermesh.store.database import Database, insert_new
from cybermesh.store.queries import fetch, select_records, values_of
from cybermesh.store.records import JournaledTransaction

_LOOKUP_MAX = 500
_ADD_EMBEDDED = """
INSERT INTO mempool (digest, payload, received_ms)
SELECT ?1, ?2, ?3 WHERE NOT EXISTS (SELECT 1 FROM transactions WHERE digest = ?1)
ON CONFLICT DO NOTHING
"""


class MempoolJournal:
    """Accepted transactions, in the order of their arrival."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, transactions: Sequence[JournaledTransaction]) -> None:
        """Store transactions durably, in one commit; those in the journal or in a block already are left alone.

        Raises:
            StoreUnavailable: nothing was stored; try again.
        """
        if not transactions:
            return

        await self._database.write(
            partial(_add_embedded if self._database.is_embedded else _add_remote, transactions=transactions)
        )

    async def remove(self, digests: Sequence[bytes]) -> None:
        """Forget transactions that this node has given up (committed ones go with their block).

        Raises:
            StoreUnavailable: nothing was changed; try again.
        """

        async def work(connection: AsyncConnection) -> None:
            for start in range(0, len(digests), _LOOKUP_MAX):
                piece = digests[start : start + _LOOKUP_MAX]
                await connection.execute(delete(tables.mempool).where(tables.mempool.c.digest.in_(piece)))

        if digests:
            await self._database.write(work)

    async def load(self) -> Sequence[JournaledTransaction]:
        """Return everything in the journal, oldest first.

        Raises:
            StoreUnavailable: the database cannot be read now.
        """
        query = select_records(tables.mempool, JournaledTransaction).order_by(tables.mempool.c.id)
        return await self._database.read(lambda connection: fetch(connection, JournaledTransaction, query))

    async def committed(self, digests: Sequence[bytes]) -> frozenset[bytes]:
        """Return which of these transactions are in a block already: late duplicates, to be acknowledged and counted.

        Raises:
            StoreUnavailable: the database cannot be read now.
        """
        return await self._database.read(lambda connection: _committed(connection, digests))


async def _add_embedded(connection: AsyncConnection, transactions: Sequence[JournaledTransaction]) -> None:
    # Past SQLAlchemy's compiler, which would take longer than the database: this statement runs for every message.
    rows = [(entry.digest, entry.payload, entry.received_ms) for entry in transactions]
    await connection.exec_driver_sql(_ADD_EMBEDDED, rows)


async def _add_remote(connection: AsyncConnection, transactions: Sequence[JournaledTransaction]) -> None:
    known = await _committed(connection, [entry.digest for entry in transactions])
    rows = values_of(entry for entry in transactions if entry.digest not in known)
    if rows:
        await connection.execute(insert_new(connection, tables.mempool), rows)


async def _committed(connection: AsyncConnection, digests: Sequence[bytes]) -> frozenset[bytes]:
    column = tables.transactions.c.digest
    found: set[bytes] = set()
    for start in range(0, len(digests), _LOOKUP_MAX):
        found.update(await connection.scalars(select(column).where(column.in_(digests[start : start + _LOOKUP_MAX]))))
    return frozenset(found)
