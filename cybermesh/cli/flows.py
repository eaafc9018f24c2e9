"""``cybermesh flows``: meter captures into one row per flow.

Flows are written as they finish, so memory does not grow with the capture. All inputs go through one meter: a capture that was
split into files gives the flows of the whole. An input that cannot be read is reported and the others are still metered; the
exit code is then 1. Ctrl-C ends a live capture or a stream (``tcpdump -w - | cybermesh flows -``) in order, with the flows that
were open; of files it just stops.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from cybermesh.cli import output
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.flow_rows import no_flows
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import DEFAULT_BLOCK, Batch, Source, SourceError

if TYPE_CHECKING:
    from cybermesh.cli.flow_sinks import FlowSink
    from cybermesh.telemetry.metering import Meter

RETAINED_FLOWS = 65_536  # below, every flow is kept to the end of the input, so that no disorder matters; about 50 MB
_DRAINED = 4096  # flows at once, when the input has ended


class FlowFormat(StrEnum):
    """File formats of the rows."""

    CSV = "csv"
    NDJSON = "ndjson"
    PARQUET = "parquet"


class FlowColumns(StrEnum):
    """Whose column names."""

    CYBERMESH = "cybermesh"
    CIC = "cic"


class Compatibility(StrEnum):
    """Whose faults are reproduced."""

    CICFLOWMETER = "cicflowmeter"


class FlowTarget(StrEnum):
    """Which bus the flows go to."""

    KAFKA = "kafka"
    LOCAL = "local"


@dataclass(slots=True)
class FlowTotals:
    """What a run metered."""

    packets: int = 0
    metered: int = 0
    flows: int = 0
    evicted: int = 0
    failed_inputs: int = 0
    units: set[str] = field(default_factory=set)  # what the inputs call what they consist of


@dataclass(slots=True)
class Run:
    """One run over some inputs: what reads and meters them, and what came of it."""

    inputs: Sequence[str]
    block: int
    meter: Meter
    open_source: Callable[..., Source]
    totals: FlowTotals = field(default_factory=FlowTotals)
    stopped: threading.Event = field(default_factory=threading.Event)

    def flows(self) -> Iterator[FlowBatch]:
        """Meter the inputs in order, as one stream of packets; yield what has finished, at first and after each batch.

        Inputs that cannot be read, and packets that are not metered, are explained on stderr.
        """
        totals, progress = self.totals, _Progress(len(self.inputs))
        for number, spec in enumerate(self.inputs):
            try:
                source = self.open_source(spec, block=self.block)
            except SourceError as error:
                totals.failed_inputs += 1
                output.complain(str(error))
                continue
            with closing(source):
                yield no_flows()
                try:
                    for batch in source.batches():
                        finished = _finished(batch, self.meter)
                        totals.flows += len(finished)
                        yield finished
                        progress.update(source, number, totals.packets + source.counters.packets)
                        if self.stopped.is_set():
                            break
                except KeyboardInterrupt:
                    if not (is_live(spec) or _is_stream(spec)):
                        raise
                finally:
                    progress.clear()
                _explain(source.name, source.counters)
                totals.packets += source.counters.packets
                totals.metered += source.counters.metered
                totals.units.add(source.counters.unit)
        if totals.failed_inputs == len(self.inputs):
            return
        for rest in self.meter.drain(_DRAINED):
            totals.flows += len(rest)
            yield rest
        totals.evicted = self.meter.evicted


class _Progress:
    """A line on stderr that shows how far a long run has come: on a terminal only, after the first second."""

    def __init__(self, inputs: int) -> None:
        self._enabled = sys.stderr.isatty()
        self._inputs = inputs
        self._began = time.monotonic()
        self._next = self._began + 1.0
        self._shown = False

    def update(self, source: Source, number: int, packets: int) -> None:
        now = time.monotonic()
        if not self._enabled or now < self._next:
            return
        self._next = now + 0.2
        self._shown = True
        passed, share = now - self._began, source.progress
        where, left = "", ""
        if share is not None:
            share = (number + share) / self._inputs
            where = f"{share:4.0%} "
            left = f", {passed * (1 - share) / share:.0f} s left" if share else ""
        which = f" ({number + 1} of {self._inputs})" if self._inputs > 1 else ""
        sys.stderr.write(f"\r\x1b[K{where}{source.name}{which}: {packets:,} packets, {packets / passed:,.0f}/s{left}")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            self._shown = False


def flows(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Captures (pcap, pcapng, .gz, .zst) or folders of them, - for stdin, live:eth0; also csv:, zeek:, eve: for"
            " flows that others metered.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of to stdout.")] = None,
    form: Annotated[FlowFormat, typer.Option("--format", help="csv, ndjson, or parquet.")] = FlowFormat.CSV,
    columns: Annotated[FlowColumns, typer.Option(help="Our names, or CICFlowMeter's (CSV).")] = FlowColumns.CYBERMESH,
    compat: Annotated[
        Compatibility | None,
        typer.Option(help="Reproduce the original tool, faults included; slow. With --columns cic: 2017's."),
    ] = None,
    to: Annotated[FlowTarget | None, typer.Option(help="Publish to telemetry.features.v1 instead of writing.")] = None,
    sensor: Annotated[str, typer.Option(help="With --to: who metered; default: this host's name.")] = "",
    config: Annotated[Path | None, typer.Option("-c", "--config", help="With --to: TOML file with the bus settings.")] = None,
    block: Annotated[int, typer.Option(min=1, max=1_048_576, help="Packets worked on at once.")] = DEFAULT_BLOCK,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Threads for long captures; the flows are the same.")] = 1,
) -> None:
    """Meter captures: one row per flow, with identifiers and 79 features.

    Examples: cybermesh flows trace.pcap > flows.csv; tcpdump -w - | cybermesh flows - --format ndjson;
    cybermesh flows captures/ --format parquet --out flows.parquet; KAFKA_BROKERS=k1:9092 cybermesh flows live:eth0 --to kafka
    """
    wanted = Wanted(form, columns, compat, out)
    wanted.check(inputs, to)
    began = time.monotonic()
    run = prepare(inputs, compat, block, workers)
    if to is not None:
        from cybermesh.cli.flow_publish import publish

        publish(run, to, sensor, config)
    else:
        with ExitStack() as stack:
            sink: FlowSink | None = None
            for finished in run.flows():
                if sink is None:  # an input could be read: now the output may be touched
                    sink = wanted.open(stack)
                sink.write(finished)
    if run.totals.failed_inputs < len(inputs):
        _summarise(run.totals, time.monotonic() - began)
    if run.totals.failed_inputs:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asked for."""

    form: FlowFormat
    columns: FlowColumns
    compat: Compatibility | None
    out: Path | None

    def check(self, inputs: Sequence[str], to: FlowTarget | None) -> None:
        """Refuse what cannot be done before anything is touched."""
        out = self.out
        if self.columns is FlowColumns.CIC and self.form is not FlowFormat.CSV:
            raise output.CommandError("--columns cic is a CSV layout; add --format csv", 2)
        if to is not None and (out is not None or self.form is not FlowFormat.CSV or self.columns is not FlowColumns.CYBERMESH):
            raise output.CommandError(f"--to {to.value} publishes messages; leave --out, --format and --columns away", 2)
        if to is not None and self.compat is not None:
            raise output.CommandError(
                f"--to {to.value}: detectors learn from flows as they are defined; leave --compat away", 2
            )
        if out is not None and out.exists() and any(Path(name).exists() and out.samefile(name) for name in inputs):
            raise output.CommandError(f"{out}: is also an input and would be overwritten; choose another --out", 2)
        if self.form is FlowFormat.PARQUET and out is None and sys.stdout.isatty():
            raise output.CommandError("--format parquet is not for a terminal; add --out FILE", 2)

    def open(self, stack: ExitStack) -> FlowSink:
        """Open the output; the stack closes it."""
        from cybermesh.cli import flow_rows
        from cybermesh.cli.flow_sinks import ParquetSink, TextSink

        target: BinaryIO = sys.stdout.buffer
        if self.out is not None:
            try:
                target = stack.enter_context(self.out.open("wb"))
            except OSError as error:
                raise output.CommandError(f"{self.out}: cannot be written: {error.strerror}; choose another --out") from error
        if self.form is FlowFormat.PARQUET:
            return stack.enter_context(closing(ParquetSink(target)))
        if self.form is FlowFormat.NDJSON:
            return stack.enter_context(closing(TextSink(target, b"", flow_rows.ndjson_rows)))
        header, rows = flow_rows.csv_header, flow_rows.csv_rows
        if self.columns is FlowColumns.CIC:
            header, rows = flow_rows.cic_header, flow_rows.cic_rows
            if self.compat is not None:
                header, rows = flow_rows.original_header, flow_rows.original_rows
        return stack.enter_context(closing(TextSink(target, header(), rows)))


