"""One database behind SQLAlchemy: opening it, transactions, and its errors in our words.

Rules:

- a write is one transaction: all of it or nothing, also when the process dies. A cancelled caller waits for the running
  transaction, which is short, because a driver that is interrupted leaves its thread and its connection in no known state;
- SQLite runs in WAL mode with synchronous=FULL, so what ``write`` returned from survives a power loss; writers queue here and
  not in the database. The others run SERIALIZABLE, and a write that lost against another (SQLSTATE 40001) is tried again;
- what passes by itself (full, locked, lost) is StoreUnavailable; whatever else the database refuses is StoreError.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from cybermesh.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

BUSY_TIMEOUT_MS = 5_000
# Digests touch their index at random, so the more of a long chain's index is at hand and the later a page goes from the journal
# to the file, the less is written twice: at most 32 MiB of pages, 16 MiB of journal.
_SQLITE_SIZES = ("cache_size=-32768", "wal_autocheckpoint=4000")
ATTEMPTS_MAX = 8
RETRY_FIRST_S = 0.01
_SERIALIZATION_FAILURE = "40001"
# Lost connections, a standby that must not be written, conflicts, no room or memory, shutdown and cancellation, locks.
_PASSING_STATES = ("08", "25006", "40", "53", "57", "55P03")
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "cockroachdb": "cockroachdb+asyncpg",
}
_PASSING = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, OSError)


def database_url(where: str | Path) -> URL:
    """Return the SQLAlchemy URL of a database given as URL or as path of an SQLite file.

    Raises:
        StoreError: not a URL, another kind of database, or an SQLite database in memory.
    """
    try:
        url = make_url(f"sqlite:///{where}" if isinstance(where, Path) else where)
    except exc.ArgumentError as error:
        raise StoreError(
            f"store.url: not a database URL; for example sqlite:////var/lib/cybermesh/ledger.db ({error})"
        ) from error
    driver = _DRIVERS.get(url.drivername, url.drivername)
    if driver not in _DRIVERS.values():
        raise StoreError(f"store.url: {url.drivername} is not supported; use sqlite, postgresql or cockroachdb")
    if driver.startswith("sqlite") and url.database in {None, "", ":memory:"}:
        raise StoreError("store.url: an SQLite database needs a file; in memory it would forget what was committed")
    return url.set(drivername=driver)


async def open_database(where: str | Path) -> Database:
    """Return the database at a URL or SQLite file; its schema is not looked at (``migrate``).

    Raises:
        StoreError: the URL is not usable.
        StoreUnavailable: the SQLite file cannot be opened or made.
    """
    url = database_url(where)
    if url.drivername.startswith("sqlite"):
        try:
            # Tried without aiosqlite first: a connection that fails to open leaves its thread running into a closed loop.
            await asyncio.to_thread(lambda: sqlite3.connect(str(url.database)).close())
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"{url.database}: {error}; check that the folder exists and may be written") from error
    return Database(url)


class Database:
    """An open database; make it with ``open_database`` and leave it with ``close``.

    Args:
        url: From ``database_url``.
        chance: Numbers in [0, 1) for the jitter of retries.
    """

    def __init__(self, url: URL, chance: Callable[[], float] = random.random) -> None:
        self._name = url.render_as_string(hide_password=True)
        self._chance = chance
        self.is_embedded = url.drivername.startswith("sqlite")
        if url.drivername.startswith("cockroachdb"):
            from cybermesh.store.cockroach import register_cockroach  # here: it takes 0.1 s to import

            register_cockroach()
        if self.is_embedded:
            self.engine = create_async_engine(url)
            event.listen(self.engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)
        else:
            self.engine = create_async_engine(url, isolation_level="SERIALIZABLE", pool_pre_ping=True)
        self._writing = self.engine.execution_options(cybermesh_write=True)
        # SQLite has one writer at a time; waiting here keeps the order of the calls and needs no timeout.
        self._turn = asyncio.Lock() if self.is_embedded else None

    async def read(self, work: Work[T]) -> T:
        """Run ``work`` in a transaction that is thrown away; it sees one state of the database.

        Raises:
            StoreUnavailable: the database is locked or lost.
        """
        with self._translated():
            return await _finished(self._attempt(self.engine.connect, work))

    async def write(self, work: Work[T]) -> T:
        """Run ``work`` in a transaction and commit it durably; it may run several times, the last one counts.

        Raises:
            StoreUnavailable: the database is full, locked or lost; nothing was changed.
            StoreError: it refused the rows.
        """
        async with self._turn or contextlib.nullcontext():
            with self._translated():
                return await _finished(self._attempt(self._writing.begin, work))

    async def _attempt(self, enter: Callable[[], AbstractAsyncContextManager[AsyncConnection]], work: Work[T]) -> T:
        for attempt in range(ATTEMPTS_MAX):
            try:
                async with enter() as connection:
                    return await work(connection)
            except exc.DBAPIError as error:
                if sqlstate(error) != _SERIALIZATION_FAILURE:
                    raise
            await asyncio.sleep(RETRY_FIRST_S * 2**attempt * (0.5 + self._chance()))
        raise StoreUnavailable(f"{self._name}: gave up after {ATTEMPTS_MAX} conflicts with concurrent writers")

    async def close(self) -> None:
        """Close every connection; an SQLite file is then complete without its journal files."""
        await self.engine.dispose()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.DBAPIError as error:
            text = f"{self._name}: {type(error).__name__}: {error.orig}"
            passes = (sqlstate(error) or "").startswith(_PASSING_STATES)
            if isinstance(error, _PASSING) or error.connection_invalidated or passes:
                raise StoreUnavailable(text) from error
            raise StoreError(text) from error
        except _PASSING as error:
            raise StoreUnavailable(f"{self._name}: {error}") from error


async def _finished(running: Coroutine[Any, Any, T]) -> T:
    """Await ``running``; when the caller is cancelled meanwhile, let it end first (a second cancellation interrupts it)."""
    result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        try:
            result.set_result(await running)
        except Exception as error:  # noqa: BLE001 - supervisor: whatever it is, the caller gets it
            result.set_exception(error)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run(), name="store transaction")
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            result.exception()  # the caller is gone; without this its loss would be reported as forgotten
            raise
    return result.result()


def sqlstate(error: exc.DBAPIError) -> str | None:
    """Return the SQLSTATE that a PostgreSQL driver put on the error, if any."""
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    return state if isinstance(state, str) else None


def _prepare_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # The driver would begin transactions by itself, and late; SQLAlchemy's "begin" event does it instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_MS}", *_SQLITE_SIZES):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A write takes the lock at once: one that took it later could find that the state it had read is old.
    is_write = connection.get_execution_options().get("cybermesh_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def insert_new(connection: AsyncConnection, table: sqlalchemy.Table) -> Any:
    """Return an INSERT that leaves rows alone which are there already; both dialects spell it alike."""
    return insert_new_for(connection.dialect.name, table)


def insert_new_for(dialect: str, table: sqlalchemy.Table) -> Any:
    """Return the INSERT of ``insert_new`` for a dialect's name."""
    if dialect == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        return sqlite_insert(table).on_conflict_do_nothing()
    from sqlalchemy.dialects.postgresql import insert as postgresql_insert

    return postgresql_insert(table).on_conflict_do_nothing()
