"""What ``cybermesh bench consensus`` runs: a process with validators over TCP with mutual TLS, their safety files synced.

Run as ``python -m cybermesh.cli.bench_validator``; one JSON line after the other goes in and out:

    in   Task                                        out  {"addresses": {index: [host, port]}}
    in   {"addresses": of all validators}            out  {"ready_s": seconds} once every validator here takes part
    in   {"at": monotonic seconds}                   out  Measured, after the measurement
    in   anything                                    the process ends

Every validator takes every transaction by itself, as if from a bus, and verifies it in a thread before it reaches consensus.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cybermesh import log
from cybermesh.cli import bench_null
from cybermesh.cli.bench_null import NullApplication, NullState
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.driver import Driver, Shell
from cybermesh.consensus.events import Commit, SafetyRecord
from cybermesh.consensus.journal import Journal
from cybermesh.consensus.leader import Reputation
from cybermesh.consensus.mempool import Admission, Mempool, PendingTransaction
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.transport.tcp import Address, TcpTransport, listen_on
from cybermesh.consensus.types import Block
from cybermesh.keys import SigningKey, verify

CHAIN_ID: Final = bytes(32)
MEMPOOL_BYTES: Final = 4 * 1024 * 1024
FEED_COUNT: Final = 128
_IDLE_HEARTBEAT_MS: Final = 5_000
_LOOK_S: Final = 0.005
_VERIFY_IN_PLACE: Final = 8


@dataclass(frozen=True, slots=True)
class Task:
    """What one process of the benchmark does.

    ``seeds`` (hex) are all validators' keys in order of index, ``mine`` the indices that run here. ``load`` is one of ``empty``
    (blocks without transactions as fast as they go), ``flood`` (all of the file ``transactions``, as fast as they are taken),
    ``paced`` (``rate_per_s`` of them), ``blocks`` (one by one until height ``target``), ``catch-up`` (none; reach ``target``).
    Measured are ``seconds`` after ``warm_s``.
    """

    seeds: list[str]
    mine: list[int]
    folder: str
    load: str
    transactions: str = ""
    rate_per_s: int = 0
    target: int = 0
    seconds: float = 5.0
    warm_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The slowest validator's figures; ``latencies_us`` from the moment a transaction was due to its commit here."""

    blocks: int
    transactions: int
    verified: int
    reached_s: float
    cpu_s: float
    rounds_given_up: int
    latencies_us: list[int]


@dataclass(slots=True)
class Member:
    """One validator and what it has seen; ``chain`` stands for its store."""

    index: int
    driver: Driver[NullState]
    transport: TcpTransport
    application: NullApplication
    chain: list[Block] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    due: dict[int, float] = field(default_factory=dict)
    latencies_us: list[int] = field(default_factory=list)
    has_grown: asyncio.Event = field(default_factory=asyncio.Event)

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        """Serve the chain to those who catch up."""
        return self.chain[from_height - 1 : from_height - 1 + count_max]

    async def on_commit(self, commit: Commit[NullState]) -> None:
        """Note what was committed, and how long it took."""
        now = time.monotonic()
        for entry in commit.blocks:
            if entry.block.height <= len(self.chain):
                continue
            self.chain.append(entry.block)
            for transaction in entry.block.payload:
                number = bench_null.number_of(transaction)
                self.committed.add(number)
                due = self.due.pop(number, None)
                if due is not None:
                    self.latencies_us.append(round(1e6 * (now - due)))
        self.has_grown.set()


class Bench:
    """The validators of this process."""

    def __init__(self, task: Task, stack: ExitStack) -> None:
        self._task = task
        self._keys = [SigningKey(bytes.fromhex(seed)) for seed in task.seeds]
        self._committee = Committee.of(CHAIN_ID, (key.public for key in self._keys))
        self._listeners = {index: stack.enter_context(listen_on(("127.0.0.1", 0))) for index in task.mine}
        self._stack = stack

    @property
    def addresses(self) -> dict[int, Address]:
        """Where the validators of this process listen."""
        return {index: listener.getsockname()[:2] for index, listener in self._listeners.items()}

    def members(self, addresses: dict[int, Address]) -> list[Member]:
        """Make the validators, each with a fresh safety file."""
        return [self._member(index, addresses) for index in self._task.mine]

    def _member(self, index: int, addresses: dict[int, Address]) -> Member:
        committee, key = self._committee, self._keys[index]
        application = NullApplication()
        transport = TcpTransport(committee, key, self._listeners[index], addresses, random.random)
        path = Path(self._task.folder) / f"validator-{index}.safety.db"
        fresh = SafetyRecord.fresh(committee.genesis_cert())
        Journal.create(path, chain_id=CHAIN_ID, public_key=key.public, record=fresh)
        journal = self._stack.enter_context(Journal.open(path, chain_id=CHAIN_ID, public_key=key.public))
        heartbeat_ms = 0 if self._task.load == "empty" else _IDLE_HEARTBEAT_MS
        parts = Parts(
            committee=committee,
            index=index,
            application=application,
            mempool=Mempool(bytes_max=MEMPOOL_BYTES),
            leaders=Reputation(committee),
            check=verify,
            signer=key,
            jitter=random.random,
            timing=Timing(heartbeat_ms=heartbeat_ms),
        )
        later = _Later()
        shell: Shell[NullState] = Shell(
            transport=transport,
            journal=journal,
            source=later,
            on_commit=later.on_commit,
            on_evidence=lambda _: None,
            wall_ms=lambda: time.time_ns() // 1_000_000,
        )
        driver = Driver(parts, Root.genesis(committee, bench_null.GENESIS), shell)
        later.member = Member(index, driver, transport, application)
        return later.member


