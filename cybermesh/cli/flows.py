"""``cybermesh flows``: meter captures into one row per flow.

Flows are written as they finish, so memory does not grow with the capture. All inputs go through one meter: a capture that was
split into files gives the flows of the whole. An input that cannot be read is reported and the others are still metered; the
exit code is then 1.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from cybermesh.cli import output
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import DEFAULT_BLOCK, Batch, Source, SourceError

if TYPE_CHECKING:
    from cybermesh.telemetry.metering import Meter

RETAINED_FLOWS = 65_536  # below, every flow is kept to the end of the input, so that no disorder matters; about 50 MB
_SLICE = 4096  # flows formatted at once


class FlowFormat(StrEnum):
    """File formats of the rows."""

    CSV = "csv"
    NDJSON = "ndjson"
    PARQUET = "parquet"


class FlowColumns(StrEnum):
    """Whose column names."""

    CYBERMESH = "cybermesh"
    CIC = "cic"


@dataclass(slots=True)
class FlowTotals:
    """What a run metered."""

    packets: int = 0
    metered: int = 0
    flows: int = 0
    evicted: int = 0
    failed_inputs: int = 0


class _Progress:
    """A line on stderr that shows how far a long run has come: on a terminal only, after the first second."""

    def __init__(self) -> None:
        self._enabled = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + 1.0
        self._shown = False

    def update(self, source: Source, packets: int) -> None:
        now = time.monotonic()
        if not self._enabled or now < self._next:
            return
        self._next = now + 0.2
        self._shown = True
        share = source.progress
        where = f"{share:4.0%}" if share is not None else "    "
        left = f", {(now - self._began) * (1 - share) / share:.0f} s left" if share else ""
        rate = packets / (now - self._began)
        sys.stderr.write(f"\r\x1b[K{where} {source.name}: {packets:,} packets, {rate:,.0f}/s{left}")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            self._shown = False


def flows(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Captures (pcap, pcapng, .gz, .zst), or - for stdin.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of to stdout.")] = None,
    form: Annotated[FlowFormat, typer.Option("--format", help="csv, ndjson, or parquet.")] = FlowFormat.CSV,
    columns: Annotated[FlowColumns, typer.Option(help="Our names, or CICFlowMeter's.")] = FlowColumns.CYBERMESH,
    block: Annotated[int, typer.Option(min=1, max=1_048_576, help="Packets worked on at once.")] = DEFAULT_BLOCK,
) -> None:
    """Meter captures: one row per flow, with identifiers and 79 features.

    Examples: cybermesh flows trace.pcap > flows.csv; tcpdump -w - | cybermesh flows - --format ndjson
    """
    _check(inputs, out, form, columns)
    began = time.monotonic()
    with ExitStack() as stack:
        sink: BinaryIO = sys.stdout.buffer
        if out is not None:
            try:
                sink = stack.enter_context(out.open("wb"))
            except OSError as error:
                raise output.CommandError(f"{out}: cannot be written: {error.strerror}; choose another --out") from error
        totals = run_flows(inputs, sink, form, columns, block)
        sink.flush()
    if totals.failed_inputs < len(inputs):
        _summarise(totals, time.monotonic() - began)
    if totals.failed_inputs:
        raise typer.Exit(1)


def run_flows(inputs: list[str], sink: BinaryIO, form: FlowFormat, columns: FlowColumns, block: int) -> FlowTotals:
    """Meter the inputs in order, as one stream of packets, and write their flows to ``sink``.

    Inputs that cannot be read, and packets that are not metered, are explained on stderr.
    """
    from cybermesh.cli import flow_rows
    from cybermesh.telemetry.metering import choose

    write = {
        (FlowFormat.CSV, FlowColumns.CYBERMESH): flow_rows.csv_rows,
        (FlowFormat.CSV, FlowColumns.CIC): flow_rows.cic_rows,
        (FlowFormat.NDJSON, FlowColumns.CYBERMESH): flow_rows.ndjson_rows,
    }[form, columns]
    header = (
        b"" if form is FlowFormat.NDJSON else flow_rows.cic_header() if columns is FlowColumns.CIC else flow_rows.csv_header()
    )
    metering = choose(inputs, tell=output.note)
    meter, totals, progress = metering.new_meter(retain=RETAINED_FLOWS), FlowTotals(), _Progress()
    for spec in inputs:
        try:
            source = metering.open_source(spec, block=block)
        except SourceError as error:
            totals.failed_inputs += 1
            output.complain(str(error))
            continue
        sink.write(header)
        header = b""
        with closing(source):
            for batch in source.batches():
                finished = _finished(batch, meter)
                if finished is None:
                    continue
                totals.flows += len(finished)
                sink.writelines(write(finished.take(slice(at, at + _SLICE))) for at in range(0, len(finished), _SLICE))
                progress.update(source, totals.packets + source.counters.packets)
            progress.clear()
            _explain(source.name, source.counters)
            totals.packets += source.counters.packets
            totals.metered += source.counters.metered
    for rest in meter.drain(_SLICE):
        totals.flows += len(rest)
        sink.write(write(rest))
    totals.evicted = meter.evicted
    return totals


def _finished(batch: Batch, meter: Meter) -> FlowBatch | None:
    """Return the flows that are finished with a batch: metered from packets, or as another meter reported them."""
    match batch:
        case PacketBatch():
            return meter.add(batch)
        case FlowBatch():
            return batch
        case _:
            return None  # events are no flows


def _check(inputs: list[str], out: Path | None, form: FlowFormat, columns: FlowColumns) -> None:
    """Refuse what cannot be done before anything is touched."""
    if form is FlowFormat.PARQUET:
        raise output.CommandError(
            "--format parquet needs the optional pyarrow, which this version does not use yet; use csv", 2
        )
    if form is FlowFormat.NDJSON and columns is FlowColumns.CIC:
        raise output.CommandError("--columns cic is a CSV layout; add --format csv", 2)
    if out is not None and out.exists() and any(Path(name).exists() and out.samefile(name) for name in inputs):
        raise output.CommandError(f"{out}: is also an input and would be overwritten; choose another --out", 2)


def _explain(name: str, counters: Counters) -> None:
    """Say what was not metered of one input, and why."""
    if counters.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counters.skipped.most_common())
        output.note(f"{name}: {counters.metered:,} of {counters.packets:,} {counters.unit} metered; skipped: {reasons}")
    if counters.ended:
        output.note(f"{name}: {counters.ended}; what came before was metered")


def _summarise(totals: FlowTotals, seconds: float) -> None:
    rate = totals.packets / seconds if seconds else 0.0
    output.note(f"{totals.flows:,} flows from {totals.metered:,} packets in {seconds:.2f} s ({rate:,.0f} packets/s)")
    if totals.evicted:
        output.note(f"{totals.evicted:,} flows were cut short: too many were open at once")
