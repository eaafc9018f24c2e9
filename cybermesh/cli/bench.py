"""``cybermesh bench``: measure this machine, and where it can be had, the tool that users know.

Every measurement is a process of its own and the two tools take turns, so that both see the same machine. What is compared:
reading a capture from the file system's cache into flows with all their statistics, without printing them. NFStream is timed
inside its process, so its imports are never counted; ours are, in ``process_packets_per_s``. The ratios ending in ``_cpu`` are
of packets per second of processor time: on a busy machine they say more, since NFStream takes a share of it for each of its
processes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cybermesh.cli import output

app = typer.Typer(no_args_is_help=True)

_WARM_RUNS = 4  # in one process; the first warms up and is not counted
_BYTES_PER_PACKET = 160  # of the captures, on disk, at most


@app.callback()
def bench() -> None:
    """Measure this machine."""


@dataclass(slots=True)
class _Rates:
    """Packets per second of every run on one capture, and what the runs needed."""

    packets: int = 0
    flows: int = 0
    warm: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    both_cores: list[float] = field(default_factory=list)
    nfstream: list[float] = field(default_factory=list)
    cicflowmeter: list[float] = field(default_factory=list)
    warm_cpu: list[float] = field(default_factory=list)
    nfstream_cpu: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


@app.command()
def idle(
    seconds: Annotated[float, typer.Option(min=1, max=3_600, help="How long to measure.")] = 30,
    as_json: output.JsonOption = False,
) -> None:
    """Measure what four validators cost while nothing happens."""
    import asyncio
    import dataclasses

    from cybermesh import log
    from cybermesh.demo.idle import measure

    log.configure(level="error")
    result = dataclasses.asdict(asyncio.run(measure(seconds)))
    _show(result, as_json=as_json)


@app.command()
def admission(
    messages: Annotated[int, typer.Option(min=10_000, max=1_000_000, help="Messages of one measurement.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often the measurements take turns.")] = 3,
    kafka: Annotated[str, typer.Option(metavar="HOST:PORT", help="Brokers to read from, too, without protection.")] = "",
    as_json: output.JsonOption = False,
) -> None:
    """Measure how fast a validator takes messages in, beside bare verification of their signatures.

    Example: make kafka, and in another terminal: cybermesh bench admission --kafka 127.0.0.1:PORT
    """
    if not kafka:
        output.note("no --kafka HOST:PORT, so reading from Kafka is not measured; `make kafka` starts a broker")
    parts = {"raw": ("raw", 1), "one": ("memory", 1), "two": ("memory", 2)} | ({"kafka": ("kafka", 2)} if kafka else {})
    told: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for number in range(rounds):
        output.note(f"round {number + 1} of {rounds}")
        for name, (part, cores) in parts.items():
            told[name].append(_run("cybermesh.cli.bench_admission", part, str(messages), str(cores), kafka))
    medians = {name: statistics.median(one["per_s"] for one in found) for name, found in told.items()}
    by_cpu = {name: statistics.median(one["per_cpu_s"] for one in found) for name, found in told.items()}
    result = {
        "raw_verify_per_s_1core": round(medians["raw"]),
        "admitted_per_s_1core": round(medians["one"]),
        "admitted_per_s_2cores": round(medians["two"]),
        "share_of_raw": round(medians["one"] / medians["raw"], 3),
        "share_of_raw_by_processor_time": round(by_cpu["one"] / by_cpu["raw"], 3),
        "kafka_admitted_per_s": round(medians["kafka"]) if kafka else None,
    }
    _show(result, as_json=as_json)


@app.command()
def consensus(
    seconds: Annotated[float, typer.Option(min=1, max=60, help="How long each rate is measured.")] = 5,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the safety files go: the disk that is measured.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Measure how fast four validators agree: blocks, transactions, latency, one of them dead, catching up."""
    from cybermesh.cli import bench_consensus

    _show(bench_consensus.run(seconds, Path(folder or tempfile.gettempdir())), as_json=as_json)


