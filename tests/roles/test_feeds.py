"""What the ai role reads: several inputs side by side, failures that stay theirs, and marks that move after the effect."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from cybermesh.bus.memory import MemoryBus
from cybermesh.config import ConfigError, Settings
from cybermesh.envelope.nonces import NonceSource
from cybermesh.keystore import FileCounters
from cybermesh.messages import FlowFeatures
from cybermesh.roles.ai import AiRole, Parts
from cybermesh.roles.detection import open_detector
from cybermesh.roles.feeds import TELEMETRY_GROUP, BusFeed, Feed, SourceFeed
from cybermesh.roles.inputs import feeds_of, metering_of
from cybermesh.roles.positions import Nowhere, Positions
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.flow_messages import NOT_FINITE, ODD_CODE, ODD_TIME, from_message, to_messages
from cybermesh.telemetry.flow_rows import Counted, Ends, counted_flows, no_flows
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.metering import reference
from cybermesh.telemetry.sources import Source
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.wire import codec
from tests.roles.site import TOPICS, Site

TOPIC = TOPICS.telemetry_features
LOG = "Nov 20 21:16:{:02d} gate sshd[{}]: Failed password for root from 203.0.113.9 port 41022 ssh2\n"
A, B = bytes(10) + b"\xff\xff\x0a\0\0\1", bytes(10) + b"\xff\xff\x0a\0\0\2"


def flows(*starts_us: int) -> FlowBatch:
    ends = [Ends(A, B, 1000 + number, 80, 6) for number in range(len(starts_us))]
    return counted_flows(ends, [Counted(start, 10, 2, 1, 100, None) for start in starts_us])


def messages(batch: FlowBatch, most: int = 1000) -> list[bytes]:
    return [codec.encode(message) for message in to_messages(batch, "gate", most)]


async def taken(feed: Feed, count: int, *, done: bool = True) -> list[FlowBatch]:
    """Take batches until ``count`` flows have come."""
    found: list[FlowBatch] = []
    async with asyncio.timeout(10), feed.batches() as batches:
        async for given in batches:
            assert isinstance(given.batch, FlowBatch)
            found.append(given.batch)
            if done:
                await given.done()
            if sum(map(len, found)) >= count:
                break
    return found


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus(lambda: 0) as opened:
        yield opened


async def test_flows_come_over_the_bus_as_they_were_in_batches_with_their_mask(bus: MemoryBus) -> None:
    sent = flows(*range(25))
    for raw in messages(sent, 20):
        await bus.publish(TOPIC, b"gate", raw)
    feed = BusFeed(f"kafka:{TOPIC}", bus, TOPIC, 7)
    found = await taken(feed, 25)
    assert [len(batch) for batch in found] == [7, 7, 6, 5]
    for name in FlowBatch.__slots__:
        whole = [getattr(batch, name) for batch in found]
        assert np.array_equal(whole[0] if name == "known" else np.concatenate(whole), getattr(sent, name)), name
    assert not found[0].known[COLUMN["totlen_bwd_pkts"]]
    assert (feed.counters.packets, feed.counters.metered, feed.counters.skipped) == (25, 25, {})


async def test_what_had_no_effect_comes_again_and_what_had_does_not(bus: MemoryBus) -> None:
    for at in range(4):
        await bus.publish(TOPIC, b"gate", messages(flows(*range(10 * at, 10 * at + 10)))[0])
    feed = BusFeed("kafka", bus, TOPIC, 1000)
    first = await taken(feed, 20)
    lost = await taken(feed, 10, done=False)
    again = await taken(feed, 20)
    assert [batch.start_us[0] for batch in (*first, *lost, *again)] == [0, 10, 20, 20, 30]


async def test_a_message_that_takes_several_batches_is_acknowledged_with_the_last(bus: MemoryBus) -> None:
    await bus.publish(TOPIC, b"gate", messages(flows(*range(10)))[0])
    assert len(await taken(BusFeed("kafka", bus, TOPIC, 4), 8)) == 2
    again = await taken(BusFeed("kafka", bus, TOPIC, 4), 10)
    assert [len(batch) for batch in again] == [4, 4, 2]


async def test_messages_and_rows_that_cannot_be_read_are_counted_by_reason_and_hold_up_nothing(bus: MemoryBus) -> None:
    good = flows(*range(6))
    (message,) = to_messages(good, "gate")
    features = good.features.copy()
    features[0, 5], features[1, 6] = np.nan, np.inf
    family = good.family.copy()
    family[2] = 5
    times = good.end_us.copy()
    times[3], times[4] = -5, np.iinfo(np.int64).max
    odd = dataclasses.replace(good, features=features, family=family, end_us=times)
    await bus.publish(TOPIC, b"gate", b"\xff\xff nonsense")
    await bus.publish(TOPIC, b"gate", codec.encode(dataclasses.replace(message, features=message.features[8:])))
    await bus.publish(TOPIC, b"gate", messages(odd)[0])
    await bus.publish(TOPIC, b"gate", messages(good)[0])
    feed = BusFeed("kafka", bus, TOPIC, 1000)
    found = await taken(feed, 7)
    assert [batch.start_us.tolist() for batch in found] == [[5], [0, 1, 2, 3, 4, 5]]
    reasons = {NOT_FINITE: 2, ODD_CODE: 1, ODD_TIME: 2, "message refused: MALFORMED": 1, "message refused: STRUCTURE": 1}
    assert feed.counters.skipped == reasons
    assert feed.counters.packets == feed.counters.metered + sum(reasons.values())


def test_a_message_of_flows_is_never_too_large_for_the_wire() -> None:
    many = flows(*range(4000))
    assert len(NAMES) == 79
    made = list(to_messages(many, "x" * 256))
    assert sum(message.count for message in made) == 4000
    assert all(isinstance(codec.decode_flow_features(codec.encode(message)), FlowFeatures) for message in made)
    again = from_message(made[0], Counters())
    assert np.array_equal(again.flow_id, many.flow_id[: len(again)])
    assert list(to_messages(no_flows(), "x")) == []


def test_inputs_of_the_settings_become_feeds(tmp_path: Path) -> None:
    log, capture = tmp_path / "auth.log", tmp_path / "trace.pcap"
    log.write_text(LOG.format(1, 1))
    capture.write_bytes(b"")

    def made(*inputs: str, kind: str = "local", **more: object) -> Sequence[Feed]:
        settings = Settings.model_validate({"telemetry": {"inputs": inputs, **more}, "bus": {"kind": kind}})
        return feeds_of(settings, reference(), MemoryBus(lambda: 0), Nowhere())

    inputs = (f"logs:{log}", f"pcap:{capture}", f"kafka:{TOPIC}", str(log), "live:eth0", f"logs:{tmp_path}")
    assert [feed.is_endless for feed in made(*inputs)] == [True, False, True, True, True, False]
    assert [feed.is_endless for feed in made(*inputs[:2], follow=False, follow_captures=True)] == [False, True]
    for wrong in ((), ("logs:",), (str(log), str(log))):
        with pytest.raises(ConfigError, match=r"telemetry\.inputs"):
            made(*wrong)
    with pytest.raises(ConfigError, match="memory bus"):
        made(f"kafka:{TOPIC}", kind="memory")
    telemetry = Settings.model_validate({"telemetry": {"inputs": [f"logs:{log}"]}}).telemetry
    assert metering_of(telemetry).name == "reference"


@asynccontextmanager
async def reading(site: Site, folder: Path, feeds: Sequence[Feed], seen: Counter[str] | None = None) -> AsyncIterator[AiRole]:
    """An ai role that runs inside the block and is killed at its end; ``seen`` counts rows by sort of batch."""
    detector = open_detector()
    if seen is not None:
        inner = detector.pipeline.feed

        def feed(batch: object, *, prompt: bool = False) -> object:
            seen[type(batch).__name__] += len(batch)  # type: ignore[arg-type]
            return inner(batch, prompt=prompt)  # type: ignore[arg-type]

        detector.pipeline.feed = feed  # type: ignore[method-assign, assignment]
    async with AsyncExitStack() as stack:
        counters = stack.enter_context(FileCounters(folder / "ai.nonces"))
        role = AiRole(
            Parts(
                genesis=site.genesis,
                key=site.deployment.keys["ai-1"],
                instance="ai-1",
                topics=TOPICS,
                bus=site.bus,
                nonces=NonceSource(counters),
                clock=site.clock,
                feeds=feeds,
                pipeline=detector.pipeline,
                reopen_first_s=0.02,
            )
        )
        async with asyncio.TaskGroup() as group:
            task = group.create_task(role.run(), name="ai")
            try:
                yield role
            finally:
                task.cancel()


def log_feed(path: Path, marks: Positions | Nowhere) -> SourceFeed:
    return SourceFeed(
        f"logs:{path}", lambda at: open_source(f"logs:{path}", rows=10, position=at, follow=True), marks, is_endless=True
    )


async def test_inputs_are_read_side_by_side_and_one_that_fails_ends_no_other(alone: Site, tmp_path: Path) -> None:
    log, late, seen = tmp_path / "auth.log", tmp_path / "late.log", Counter[str]()
    log.write_text("".join(LOG.format(n, n) for n in range(5)))
    feeds = [log_feed(late, Nowhere()), log_feed(log, Nowhere()), BusFeed("kafka", alone.bus, TOPIC, 1000)]
    async with reading(alone, tmp_path, feeds, seen) as role:
        await alone.until(lambda: seen["EventBatch"] == 5)
        await alone.until(lambda: f"logs:{late}" in (role.problem or ""))
        assert "no such file" in (role.problem or "")
        assert role.figures()["ai_inputs_failing"] == 1
        await alone.bus.publish(TOPIC, b"gate", messages(flows(1, 2, 3))[0])
        await alone.until(lambda: seen["FlowBatch"] == 3)
        late.write_text(LOG.format(9, 9))
        await alone.until(lambda: seen["EventBatch"] == 6)
        await alone.until(lambda: role.problem is None)
        with log.open("a") as file:
            file.write(LOG.format(10, 10) + "no such line\n")
        await alone.until(lambda: seen["EventBatch"] == 7 and role.figures()["ai_records_skipped_total"] == 1)
        assert not role.finished.is_set()


async def test_files_with_an_end_are_read_in_turn_and_one_that_fails_after_the_others(alone: Site, tmp_path: Path) -> None:
    paths, order = [tmp_path / name for name in ("first", "late", "last")], []
    for path in (paths[0], paths[2]):
        path.write_text("".join(LOG.format(n, n) for n in range(30)))

    def finite(path: Path) -> SourceFeed:
        def open_at(position: str) -> Source:
            order.append(path.name)
            return open_source(f"logs:{path}", rows=10, position=position)

        return SourceFeed(str(path), open_at, Nowhere())

    seen = Counter[str]()
    async with reading(alone, tmp_path, [finite(path) for path in paths], seen) as role:
        await alone.until(lambda: order.count("late") >= 2)
        assert seen["EventBatch"] == 60
        assert str(paths[1]) in (role.problem or "")
        paths[1].write_text(LOG.format(1, 1))
        await alone.until(role.finished.is_set)
        assert role.problem is None
    assert order[:3] == ["first", "late", "last"]
    assert set(order[3:]) == {"late"}
    assert seen["EventBatch"] == 61


async def test_a_restarted_role_neither_loses_nor_repeats(alone: Site, tmp_path: Path) -> None:
    log, kept, total = tmp_path / "auth.log", tmp_path / "positions.json", Counter[str]()
    lines = 0
    for restart in range(3):
        with log.open("a") as file:
            file.write("".join(LOG.format(n, lines + n) for n in range(25)))
        lines += 25
        await alone.bus.publish(TOPIC, b"gate", messages(flows(*range(10 * restart, 10 * restart + 10)))[0])
        marks = Positions(kept)
        seen = Counter[str]()
        async with reading(alone, tmp_path, [log_feed(log, marks), BusFeed("kafka", alone.bus, TOPIC, 4)], seen):
            await alone.until(lambda seen=seen: seen["EventBatch"] == 25 and seen["FlowBatch"] == 10)
            position = Positions(kept)
            await alone.until(lambda: f'"offset":{log.stat().st_size}' in Positions(kept).of(f"logs:{log}"))
            await asyncio.sleep(0)
        total += seen
        log.rename(tmp_path / f"auth.log.{9 - restart}")
        assert position is not marks
    assert total == {"EventBatch": 75, "FlowBatch": 30}
    assert TELEMETRY_GROUP == "cybermesh-telemetry"


def test_positions_survive_and_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "positions.json"
    marks = Positions(path)
    marks.keep("a", "1")
    marks.keep("b", "2")
    assert (Positions(path).of("a"), Positions(path).of("b"), Positions(path).of("c")) == ("1", "2", "")
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"positions\.json"):
            Positions(path)
