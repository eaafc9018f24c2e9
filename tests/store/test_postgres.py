"""What only a real PostgreSQL can show: true conflicts, its own errors, its schema; and CockroachDB's words for all of it.

No CockroachDB runs here: its dialect compiles every statement and migration, and its answer to a conflict (SQLSTATE 40001) is
PostgreSQL's. What remains untried is said in docs/store.md.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy_cockroachdb.asyncpg import CockroachDBDialect_asyncpg
from typer.testing import CliRunner

from cybermesh.cli.migrate import app as migrate_app
from cybermesh.store import StoreError, StoreUnavailable, database, tables
from cybermesh.store.database import Database, database_url, insert_new_for, open_database
from cybermesh.store.migrate import _config as alembic_config
from cybermesh.store.migrate import migrate, newest_revision, stored_revision
from cybermesh.store.store import Store, open_store
from tests.postgres import Cluster
from tests.store.test_database import block, use_everything

CONFLICT = text("DO $$ BEGIN RAISE SQLSTATE '40001' USING MESSAGE = 'injected'; END $$")


async def test_migrating_an_empty_database_makes_exactly_the_schema_of_the_tables(postgres: Cluster) -> None:
    url = postgres.database(migrated=False)
    with pytest.raises(StoreError, match="run `cybermesh migrate`"):
        async with open_store(url):
            pass
    opened = await open_database(url)
    assert await migrate(opened) == (None, newest_revision())
    assert await migrate(opened) == (newest_revision(), newest_revision())

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), tables.metadata))

    async def work(connection: AsyncConnection) -> list[object]:
        return await connection.run_sync(differences)

    assert await opened.read(work) == []
    await opened.close()


def test_the_command_migrates_and_says_so_and_does_nothing_the_second_time(postgres: Cluster, tmp_path: Path) -> None:
    url = postgres.database(migrated=False)
    settings = tmp_path / "validator.toml"
    settings.write_text(f'[store]\nurl = "{url}"\n', encoding="utf-8")
    first = CliRunner().invoke(migrate_app, ["-c", str(settings), "--json"])
    assert first.exit_code == 0, first.output
    assert '"before": null' in first.stdout
    again = CliRunner().invoke(migrate_app, ["-c", str(settings)])
    assert "up to date" in again.stdout


async def test_stores_are_migrated_side_by_side_in_one_process(postgres: Cluster, tmp_path: Path) -> None:
    places = [tmp_path / "one.db", tmp_path / "two.db", *(postgres.database(migrated=False) for _ in range(2))]
    opened = [await open_database(place) for place in places]
    async with asyncio.TaskGroup() as tasks:
        for one in opened:
            tasks.create_task(migrate(one), name="migrate")
    assert [await stored_revision(one) for one in opened] == [newest_revision()] * 4
    for one in opened:
        await one.close()


async def test_a_write_that_lost_against_another_is_repeated_on_what_the_other_left(postgres: Cluster) -> None:
    """Two writers read the same count and write according to it: one after the other, or the database would not be serial."""
    opened = await open_database(postgres.database())
    both_have_read = asyncio.Barrier(2)
    runs: list[int] = []

    async def write(boot: int) -> None:
        is_first = True

        async def work(connection: AsyncConnection) -> None:
            nonlocal is_first
            count = (await connection.execute(select(func.count()).select_from(tables.boots))).scalar_one()
            runs.append(boot)
            if is_first:
                is_first = False
                await both_have_read.wait()
            await connection.execute(insert(tables.boots), [{"boot": boot, "started_ms": count}])

        await opened.write(work)

    async with asyncio.TaskGroup() as tasks:
        for boot in (1, 2):
            tasks.create_task(write(boot), name=f"writer {boot}")

    async def counts(connection: AsyncConnection) -> list[int]:
        return sorted(await connection.scalars(select(tables.boots.c.started_ms)))

    assert await opened.read(counts) == [0, 1]
    assert len(runs) == 3, "one of them ran twice"
    await opened.close()


async def test_a_conflict_at_any_statement_of_a_block_leaves_the_block_written_once(
    postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RETRY_FIRST_S", 0.0001)
    async with open_store(postgres.database()) as store:
        conflicts = 0
        for height in range(1, 60):
            hits = await _append_with_conflict(store, height, at=conflicts)
            assert (await store.chain.counts())["blocks"] == height
            assert (await store.chain.counts())["decisions"] == height
            if not hits:
                break
            conflicts += 1
        assert conflicts >= 10, "every table is a statement of its own"


async def _append_with_conflict(store: Store, height: int, at: int) -> int:
    """Append a block; before its statement number ``at`` the server itself reports a conflict, once."""
    seen = [0, 0]

    def conflict(connection: Connection, *_: object) -> None:
        seen[0] += 1
        if seen[0] == at + 1:
            seen[1] += 1
            connection.connection.cursor().execute(str(CONFLICT))

    engine = store._database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", conflict)
    try:
        assert await store.append([block(height)]) == 1
    finally:
        event.remove(engine, "before_cursor_execute", conflict)
    return seen[1]


async def test_conflicts_without_end_are_given_up_and_nothing_is_written(
    postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RETRY_FIRST_S", 0.0001)
    opened = await open_database(postgres.database())

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(tables.boots), [{"boot": 1, "started_ms": 0}])
        await connection.execute(CONFLICT)

    with pytest.raises(StoreUnavailable, match="gave up after 8 conflicts"):
        await opened.write(work)

    async def count(connection: AsyncConnection) -> int:
        return (await connection.execute(select(func.count()).select_from(tables.boots))).scalar_one()

    assert await opened.read(count) == 0
    await opened.close()


async def test_a_server_that_ends_the_connections_is_unavailable_and_found_again(postgres: Cluster) -> None:
    async with open_store(postgres.database()) as store:
        await store.append([block(1)])
        postgres.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cybermesh' AND pid <> pg_backend_pid()"
        )
        assert await store.append([block(2)]) == 1, "a connection that died while idle is not used"


async def test_the_store_runs_serializable(postgres: Cluster) -> None:
    opened = Database(database_url(postgres.database()))

    async def level(connection: AsyncConnection) -> str:
        return str((await connection.execute(text("SHOW transaction_isolation"))).scalar_one())

    assert await opened.write(level) == await opened.read(level) == "serializable"
    await opened.close()


# CockroachDB


async def test_every_statement_and_table_compiles_in_the_words_of_cockroachdb(tmp_path: Path) -> None:
    dialect = CockroachDBDialect_asyncpg()
    seen: dict[str, object] = {}

    def remember(_: object, statement: object, *__: object) -> None:
        seen[str(statement)] = statement

    async with open_store(tmp_path / "s.db") as store:
        event.listen(store._database.engine.sync_engine, "before_execute", remember)
        await use_everything(store)
    compiled = [str(statement.compile(dialect=dialect)) for name, statement in seen.items() if "ON CONFLICT" not in name]  # type: ignore[attr-defined]
    assert len(compiled) >= 40
    assert all(compiled)
    for table in tables.metadata.sorted_tables:
        assert "ON CONFLICT DO NOTHING" in str(insert_new_for("cockroachdb", table).compile(dialect=dialect))
        assert str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))


def test_every_migration_compiles_in_the_words_of_cockroachdb() -> None:
    scripts = ScriptDirectory.from_config(alembic_config())
    revisions = list(reversed(list(scripts.walk_revisions())))
    written = io.StringIO()
    context = MigrationContext.configure(dialect=CockroachDBDialect_asyncpg(), opts={"as_sql": True, "output_buffer": written})
    for revision in revisions:
        revision.module.upgrade(op=Operations(context))
    for table in tables.metadata.sorted_tables:
        assert f"CREATE TABLE {table.name} (" in written.getvalue()
