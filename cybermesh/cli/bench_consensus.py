"""``cybermesh bench consensus``: how fast a committee of four agrees on this machine, and what bounds it.

Every measurement starts new processes with new safety files; beside the rates stand the bounds measured in the same run, so
that a busy machine shows in both. Four validators share this machine: on machines of their own each would have all its cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

from cybermesh.cli import bench_null, output
from cybermesh.cli.bench_admission import make_messages
from cybermesh.cli.bench_node import PRODUCERS, LedgerTask, write_messages
from cybermesh.cli.bench_validator import Measured, Task
from cybermesh.genesis import Budget
from cybermesh.keys import SigningKey
from cybermesh.roles.deployment import Roster, create
from cybermesh.wire import codec

VALIDATORS: Final = 4
CATCH_UP_BLOCKS: Final = 1_000
PACE_PER_S: Final = 1_000
LEDGER_MESSAGES: Final = 12_000
_AHEAD_S: Final = 0.3


class Process:
    """A process of the benchmark and the lines it is told and tells."""

    def __init__(self, task: Task | LedgerTask) -> None:
        module = "bench_node" if isinstance(task, LedgerTask) else "bench_validator"
        command = [sys.executable, "-m", f"cybermesh.cli.{module}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self.tell(dataclasses.asdict(task))
        self.addresses = self.hear()["addresses"]

    def tell(self, value: object) -> None:
        """Send a line."""
        stream: IO[str] | None = self._process.stdin
        assert stream is not None
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    def hear(self) -> Any:
        """Return the next line; a process that ends without one has printed why."""
        stream: IO[str] | None = self._process.stdout
        assert stream is not None
        line = stream.readline()
        if not line:
            raise output.CommandError(f"a validator of the benchmark ended with {self._process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End it, and wait until it has ended."""
        if self._process.poll() is None:
            try:
                self.tell({})
                self._process.wait(timeout=5)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what could not be written to it any more
                    stream.close()


