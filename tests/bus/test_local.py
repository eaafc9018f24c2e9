"""What is the local bus' own: its bounds, several processes, and what becomes of one that dies or stands still."""

from __future__ import annotations

import asyncio
import resource
import signal
import sqlite3
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.bus import BusError, Delivery, Published
from cybermesh.bus.local import LocalBus, LocalSubscription
from cybermesh.bus.local_store import Bounds, share_out

MEMBER = Path(__file__).with_name("member.py")
WAIT_S = 20.0
SOON_S = 0.1  # long enough for what would happen without waiting


def open_bus(path: Path, **bounds: float) -> LocalBus:
    return LocalBus(path, lambda: time.time_ns() // 1_000_000, partitions=1, bounds=Bounds(**bounds))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.db"


async def take(subscription: LocalSubscription) -> Delivery:
    async with asyncio.timeout(WAIT_S):
        return await anext(aiter(subscription))


async def still_waits(task: asyncio.Task[Published]) -> bool:
    done, _ = await asyncio.wait([task], timeout=SOON_S)
    return not done


@asynccontextmanager
async def member(action: str, path: Path, lease_s: float = 10.0) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(MEMBER), action, str(path), str(lease_s), stdin=PIPE, stdout=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def size_of(path: Path) -> int:
    return path.stat().st_size


async def line(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        return (await process.stdout.readline()).decode().strip()


async def test_a_full_partition_makes_publish_wait_until_a_subscriber_elsewhere_acknowledges(path: Path) -> None:
    async with (
        open_bus(path, records_max=3) as here,
        open_bus(path, records_max=3) as there,
        there.subscribe(["t"], "g") as subscription,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(3):
            await here.publish("t", b"k", b"%d" % number)
        waiting = [tasks.create_task(here.publish("t", b"k", b"%d" % number), name=f"publish {number}") for number in (3, 4)]
        first = await take(subscription)
        assert await still_waits(waiting[0]), "delivered is not processed"
        await subscription.ack(first)
        assert (await waiting[0]).offset == 3
        assert await still_waits(waiting[1])
        await subscription.ack(await take(subscription))
        assert (await waiting[1]).offset == 4, "publishes keep their order while they wait"


async def test_the_bound_on_bytes_holds_and_one_large_record_passes_alone(path: Path) -> None:
    async with open_bus(path, bytes_max=100) as bus, bus.subscribe(["t"], "g") as subscription, asyncio.TaskGroup() as tasks:
        await bus.publish("t", b"", bytes(1000))
        waiting = tasks.create_task(bus.publish("t", b"", bytes(60)), name="publisher")
        assert await still_waits(waiting)
        await subscription.ack(await take(subscription))
        assert (await waiting).offset == 1


async def test_a_cancelled_publisher_does_not_publish_when_room_comes(path: Path) -> None:
    async with open_bus(path, records_max=1) as bus, bus.subscribe(["t"], "g") as subscription, asyncio.TaskGroup() as tasks:
        await bus.publish("t", b"k", b"0")
        given_up = tasks.create_task(bus.publish("t", b"k", b"given up"), name="publisher that gives up")
        assert await still_waits(given_up)
        given_up.cancel()
        last = tasks.create_task(bus.publish("t", b"k", b"1"), name="publisher")
        await subscription.ack(await take(subscription))
        await last
        assert (await take(subscription)).value == b"1"


async def test_a_group_without_a_subscriber_holds_nobody_up_and_keeps_its_place(path: Path) -> None:
    async with open_bus(path, records_max=3) as bus:
        async with bus.subscribe(["t"], "g") as subscription:
            await bus.publish("t", b"k", b"0")
            await subscription.ack(await take(subscription))
        for number in range(1, 3):
            await bus.publish("t", b"k", b"%d" % number)
        async with bus.subscribe(["t"], "g") as subscription:
            assert (await take(subscription)).value == b"1"
        for number in range(3, 8):
            await bus.publish("t", b"k", b"%d" % number)
        async with bus.subscribe(["t"], "g") as subscription:
            assert (await take(subscription)).value == b"5", "the oldest record that is still there"


async def test_old_records_leave_and_the_file_gives_their_room_to_new_ones(path: Path) -> None:
    now_ms = 1_000_000
    async with LocalBus(path, lambda: now_ms, partitions=1, bounds=Bounds(age_max_s=60)) as bus:
        for _ in range(20):
            await bus.publish("t", b"k", bytes(100_000))
    now_ms += 61_000
    before = size_of(path)
    async with LocalBus(path, lambda: now_ms, partitions=1, bounds=Bounds(age_max_s=60)) as bus:
        for _ in range(19):
            await bus.publish("t", b"k", bytes(100_000))
        async with bus.subscribe(["t"], "g") as subscription:
            assert (await take(subscription)).offset == 20
    assert size_of(path) < 1.2 * before


async def test_closing_refuses_waiting_publishers_and_ends_subscriptions(path: Path) -> None:
    bus = open_bus(path, records_max=1)
    async with asyncio.TaskGroup() as tasks:
        await bus.__aenter__()
        async with bus.subscribe(["t"], "g") as subscription:
            await bus.publish("t", b"k", b"0")
            waiting = tasks.create_task(refused(bus), name="publisher")
            await asyncio.wait([waiting], timeout=SOON_S)
            await bus.__aexit__(None, None, None)
            assert [delivery async for delivery in subscription] == []
    assert waiting.result()


async def refused(bus: LocalBus) -> bool:
    with pytest.raises(BusError, match="closed"):
        await bus.publish("t", b"k", b"1")
    return True


async def test_members_in_two_processes_share_a_group_without_overlap(path: Path) -> None:
    now_ms = 1
    async with (
        LocalBus(path, lambda: now_ms, partitions=4) as bus,
        bus.subscribe(["t"], "g") as subscription,
        member("subscribe", path) as process,
    ):
        assert await line(process) == "joined"
        places = {(await bus.publish("t", b"%d" % number, b"%d" % number)).partition: b"%d" % number for number in range(64)}
        assert set(places) == {0, 1, 2, 3}
        async with asyncio.TaskGroup() as tasks:
            there = tasks.create_task(line(process), name="the other process")
            here = await take(subscription)
        last = there.result()
        await bus.publish("t", b"end", b"end")
        mine = {here.partition}
        while len(mine) < 2:
            mine.add((await take(subscription)).partition)
        theirs = next(partition for partition in range(4) if last.encode() in records_of(path, partition))
        assert theirs not in mine


def records_of(path: Path, number: int) -> set[bytes]:
    with sqlite3.connect(path) as database:
        rows = database.execute(
            "SELECT r.value FROM records r JOIN partitions p ON p.id = r.id >> 40 WHERE p.number = ?", (number,)
        ).fetchall()
    database.close()
    return {value for (value,) in rows}


async def test_a_killed_subscriber_hands_over_what_it_did_not_acknowledge(path: Path) -> None:
    async with open_bus(path) as bus:
        for number in range(10):
            await bus.publish("t", b"k", b"%d" % number)
        async with member("subscribe", path) as process:
            assert await line(process) == "joined"
            assert [await line(process) for _ in range(10)] == [str(number) for number in range(10)]
            assert process.stdin is not None
            process.stdin.write(b"3\n")
            async with bus.subscribe(["t"], "g") as subscription, asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(take(subscription), name="heir")
                await until(lambda: acknowledged(path) == 4)
                process.kill()
                assert [(await waiting).value, (await take(subscription)).value] == [b"4", b"5"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.to_thread(time.sleep, 0.01)


def acknowledged(path: Path) -> int:
    database = sqlite3.connect(path)
    ((offset,),) = database.execute("SELECT sum(acknowledged) FROM cursors").fetchall()
    database.close()
    return int(offset)


async def test_a_subscriber_that_stands_still_loses_its_partitions_and_comes_back(path: Path) -> None:
    lease_s = 0.6
    async with (
        LocalBus(path, lambda: 1, partitions=1, lease_s=lease_s) as bus,
        member("subscribe", path, lease_s) as process,
    ):
        assert await line(process) == "joined"
        await bus.publish("t", b"k", b"0")
        assert await line(process) == "0"
        process.send_signal(signal.SIGSTOP)
        async with bus.subscribe(["t"], "g") as subscription:
            heir = await take(subscription)
            assert heir.value == b"0", "not acknowledged, so it comes again"
            await subscription.ack(heir)
            await until(lambda: acknowledged(path) == 1)
            process.send_signal(signal.SIGCONT)
        await bus.publish("t", b"k", b"1")
        assert await line(process) == "1", "the process that came back owns the partition again, after the last mark"


async def test_a_killed_publisher_loses_nothing_that_it_was_told_is_published(path: Path) -> None:
    async with open_bus(path) as bus, bus.subscribe(["t"], "g") as subscription:
        async with member("publish", path) as process:
            for number in range(50):
                assert (await take(subscription)).value == b"%d" % number
            process.kill()
            out, _ = await process.communicate()
        said = int(out.split()[-1])
        for number in range(50, said + 1):
            assert (await take(subscription)).value == b"%d" % number


async def test_a_full_disk_refuses_publishes_and_recovers_without_a_restart(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with open_bus(path) as bus, bus.subscribe(["t"], "g") as subscription:
        await bus.publish("t", b"k", b"before")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
            with pytest.raises(BusError):
                await bus.publish("t", b"k", bytes(1_000_000))
            assert str(path) in bus.trouble
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await bus.publish("t", b"k", b"after")
        assert bus.trouble == ""
        assert [(await take(subscription)).value for _ in range(2)] == [b"before", b"after"]


def make_newer(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()


def make_text(path: Path) -> None:
    path.write_text("not a database" * 100)


def make_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [make_newer, make_text, make_directory])
async def test_a_file_that_cannot_be_used_is_refused_by_name(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(BusError, match=r"bus\.db"):
        async with open_bus(path):
            pytest.fail("opened")


@given(st.lists(st.sampled_from([None, "a", "b", "c", "gone"]), max_size=12), st.sets(st.sampled_from("abcd")))
def test_partitions_are_shared_evenly_and_change_hands_no_more_than_they_must(
    owners: list[str | None], readers: set[str]
) -> None:
    chosen = share_out(owners, sorted(readers))
    if not readers:
        assert chosen == [None] * len(owners)
        return
    counts = Counter(chosen)
    assert set(counts) <= readers
    shares = [counts[reader] for reader in readers]
    assert max(shares) - min(shares) <= 1
    kept = sum(before == after for before, after in zip(owners, chosen, strict=True))
    share, extra = divmod(len(owners), len(readers))
    had = sorted((owners.count(reader) for reader in readers), reverse=True)
    assert kept == sum(min(count, share + (rank < extra)) for rank, count in enumerate(had))


async def test_an_idle_subscriber_costs_next_to_nothing(path: Path) -> None:
    async with open_bus(path) as bus, bus.subscribe(["t"], "g") as subscription:
        before_s = time.process_time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await anext(aiter(subscription))
        assert time.process_time() - before_s < 0.05


async def test_sockets_of_dead_processes_are_swept(path: Path) -> None:
    async with open_bus(path) as bus:
        async with member("subscribe", path) as process:
            assert await line(process) == "joined"
            process.kill()
        await bus.publish("t", b"k", b"v")
    async with open_bus(path):
        assert len(list(path.with_name("bus.db.wake").iterdir())) == 1
