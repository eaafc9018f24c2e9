"""The compiled reader, decoder and meter against the reference: the same bits on every input and for every block size."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry import compile_cache, metering
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames, decode
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.meter_clock import Watermark
from cybermesh.telemetry.metering import Meter, Metering
from cybermesh.telemetry.packets import ACK, SYN, TCP, PacketBatch, join_batches
from cybermesh.telemetry.sources.capture import CaptureSource
from tests.telemetry import frames
from tests.telemetry.flow_rows import pieces, to_batch
from tests.telemetry.oracle import Packet
from tests.telemetry.test_decode import as_frames
from tests.telemetry.test_meter import KEEP_ALL, S, conversations, sequences

DEMO = Path(__file__).parents[2] / "cybermesh" / "data" / "demo.pcap"


@pytest.fixture(scope="session")
def compiled() -> Metering:
    return metering.compiled()


def new(compiled: Metering, shards: int = 1, **options: int) -> Meter:
    from cybermesh.telemetry.meter_compiled import CompiledMeter

    return CompiledMeter(shards=shards, **options) if shards > 1 else compiled.new_meter(**options)


def run(meter: Meter, batches: Iterable[PacketBatch]) -> list[FlowBatch]:
    return [*[meter.add(batch) for batch in batches], meter.flush()]


def in_order(batches: list[FlowBatch]) -> dict[str, np.ndarray]:
    """Return all flows' columns, in an order that does not depend on when a flow was emitted."""
    columns = {
        f.name: np.concatenate([getattr(batch, f.name) for batch in batches]) for f in fields(FlowBatch) if f.name != "known"
    }
    ids = np.concatenate([batch.flow_id for batch in batches])
    order = np.lexsort((*columns["features"].T, ids, columns["start_us"]))
    return {name: column[order] for name, column in columns.items()}


def assert_equal(found: list[FlowBatch], expected: list[FlowBatch], *, reasons: bool = True) -> None:
    ours, theirs = in_order(found), in_order(expected)
    for name, column in theirs.items():
        assert ours[name].dtype == column.dtype
        if name != "end_reason" or reasons:
            assert ours[name].tobytes() == column.tobytes(), name


def assert_same_packets(ours: PacketBatch, theirs: PacketBatch) -> None:
    for field in fields(PacketBatch):
        if field.name != "data":
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field.name)


def captures(shared_data: Path) -> list[Path]:
    return [DEMO, *sorted((shared_data / "pcaps").glob("*.pcap*"))]


def load(path: Path) -> PacketBatch | None:
    with closing(CaptureSource(str(path))) as source:
        batches = [join_batches([batch]) for batch in source.batches()]
    return join_batches(batches) if batches else None


@pytest.mark.shared
@pytest.mark.parametrize("block", [16_384, 100])
def test_every_capture_is_read_alike(compiled: Metering, shared_data: Path, block: int) -> None:
    for path in captures(shared_data):
        with (
            closing(CaptureSource(str(path), block=block)) as theirs,
            closing(compiled.open_source(str(path), block=block)) as ours,
        ):
            for expected, found in zip(theirs.batches(), ours.batches(), strict=True):
                assert_same_packets(found, expected)
                assert ours.position == theirs.position
                held = found.payload_at >= 0
                for at, size in zip(found.payload_at[held], found.payload_captured[held], strict=True):
                    assert found.data[at : at + size].tobytes() == expected.data[at : at + size].tobytes()
            assert ours.counters == theirs.counters, path.name


@pytest.mark.shared
def test_every_capture_gives_the_same_flows_for_every_block_size_and_number_of_shards(
    compiled: Metering, shared_data: Path
) -> None:
    for path in captures(shared_data):
        packets = load(path)
        if packets is None:
            continue
        expected = run(FlowMeter(retain=KEEP_ALL), [packets])
        for block, shards in ((5_000, 1), (16_384, 1), (131_072, 1), (977, 3)):
            assert_equal(run(new(compiled, shards, retain=KEEP_ALL), pieces(packets, block)), expected)
        assert_equal(run(new(compiled), pieces(packets, 3_000)), run(FlowMeter(), pieces(packets, 3_000)), reasons=False)