class Run:
    """One measurement: the processes of a committee."""

    def __init__(self, folder: Path, transactions: Path) -> None:
        self._folder = folder
        self._transactions = transactions
        seeds = [secrets.token_bytes(32) for _ in range(VALIDATORS)]
        self._seeds = [seed.hex() for seed in sorted(seeds, key=lambda seed: SigningKey(seed).public)]

    def measure(self, load: str, groups: Sequence[Sequence[int]], **options: Any) -> list[Measured]:
        """Run the groups of validators, a process each, under a load; return each process' figures."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            given = str(self._transactions) if load != "empty" else ""
            tasks = [Task(self._seeds, list(group), folder, load, given, **options) for group in groups]
            processes = [Process(task) for task in tasks]
            try:
                self._connect(processes, peers=sum(len(group) for group in groups) - 1)
                self._start(processes)
                return [Measured(**process.hear()) for process in processes]
            finally:
                for process in processes:
                    process.close()

    def catch_up(self, blocks: int) -> float:
        """Return how long a validator that starts late takes for its first blocks, in seconds from its start."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            early = [
                Process(Task(self._seeds, [index], folder, "blocks", str(self._transactions), target=blocks))
                for index in range(VALIDATORS - 1)
            ]
            late = Process(Task(self._seeds, [VALIDATORS - 1], folder, "catch-up", target=blocks))
            everybody = [*early, late]
            try:
                addresses = _addresses(everybody)
                for process in early:
                    process.tell({"addresses": addresses, "peers": VALIDATORS - 2})
                for process in early:
                    process.hear()
                self._start(early)
                for process in early:
                    process.hear()
                began = time.monotonic()
                late.tell({"addresses": addresses, "peers": 0})
                late.hear()
                late.tell({"at": began})
                return Measured(**late.hear()).reached_s
            finally:
                for process in everybody:
                    process.close()

    def with_ledger(self, messages: int) -> float:
        """Return how many anomalies a second four whole validators agree on, execute and store."""
        deployment = create(Roster("bench", VALIDATORS, producers=PRODUCERS, agents=1, operators=1, budget=Budget()))
        values = [codec.encode(each) for each in make_messages(deployment, messages, time.time_ns() // 1_000_000)]
        genesis = deployment.genesis.encode().decode()
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = Path(folder) / "messages"
            write_messages(path, values)
            seeds = [deployment.keys[f"validator-{number + 1}"].seed.hex() for number in range(VALIDATORS)]
            tasks = [LedgerTask(genesis, seed, number + 1, folder, str(path)) for number, seed in enumerate(seeds)]
            processes = [Process(task) for task in tasks]
            try:
                self._connect(processes, peers=VALIDATORS - 1)
                self._start(processes)
                return min(float(process.hear()["per_s"]) for process in processes)
            finally:
                for process in processes:
                    process.close()

    def _connect(self, processes: Sequence[Process], peers: int) -> None:
        addresses = _addresses(processes)
        for index in range(VALIDATORS):
            addresses.setdefault(str(index), ["127.0.0.1", 9])  # nobody listens there: this one is dead
        for process in processes:
            process.tell({"addresses": addresses, "peers": peers})
        for process in processes:
            process.hear()

    def _start(self, processes: Sequence[Process]) -> None:
        at = time.monotonic() + _AHEAD_S
        for process in processes:
            process.tell({"at": at})


def _addresses(processes: Sequence[Process]) -> dict[str, Any]:
    return {index: address for process in processes for index, address in process.addresses.items()}


def raw_verify_per_s(threads: int, seconds: float = 1.0) -> float:
    """Return how many transactions a second this machine verifies, doing nothing else."""
    transaction = bench_null.make_transaction(SigningKey(secrets.token_bytes(32)), 0)
    counts = [0] * threads
    end = time.monotonic() + seconds

    def work(place: int) -> None:
        while time.monotonic() < end:
            for _ in range(50):
                bench_null.is_signed(transaction)
            counts[place] += 50

    workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / seconds


def sync_p50_ms(folder: Path) -> float:
    """Return how long the disk takes to make 4 KiB durable; a block costs two of these, one after the other."""
    took = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(50):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took)


def write_transactions(path: Path, count: int) -> None:
    """Write signed transactions, one behind the other."""
    keys = [SigningKey(secrets.token_bytes(32)) for _ in range(bench_null.PRODUCERS)]
    with path.open("wb") as file:
        for number in range(count):
            file.write(bench_null.make_transaction(keys[number % len(keys)], number))


def percentile_ms(latencies_us: Sequence[int], percent: int) -> float | None:
    """Return a percentile in milliseconds, None without values."""
    if len(latencies_us) < 2:
        return None
    return round(statistics.quantiles(latencies_us, n=100, method="inclusive")[percent - 1] / 1000, 2)


def run(seconds: float, folder: Path) -> dict[str, object]:
    """Measure everything; about ten times ``seconds`` and the start of forty processes."""
    one, four = [list(range(VALIDATORS))], [[index] for index in range(VALIDATORS)]
    with tempfile.TemporaryDirectory(prefix="cybermesh-bench-", dir=folder) as made:
        place = Path(made)
        transactions = place / "transactions"
        single = raw_verify_per_s(1)
        cores = os.cpu_count() or 1
        ceiling = raw_verify_per_s(cores) / VALIDATORS
        output.note("signing transactions")
        write_transactions(transactions, int(1.2 * ceiling * (seconds + 2)) + 5_000)
        bench = Run(place, transactions)

        def rate(load: str, groups: Sequence[Sequence[int]], figure: str) -> float:
            output.note(f"{load}, {len(groups)} processes")
            found = bench.measure(load, groups, seconds=seconds)
            return float(min(getattr(each, figure) for each in found)) / seconds

        result: dict[str, object] = {
            "application": "null",
            "validators": VALIDATORS,
            "blocks_per_s_1p": round(rate("empty", one, "blocks")),
            "blocks_per_s_4p": round(rate("empty", four, "blocks")),
            "tx_per_s_1p": round(rate("flood", one, "transactions")),
        }
        all_four = rate("flood", four, "transactions")
        one_dead = rate("flood", four[1:], "transactions")
        output.note(f"paced, {PACE_PER_S} transactions/s")
        paced = bench.measure("paced", four, seconds=seconds, rate_per_s=PACE_PER_S)
        latencies = [latency for each in paced for latency in each.latencies_us]
        output.note("catch-up")
        caught_up = bench.catch_up(CATCH_UP_BLOCKS)
        output.note("with ledger and database")
        with_ledger = bench.with_ledger(LEDGER_MESSAGES)
        sync_ms = sync_p50_ms(place)
    return result | {
        "tx_per_s_4p": round(all_four),
        "tx_per_s_ledger_4p": round(with_ledger),
        "one_dead_share": round(one_dead / all_four, 3),
        "commit_p50_ms": percentile_ms(latencies, 50),
        "commit_p99_ms": percentile_ms(latencies, 99),
        "catch_up_1000_blocks_s": round(caught_up, 2),
        "raw_verify_per_s": round(single),
        "tx_ceiling": round(ceiling),
        "tx_share_of_ceiling_4p": round(all_four / ceiling, 3),
        "sync_p50_ms": round(sync_ms, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }
