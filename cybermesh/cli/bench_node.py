"""What ``cybermesh bench consensus`` runs for ``tx_per_s_ledger_4p``: one whole validator, from its bus to its database.

Run as ``python -m cybermesh.cli.bench_node``; one JSON line after the other goes in and out, like with ``bench_validator``:

    in   LedgerTask                                  out  {"addresses": {index: [host, port]}}
    in   {"addresses": of all validators}            out  {"ready_s": seconds} once it takes part
    in   {"at": monotonic seconds}                   out  {"per_s": transactions committed and stored}
    in   anything                                    the process ends

The validator is the role that a deployment runs: signed anomalies wait on its bus, are verified, journaled, agreed on, executed
and stored with all rows, SQLite synced. The first tenth and the last twentieth are not counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cybermesh import genesis as genesis_file
from cybermesh import log
from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import Topics
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Commit
from cybermesh.consensus.transport.tcp import listen_on
from cybermesh.keys import SigningKey
from cybermesh.ledger.state import State
from cybermesh.messages import GIB
from cybermesh.roles.clock import SystemClock
from cybermesh.roles.links import Links
from cybermesh.roles.validator import ValidatorParts, ValidatorRole, create_safety_file
from cybermesh.store.store import open_store

PRODUCERS: Final = 4
_LOOK_S: Final = 0.005
_AT_ONCE: Final = 500
_LENGTH_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class LedgerTask:
    """One validator of the benchmark: ``genesis`` is the file's text, ``seed`` (hex) its key, ``messages`` a file."""

    genesis: str
    seed: str
    number: int
    folder: str
    messages: str


@dataclass(slots=True)
class Progress:
    """When how much was stored; ``marks`` are the counts asked for."""

    marks: tuple[int, ...]
    count: int = 0
    reached: dict[int, float] = field(default_factory=dict)
    has_grown: asyncio.Event = field(default_factory=asyncio.Event)

    def commit(self, commit: Commit[State]) -> None:
        """Count what was just stored."""
        self.count += sum(len(entry.block.payload) for entry in commit.blocks)
        for mark in self.marks:
            if self.count >= mark:
                self.reached.setdefault(mark, time.monotonic())
        self.has_grown.set()

    async def until(self, mark: int) -> float:
        """Return when so many were stored."""
        while mark not in self.reached:
            self.has_grown.clear()
            await self.has_grown.wait()
        return self.reached[mark]


def write_messages(path: Path, values: list[bytes]) -> None:
    """Write messages with their lengths."""
    path.write_bytes(b"".join(len(value).to_bytes(_LENGTH_BYTES, "big") + value for value in values))


def read_messages(path: Path) -> list[bytes]:
    """Return what ``write_messages`` wrote."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        end = at + _LENGTH_BYTES + int.from_bytes(data[at : at + _LENGTH_BYTES], "big")
        found.append(data[at + _LENGTH_BYTES : end])
        at = end
    return found


async def publish(bus: MemoryBus, topic: str, values: list[bytes]) -> None:
    """Put all messages on the bus."""
    for start in range(0, len(values), _AT_ONCE):
        async with asyncio.TaskGroup() as group:
            for number, value in enumerate(values[start : start + _AT_ONCE]):
                group.create_task(bus.publish(topic, str(number % PRODUCERS).encode(), value), name="publish")


async def run(task: LedgerTask, stack: AsyncExitStack) -> None:
    """Run one validator until it is told to stop."""
    genesis, key, clock = genesis_file.parse(task.genesis.encode()), SigningKey(bytes.fromhex(task.seed)), SystemClock()
    committee = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
    listener = stack.enter_context(listen_on(("127.0.0.1", 0)))
    index = committee.index_of(key.public)
    _tell({"addresses": {index: listener.getsockname()[:2]}})
    addresses = {int(each): (host, port) for each, (host, port) in (await _line())["addresses"].items()}
    known = {committee.public_keys[each]: address for each, address in addresses.items()}
    links = Links(key, listener, lambda: known)
    values = read_messages(Path(task.messages))
    progress = Progress((len(values) // 10, len(values) * 19 // 20))
    bus = await stack.enter_async_context(MemoryBus(clock.wall_ms, records_max=len(values), bytes_max=GIB))
    safety_file = Path(task.folder) / f"validator-{task.number}.safety.db"
    create_safety_file(safety_file, genesis, key)
    store = await stack.enter_async_context(open_store(Path(task.folder) / f"validator-{task.number}.db"))
    topics = Topics()
    role = ValidatorRole(
        ValidatorParts(
            genesis=genesis,
            key=key,
            number=task.number,
            topics=topics,
            group="bench",
            bus=bus,
            connect=links.connect,
            store=store,
            safety_file=safety_file,
            clock=clock,
            on_commit=progress.commit,
        )
    )
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(role.run(), name="validator")]
        while not _takes_part(role, links, committee.n - 1):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(_LOOK_S)
        _tell({"ready_s": time.monotonic() - began})
        await asyncio.sleep(max(0.0, (await _line())["at"] - time.monotonic()))
        running.append(group.create_task(publish(bus, topics.ai_anomalies, values), name="publish"))
        first, last = [await progress.until(mark) for mark in progress.marks]
        _tell({"per_s": (progress.marks[1] - progress.marks[0]) / (last - first)})
        await _line()
        for each in running:
            each.cancel()


def _takes_part(role: ValidatorRole, links: Links, peers: int) -> bool:
    status = role.status
    return status is not None and status.problem is None and links.figures()["validator_peers_connected"] >= peers


async def _line() -> Any:
    text = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(text) if text.strip() else None


def _tell(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def main() -> None:
    """Do one task."""
    log.configure(level="error")
    async with AsyncExitStack() as stack:
        await run(LedgerTask(**await _line()), stack)


if __name__ == "__main__":
    asyncio.run(main())