@app.command()
def detect(
    rows: Annotated[int, typer.Option(min=10_000, help="Flows to judge, at least.")] = 200_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often; the medians count.")] = 3,
    as_json: output.JsonOption = False,
) -> None:
    """Judge flows: by the classifier alone, and by everything.

    The flows are those of the capture that the package ships, copied with other sources and later times, metered before the
    clock starts, in batches of 1,000, on one thread; times are that thread's processor time. classifier_rows_per_s: calibrated
    scores and the guard for every row, and onnx_batch_p99_ms for one batch of it. pipeline_rows_per_s: rules, statistics and
    classifier over the flows, ensemble, evidence, alerts and policies; nineteen of twenty flows are attacks, which cost most.
    with_windows_rows_per_s: the same and the windows over flows, which cost by the second of traffic rather than by the row.
    Not in it: metering (bench flows) and windows over packets. model_mb is model.onnx and model.json together, wall_rows_per_s
    the classifier by the clock on the wall.
    """
    from cybermesh.cli import bench_capture, bench_detect

    result = bench_detect.measure(bench_capture.demo_capture(), rows, rounds)
    _show(result, as_json=as_json)


@app.command()
def enforce(
    hosts: Annotated[int, typer.Option(min=1_000, max=100_000, help="Hosts that are installed already.")] = 100_000,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the agent's database goes while it is needed.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Measure an agent with the kernel's nftables, in a network namespace of its own; needs root.

    Example: cybermesh bench enforce --json
    """
    if os.geteuid() != 0:
        raise output.CommandError("measuring the kernel's firewall needs root, for a network namespace of its own")
    told: dict[str, typing.Any] = {}
    with tempfile.TemporaryDirectory(prefix="cybermesh-bench-", dir=folder) as made:
        for part in ("fill", "nft", "agent"):
            output.note(f"part {part}")
            told |= _run("cybermesh.cli.bench_enforce", part, made, str(hosts))
    names = (
        "one_policy_p50_ms",
        "one_policy_p99_ms",
        "burst_10k_s",
        "restore_100k_s",
        "nft_f_100k_s",
        "ratio_restore",
        "rss_mb",
    )
    told["ratio_restore"] = round(told["restore_100k_s"] / told["nft_f_100k_s"], 2)
    _show({name: told[name] for name in names}, as_json=as_json)


@app.command()
def flows(
    packets: Annotated[
        int, typer.Option(min=100_000, help="Packets of the usual capture, at least; the long one has two thirds.")
    ] = 6_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often the tools take turns.")] = 2,
    cicflowmeter: Annotated[
        str | None, typer.Option(metavar="PROGRAM", help="The Python CICFlowMeter, of an environment of its own.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the captures go while they are needed.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Meter large captures, alternating with NFStream, and with the Python CICFlowMeter if it is on the PATH.

    The captures are made from the one that the package ships: one with about 10 packets per flow, one with hundreds.
    NFStream is an extra: pip install 'cybermesh[bench]'. CICFlowMeter needs an older numpy than we do, so it cannot be one:
    pipx install cicflowmeter && pipx inject cicflowmeter scapy==2.5.0
    """
    from cybermesh.cli.bench_cicflowmeter import CicFlowMeter

    if importlib.util.find_spec("nfstream") is None:
        output.note("NFStream is not installed, so there is nothing to compare with: pip install 'cybermesh[bench]'")
        other = None
    else:
        other = importlib.metadata.version("nfstream")
    where = _room(folder, 2 * packets)
    program = cicflowmeter or shutil.which("cicflowmeter")
    third = CicFlowMeter(program) if program else None
    with tempfile.TemporaryDirectory(prefix="cybermesh-bench-", dir=where) as made:
        captures = _make(Path(made), packets)
        _worker("1", captures.usual, 1)  # compiles what is not compiled yet
        usual, long = _Rates(), _Rates()
        for number in range(rounds):
            for rates, capture in ((usual, captures.usual), (long, captures.long)):
                output.note(f"{capture.name}: round {number + 1} of {rounds}")
                _take_turns(rates, capture, compare=other is not None)
            if third is not None:
                usual.cicflowmeter.append(third.packets_per_s(captures.short, captures.short_packets))
    result = _result(usual, long) | {"rounds": rounds, "nfstream_version": other}
    _show(result, as_json=as_json)


@app.command()
def logs(
    lines: Annotated[int, typer.Option(min=1_000, help="Lines of each log.")] = 200_000,
    as_json: output.JsonOption = False,
) -> None:
    """Read authentication logs into events: lines a second on one core, of failed logins, of a usual log, of hostile lines.

    Rates count the reading thread's processor time and are medians of three. reading_lines_per_s takes lines out of the file
    only; python_floor_lines_per_s is a loop that splits each line at its blanks and does nothing else.
    """
    from cybermesh.cli import bench_logs

    _show(bench_logs.measure(lines), as_json=as_json)


@app.command()
def live(
    packets: Annotated[int, typer.Option(min=10_000, help="Packets to send, at least.")] = 2_000_000,
    rate: Annotated[float, typer.Option(min=0, help="Packets/s to offer; 0: as many as the sender's core can.")] = 1_000_000,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the capture goes while it is needed.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Send packets over a virtual link and meter them as they come; tells what kernel and sender dropped. Needs root.

    The link is between two network namespaces that are made for it and removed afterwards.
    """
    from cybermesh.cli import bench_capture, bench_live

    bench_live.check_allowed()
    where = _room(folder, packets)
    with tempfile.TemporaryDirectory(prefix="cybermesh-bench-", dir=where) as made:
        capture = Path(made) / "usual.pcap"
        bench_capture.write(bench_capture.usual(bench_capture.demo_capture()), capture, packets)
        output.note(f"sending at {rate:,.0f} packets/s" if rate else "sending as fast as one core can")
        result = {"offered_packets_per_s": rate or None} | bench_live.measure(capture, rate)
    _show(result, as_json=as_json)


def _room(folder: Path | None, packets: int) -> Path:
    """Return where captures of so many packets go."""
    where = Path(folder or tempfile.gettempdir())
    if not where.is_dir() or shutil.disk_usage(where).free < packets * _BYTES_PER_PACKET:
        raise output.CommandError(f"{where}: has no room for captures of {packets:,} packets; choose another --dir")
    return where


def _show(result: Mapping[str, object], *, as_json: bool) -> None:
    if as_json:
        output.emit_one(result)
    else:
        for name, value in result.items():
            sys.stdout.write(f"{name:32} {value if value is not None else '-'}\n")


class _Captures(NamedTuple):
    """Where the captures are."""

    usual: Path
    long: Path
    short: Path
    short_packets: int


@app.command()
def ledger(
    blocks: Annotated[int, typer.Option(min=3, help="Blocks of 1,000 transactions timed at each point.")] = 12,
    audited: Annotated[int, typer.Option(min=2, help="Blocks of the chain that is audited.")] = 20,
    points: Annotated[str, typer.Option(help="Lengths of the history in blocks, ascending.")] = "1000,100000,1000000",
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where the databases go; a gigabyte at a million blocks.")
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Measure executing and storing blocks at growing histories, an audit, and a proof.

    The history is made, not lived: decisions and nonces are put into the state, and the rows below the head are short, but as
    many, with every index. Admission (decoding, signatures) is outside the times, except the audit's.

    Example: cybermesh bench ledger --json
    """
    from cybermesh.cli import bench_ledger

    try:
        lengths = [int(text) for text in points.split(",")]
    except ValueError as error:
        raise output.CommandError(f"--points {points}: not numbers with commas between them", 2) from error
    if lengths != sorted(set(lengths)) or lengths[0] < 0:
        raise output.CommandError(f"--points {points}: not ascending", 2)
    result = bench_ledger.run(blocks, lengths, audited, folder)
    _show(result, as_json=as_json)


def _make(folder: Path, packets: int) -> _Captures:
    from cybermesh.cli import bench_capture
    from cybermesh.cli.bench_cicflowmeter import CAPTURE_PACKETS

    usual, long, short = (folder / f"{name}.pcap" for name in ("usual", "long", "short"))
    source = bench_capture.demo_capture()
    output.note(f"making captures of {packets:,} and {packets * 2 // 3:,} packets from {source.name}")
    template = bench_capture.usual(source)
    bench_capture.write(template, usual, packets)
    bench_capture.write(bench_capture.long_flows(source), long, packets * 2 // 3)
    return _Captures(usual, long, short, bench_capture.write(template, short, CAPTURE_PACKETS))


def _take_turns(rates: _Rates, capture: Path, *, compare: bool) -> None:
    """Measure everything once, one after the other, and add what came out to ``rates``."""
    began = time.perf_counter()
    told = _worker("1", capture, 1)
    rates.process.append(told["packets"] / (time.perf_counter() - began))
    rates.packets, rates.flows, rates.peak_mb = told["packets"], told["flows"], max(rates.peak_mb, told["peak_rss_mb"])
    for what, into in (("1", rates.warm), ("2", rates.both_cores)):
        told = _worker(what, capture, _WARM_RUNS)
        into += [rates.packets / seconds for seconds in told["seconds"][1:]]
        if what == "1":
            rates.warm_cpu += [rates.packets / seconds for seconds in told["cpu_seconds"][1:]]
            rates.peak_mb = max(rates.peak_mb, told["peak_rss_mb"])
    if compare:
        told = _worker("nfstream", capture, 1)
        rates.nfstream += [rates.packets / seconds for seconds in told["seconds"]]
        rates.nfstream_cpu += [rates.packets / seconds for seconds in told["cpu_seconds"]]


def _worker(what: str, capture: Path, times: int) -> dict[str, typing.Any]:
    return _run("cybermesh.cli.bench_worker", what, str(capture), str(times))


def _run(module: str, what: str, *arguments: str) -> dict[str, typing.Any]:
    command = [sys.executable, "-m", module, what, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        raise output.CommandError(f"measuring '{what}' failed with exit code {done.returncode}; its error is above")
    told: dict[str, typing.Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _result(usual: _Rates, long: _Rates) -> dict[str, object]:
    """Return the figures: medians of all runs, and their ratios."""

    def rate(values: list[float]) -> int | None:
        return round(statistics.median(values)) if values else None

    def ratio(ours: list[float], theirs: list[float]) -> float | None:
        return round(statistics.median(ours) / statistics.median(theirs), 1) if ours and theirs else None

    return {
        "capture_packets": usual.packets,
        "capture_flows": usual.flows,
        "warm_packets_per_s": rate(usual.warm),
        "process_packets_per_s": rate(usual.process),
        "two_threads_packets_per_s": rate(usual.both_cores),
        "nfstream_packets_per_s": rate(usual.nfstream),
        "ratio_warm": ratio(usual.warm, usual.nfstream),
        "ratio_process": ratio(usual.process, usual.nfstream),
        "ratio_warm_cpu": ratio(usual.warm_cpu, usual.nfstream_cpu),
        "cicflowmeter_packets_per_s": rate(usual.cicflowmeter),
        "ratio_cicflowmeter": ratio(usual.warm, usual.cicflowmeter),
        "long_capture_packets": long.packets,
        "long_capture_flows": long.flows,
        "long_warm_packets_per_s": rate(long.warm),
        "nfstream_long_packets_per_s": rate(long.nfstream),
        "ratio_long_flows": ratio(long.warm, long.nfstream),
        "ratio_long_flows_cpu": ratio(long.warm_cpu, long.nfstream_cpu),
        "peak_rss_mb": round(max(usual.peak_mb, long.peak_mb)),
    }
