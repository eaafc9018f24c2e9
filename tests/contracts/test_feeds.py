"""One suite over everything that the ai role reads, as it reads it: files of every kind, the journal, the bus, Kafka."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from cybermesh.bus import Bus
from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.kafka_client import KafkaOptions
from cybermesh.bus.local import LocalBus
from cybermesh.bus.memory import MemoryBus
from cybermesh.config import Settings
from cybermesh.roles.feeds import Feed
from cybermesh.roles.inputs import feeds_of
from cybermesh.roles.positions import Positions
from cybermesh.telemetry.flow_messages import to_messages
from cybermesh.telemetry.flow_rows import Counted, Ends, counted_flows
from cybermesh.telemetry.metering import reference
from cybermesh.wire import codec
from tests.contracts.test_sources import COUNT, IDS, KINDS, Kind, rows, write
from tests.telemetry.sources.test_journald import WRITER, failed

BATCH_SIZE = 7
TOPIC = "telemetry.features.v1"


def feed(spec: str, folder: Path, bus: Bus, kind: str = "local") -> Feed:
    """The feed that a process makes of its settings."""
    given = {"telemetry": {"inputs": [spec], "batch_size": BATCH_SIZE, "block_packets": BATCH_SIZE}, "bus": {"kind": kind}}
    (made,) = feeds_of(Settings.model_validate(given), reference(), bus, Positions(folder / "positions.json"))
    return made


async def read(feed: Feed, batches_most: int, rows_most: int = COUNT) -> list[tuple[object, ...]]:
    """Read some batches and be done with each, but not with the one after them, which is where the process is killed."""
    found: list[tuple[object, ...]] = []
    async with asyncio.timeout(60), feed.batches() as batches:
        taken = 0
        async for given in batches:
            assert len(given.batch) <= BATCH_SIZE
            if taken == batches_most or (not len(given.batch) and feed.is_endless and taken):
                break
            found += rows(given.batch)
            taken += len(given.batch) > 0
            await given.done()
            if len(found) >= rows_most:
                break
    return found


async def read_in_lives(make: Callable[[], Feed]) -> list[tuple[object, ...]]:
    """Read an input in lives of one, two, three … batches, each ended before the effect of the next."""
    found: list[tuple[object, ...]] = []
    for batches in itertools.count(1):
        more = await read(make(), batches, COUNT - len(found))
        found += more
        if len(found) >= COUNT or not more:
            return found
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
async def test_a_file_is_read_once_whenever_the_process_ends(kind: Kind, tmp_path: Path) -> None:
    spec, elsewhere = f"{kind.name}:{write(kind, tmp_path)}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with MemoryBus(lambda: 0) as bus:
        whole = await read(feed(spec, elsewhere, bus), COUNT)
        in_lives = await read_in_lives(lambda: feed(spec, tmp_path, bus))
    assert len(whole) == COUNT
    assert sorted(map(repr, in_lives)) == sorted(map(repr, whole))


async def test_a_folder_is_read_once_whenever_the_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "captures"
    folder.mkdir()
    pcap = KINDS[0].content(tmp_path)
    for name in "ab":
        (folder / name).write_bytes(pcap)
    async with MemoryBus(lambda: 0) as bus:
        found = []
        for batches in range(1, 9):
            found += await read(feed(str(folder), tmp_path, bus), batches, 1000)
    assert len(found) == 2 * COUNT


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "entries").write_text(json.dumps([failed(n) for n in range(COUNT)]))
    (tmp_path / "writer.py").write_text(WRITER)
    program = tmp_path / "bin" / "journalctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/writer.py {tmp_path}/entries "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.mark.usefixtures("journal")
async def test_the_journal_is_read_once_whenever_the_process_ends(tmp_path: Path) -> None:
    async with MemoryBus(lambda: 0) as bus:
        found = await read_in_lives(lambda: feed("logs:journald", tmp_path, bus))
    assert len(found) == len(set(found)) == COUNT


@asynccontextmanager
async def _kafka(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bus]:
    del tmp_path
    broker = request.getfixturevalue("kafka_broker")
    async with KafkaBus(KafkaOptions((broker.access.plain,))) as bus:
        yield bus


@asynccontextmanager
async def _local(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bus]:
    del request
    async with LocalBus(tmp_path / "bus.db", lambda: 0) as bus:
        yield bus


@pytest.mark.parametrize("open_bus", [_local, _kafka], ids=["local", "kafka"])
async def test_a_topic_is_read_once_whenever_the_process_ends(
    open_bus: Callable[..., AbstractAsyncContextManager[Bus]], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ends = [Ends(bytes(15) + b"\1", bytes(15) + b"\2", 1000 + n, 80, 6) for n in range(COUNT)]
    sent = counted_flows(ends, [Counted(n, 10, 2, 1, 100, None) for n in range(COUNT)])
    topic = f"{TOPIC}.{request.node.name.partition('[')[2].rstrip(']')}"
    async with open_bus(request, tmp_path) as bus:
        for message in to_messages(sent, "gate", BATCH_SIZE):
            await bus.publish(topic, b"gate", codec.encode(message))
        found = await read_in_lives(lambda: feed(f"kafka:{topic}", tmp_path, bus))
    assert sorted(map(repr, found)) == sorted(map(repr, rows(sent)))
