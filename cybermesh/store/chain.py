"""Reads of the chain: each call sees one state of the database, and long lists are read in pages, by the key they end with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Table, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import tables
from cybermesh.store.database import Database
from cybermesh.store.queries import fetch, fetch_one, select_records
from cybermesh.store.records import (
    StoredBlock,
    StoredDecision,
    StoredEpoch,
    StoredEvidence,
    StoredReceipt,
    StoredTransaction,
)

T = TypeVar("T")
PAGE_MAX = 10_000


class Chain:
    """Blocks, transactions, receipts, decisions, evidence and epochs; every method raises StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def head(self) -> StoredBlock | None:
        """Return the newest block, or None in an empty store."""
        return await self._one(StoredBlock, _BLOCKS.order_by(tables.blocks.c.height.desc()))

    async def block(self, height: int) -> StoredBlock | None:
        """Return the block at a height."""
        return await self._one(StoredBlock, _BLOCKS.where(tables.blocks.c.height == height))

    async def block_by_hash(self, block_hash: bytes) -> StoredBlock | None:
        """Return the block with this hash."""
        return await self._one(StoredBlock, _BLOCKS.where(tables.blocks.c.hash == block_hash))

    async def blocks(self, first: int, limit: int) -> Sequence[StoredBlock]:
        """Return up to ``limit`` blocks from height ``first`` on, lowest first."""
        column = tables.blocks.c.height
        return await self._page(StoredBlock, _BLOCKS.where(column >= first).order_by(column), limit)

    async def certificate(self, height: int) -> tuple[int, bytes] | None:
        """Return the certificate that proves the block at ``height``: the height it was stored with, and its bytes.

        The first is above the block's where several were committed at once; their headers make the chain of the proof.
        """
        table = tables.certificates

        async def work(connection: AsyncConnection) -> tuple[int, bytes] | None:
            query = select(table.c.height, table.c.body).where(table.c.height >= height).order_by(table.c.height).limit(1)
            row = (await connection.execute(query)).first()
            return None if row is None else (row[0], row[1])

        return await self._database.read(work)

    async def certificates(self, first: int, limit: int) -> Sequence[tuple[int, bytes]]:
        """Return up to ``limit`` stored certificates from height ``first`` on, with their heights."""
        table = tables.certificates

        async def work(connection: AsyncConnection) -> Sequence[tuple[int, bytes]]:
            query = select(table.c.height, table.c.body).where(table.c.height >= first).order_by(table.c.height)
            return [(height, body) for height, body in await connection.execute(query.limit(_bounded(limit)))]

        return await self._database.read(work)

    async def transactions(self, height: int) -> Sequence[StoredTransaction]:
        """Return a block's transactions in order."""
        table = tables.transactions
        query = select_records(table, StoredTransaction).where(table.c.height == height).order_by(table.c.position)
        return await self._page(StoredTransaction, query, PAGE_MAX)

    async def transactions_between(self, first: int, last: int) -> Sequence[StoredTransaction]:
        """Return the transactions of the blocks ``first`` to ``last``, in order; the caller bounds the range."""
        table = tables.transactions
        query = select_records(table, StoredTransaction).where(table.c.height.between(first, last))

        async def work(connection: AsyncConnection) -> Sequence[StoredTransaction]:
            return await fetch(connection, StoredTransaction, query.order_by(table.c.height, table.c.position))

        return await self._database.read(work)

    async def transaction(self, digest: bytes) -> StoredTransaction | None:
        """Return the first committed transaction with this digest."""
        table = tables.transactions
        query = select_records(table, StoredTransaction).where(table.c.digest == digest)
        return await self._one(StoredTransaction, query.order_by(table.c.height, table.c.position))

    async def receipts(self, first_leaf: int, limit: int) -> Sequence[StoredReceipt]:
        """Return up to ``limit`` receipts from leaf ``first_leaf`` on, in the log's order."""
        column = tables.receipts.c.leaf
        return await self._page(StoredReceipt, _RECEIPTS.where(column >= first_leaf).order_by(column), limit)

    async def receipts_of_block(self, height: int) -> Sequence[StoredReceipt]:
        """Return the receipts that a block caused, in the log's order."""
        table = tables.receipts
        return await self._page(StoredReceipt, _RECEIPTS.where(table.c.height == height).order_by(table.c.leaf), PAGE_MAX)

    async def receipts_about(self, subject: str) -> Sequence[StoredReceipt]:
        """Return the receipts about a transaction (digest in hex) or a thing that fell due, oldest first."""
        table = tables.receipts
        return await self._page(StoredReceipt, _RECEIPTS.where(table.c.subject == subject).order_by(table.c.leaf), PAGE_MAX)

    async def receipt_of_decision(self, decision_seq: int) -> StoredReceipt | None:
        """Return the receipt that carries a decision's effect."""
        join = tables.receipts.c.leaf == tables.decisions.c.leaf
        query = _RECEIPTS.select_from(tables.receipts.join(tables.decisions, join))
        return await self._one(StoredReceipt, query.where(tables.decisions.c.decision_seq == decision_seq))

    async def decision(self, decision_seq: int) -> StoredDecision | None:
        """Return a decision by its number."""
        return await self._one(StoredDecision, _DECISIONS.where(tables.decisions.c.decision_seq == decision_seq))

    async def policy_history(self, policy_id: str) -> Sequence[StoredDecision]:
        """Return every decision about a policy, oldest first."""
        table = tables.decisions
        query = _DECISIONS.where(table.c.policy_id == policy_id).order_by(table.c.decision_seq)
        return await self._page(StoredDecision, query, PAGE_MAX)

    async def decisions(self, limit: int, *, before: int | None = None, active_only: bool = False) -> Sequence[StoredDecision]:
        """Return up to ``limit`` decisions below number ``before``, newest first."""
        column = tables.decisions.c.decision_seq
        conditions: list[ColumnElement[bool]] = []
        if before is not None:
            conditions.append(column < before)
        if active_only:
            conditions.append(tables.decisions.c.is_active)
        return await self._page(StoredDecision, _DECISIONS.where(*conditions).order_by(column.desc()), limit)

    async def decisions_from(self, first: int, limit: int) -> Sequence[StoredDecision]:
        """Return up to ``limit`` decisions from number ``first`` on, oldest first; for agents that miss some, and audits."""
        column = tables.decisions.c.decision_seq
        return await self._page(StoredDecision, _DECISIONS.where(column >= first).order_by(column), limit)

    async def evidence(self, digest: bytes) -> StoredEvidence | None:
        """Return an evidence body by its content hash."""
        table = tables.evidence
        return await self._one(StoredEvidence, select_records(table, StoredEvidence).where(table.c.digest == digest))

    async def evidence_by_id(self, evidence_id: str) -> Sequence[StoredEvidence]:
        """Return the evidence with this id, oldest first; ids are the producers', so several may share one."""
        table = tables.evidence
        query = select_records(table, StoredEvidence).where(table.c.evidence_id == evidence_id).order_by(table.c.height)
        return await self._page(StoredEvidence, query, PAGE_MAX)

    async def epochs(self) -> Sequence[StoredEpoch]:
        """Return every epoch that the store knows, oldest first."""
        table = tables.epochs
        return await self._page(StoredEpoch, select_records(table, StoredEpoch).order_by(table.c.epoch), PAGE_MAX)

    async def counts(self) -> dict[str, int]:
        """Return the number of rows of every table of the chain; an audit compares them with what the blocks say."""
        counted = (
            tables.blocks,
            tables.certificates,
            tables.transactions,
            tables.receipts,
            tables.decisions,
            tables.evidence,
            tables.epochs,
        )

        async def work(connection: AsyncConnection) -> dict[str, int]:
            return {table.name: await _count(connection, table) for table in counted}

        return await self._database.read(work)

    async def _one(self, record: type[T], query: Select[Any]) -> T | None:
        return await self._database.read(lambda connection: fetch_one(connection, record, query))

    async def _page(self, record: type[T], query: Select[Any], limit: int) -> Sequence[T]:
        return await self._database.read(lambda connection: fetch(connection, record, query.limit(_bounded(limit))))


def _bounded(limit: int) -> int:
    return max(0, min(limit, PAGE_MAX))


async def _count(connection: AsyncConnection, table: Table) -> int:
    return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


_BLOCKS = select_records(tables.blocks, StoredBlock)
_RECEIPTS = select_records(tables.receipts, StoredReceipt)
_DECISIONS = select_records(tables.decisions, StoredDecision)
