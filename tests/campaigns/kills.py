"""Kills the broker, the validator that consumes and the producer at random points, with SIGKILL, and counts what became of it.

Run as ``python -m tests.campaigns.kills --broker 20 --consumer 90 --producer 90 --seed 1``; prints a report as JSON.

What must hold:

- every message that the brokers have confirmed to the producer is in the ledger, in one block and once;
- after every death of the consumer: whatever is before the positions that its group has committed is in its journal or in a
  block (these messages give no reason for a dead letter);
- nothing needs a restart but what was killed.

All processes are real: Apache Kafka, ``cybermesh run --role validator`` as a committee of one, ``tests.campaigns.producer``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition, errors

from cybermesh.bus.topics import Topics
from cybermesh.messages import Transaction, TxKind
from tools.kafka_broker import Broker, fetch, free_ports

PYTHON = [sys.executable, "-c"]
CYBERMESH = [*PYTHON, "from cybermesh.cli import main; main()"]
PATIENCE_S = 120.0
# A validator that dies all the time falls behind; after five minutes messages are stale, which is not what is looked for here.
BACKLOG_MAX = 500
GROUP = "cybermesh-consensus-node-1"


class CampaignError(AssertionError):
    """A promise was broken, or the system did not come back; the text says which and where its files are."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was done and found; times are in seconds."""

    seed: int
    kills: Mapping[str, int]
    accepted: int
    in_ledger: int
    twice_in_ledger: int
    positions_checked: int
    took_s: float


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class Process:
    """A process that can be killed and started again; its output goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its number while it runs."""
        assert self._running is not None
        return self._running.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._running = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def check(self) -> None:
        """Make sure that it has not ended by itself."""
        if self._running is not None and self._running.poll() is not None:
            raise CampaignError(f"ended by itself with {self._running.returncode}:\n{self._log.read_text()[-3_000:]}")

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._running is not None:
            self._running.send_signal(number)
            self._running.wait(PATIENCE_S)
            self._running = None