def prepare(inputs: Sequence[str], compat: Compatibility | None, block: int, workers: int = 1) -> Run:
    """Return a run with the meter that suits the inputs."""
    from cybermesh.telemetry.metering import choose, compiled

    if compat is not None:
        from cybermesh.telemetry.compat import CompatMeter
        from cybermesh.telemetry.sources.choose import open_source

        return Run(inputs, block, CompatMeter(), open_source)
    live = any(map(is_live, inputs))
    metering = compiled(workers) if live else choose(inputs, workers=workers, tell=output.note)
    return Run(inputs, block, metering.new_meter(retain=0 if live else RETAINED_FLOWS), metering.open_source)


def is_live(spec: str) -> bool:
    """Return whether an input is a network interface, which never ends by itself."""
    return spec.startswith("live:") and not Path(spec).exists()


def _is_stream(spec: str) -> bool:
    """Return whether an input is a pipe, which ends when somebody else says so."""
    return spec in {"-", "pcap:-"} or Path(spec).is_fifo()


def _finished(batch: Batch, meter: Meter) -> FlowBatch:
    """Return the flows that are finished with a batch: metered from packets, or as another meter reported them."""
    match batch:
        case PacketBatch():
            return meter.add(batch)
        case FlowBatch():
            return batch
        case _:
            return no_flows()  # logins, web requests and names asked for are none


def _explain(name: str, counters: Counters) -> None:
    """Say what was not metered of one input, and why."""
    if counters.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counters.skipped.most_common())
        output.note(f"{name}: {counters.metered:,} of {counters.packets:,} {counters.unit} metered; skipped: {reasons}")
    if counters.ended:
        output.note(f"{name}: {counters.ended}; what could be read was metered")


def _summarise(totals: FlowTotals, seconds: float) -> None:
    rate = totals.packets / seconds if seconds else 0.0
    unit = totals.units.pop() if len(totals.units) == 1 else "packets and records"
    output.note(f"{totals.flows:,} flows from {totals.metered:,} {unit} in {seconds:.2f} s ({rate:,.0f} {unit}/s)")
    if totals.evicted:
        output.note(f"{totals.evicted:,} flows were cut short: too many were open at once")
