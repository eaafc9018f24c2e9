"""A store that cannot be written, for real: the validator stops voting, says so in /ready, and goes on when it can."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from sqlalchemy.engine import Connection

from cybermesh.api.health import Probes, serve
from cybermesh.roles.process import Role, _Running
from cybermesh.store import StoreUnavailable, database
from cybermesh.store.store import open_store
from tests.postgres import Cluster
from tests.roles.site import Site
from tests.store.test_database import block


@pytest.fixture
def small_disk(netns: None, tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes; mounting it needs root, like network namespaces."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest_asyncio.fixture
async def on_small_disk(small_disk: Path) -> AsyncIterator[Site]:
    site = Site(small_disk, 1)
    async with site.bus:
        yield site


@contextmanager
def full(site: Site) -> Iterator[None]:
    """Fill the disk to its last byte."""
    filler = site.ledger_file(1).parent / "filler"
    with filler.open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def locked(site: Site) -> Iterator[None]:
    """Another program holds the database's write lock."""
    other = sqlite3.connect(site.ledger_file(1), isolation_level=None, check_same_thread=False)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
    finally:
        other.close()


class ReadOnly:
    """While it is entered, every write gets SQLite's own error of a read-only database."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_on = False
        self._begin = database._begin_sqlite
        monkeypatch.setattr(database, "_begin_sqlite", self._on_begin)

    def _on_begin(self, connection: Connection) -> None:
        connection.connection.cursor().execute(f"PRAGMA query_only = {'ON' if self._is_on else 'OFF'}")
        self._begin(connection)

    def __enter__(self) -> None:
        self._is_on = True

    def __exit__(self, *_: object) -> None:
        self._is_on = False


async def ready(site: Site) -> tuple[int, str]:
    """Ask /ready over HTTP as an operator does."""
    running = _Running(Role.VALIDATOR, site.roles[1])
    probes = Probes(lambda: {"validator": running.problem()} if running.problem() else {}, running.figures)
    async with asyncio.TaskGroup() as group:
        server = group.create_task(serve("127.0.0.1", port := free_port(), probes), name="health")
        async with aiohttp.ClientSession() as client:
            while True:
                try:
                    async with client.get(f"http://127.0.0.1:{port}/api/v1/ready") as answer:
                        found = answer.status, await answer.text()
                        break
                except aiohttp.ClientConnectorError:
                    await asyncio.sleep(0.01)
        server.cancel()
    return found


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def stops_and_recovers(site: Site, failure: AbstractContextManager[None], words: str) -> None:
    role = site.roles[1]

    def problem() -> str:
        status = role.status
        return (status.problem if status is not None else None) or ""

    with failure:
        waiting = await site.send(site.anomaly("while away"))
        await site.until(lambda: words in problem(), limit_s=20)
        status, body = await ready(site)
        assert (status, words in body) == (503, True)
        assert role.figures()["validator_voting"] == 0
        height = role.figures()["validator_height_blocks"]
        assert await site.stores[1].chain.transaction(b"") is None, "reading goes on"
    await site.until_committed(waiting, 1)
    await site.until_votes(1)
    assert (await ready(site))[0] == 200
    assert role.figures()["validator_height_blocks"] > height
    after = await site.send(site.anomaly("afterwards"))
    await site.until_committed(after, 1)


async def test_a_full_disk_stops_voting_and_room_resumes_it(on_small_disk: Site) -> None:
    async with on_small_disk.running(1):
        await on_small_disk.until_votes(1)
        await stops_and_recovers(on_small_disk, full(on_small_disk), "full")


async def test_a_locked_database_stops_voting_until_it_is_free(alone: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 20)
    async with alone.running(1):
        await alone.until_votes(1)
        await stops_and_recovers(alone, locked(alone), "locked")


async def test_a_read_only_database_stops_voting_until_it_can_be_written(alone: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = ReadOnly(monkeypatch)
    async with alone.running(1):
        await alone.until_votes(1)
        await stops_and_recovers(alone, failure, "readonly")


async def test_a_postgresql_that_became_read_only_is_waited_for(postgres: Cluster) -> None:
    """As after a failover: the new connections reach a standby."""
    url = postgres.database()
    name = url.partition("@/")[2].partition("?")[0]
    async with open_store(url) as store:
        await store.append([block(1)])
        postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        with pytest.raises(StoreUnavailable, match="read-only"):
            await store.append([block(2)])
        head = await store.chain.head()
        assert head is not None
        assert head.height == 1
        postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        assert await store.append([block(2)]) == 1