class Mesh:
    """One deployment on a broker, in a folder."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.folder, self.broker = folder, broker
        mesh = folder / "mesh"
        subprocess.run(
            [*CYBERMESH, "init", str(mesh), "--validators", "1", "--ai", "1", "--agents", "1", "--no-budget"],
            check=True,
            capture_output=True,
        )
        (self.port,) = free_ports(1)
        (mesh / "validator-1.local.toml").write_text(
            f'[bus]\nkind = "kafka"\n[kafka]\nbrokers = "{broker.access.plain}"\n'
            f'[http]\nport = {self.port}\n[log]\nlevel = "warning"\n'
        )
        run = [*CYBERMESH, "run", "--role", "validator", "-c", str(mesh / "validator-1.toml")]
        produce = [sys.executable, "-m", "tests.campaigns.producer"]
        produce += [str(mesh / "keys" / "ai-1.key"), str(folder), broker.access.plain]
        self.consumer = Process(run, folder / "validator.log")
        self.producer = Process(produce, folder / "producer.log")
        self._ledger = mesh / "state" / "validator-1" / "validator.ledger.db"

    def digests(self, table: str) -> list[bytes]:
        """Return the digests in a table of the validator's store, as they are on disk."""
        if not self._ledger.exists():
            return []
        with closing(sqlite3.connect(f"file:{self._ledger}?mode=ro", uri=True, timeout=PATIENCE_S)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
                return []
            return [row[0] for row in database.execute(f"SELECT digest FROM {table}")]

    def accepted(self) -> set[bytes]:
        """Return what the producer was confirmed."""
        file = self.folder / "accepted"
        return {bytes.fromhex(line) for line in file.read_text().splitlines()} if file.exists() else set()

    def until(self, condition: Callable[[], bool], what: str, limit_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            self.consumer.check()
            self.producer.check()
            if time.monotonic() > end:
                raise CampaignError(f"not within {limit_s:.0f} s: {what}; see {self.folder}")
            time.sleep(0.05)


class Positions:
    """Looks whether the group's committed positions are behind what the validator holds."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._seen: dict[TopicPartition, list[bytes]] = {}
        self.checked = 0

    def check(self) -> None:
        """Compare, while the consumer is dead.

        Raises:
            CampaignError: a record before a committed position is nowhere.
        """
        committed = self._until_told()
        held = {*self._mesh.digests("mempool"), *self._mesh.digests("transactions")}
        for place, position in committed.items():
            missing = [offset for offset, digest in enumerate(self._seen[place][:position]) if digest not in held]
            if missing:
                raise CampaignError(
                    f"{place}: committed up to {position}, but {missing[:5]} are nowhere; see {self._mesh.folder}"
                )
            self.checked += position

    def _until_told(self) -> dict[TopicPartition, int]:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return asyncio.run(self._read())
            except (errors.KafkaError, TimeoutError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    async def _read(self) -> dict[TopicPartition, int]:
        """Return the committed positions, after reading the records before them."""
        topic = Topics().ai_anomalies
        reader = AIOKafkaConsumer(
            bootstrap_servers=self._mesh.broker.access.plain,
            group_id=GROUP,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        places = [TopicPartition(topic, number) for number in range(8)]
        reader.assign(places)
        async with asyncio.timeout(10):
            await reader.start()
            try:
                committed = {place: found for place in places if (found := await reader.committed(place))}
                for place in places:
                    reader.seek(place, len(self._seen.setdefault(place, [])))
                while any(len(self._seen[place]) < position for place, position in committed.items()):
                    for place, records in (await reader.getmany(timeout_ms=200)).items():
                        # These topics are neither compacted nor transactional, so offsets have no holes.
                        assert records[0].offset == len(self._seen[place])
                        self._seen[place] += [Transaction(TxKind.ANOMALY, record.value).digest for record in records]
                return committed
            finally:
                await reader.stop()


def run(folder: Path, broker: Broker, kills: Mapping[str, int], seed: int) -> Report:
    """Run one campaign on a running broker.

    Raises:
        CampaignError: a promise was broken.
    """
    began = time.monotonic()
    chance = random.Random(seed)
    plan = [name for name, count in kills.items() for _ in range(count)]
    chance.shuffle(plan)
    mesh = Mesh(folder, broker)
    positions = Positions(mesh)
    mesh.consumer.start()
    mesh.producer.start()
    try:
        mesh.until(lambda: bool(mesh.digests("transactions")), "a first block")
        for number, victim in enumerate(plan, start=1):
            _say(f"{number} of {len(plan)}: {victim}; {len(mesh.accepted())} accepted")
            _wait_for_a_moment(mesh, chance)
            _kill(victim, mesh, positions, chance)
        mesh.until(lambda: bool(mesh.accepted()), "something was accepted")
        mesh.producer.end(signal.SIGTERM)
        accepted = mesh.accepted()
        mesh.until(lambda: accepted <= set(mesh.digests("transactions")), "everything that was accepted is in the ledger")
    finally:
        mesh.producer.end()
        mesh.consumer.end()
    positions.check()
    found = Counter(mesh.digests("transactions"))
    twice = sum(count > 1 for count in found.values())
    if twice:
        raise CampaignError(f"{twice} messages are in the ledger more than once; see {folder}")
    took_s = round(time.monotonic() - began, 1)
    return Report(seed, dict(kills), len(accepted), len(found), twice, positions.checked, took_s)


def _wait_for_a_moment(mesh: Mesh, chance: random.Random) -> None:
    """Let some time pass, and in half of the cases wait for a block, so that deaths meet every state."""
    time.sleep(chance.uniform(0.0, 1.0))
    mesh.until(lambda: len(mesh.accepted()) - len(mesh.digests("transactions")) < BACKLOG_MAX, "the validator catches up")
    if chance.random() < 0.5:
        blocks = len(mesh.digests("transactions"))
        mesh.until(lambda: len(mesh.digests("transactions")) > blocks, "another block")
        time.sleep(chance.uniform(0.0, 0.3))


def _kill(victim: str, mesh: Mesh, positions: Positions, chance: random.Random) -> None:
    mesh.consumer.check()
    mesh.producer.check()
    match victim:
        case "broker":
            mesh.broker.kill()
            time.sleep(chance.uniform(0.0, 1.0))
            mesh.broker.start()
        case "consumer":
            mesh.consumer.end()
            positions.check()
            mesh.consumer.start()
        case _:
            mesh.producer.end()
            time.sleep(chance.uniform(0.0, 0.2))
            mesh.producer.start()


def main() -> None:
    """Run a campaign on a broker of its own and print its report."""
    parser = argparse.ArgumentParser(description="Kill broker, consumer and producer at random points.")
    for name, count in (("broker", 20), ("consumer", 90), ("producer", 90)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"deaths of the {name} (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    kills = {name: getattr(arguments, name) for name in ("broker", "consumer", "producer")}
    folder = Path(tempfile.mkdtemp(prefix="cybermesh-kills-"))  # kept: a failure is looked at there
    with Broker(folder / "broker", fetch()) as broker:
        report = run(folder, broker, kills, arguments.seed)
    sys.stdout.write(json.dumps(asdict(report)) + "\n")


if __name__ == "__main__":
    main()
