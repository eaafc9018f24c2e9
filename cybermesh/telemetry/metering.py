"""Which meter an input gets: the numpy reference or the compiled one (shell).

The flows are the same. The compiled meter is several times as fast but takes a third of a second to load, and some seconds to
compile when it is used for the first time; so it is for inputs that are long, and for roles that run for long, which call
``compiled`` at their start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from cybermesh.telemetry.compile_cache import cache_folder, is_compiled, load_kernels
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.meter import DEFAULT_MAX_FLOWS, FlowMeter
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import Source
from cybermesh.telemetry.sources.choose import open_source

LONG_BYTES = 32 << 20  # captures from here on are worth loading kernels for: the reference needs half a second or more
COMPILE_BYTES = 4 * LONG_BYTES  # ... and from here on, compiling them
_UNPACKED = 4  # a compressed capture is about so many times as long as its file


class Meter(Protocol):
    """What both meters are."""

    @property
    def evicted(self) -> int:
        """Flows pushed out by the hard cap so far."""
        ...

    def __len__(self) -> int:
        """Return the number of open flows."""
        ...

    def add(self, batch: PacketBatch) -> FlowBatch:
        """Meter packets; return the flows that are finished."""
        ...

    def drain(self, limit: int) -> Iterator[FlowBatch]:
        """Return all open flows in batches of at most ``limit``, and forget them."""
        ...

    def flush(self) -> FlowBatch:
        """Return all open flows in one batch, and forget them."""
        ...


@dataclass(frozen=True, slots=True)
class Metering:
    """How inputs are read and metered.

    ``open_source`` is that of ``sources.choose``; ``new_meter(max_flows=…, retain=…)`` makes a meter.
    """

    name: str  # "reference" or "compiled"
    open_source: Callable[..., Source]
    new_meter: Callable[..., Meter]


def reference() -> Metering:
    """Return the numpy implementation."""
    return Metering("reference", open_source, FlowMeter)


def compiled(workers: int = 1) -> Metering:
    """Load the compiled implementation, or compile it: some seconds, once for a user and version.

    Args:
        workers: Threads that work side by side; the flows are the same for any number. With two, one reads and one meters;
            from three on, those that meter have a share of the flows each.
    """
    load_kernels()
    from cybermesh.telemetry.meter_ahead import AheadMeter
    from cybermesh.telemetry.meter_compiled import CompiledMeter

    ahead = ThreadPoolExecutor(1, "meter") if workers > 1 else None
    pool = ThreadPoolExecutor(workers - 1, "shard") if workers > 2 else None

    def new_meter(*, max_flows: int = DEFAULT_MAX_FLOWS, retain: int = 0) -> Meter:
        shards = max(workers - 1, 1)
        meter = CompiledMeter(max_flows=max_flows, retain=retain, shards=shards, run=pool.map if pool else map)
        return AheadMeter(meter, ahead) if ahead else meter

    return Metering("compiled", partial(open_source, compiled=True), new_meter)


def choose(inputs: Iterable[str], *, workers: int = 1, tell: Callable[[str], None] | None = None) -> Metering:
    """Return the implementation that is done first with these inputs.

    A stream of unknown length gets the compiled one only if it need not be compiled first.

    Args:
        inputs: As ``open_source`` takes them.
        workers: As ``compiled`` takes them; the reference has one.
        tell: Is given a remark for people if kernels must be compiled, which takes some seconds.
    """
    sizes = [_size(spec) for spec in inputs]
    known = sum(size for size in sizes if size is not None)
    kept = is_compiled()
    wanted = known >= (LONG_BYTES if kept else COMPILE_BYTES) or (None in sizes and kept)
    if not wanted or sys.byteorder != "little":  # the kernels read numbers as a little-endian machine lays them out
        return reference()
    if tell is not None and not kept:
        tell(f"compiling the meter for long captures: some seconds, {_how_often()}")
    return compiled(workers)


def _how_often() -> str:
    if cache_folder() is not None:
        return "the first time only"
    return "each time, as the result can be kept nowhere; set CYBERMESH_CACHE_DIR to a folder of yours"


def _size(spec: str) -> int | None:
    """Return about how many bytes of capture an input holds, None if that cannot be known, 0 if it cannot be read."""
    if spec.startswith("live:") and not Path(spec).exists():
        return None
    path = Path(spec if Path(spec).exists() else spec.removeprefix("pcap:"))
    try:
        if path.is_dir():
            return sum(_file_size(each) for each in path.iterdir() if each.is_file())
        if not path.is_file():
            return None if spec in ("-", "pcap:-") or path.is_fifo() else 0
        return _file_size(path)
    except OSError:
        return 0


def _file_size(path: Path) -> int:
    return path.stat().st_size * (_UNPACKED if path.suffix in (".gz", ".zst") else 1)
