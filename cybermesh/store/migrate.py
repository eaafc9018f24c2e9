"""Bringing a database to this version's schema.

The embedded database migrates itself when it is opened. A database that others share is migrated by a person, with
``cybermesh migrate``: until then the validator refuses to use it.

Alembic's usual way through ``env.py`` keeps its context in module globals, so that two stores that are migrated at once in one
process would migrate each other's database. Here each migration is handed its own operations and nothing is global.
"""

from __future__ import annotations

from importlib import resources

from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, MigrationStep, RevisionStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store import StoreError
from cybermesh.store.database import Database


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(resources.files("cybermesh.store") / "migrations"))
    # The folder's path may hold a percent sign or a space; versions are found beside the scripts.
    config.set_main_option("path_separator", "newline")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def newest_revision() -> str:
    """Return the name of this version's schema."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


async def stored_revision(database: Database) -> str | None:
    """Return the name of the database's schema; None when it is empty.

    Raises:
        StoreUnavailable: the database is locked or lost.
    """

    def read(connection: Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    async def work(connection: AsyncConnection) -> str | None:
        return await connection.run_sync(read)

    return await database.read(work)


async def migrate(database: Database) -> tuple[str | None, str]:
    """Bring the schema up to date, in one transaction; return the names before and after.

    Raises:
        StoreError: the database was made by a newer version of CyberMesh.
        StoreUnavailable: the database is full, locked or lost.
    """
    newest = newest_revision()
    scripts = _scripts()
    known = {script.revision for script in scripts.walk_revisions()}

    def upgrade(connection: Connection) -> str | None:
        before = MigrationContext.configure(connection).get_current_revision()
        if before is not None and before not in known:
            raise StoreError(
                f"the database has schema {before}, which this version ({newest}) does not know: upgrade CyberMesh"
            )
        if before != newest:
            try:
                _upgrade(connection, scripts, before)
            except CommandError as error:
                raise StoreError(f"cannot migrate from schema {before} to {newest}: {error}") from error
        return before

    async def work(connection: AsyncConnection) -> str | None:
        return await connection.run_sync(upgrade)

    return await database.write(work), newest


def _upgrade(connection: Connection, scripts: ScriptDirectory, before: str | None) -> None:
    def steps(_heads: object, _context: MigrationContext) -> list[MigrationStep]:
        todo = reversed(list(scripts.iterate_revisions("head", before or "base")))
        return [RevisionStep(scripts.revision_map, script, True) for script in todo]

    context = MigrationContext.configure(connection, opts={"fn": steps})
    context.run_migrations(op=Operations(context))


async def require_current(database: Database) -> None:
    """Refuse a shared database whose schema is not this version's.

    Raises:
        StoreError: it must be migrated first.
    """
    stored, newest = await stored_revision(database), newest_revision()
    if stored != newest:
        raise StoreError(f"the database has schema {stored or 'none'}, this version needs {newest}: run `cybermesh migrate`")
