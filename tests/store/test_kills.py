"""Kill -9 at every boundary of a block's commit: before and after each statement, around the commit itself, then go on.

The boundaries are enumerated, not drawn: a child process appends and dies at its k-th boundary, for every k until one survives.
The rows are a real chain's, so an audit of what a resumed store holds says whether anything was lost, repeated or differs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event

from cybermesh.roles.audit import Auditor
from cybermesh.store.records import JournaledTransaction
from cybermesh.store.store import Store, open_store
from tests.postgres import Cluster
from tests.roles.stored_chain import StoredChain, usual_chain

ROOT = Path(__file__).resolve().parents[2]
TORN = 1
"""Which of the usual chain's commits is killed: two blocks at once, with decisions, evidence, outbox rows and removals."""


async def prepare(store: Store, chain: StoredChain) -> None:
    """The chain up to the commit that will be killed, whose transactions wait in the journal."""
    for rows in chain.rows[:TORN]:
        await store.append(rows)
    await store.mempool.add([JournaledTransaction(row.digest, row.payload, 1) for row in torn_transactions(chain)])


def torn_transactions(chain: StoredChain) -> list[object]:
    return [row for block in chain.rows[TORN] for row in block.transactions]


class Killer:
    """Ends the process by SIGKILL at its ``at``-th boundary."""

    def __init__(self, at: int) -> None:
        self.left = at

    def boundary(self, *_: object) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


async def append_and_die(chain: StoredChain, where: str, at: int) -> None:
    async with open_store(Path(where) if where.startswith("/") else where) as store:
        killer, engine = Killer(at), store._database.engine.sync_engine
        for name in ("begin", "before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(engine, name, killer.boundary)
        event.listen(engine.pool, "reset", killer.boundary)  # the connection comes back: the commit has been made
        await store.append(chain.rows[TORN])
        print("survived", flush=True)


def fork_each() -> None:
    """Read places from standard input; for each let a child die there. Everything is imported once, before the forks."""
    chain = usual_chain()
    for line in sys.stdin:
        where, at = line.split()
        pid = os.fork()
        if pid == 0:
            asyncio.run(append_and_die(chain, where, int(at)))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print("killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else f"ended {status}", flush=True)


def test_a_kill_at_any_boundary_of_a_commit_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    chain, prepared = usual_chain(), tmp_path / "prepared.db"
    asyncio.run(_prepared(str(prepared), chain))
    boundaries = kill_everywhere(chain, lambda at: str(shutil.copy(prepared, tmp_path / f"{at}.db")))
    assert boundaries["absent"] >= 20, "two boundaries for each statement of the transaction"
    assert boundaries["present"] >= 1, "after the commit the block is there"


def test_a_kill_at_any_boundary_leaves_all_or_nothing_on_postgresql_too(postgres: Cluster) -> None:
    chain, prepared = usual_chain(), postgres.database()
    asyncio.run(_prepared(prepared, chain))
    boundaries = kill_everywhere(chain, lambda _: postgres.copy(prepared))
    assert boundaries["absent"] >= 20
    assert boundaries["present"] >= 1


def kill_everywhere(chain: StoredChain, place: Callable[[int], str]) -> dict[str, int]:
    found = {"absent": 0, "present": 0}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.test_kills"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as children:
        assert children.stdin is not None
        assert children.stdout is not None
        for at in range(200):
            where = place(at)
            children.stdin.write(f"{where} {at}\n")
            children.stdin.flush()
            answer = children.stdout.readline().strip()
            if answer == "survived":
                assert children.stdout.readline().strip() == "ended 0"
                assert asyncio.run(_resumed(where, chain)) == "present"
                break
            assert answer == "killed"
            found[asyncio.run(_resumed(where, chain))] += 1
        else:
            pytest.fail("200 boundaries and no end")
        children.stdin.close()
        children.wait(20)
    return found


async def _prepared(where: str, chain: StoredChain) -> None:
    async with open_store(Path(where) if where.startswith("/") else where) as store:
        await prepare(store, chain)


async def _resumed(where: str, chain: StoredChain) -> str:
    """Go on after the kill as a validator does; return whether the killed commit was there, whole, or absent, wholly."""
    async with open_store(Path(where) if where.startswith("/") else where) as store:
        before = chain.rows[TORN - 1][-1].block.height
        torn = chain.rows[TORN]
        head = await store.chain.head()
        assert head is not None
        journal = await store.mempool.load()
        if head.height == before:
            state = "absent"
            assert [row.digest for row in journal] == [row.digest for row in torn_transactions(chain)]  # type: ignore[attr-defined]
        else:
            state = "present"
            assert head == torn[-1].block
            assert journal == ()
        for rows in chain.rows[TORN:]:
            await store.append(rows)
        report = await Auditor(store.rows, chain.world.genesis).run()
        assert report.finding is None, str(report.finding)
        assert report.state_root == chain.world.state.root
        assert await store.mempool.load() == ()
        events = [(row.event, row.subject) for row in await store.outbox.pending(1_000)]
        assert events == [(row.event, row.subject) for rows in chain.rows for block in rows for row in block.outbox]
    return state


if __name__ == "__main__":
    fork_each()
