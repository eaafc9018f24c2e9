"""What came back: agents' acks, operators' labels, and the stages each anomaly and policy has reached.

All of it may arrive more than once and late. The newest ack of an agent about a decision counts; of a stage the first time.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import tables
from cybermesh.store.database import Database, insert_new
from cybermesh.store.queries import fetch, select_records, values_of
from cybermesh.store.records import LifecycleStep, StoredAck, StoredLabel

_PAGE_MAX = 10_000


class Feedback:
    """Acks, labels and lifecycle; every method raises StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_ack(self, ack: StoredAck) -> bool:
        """Store an ack unless a newer one of the same agent about the same decision is there; return whether it was stored."""
        table = tables.acks
        same = (table.c.policy_id == ack.policy_id) & (table.c.decision_seq == ack.decision_seq) & (table.c.agent == ack.agent)

        async def work(connection: AsyncConnection) -> bool:
            stored_ms = (await connection.execute(select(table.c.acked_at_ms).where(same))).scalar()
            if stored_ms is not None and stored_ms >= ack.acked_at_ms:
                return False
            await connection.execute(delete(table).where(same))
            await connection.execute(insert(table), values_of([ack]))
            return True

        return await self._database.write(work)

    async def acks_of(self, policy_id: str) -> Sequence[StoredAck]:
        """Return what agents did with a policy's decisions, oldest decision first."""
        table = tables.acks
        query = select_records(table, StoredAck).where(table.c.policy_id == policy_id)
        query = query.order_by(table.c.decision_seq, table.c.agent).limit(_PAGE_MAX)
        return await self._database.read(lambda connection: fetch(connection, StoredAck, query))

    async def newest_acks(self) -> Sequence[StoredAck]:
        """Return each agent's ack of the highest decision, for the overview of agents."""
        table = tables.acks
        other = table.alias("other")
        later = select(other.c.agent).where((other.c.agent == table.c.agent) & (other.c.decision_seq > table.c.decision_seq))
        query = select_records(table, StoredAck).where(~later.exists()).order_by(table.c.agent).limit(_PAGE_MAX)
        return await self._database.read(lambda connection: fetch(connection, StoredAck, query))

    async def add_label(self, label: StoredLabel) -> None:
        """Store an operator's label; labels are never changed, a later one counts."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(tables.labels), values_of([label]))

        await self._database.write(work)

    async def labels_of(self, anomaly_id: str) -> Sequence[StoredLabel]:
        """Return an anomaly's labels, oldest first."""
        table = tables.labels
        query = select_records(table, StoredLabel).where(table.c.anomaly_id == anomaly_id).order_by(table.c.id).limit(_PAGE_MAX)
        return await self._database.read(lambda connection: fetch(connection, StoredLabel, query))

    async def add_steps(self, steps: Sequence[LifecycleStep]) -> None:
        """Store stages that were reached; of a stage that is stored already the first time stays."""
        if not steps:
            return

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert_new(connection, tables.lifecycle), values_of(steps))

        await self._database.write(work)

    async def steps_of(self, subject: str) -> Sequence[LifecycleStep]:
        """Return the stages of an anomaly or policy in the order of their times."""
        table = tables.lifecycle
        query = select_records(table, LifecycleStep).where(table.c.subject == subject).order_by(table.c.at_ms, table.c.stage)
        return await self._database.read(lambda connection: fetch(connection, LifecycleStep, query))
