"""What ``cybermesh bench admission`` measures, each in a process of its own, on one core or on two.

Run as ``python -m cybermesh.cli.bench_admission PART MESSAGES CORES [BROKERS]`` where PART is ``raw`` (signatures and nothing
else), ``memory`` or ``kafka`` (the whole way from the bus through verification and the durable journal to the acknowledgement).
Prints one line of JSON: messages per second, and per second of processor time (which other work on the machine changes less),
without the first tenth, in which a consumer joins and code warms up.

The intake is the validator's own with its store in a file; only consensus is left out: its mempool takes everything.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from cybermesh import log
from cybermesh.bus import Bus
from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.kafka_client import KafkaOptions
from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import Topics
from cybermesh.consensus.mempool import Admission, Mempool, PendingTransaction
from cybermesh.envelope.nonces import Nonce
from cybermesh.envelope.signing import AnomalyContent, Stamp, sign_anomaly, sign_bytes
from cybermesh.genesis import Budget
from cybermesh.keys import verify
from cybermesh.messages import GIB, Anomaly
from cybermesh.roles.application import LedgerApplication
from cybermesh.roles.clock import SystemClock
from cybermesh.roles.deployment import Deployment, Roster, create
from cybermesh.roles.garbage import collect_rarely
from cybermesh.roles.intake import Intake, Surroundings
from cybermesh.roles.patience import Patience
from cybermesh.store.store import open_store
from cybermesh.wire import codec

PRODUCERS: Final = 4
AT_ONCE: Final = 500


class _Everything:
    """Consensus that takes whatever is offered into a mempool of its own kind, and notes when it had so many."""

    def __init__(self, first: int, last: int) -> None:
        self._mempool = Mempool(bytes_max=GIB, producer_bytes_max=GIB)
        self._last = last
        self._counts = (first, last)
        self.moments: list[_Moment] = []
        self.done = asyncio.Event()

    def submit(self, transaction: PendingTransaction) -> Admission:
        admission = self._mempool.add(transaction)
        if (count := len(self._mempool)) in self._counts:
            self.moments.append(_Moment.now(count))
            if count == self._last:
                self.done.set()
        return admission

    async def room(self) -> None:
        raise AssertionError("the mempool of the measurement has room for everything")


def make_messages(deployment: Deployment, count: int, now_ms: int) -> list[Anomaly]:
    """Return signed anomalies as an ai role writes them, of several producers in turn."""
    made = []
    for number in range(count):
        entity = f"203.0.113.{number % 250}"
        details = {
            "victim": "198.51.100.9",
            "port": 22,
            "first_us": now_ms * 1000,
            "last_us": now_ms * 1000 + number,
            "count": number,
            "votes": {"rules": 0.97, "statistics": 0.91},
            "explanation": ["83 failed logins in 60 s from one address", "the usual rate here is below 2"],
            "alert_id": f"{number:064x}",
            "revision": 1,
        }
        nonce = Nonce(now_ms, 1, number // PRODUCERS).encode()
        stamp = Stamp(deployment.keys[f"ai-{number % PRODUCERS + 1}"], now_ms // 1000, nonce)
        content = AnomalyContent(str(uuid.UUID(int=number)), "brute_force", entity, entity, 8, 0.97, "bench", details)
        made.append(sign_anomaly(content, stamp))
    return made


@dataclass(frozen=True, slots=True)
class Rate:
    """Messages per second, and per second of this process' time on processors."""

    per_s: float
    per_cpu_s: float


@dataclass(frozen=True, slots=True)
class _Moment:
    count: int
    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls, count: int) -> _Moment:
        return cls(count, time.perf_counter(), time.process_time())

    def rate_until(self, end: _Moment) -> Rate:
        count = end.count - self.count
        return Rate(count / (end.wall_s - self.wall_s), count / (end.cpu_s - self.cpu_s))


def raw_rate(messages: list[Anomaly]) -> Rate:
    """Return how many signatures are verified in a second, one after the other, with everything prepared."""
    prepared = [(message.pubkey, sign_bytes(message), message.signature) for message in messages]
    began = _Moment.now(0)
    assert all(verify(*one) for one in prepared)
    return began.rate_until(_Moment.now(len(prepared)))


async def admission_rate(bus: Bus, deployment: Deployment, messages: list[Anomaly], threads: int) -> Rate:
    """Return how many messages are admitted in a second; they are on the bus before the clock starts."""
    topics = Topics(ai_anomalies=f"bench.{uuid.uuid4().hex}", ai_evidence="", ai_policy="", control_operator="bench.operator")
    values = [codec.encode(message) for message in messages]
    for start in range(0, len(values), AT_ONCE):
        async with asyncio.TaskGroup() as group:
            for message, value in zip(messages[start : start + AT_ONCE], values[start : start + AT_ONCE], strict=True):
                group.create_task(bus.publish(topics.ai_anomalies, message.source.encode(), value), name="publish")
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cybermesh-bench-"))
        store = await stack.enter_async_context(open_store(Path(folder) / "ledger.db"))
        around = Surroundings("bench", topics.ai_anomalies, topics, bus, store, SystemClock(), threads)
        application = LedgerApplication(deployment.genesis, time.monotonic)
        intake = Intake(deployment.genesis, around, application, Patience(log.logger(role="bench")))
        everything = _Everything(len(messages) // 10, len(messages))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(intake.run(everything), name="intake")
            await everything.done.wait()
            running.cancel()
        assert not intake.counts.refused
        assert len(await store.mempool.load()) == len(messages)
    first, last = everything.moments
    return first.rate_until(last)


async def measure(part: str, count: int, cores: int, brokers: str) -> Rate:
    """Measure one part; see the module."""
    roster = Roster("bench", 1, producers=PRODUCERS, agents=1, operators=1, budget=Budget())
    deployment = create(roster)
    clock = SystemClock()
    messages = make_messages(deployment, count, clock.wall_ms())
    if part == "raw":
        return raw_rate(messages)
    bus: MemoryBus | KafkaBus
    bus = MemoryBus(clock.wall_ms, records_max=count, bytes_max=GIB)
    if part == "kafka":
        bus = KafkaBus(KafkaOptions(tuple(brokers.split(","))))
    async with bus:
        return await admission_rate(bus, deployment, messages, cores)


def main() -> None:
    """Measure what the arguments say."""
    part, count, cores, *brokers = sys.argv[1:]
    log.configure(level="error")
    collect_rarely()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    rate = asyncio.run(measure(part, int(count), int(cores), *brokers or [""]))
    sys.stdout.write(json.dumps(asdict(rate)) + "\n")


if __name__ == "__main__":
    main()