@dataclass(slots=True)
class _Later:
    """A member that is made after its driver."""

    member: Member | None = None

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        assert self.member is not None
        return await self.member.blocks(from_height, count_max)

    async def epoch_end(self, epoch: int) -> None:
        """No epoch ends here."""

    async def on_commit(self, commit: Commit[NullState]) -> None:
        assert self.member is not None
        await self.member.on_commit(commit)


def read_transactions(path: str) -> list[bytes]:
    """Return what ``bench_consensus.write_transactions`` has written."""
    data = Path(path).read_bytes()
    size = bench_null.TRANSACTION_BYTES
    return [data[at : at + size] for at in range(0, len(data), size)]


async def feed(member: Member, task: Task, every: Sequence[bytes], began: float) -> None:
    """Take transactions as a validator takes them from a bus: verify in a thread, wait while the mempool is full."""
    if task.load == "blocks":
        await _one_by_one(member, task, every)
        return
    for start, piece in _pieces(every, task, began):
        if task.rate_per_s:
            due = began + start / task.rate_per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            member.due |= {start + offset: due for offset in range(len(piece)) if start + offset not in member.committed}
        arrived = [bench_null.pending(each) for offset, each in enumerate(piece) if start + offset not in member.committed]
        new = [each for each in arrived if not member.application.is_known(each.digest)]
        if not (await asyncio.to_thread(_verify, new) if len(new) > _VERIFY_IN_PLACE else _verify(new)):
            raise AssertionError("the benchmark signs its transactions")
        for each in new:
            if not member.application.is_known(each.digest):
                member.application.remember(each.digest)
        for each in arrived:
            if bench_null.number_of(each.data) not in member.committed:
                await _submit(member, each)


def _pieces(every: Sequence[bytes], task: Task, began: float) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Yield (number of the first, transactions); paced ones are what falls due within two milliseconds."""
    count = FEED_COUNT if not task.rate_per_s else max(1, task.rate_per_s // 500)
    for start in range(0, len(every), count):
        yield start, every[start : start + count]


def _verify(piece: Sequence[PendingTransaction]) -> bool:
    return all(bench_null.is_signed(each.data) for each in piece)


async def _submit(member: Member, pending: PendingTransaction) -> None:
    while member.driver.submit(pending) is Admission.FULL:
        await member.driver.room()


async def _one_by_one(member: Member, task: Task, every: Sequence[bytes]) -> None:
    for number, transaction in enumerate(every):
        while len(member.chain) < min(number, task.target):
            member.has_grown.clear()
            await member.has_grown.wait()
        if len(member.chain) >= task.target:
            return
        if number not in member.committed:
            await _submit(member, bench_null.pending(transaction))


async def take_part(member: Member, peers: int) -> None:
    """Return when the validator votes and the others are connected."""
    while member.driver.status.problem is not None or len(member.transport.peers) < peers:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(_LOOK_S)


async def measure(members: Sequence[Member], task: Task, at: float) -> Measured:
    """Run the load from the moment ``at`` on and return what happened after the warm-up."""
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    async with asyncio.TaskGroup() as group:
        feeding = []
        if task.transactions:
            every = read_transactions(task.transactions)
            feeding = [group.create_task(feed(each, task, every, at), name=f"feed {each.index}") for each in members]
        if task.target:
            reached = await _reach(members, task.target)
            return _result(members, _figures(members), _figures(members), reached - at)
        await asyncio.sleep(max(0.0, at + task.warm_s - time.monotonic()))
        for each in members:
            each.latencies_us.clear()
        before = _figures(members)
        await asyncio.sleep(task.seconds)
        after = _figures(members)
        for feeder in feeding:
            feeder.cancel()
    return _result(members, before, after, 0.0)


async def _reach(members: Sequence[Member], target: int) -> float:
    for member in members:
        while len(member.chain) < target:
            member.has_grown.clear()
            await member.has_grown.wait()
    return time.monotonic()


def _figures(members: Sequence[Member]) -> list[tuple[int, int, int, float]]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = used.ru_utime + used.ru_stime
    return [(len(each.chain), len(each.committed), each.application.verified, cpu_s) for each in members]


def _result(
    members: Sequence[Member],
    before: Sequence[tuple[int, int, int, float]],
    after: Sequence[tuple[int, int, int, float]],
    reached_s: float,
) -> Measured:
    grown = [tuple(late - early for early, late in zip(one, two, strict=True)) for one, two in zip(before, after, strict=True)]
    blocks, transactions, verified, cpu_s = (min(each[place] for each in grown) for place in range(4))
    given_up = max(each.driver.counters.sent["timeout"] for each in members)
    latencies = [latency for each in members for latency in each.latencies_us]
    return Measured(int(blocks), int(transactions), int(verified), reached_s, cpu_s, given_up, latencies)


async def _line() -> Any:
    text = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(text) if text.strip() else None


def _tell(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def main() -> None:
    """Do one task."""
    log.configure(level="error")
    task = Task(**await _line())
    with ExitStack() as stack:
        bench = Bench(task, stack)
        _tell({"addresses": bench.addresses})
        told = await _line()
        addresses = {int(index): (host, port) for index, (host, port) in told["addresses"].items()}
        members = bench.members(addresses)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            running: list[asyncio.Task[Any]]
            running = [group.create_task(each.transport.run(), name=f"transport {each.index}") for each in members]
            running += [group.create_task(each.driver.run(), name=f"validator {each.index}") for each in members]
            for member in members:
                await take_part(member, told["peers"])
            _tell({"ready_s": time.monotonic() - began})
            at = (await _line())["at"]
            measured = await measure(members, task, at)
            _tell(dataclasses.asdict(measured))
            await _line()
            for task_here in running:
                task_here.cancel()


if __name__ == "__main__":
    asyncio.run(main())
