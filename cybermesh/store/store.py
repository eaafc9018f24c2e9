"""The chain as one validator keeps it, and the door to everything else it keeps.

Rules:

- a block and all it causes (certificate, transactions, receipts, decisions, outbox rows, mempool removals) is one transaction;
- writing the same block twice changes nothing, so whoever is unsure writes again; another block at a stored height is a
  BlockConflict, which must stop the node;
- heights are dense. Only an empty store may begin above height 1, when it begins from a snapshot.
"""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import ColumnElement, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import BlockConflict, StoreError, tables
from cybermesh.store.chain import Chain
from cybermesh.store.database import Database, open_database
from cybermesh.store.feedback import Feedback
from cybermesh.store.mempool import MempoolJournal
from cybermesh.store.migrate import migrate, require_current
from cybermesh.store.node import NodeRecords
from cybermesh.store.outbox import Outbox
from cybermesh.store.queries import delete_each, insert_many, insert_tuples, names_of, values_of
from cybermesh.store.records import CommittedBlock, OutboxEvent, StoredDecision, StoredEvidence
from cybermesh.store.rows import Rows

IN_LIST_MAX = 500
_EVIDENCE: Final = tuple(names_of(StoredEvidence))
_OUTBOX: Final = tuple(names_of(OutboxEvent))
_OUTBOX_VALUES: Final = operator.attrgetter(*_OUTBOX)
_DECISION: Final = tuple(names_of(StoredDecision)[:-3])  # then come the lists of names, and what the store itself decides
_DECISION_VALUES: Final = operator.attrgetter(*_DECISION)


class Store:
    """Everything one validator keeps; make it with ``open_store``.

    Attributes:
        chain: Reads of blocks, transactions, receipts, decisions, evidence, epochs.
        mempool: The journal of accepted transactions.
        outbox: What is to be published.
        feedback: Acks, labels and lifecycle.
        node: Boots, snapshots and the audit trail.
        rows: Whole tables, for audits, exports and pruning.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.chain = Chain(database)
        self.mempool = MempoolJournal(database)
        self.outbox = Outbox(database)
        self.feedback = Feedback(database)
        self.node = NodeRecords(database)
        self.rows = Rows(database)

    async def append(self, blocks: Sequence[CommittedBlock], *, is_published: bool = False) -> int:
        """Store blocks of consecutive heights, oldest first, in one durable transaction; return how many were new.

        ``is_published`` says that others have published their outbox rows long ago (a restored backup): they are kept, not
        sent.

        Raises:
            BlockConflict: another block is stored at one of the heights; nothing was changed.
            StoreError: a height is missing between the head and the first new block.
            StoreUnavailable: nothing was changed; try again.
        """

        async def work(connection: AsyncConnection) -> int:
            fresh = await _not_stored(connection, blocks)
            if fresh:
                await _write(connection, fresh, is_published=is_published)
            return len(fresh)

        return await self._database.write(work) if blocks else 0


@asynccontextmanager
async def open_store(where: str | Path) -> AsyncIterator[Store]:
    """Open the store at a database URL or SQLite file, migrating an embedded one.

    Raises:
        StoreError: the URL or the schema is not usable; the text says what to do.
        StoreUnavailable: the database cannot be reached.
    """
    database = await open_database(where)
    try:
        if database.is_embedded:
            await migrate(database)
        else:
            await require_current(database)
        yield Store(database)
    finally:
        await database.close()


async def _not_stored(connection: AsyncConnection, blocks: Sequence[CommittedBlock]) -> list[CommittedBlock]:
    """Return the blocks that come after the head, having compared the others with what is stored."""
    heights = [entry.block.height for entry in blocks]
    if heights != list(range(heights[0], heights[0] + len(heights))):
        raise StoreError(f"blocks of heights {heights} are not consecutive")
    table = tables.blocks
    query = select(table.c.height, table.c.hash).where(table.c.height.between(heights[0], heights[-1]))
    rows = await connection.execute(query)
    stored: dict[int, bytes] = {row.height: row.hash for row in rows}
    for entry in blocks:
        found = stored.get(entry.block.height)
        if found is not None and found != entry.block.hash:
            raise BlockConflict(entry.block.height, found, entry.block.hash)
    fresh = [entry for entry in blocks if entry.block.height not in stored]
    if fresh:
        head = (await connection.execute(select(table.c.height).order_by(table.c.height.desc()).limit(1))).scalar()
        if head is not None and fresh[0].block.height != head + 1:
            raise StoreError(f"block {fresh[0].block.height} does not follow the head {head}: fetch what is between")
    return fresh


async def _write(connection: AsyncConnection, blocks: Sequence[CommittedBlock], *, is_published: bool) -> None:
    await _insert(connection, tables.blocks, (entry.block for entry in blocks))
    certificates = [{"height": entry.block.height, "body": entry.certificate} for entry in blocks if entry.certificate]
    if certificates:
        await connection.execute(insert(tables.certificates), certificates)
    await insert_many(connection, tables.transactions, [row for entry in blocks for row in entry.transactions])
    await insert_many(connection, tables.receipts, [row for entry in blocks for row in entry.receipts])
    await _write_decisions(connection, [row for entry in blocks for row in entry.decisions])
    bodies = [(row.digest, row.evidence_id, row.producer, row.height, row.body) for entry in blocks for row in entry.evidence]
    await insert_tuples(connection, tables.evidence, _EVIDENCE, bodies, only_new=True)
    await _insert(connection, tables.epochs, (row for entry in blocks for row in entry.epochs))
    events = []
    for entry in blocks:
        height, now_ms = entry.block.height, entry.block.committed_ms
        published_ms = now_ms if is_published else None
        events += [(height, *_OUTBOX_VALUES(event), now_ms, published_ms) for event in entry.outbox]
    await insert_tuples(connection, tables.outbox, ("height", *_OUTBOX, "created_ms", "published_ms"), events)
    await delete_each(connection, tables.mempool.c.digest, [digest for entry in blocks for digest in entry.mempool_done])


async def _insert(connection: AsyncConnection, table: Table, records: Iterable[object]) -> None:
    rows = values_of(records)
    if rows:
        await connection.execute(insert(table), rows)


async def _write_decisions(connection: AsyncConnection, decisions: Sequence[StoredDecision]) -> None:
    """Insert decisions and keep ``is_active`` true for the newest one of each policy that has not ended."""
    if not decisions:
        return
    table = tables.decisions
    newest = {row.policy_id: row.decision_seq for row in sorted(decisions, key=lambda row: row.decision_seq)}
    for ids in _pieces(list(newest)):
        superseded: ColumnElement[bool] = table.c.policy_id.in_(ids) & table.c.is_active
        await connection.execute(update(table).where(superseded).values(is_active=False))
    rows = [
        (
            *_DECISION_VALUES(row),
            tables.names_text(row.reporters),
            tables.names_text(row.approvers),
            row.change != "ended" and newest[row.policy_id] == row.decision_seq,
        )
        for row in decisions
    ]
    await insert_tuples(connection, table, (*_DECISION, "reporters", "approvers", "is_active"), rows)


def _pieces(values: Sequence[Any]) -> list[Sequence[Any]]:
    """Split a long IN list; databases limit the number of parameters of a statement."""
    return [values[start : start + IN_LIST_MAX] for start in range(0, len(values), IN_LIST_MAX)]