def test_a_capture_read_in_two_sittings_gives_the_flows_of_one(compiled: Metering) -> None:
    meter, flows = compiled.new_meter(), []
    with closing(compiled.open_source(str(DEMO), block=5_000)) as source:
        flows.append(meter.add(next(source.batches())))
        position = source.position
    with closing(compiled.open_source(str(DEMO), position=position)) as source:
        flows += run(meter, source.batches())
    packets = load(DEMO)
    assert packets is not None
    assert_equal(flows, run(FlowMeter(), [packets]))


@given(st.lists(frames.records(), max_size=40))
def test_usual_and_odd_frames_decode_alike(compiled: Metering, records: list[tuple[int, int, bytes, int]]) -> None:
    everything = as_frames(records)
    for link in {1, *everything.link.tolist()}:
        rows = np.flatnonzero(everything.link == link)
        check_decoder(
            Frames(everything.data, *(getattr(everything, n)[rows] for n in ("at", "captured", "wire", "ts_us", "link")))
        )
    check_decoder(everything)


@given(st.binary(max_size=120), st.sampled_from([1, 12, 101, 113, 276]), st.integers(0, 80), st.integers(0, 200))
def test_garbage_decodes_alike_up_to_the_last_byte_of_the_buffer(
    compiled: Metering, data: bytes, link: int, start: int, beyond: int
) -> None:
    start = min(start, len(data))
    at, captured = np.array([start]), np.array([len(data) - start])
    check_decoder(Frames(np.frombuffer(data, np.uint8), at, captured, captured + beyond, at * 0, np.array([link], np.int32)))


def check_decoder(some: Frames) -> None:
    from cybermesh.telemetry.decode_compiled import decode_frames

    ours, theirs = Counters(), Counters()
    assert_same_packets(decode_frames(some, ours), decode(some, theirs))
    assert ours == theirs


@given(sequences(late_us=10**9), st.integers(1, 50), st.integers(1, 3))
def test_any_sequence_gives_the_same_flows_when_flows_are_kept(
    compiled: Metering, sequence: list[Packet], block: int, shards: int
) -> None:
    packets = to_batch(sequence)
    expected = run(FlowMeter(retain=KEEP_ALL), [packets])
    assert_equal(run(new(compiled, shards, retain=KEEP_ALL), pieces(packets, block)), expected)


@given(sequences(late_us=10 * S), st.integers(1, 12))
def test_emitting_early_gives_the_same_flows_for_packets_up_to_10_s_late(
    compiled: Metering, sequence: list[Packet], block: int
) -> None:
    packets = to_batch(sequence)
    assert_equal(run(new(compiled), pieces(packets, block)), run(FlowMeter(), [packets]), reasons=False)


@given(conversations(), st.integers(1, 90))
def test_long_conversations_give_the_same_flows(compiled: Metering, sequence: list[Packet], block: int) -> None:
    packets = to_batch(sequence)
    assert_equal(run(new(compiled), pieces(packets, block)), run(FlowMeter(), [packets]), reasons=False)


@given(st.lists(st.tuples(st.sampled_from([0, 1, 10, -5, 3_599, 3_601, 9_000, -3_601]), st.integers(1, 70)), max_size=12))
def test_the_clock_is_that_of_the_reference(compiled: Metering, runs: list[tuple[int, int]]) -> None:
    from cybermesh.telemetry.kernels.clock import CLOCK_WIDTH, NOW, STEPS_BACK, advance

    times = np.array([shift * S + n for shift, count in runs for n in range(count)], np.int64)
    watermark, clock, marks = Watermark(), np.zeros(CLOCK_WIDTH, np.int64), np.empty(len(times), np.int64)
    advance(clock, times, marks)
    # One packet at a time: only then is every step of the reference taken.
    assert marks.tolist() == [int(watermark.advance(times[n : n + 1])[0]) for n in range(len(times))]
    assert (clock[NOW], clock[STEPS_BACK]) == (watermark.now_us or 0, watermark.steps_back)


