"""Opening, migrating, failing and recovering; and every statement in PostgreSQL's words."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, exc, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateTable

from cybermesh.bus import Published
from cybermesh.store import StoreError, StoreUnavailable, database, tables
from cybermesh.store.database import Database, database_url, insert_new_for
from cybermesh.store.migrate import migrate, newest_revision, require_current, stored_revision
from cybermesh.store.records import (
    AuditEntry,
    CommittedBlock,
    JournaledTransaction,
    LifecycleStep,
    OutboxEvent,
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
from cybermesh.store.store import Store, open_store

D = b"\x01" * 32


def block(height: int, size: int = 1) -> CommittedBlock:
    return CommittedBlock(
        StoredBlock(height, bytes([height]) * 32, 1, height, 0, 0, b"h", b"f" * size, D, height, 1, height - 1, 1, height, 1),
        b"certificate",
        (StoredTransaction(height, 0, bytes([height, 1]) * 16, b"\x01"),),
        (StoredReceipt(height - 1, height, "anomaly", "s", "OK", b"r"),),
        (
            StoredDecision(
                height, height, height - 1, "p", "r", "opened", "drop", "block", b"{}", D, 1, 2, "budget", "", (), ()
            ),
        ),
        (StoredEvidence(bytes([height, 2]) * 16, "e", D, height, b"{}"),),
        (StoredEpoch(height, height, b"c", b""),),
        (OutboxEvent("commit", height, "t", b"k", b"v"),),
        (bytes([height, 1]) * 16,),
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Path("/tmp/a b.db"), "sqlite+aiosqlite:////tmp/a b.db"),
        ("sqlite:///x.db", "sqlite+aiosqlite:///x.db"),
        ("postgresql://u:p@h/db", "postgresql+asyncpg://u:***@h/db"),
        ("postgresql+asyncpg://h/db", "postgresql+asyncpg://h/db"),
        ("cockroachdb://h:26257/db", "cockroachdb+asyncpg://h:26257/db"),
        ("cockroachdb+asyncpg://h:26257/db", "cockroachdb+asyncpg://h:26257/db"),
    ],
)
def test_database_urls_get_their_driver(given: str | Path, expected: str) -> None:
    assert database_url(given).render_as_string(hide_password=True) == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("not a url", "not a database URL"),
        ("mysql://h/db", "mysql is not supported"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_other_urls_are_refused_with_what_to_do(given: str, reason: str) -> None:
    with pytest.raises(StoreError, match=reason):
        database_url(given)


@pytest.mark.parametrize("url", ["postgresql://h/db", "cockroachdb://h/db"])
async def test_the_shared_databases_have_a_dialect(url: str) -> None:
    shared = Database(database_url(url))
    assert shared.engine.dialect.name == "postgresql"
    assert not shared.is_embedded
    await shared.close()


async def test_a_database_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match=r"postgresql\+asyncpg://u:\*\*\*@127"):
        async with open_store("postgresql://u:secret@127.0.0.1:1/db"):
            pass


async def test_migrating_makes_exactly_the_schema_of_the_tables(tmp_path: Path) -> None:
    opened = Database(database_url(tmp_path / "s.db"))
    assert await stored_revision(opened) is None
    with pytest.raises(StoreError, match="run `cybermesh migrate`"):
        await require_current(opened)
    assert await migrate(opened) == (None, newest_revision())
    assert await migrate(opened) == (newest_revision(), newest_revision())
    await require_current(opened)

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), tables.metadata))

    async def work(connection: AsyncConnection) -> list[object]:
        return await connection.run_sync(differences)

    assert await opened.read(work) == []
    await opened.close()


async def test_a_database_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    async with open_store(tmp_path / "s.db"):
        pass
    with sqlite3.connect(tmp_path / "s.db") as plain:
        plain.execute("UPDATE alembic_version SET version_num = '9999'")
    plain.close()
    with pytest.raises(StoreError, match=r"schema 9999.*upgrade CyberMesh"):
        async with open_store(tmp_path / "s.db"):
            pass


async def test_a_migration_that_fails_leaves_an_empty_database(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as plain:
        plain.execute("CREATE TABLE outbox (x)")
    plain.close()
    with pytest.raises(StoreError, match="outbox"):
        async with open_store(tmp_path / "s.db"):
            pass
    with sqlite3.connect(tmp_path / "s.db") as plain:
        assert [row[0] for row in plain.execute("SELECT name FROM sqlite_master WHERE type = 'table'")] == ["outbox"]
    plain.close()


async def test_sqlite_is_durable_and_lets_readers_read(tmp_path: Path) -> None:
    async with open_store(tmp_path / "s.db") as store:

        async def pragmas(connection: AsyncConnection) -> list[object]:
            names = ("journal_mode", "synchronous")
            return [(await connection.execute(text(f"PRAGMA {name}"))).scalar() for name in names]

        assert await store._database.write(pragmas) == ["wal", 2]


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"this is no database, but it is long enough to be looked at" * 40)
    with pytest.raises(StoreError, match="not a database"):
        async with open_store(tmp_path / "s.db"):
            pass


async def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="unable to open"):
        async with open_store(tmp_path / "absent" / "s.db"):
            pass


async def test_a_full_disk_is_unavailable_and_writing_resumes_when_there_is_room(tmp_path: Path) -> None:
    async with open_store(tmp_path / "s.db") as store:
        await store.append([block(1)])

        async def limit_pages(connection: AsyncConnection, pages: int) -> None:
            used = (await connection.execute(text("PRAGMA page_count"))).scalar_one()
            await connection.execute(text(f"PRAGMA max_page_count = {used + pages}"))

        await store._database.write(lambda connection: limit_pages(connection, 2))
        with pytest.raises(StoreUnavailable, match="full"):
            await store.append([block(2, 1_000_000)])
        assert (await store.chain.counts())["blocks"] == 1
        await store._database.write(lambda connection: limit_pages(connection, 10_000))
        assert await store.append([block(2, 1_000_000)]) == 1


async def test_a_locked_database_is_unavailable_until_it_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 20)
    async with open_store(tmp_path / "s.db") as store:
        other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.append([block(1)])
        assert await store.chain.head() is None, "readers are not locked out"
        other.execute("ROLLBACK")
        other.close()
        assert await store.append([block(1)]) == 1


class ConflictError(Exception):
    sqlstate = "40001"


@pytest.mark.parametrize(("conflicts", "succeeds"), [(0, True), (3, True), (7, True), (8, False)])
async def test_a_serialization_failure_is_tried_again_a_bounded_number_of_times(
    tmp_path: Path, conflicts: int, succeeds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RETRY_FIRST_S", 0.0001)
    opened = Database(database_url(tmp_path / "s.db"), chance=lambda: 0.5)
    await migrate(opened)
    runs = [0]

    async def work(connection: AsyncConnection) -> int:
        runs[0] += 1
        await connection.execute(tables.boots.insert(), [{"boot": runs[0], "started_ms": 0}])
        if runs[0] <= conflicts:
            raise exc.DBAPIError("INSERT", {}, ConflictError())
        return runs[0]

    async def boots(connection: AsyncConnection) -> list[int]:
        return list(await connection.scalars(tables.boots.select()))

    if succeeds:
        assert await opened.write(work) == conflicts + 1
        assert await opened.read(boots) == [conflicts + 1], "only the last attempt left its rows"
    else:
        with pytest.raises(StoreUnavailable, match="gave up after 8 conflicts"):
            await opened.write(work)
        assert await opened.read(boots) == []
    await opened.close()


async def use_everything(store: Store) -> None:
    """Call every method of the store once."""
    await store.append([block(1), block(2)])
    chain, node, feedback, outbox = store.chain, store.node, store.feedback, store.outbox
    await chain.head(), await chain.block(1), await chain.block_by_hash(D), await chain.blocks(1, 5)
    await chain.certificate(1), await chain.certificates(1, 5), await chain.counts(), await chain.epochs()
    await chain.transactions(1), await chain.transactions_between(1, 2), await chain.transaction(D)
    await chain.receipts(0, 5), await chain.receipts_of_block(1), await chain.receipts_about("s")
    await chain.receipt_of_decision(1), await chain.decision(1), await chain.policy_history("p")
    await chain.decisions(5, before=9), await chain.decisions(5, active_only=True), await chain.decisions_from(1, 5)
    await chain.evidence(D), await chain.evidence_by_id("e")
    await store.mempool.add([JournaledTransaction(D, b"\x01", 1)])
    await store.mempool.load(), await store.mempool.remove([D]), await store.mempool.committed([D])
    await feedback.add_ack(StoredAck("p", 1, D, "applied", "", "", 1, 1, 1, b""))
    await feedback.acks_of("p"), await feedback.newest_acks()
    await feedback.add_label(StoredLabel("a", "l", D, "", 1)), await feedback.labels_of("a")
    await feedback.add_steps([LifecycleStep("a", "s", 1, 1, "")]), await feedback.steps_of("a")
    await node.record_boot(1, 1), await node.last_boot(), await node.last_voted_round()
    for height in (1, 2, 3):
        await node.save_snapshot(StoredSnapshot(height, D, D, b"", 1))
    await node.newest_snapshot(), await node.add_audit(AuditEntry(1, "a", "b", "c", b"")), await node.audit_trail(5)
    (row, *_) = await outbox.pending(5)
    await outbox.mark([(row.id, Published("t", 0, 0))], 1), await outbox.mark_copy("commit", 2, (0, 0), 1)
    await outbox.pending_count()


async def test_every_statement_compiles_for_postgresql(tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    def remember(_: object, statement: object, *__: object) -> None:
        seen[str(statement)] = statement

    async with open_store(tmp_path / "s.db") as store:
        event.listen(store._database.engine.sync_engine, "before_execute", remember)
        await use_everything(store)
    dialect = postgresql.dialect()
    compiled = 0
    for name, statement in seen.items():
        if "ON CONFLICT" in name:
            continue  # built for each dialect; checked below
        assert "sqlite" not in type(statement).__module__, name
        assert str(statement.compile(dialect=dialect))  # type: ignore[attr-defined]
        compiled += 1
    assert compiled >= 40
    for table in tables.metadata.sorted_tables:
        assert "ON CONFLICT DO NOTHING" in str(insert_new_for("postgresql", table).compile(dialect=dialect))
        assert "JSON" not in str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))


async def test_numbered_tables_number_themselves_on_both_dialects() -> None:
    created = str(CreateTable(tables.outbox).compile(dialect=postgresql.dialect()))
    assert "id BIGSERIAL" in created
    assert "height BIGINT NOT NULL" in str(CreateTable(tables.blocks).compile(dialect=postgresql.dialect()))


WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_database import block
from cybermesh.store.store import open_store

async def main():
    async with open_store(Path({path!r})) as store:
        for height in range(1, 250):
            await store.append([block(height)])
            print(height, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("heights", [1, 7, 30])
async def test_a_killed_writer_loses_no_block_it_had_reported(tmp_path: Path, heights: int) -> None:
    path = tmp_path / "s.db"
    script = WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        reported = [int(await process.stdout.readline()) for _ in range(heights)]
        process.kill()
        reported += [int(line) for line in (await process.stdout.read()).split()]
        assert await process.wait() == -signal.SIGKILL
    async with open_store(path) as store:
        head = await store.chain.head()
        assert head is not None
        assert head.height >= reported[-1]
        counts = await store.chain.counts()
        assert set(counts.values()) == {head.height}
        assert await store.append([block(head.height), block(head.height + 1)]) == 1


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_closing_leaves_one_file(tmp_path: Path) -> None:
    async with open_store(tmp_path / "s.db") as store, asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(store.chain.counts(), name="reader")
    assert names(tmp_path) == ["s.db"]
