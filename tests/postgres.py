"""A PostgreSQL server of our own for tests: made in a temporary folder, on a Unix socket, gone with the test run.

It never listens on a network and is started by nobody but the process that asks for it; when that process dies, so does the
server (the kernel sends it SIGQUIT). Every call of ``database`` gives a new database, migrated when that is asked for.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_S = 30
_PR_SET_PDEATHSIG = 1
# Tests kill clients, never the machine: what a server crash would lose is not what they look at.
_SETTINGS = ("listen_addresses=", "fsync=off", "full_page_writes=off", "synchronous_commit=off", "max_connections=60")


class PostgresError(Exception):
    """There is no server to be had; the text says why."""


def binaries() -> Path:
    """Return the folder of the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        raise PostgresError("initdb is not installed (Debian package postgresql)")
    return Path(on_path).parent


class Cluster:
    """A running server; use it as a context manager."""

    def __init__(self) -> None:
        self._programs = binaries()
        self._names = itertools.count(1)
        self._template = ""

    def __enter__(self) -> Cluster:
        # A socket's path has at most 107 bytes, so it cannot lie in pytest's folders.
        self._folder = Path(tempfile.mkdtemp(prefix="cm-pg-"))
        self._user = None
        if os.geteuid() == 0:
            try:
                self._user = pwd.getpwnam("postgres").pw_name
            except KeyError as error:
                raise PostgresError("the server refuses root, and there is no user postgres") from error
            shutil.chown(self._folder, self._user)
        try:
            self._start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.send_signal(signal.SIGQUIT)
        self._server.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        data = self._folder / "data"
        made = self._run("initdb", "-D", str(data), "-U", "cybermesh", "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
        if made.returncode != 0:
            raise PostgresError(f"initdb: {made.stderr.strip()}")
        options = [f"-c{setting}" for setting in (*_SETTINGS, f"unix_socket_directories={self._folder}")]
        with (self._folder / "log").open("wb") as log:
            self._server = subprocess.Popen(
                [self._programs / "postgres", "-D", data, *options],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                preexec_fn=_die_with_parent,
            )
        end = time.monotonic() + START_S
        while self._run("pg_isready", "-q", "-h", str(self._folder)).returncode != 0:
            if self._server.poll() is not None or time.monotonic() > end:
                self._server.kill()
                raise PostgresError((self._folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.02)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._programs / program), *arguments]
        return subprocess.run(
            command, cwd=self._folder, user=self._user, capture_output=True, text=True, check=False, timeout=120
        )

    def url(self, name: str) -> str:
        return f"postgresql://cybermesh@/{name}?host={self._folder}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run one statement as the owner; return what psql printed."""
        options = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", str(self._folder), "-U", "cybermesh", "-d", database]
        done = self._run("psql", *options, "-c", statement)
        if done.returncode != 0:
            raise PostgresError(done.stderr.strip())
        return done.stdout.strip()

    def database(self, *, migrated: bool = True) -> str:
        """Make a database and return its URL."""
        if migrated and not self._template:
            self._template = self._make("template0")
            _migrate(self.url(self._template))
        return self.url(self._make(self._template if migrated else "template0"))

    def copy(self, url: str) -> str:
        """Make a copy of a database that nobody is connected to and return its URL."""
        return self.url(self._make(url.partition("@/")[2].partition("?")[0]))

    def _make(self, template: str) -> str:
        name = f"db{next(self._names)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name


def _migrate(url: str) -> None:
    """Migrate in a process of its own: a fixture may not start an event loop beside the test's."""
    code = (
        "import asyncio, sys\n"
        "from cybermesh.store.database import open_database\n"
        "from cybermesh.store.migrate import migrate\n"
        "async def main():\n"
        "    database = await open_database(sys.argv[1])\n"
        "    await migrate(database)\n"
        "    await database.close()\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, check=True, timeout=120)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