def random_packets(count: int, hosts: int, step_us: int) -> PacketBatch:
    """Return TCP packets between many port pairs, in an order that visits each now and then."""
    random = np.random.default_rng(7)
    pair = random.integers(0, hosts, count)
    ends = np.zeros((count, 16), np.uint8)
    ends[:, 10:12] = 255
    ends[:, 12:] = pair.astype(">u4").view(np.uint8).reshape(-1, 4)
    other = ends.copy()
    other[:, 12] = 10
    back = random.random(count) < 0.4
    kinds = {f.name: np.uint8 for f in fields(PacketBatch)} | {"header": np.int32, "window": np.uint16, "wire": np.uint32}
    kinds |= {"payload_captured": np.int32}
    columns = {name: np.zeros(count, kind) for name, kind in kinds.items() if name != "data"}
    columns |= {
        "ts_us": np.cumsum(random.integers(0, 2 * step_us, count)),
        "src": np.where(back[:, None], other, ends),
        "dst": np.where(back[:, None], ends, other),
        "sport": np.where(back, 80, 4_000).astype(np.uint16),
        "dport": np.where(back, 4_000, 80).astype(np.uint16),
        "payload": random.integers(0, 1_500, count),
        "payload_at": np.full(count, -1, np.int64),
        "flags": random.choice(np.array([SYN, ACK, ACK, ACK, 17, 4], np.uint8), count),
    }
    columns["family"][:], columns["proto"][:], columns["klass"][:], columns["header"][:] = 4, 6, TCP, 20
    return PacketBatch(**columns, data=np.empty(0, np.uint8))


def test_thousands_of_flows_that_come_and_go_are_found_again(compiled: Metering) -> None:
    packets = random_packets(60_000, 9_000, 40_000)  # 2,400 s: each flow is cut and expires many times
    expected = run(FlowMeter(), pieces(packets, 7_000))
    assert sum(map(len, expected)) > 20_000
    for shards in (1, 2):
        assert_equal(run(new(compiled, shards), pieces(packets, 2_500)), expected, reasons=False)


def test_drain_gives_the_flows_of_flush_in_parts(compiled: Metering) -> None:
    packets = random_packets(3_000, 700, 100)
    for shards in (1, 2):
        meter = new(compiled, shards)
        first = meter.add(packets)
        parts = list(meter.drain(100))
        assert max(map(len, parts)) <= 100
        assert_equal([first, *parts], run(new(compiled, shards), [packets]))
        assert len(meter) == 0
        assert [len(rest) for rest in meter.drain(5)] == [0]


@pytest.mark.parametrize("workers", [2, 3])
def test_reading_ahead_of_the_meter_changes_no_flow(compiled: Metering, workers: int) -> None:
    packets = random_packets(60_000, 9_000, 40_000)
    how = metering.compiled(workers)
    expected = run(compiled.new_meter(), pieces(packets, 7_000))
    assert_equal(run(how.new_meter(), pieces(packets, 2_500)), expected, reasons=False)
    meter = how.new_meter(max_flows=2_000)
    parts = [*[meter.add(piece) for piece in pieces(packets, 5_000)], *meter.drain(100)]
    assert meter.evicted > 0
    assert sum(part.features[:, 4:6].sum() for part in parts) == 60_000
    assert len(meter) == 0
    assert [len(rest) for rest in meter.drain(5)] == [0]
    assert (np.diff(meter.flush().start_us) >= 0).all()


def test_what_fails_beside_the_reader_is_raised_at_the_next_batch() -> None:
    meter = metering.compiled(2).new_meter()
    packets = random_packets(10, 5, 10)
    meter.add(replace(packets, flags=packets.flags[:3, None]))
    with pytest.raises(TypeError):
        meter.add(packets)


def test_finished_flows_come_in_order_of_their_first_packets(compiled: Metering) -> None:
    packets = random_packets(150_000, 30_000, 10)  # three pieces
    for shards in (1, 3):
        meter = new(compiled, shards)
        for flows in (meter.add(packets), meter.flush()):
            assert (np.diff(flows.start_us) >= 0).all()
            assert len(flows) > 5_000


