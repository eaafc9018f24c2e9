"""What is fuzzed. A target makes one case from chance and judges it: anything raised is a finding.

Judged is not only that nothing is raised: both implementations must say the same, and of single frames the plain oracle too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from cybermesh.telemetry.compile_cache import load_kernels
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.telemetry.sources.compression import decompressor
from tests.fuzz import mutations
from tests.telemetry import oracle
from tests.telemetry.test_compiled import assert_equal, check_decoder
from tests.telemetry.test_decode import as_frames, check, expected, rows

Target = Callable[[Random], None]

_BLOCKS = (1, 7, 50, 50, 1000, 1000)
_BUFFER_BYTES = 1 << 20
_MOST_FLOWS = 256


def decoder(corpus: mutations.Corpus, folder: Path) -> Target:
    """Frames through both decoders and the oracle."""
    del folder
    load_kernels()

    def judge(random: Random) -> None:
        records = mutations.records(random, corpus)
        check(records)
        check_decoder(as_frames(records))

    return judge


def reader(make: Callable[[Random, mutations.Corpus], bytes]) -> Callable[[mutations.Corpus, Path], Target]:
    """Files through both readers, decoders and meters, in one go and in two sittings."""

    def prepare(corpus: mutations.Corpus, folder: Path) -> Target:
        load_kernels()
        from cybermesh.telemetry.meter_compiled import CompiledMeter
        from cybermesh.telemetry.sources.capture_compiled import CompiledCaptureSource

        path = folder / "case"

        def judge(random: Random) -> None:
            data = make(random, corpus)
            path.write_bytes(data)
            block = random.choice(_BLOCKS)
            theirs = _read(lambda at: CaptureSource(str(path), block=block, position=at, buffer_bytes=_BUFFER_BYTES), FlowMeter)
            ours = _read(
                lambda at: CompiledCaptureSource(str(path), block=block, position=at, buffer_bytes=_BUFFER_BYTES), CompiledMeter
            )
            assert (ours.refused, ours.counters, ours.stops) == (theirs.refused, theirs.counters, theirs.stops)
            if ours.refused:
                return
            assert_equal(ours.flows, theirs.flows, reasons=False)
            assert ours.counters.packets == ours.counters.metered + sum(ours.counters.skipped.values())
            if decompressor(data[:16]) is None:
                assert theirs.packets == expected([record for record in oracle.read_capture(data) if abs(record[0]) < 1 << 62])
            if len(ours.stops) > 1:
                _two_sittings(path, block, random.choice(ours.stops[:-1]), ours.counters)

        return judge

    return prepare


@dataclass
class _Reading:
    """What became of a file: why it was refused, or packets, flows, counters and the position after each batch."""

    refused: str = ""
    packets: list[tuple[object, ...]] = field(default_factory=list)
    flows: list[FlowBatch] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    stops: list[str] = field(default_factory=list)


def _read(open_at: Callable[[str], CaptureSource], new_meter: Callable[..., FlowMeter]) -> _Reading:
    reading = _Reading()
    try:
        source = open_at("")
    except SourceError as error:
        reading.refused = str(error)
        return reading
    meter, reading.counters = new_meter(max_flows=_MOST_FLOWS, retain=_MOST_FLOWS), source.counters
    with closing(source):
        for batch in source.batches():
            reading.packets += rows(batch)
            reading.flows.append(meter.add(batch))
            reading.stops.append(source.position)
    reading.flows.append(meter.flush())
    return reading


def _two_sittings(path: Path, block: int, stop: str, counters: Counters) -> None:
    """Check that going on from a kept position reads what followed, all of it and only once."""
    metered = 0
    with closing(CaptureSource(str(path), block=block, buffer_bytes=_BUFFER_BYTES)) as source:
        for batch in source.batches():
            metered += len(batch)
            if source.position == stop:
                break
    try:
        source = CaptureSource(str(path), block=block, position=stop, buffer_bytes=_BUFFER_BYTES)
    except SourceError as error:
        raise AssertionError(f"the kept position {stop} was refused") from error
    with closing(source):
        metered += sum(map(len, source.batches()))
    assert metered == counters.metered


def crash(corpus: mutations.Corpus, folder: Path) -> Target:
    """A target with a defect, to test the campaign itself: the hundredth case or so raises."""
    del corpus, folder

    def judge(random: Random) -> None:
        if random.randrange(100) == 7:
            raise IndexError("found")

    return judge


def hang(corpus: mutations.Corpus, folder: Path) -> Target:
    """Another one: a case that never ends."""
    del corpus, folder

    def judge(random: Random) -> None:
        while random.randrange(100) == 7:
            random.seed("always the same")
            while True:
                pass

    return judge


def growth(corpus: mutations.Corpus, folder: Path) -> Target:
    """Another one: every case keeps a little."""
    del corpus, folder
    kept: list[bytes] = []

    def judge(random: Random) -> None:
        kept.append(random.randbytes(20_000))

    return judge


TARGETS = {"decoder": decoder, "pcap": reader(mutations.pcap), "pcapng": reader(mutations.pcapng)}
DEFECTIVE = {"crash": crash, "hang": hang, "growth": growth}


def forget() -> None:
    """Free what is not used any more, before memory is measured."""
    gc.collect()