def spoofed(first: int, count: int) -> PacketBatch:
    """Return SYNs from as many made-up addresses, a microsecond apart; every 10,000th is of a connection that lasts instead."""
    batch = random_packets(1, 1, 1)
    number = np.arange(first, first + count)
    columns = {f.name: np.repeat(getattr(batch, f.name), count, axis=0) for f in fields(PacketBatch) if f.name != "data"}
    lasting = number % 10_000 == 0
    mixed = (number * 2_654_435_761 % 2**32).astype(">u4").view(np.uint8).reshape(-1, 4)
    columns["src"][:, 12:] = np.where(lasting[:, None], 9, mixed)
    columns["sport"][:] = np.where(lasting, 777, 5_000)
    columns["dst"][:, 12:] = 1
    columns["dport"][:] = 80
    columns["flags"][:] = np.where(lasting, ACK, SYN)
    columns["ts_us"][:] = number
    columns["payload"][:] = 0
    return PacketBatch(**columns, data=np.empty(0, np.uint8))


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_two_million_spoofed_syns_stay_under_the_cap_and_cost_no_lasting_flow(compiled: Metering) -> None:
    meter, cap = compiled.new_meter(max_flows=100_000), 100_000
    before, flows, evicted, lasting = resident_mb(), 0, 0, []
    for first in range(0, 2_000_000, 50_000):
        finished = meter.add(spoofed(first, 50_000))
        assert len(meter) <= cap
        flows += len(finished)
        evicted += int((finished.end_reason == EndReason.EVICTED).sum())
        assert (finished.sport != 777).all(), "the flow that goes on was evicted"
    assert resident_mb() - before < 250
    for finished in meter.drain(10_000):
        flows += len(finished)
        lasting += finished.features[finished.sport == 777, 4].tolist()
    assert lasting == [200]
    assert meter.evicted == evicted > 1_800_000
    assert flows == 2_000_000 - 200 + 1


def test_short_and_unreadable_inputs_get_the_reference_and_long_ones_the_compiled_meter(tmp_path: Path) -> None:
    assert metering.choose([str(DEMO)]).name == "reference"
    assert metering.choose([str(tmp_path / "missing.pcap"), str(tmp_path)]).name == "reference"
    long = tmp_path / "long.pcap"
    with long.open("wb") as file:
        file.truncate(metering.COMPILE_BYTES)
    assert metering.choose([str(DEMO), f"pcap:{long}"]).name == "compiled"
    assert metering.choose([f"pcap:{tmp_path}"]).name == "compiled"  # a folder is as long as its files


def test_a_stream_of_unknown_length_gets_the_compiled_meter_once_it_is_compiled(
    compiled: Metering, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stream in ("-", "live:lo"):
        assert compile_cache.cache_folder() is None or metering.choose([stream]).name == "compiled"
    monkeypatch.setenv("CYBERMESH_CACHE_DIR", str(tmp_path))
    assert metering.choose(["-"]).name == "reference"


def test_the_cache_is_kept_where_only_we_may_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named, other, file = tmp_path / "named", tmp_path / "other", tmp_path / "file"
    monkeypatch.setenv("CYBERMESH_CACHE_DIR", str(named))
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    folder = compile_cache.cache_folder()
    assert folder is not None
    assert folder.parent == named
    folder.chmod(0o777)  # others may put code there
    fallback = compile_cache.cache_folder()
    assert fallback is not None
    assert fallback.parent == other / "cybermesh"
    file.touch()
    monkeypatch.setenv("CYBERMESH_CACHE_DIR", str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert compile_cache.cache_folder() is None
    assert not compile_cache.is_compiled()


def test_folders_of_versions_not_used_lately_are_removed_and_nothing_else(tmp_path: Path) -> None:
    versions = [tmp_path / f"kernels-{number:016x}" for number in range(6)]
    for age, folder in enumerate(versions):
        (folder / "kernels_1").mkdir(parents=True)
        (folder / "complete").touch()
        os.utime(folder / "complete", ns=(0, 10**18 - age))
    foreign, notes, open_to_all = tmp_path / "kernels-of-mine", tmp_path / "notes", tmp_path / f"kernels-{9:016x}"
    for folder in (foreign, notes, open_to_all):
        folder.mkdir()
        os.utime(folder, ns=(0, 0))
    open_to_all.chmod(0o777)
    compile_cache.prune(versions[5])
    assert sorted(tmp_path.iterdir()) == sorted([*versions[:3], versions[5], foreign, notes, open_to_all])


def test_where_nothing_can_be_kept_it_is_said_once(compiled: Metering, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, long = tmp_path / "file", tmp_path / "long.pcap"
    with long.open("wb") as content:
        content.truncate(metering.COMPILE_BYTES)
    file.touch()
    monkeypatch.setenv("CYBERMESH_CACHE_DIR", str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    told: list[str] = []
    assert metering.choose([str(long)], tell=told.append).name == "compiled"
    assert len(told) == 1
    assert "CYBERMESH_CACHE_DIR" in told[0]


def test_kernels_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numba

    from cybermesh.telemetry.kernels import kernel

    file = tmp_path / "file"
    file.touch()
    for place in ("", str(file)):
        monkeypatch.setattr(numba.config, "CACHE_DIR", place)
        assert kernel("int64(int64)")(lambda number: number + 1)(41) == 42
