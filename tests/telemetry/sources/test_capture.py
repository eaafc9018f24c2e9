"""Captures as a source: formats, byte orders, clocks, compression, damage, positions."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.packets import PacketBatch, join_batches
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.telemetry.sources.lines import GONE, Pace
from tests.telemetry import frames, oracle
from tests.telemetry.sources import captures

SMALL_BUFFER = 1 << 20
FRAME = frames.ethernet(frames.ipv4(17, frames.udp(1, 2, b"abc")))


def read(path: Path, **options: object) -> tuple[list[PacketBatch], CaptureSource]:
    with closing(CaptureSource(str(path), **options)) as source:
        return list(source.batches()), source


def times(path: Path, **options: object) -> list[int]:
    return [time for batch in read(path, **options)[0] for time in batch.ts_us.tolist()]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("per_us", [1, 1000])
def test_pcap_is_read_in_both_byte_orders_and_resolutions(tmp_path: Path, order: str, per_us: int) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(
        captures.pcap([(1_500_000_000_000_001, FRAME), (1_500_000_000_999_999, FRAME)], order=order, per_us=per_us)
    )
    assert times(path) == [1_500_000_000_000_001, 1_500_000_000_999_999]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("resolution", "ticks", "expected"),
    [
        (None, 1_234_567, 1_234_567),
        (9, 1_999, 1),
        (3, 7, 7_000),
        (0, 7, 7_000_000),
        (0x80 | 20, (5 << 20) + 1, 5_000_000),
        (0x80 | 32, (5 << 32) + (1 << 31), 5_500_000),
        (0x80 | 64, (1 << 64) - 1, 999_999),
        (127, (1 << 64) - 1, 0),
    ],
)
def test_pcapng_clock_resolution_is_applied_and_rounded_down(
    tmp_path: Path, order: str, resolution: int | None, ticks: int, expected: int
) -> None:
    path = tmp_path / "a.pcapng"
    described = captures.interface(resolution=resolution, order=order)
    path.write_bytes(captures.section(order=order) + described + captures.enhanced(ticks, FRAME, order=order))
    assert times(path) == [expected]


def test_pcapng_clock_offset_is_added(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    body = captures.interface(offset_s=1000) + captures.interface(offset_s=-3, resolution=9)
    body += captures.enhanced(5, FRAME) + captures.enhanced(5_000_001_000, FRAME, number=1)
    path.write_bytes(captures.section() + body)
    assert times(path) == [1_000_000_005, 2_000_001]


def test_pcapng_time_beyond_any_clock_is_counted_not_metered(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(captures.section() + captures.interface(resolution=0) + captures.enhanced(1 << 63, FRAME))
    batches, source = read(path)
    assert sum(map(len, batches)) == 0
    assert source.counters.skipped == {"time out of range": 1}


def test_pcapng_sections_have_their_own_byte_order_and_interfaces(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    raw = frames.ipv4(17, frames.udp(1, 2, b"abc"))
    data = captures.section() + captures.interface() + captures.enhanced(1, FRAME) + captures.enhanced(2, FRAME, number=1)
    data += captures.section(order=">") + captures.interface(link=101, order=">") + captures.enhanced(3, raw, order=">")
    data += captures.interface(order=">") + captures.enhanced(4, FRAME, number=1, order=">")
    path.write_bytes(data)
    batches, source = read(path)
    assert [t for b in batches for t in b.ts_us.tolist()] == [1, 3, 4]
    assert source.counters.skipped == {"interface not described": 1}


def test_obsolete_packet_blocks_are_metered_and_simple_ones_only_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    body = captures.obsolete(9, FRAME) + captures.simple(FRAME) + captures.block(0xBAD, b"unknown")
    path.write_bytes(captures.section() + captures.interface() + body)
    batches, source = read(path)
    assert [t for b in batches for t in b.ts_us.tolist()] == [9]
    assert (source.counters.packets, source.counters.skipped) == (2, {"no time (simple packet block)": 1})


def test_block_larger_than_the_buffer_is_passed_over_unless_it_is_a_packet(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    head = captures.section() + captures.interface() + captures.enhanced(1, FRAME)
    path.write_bytes(head + captures.block(10, bytes(3 << 20)) + captures.enhanced(2, FRAME))
    assert times(path, buffer_bytes=SMALL_BUFFER) == [1, 2]
    path.write_bytes(head + captures.enhanced(2, bytes(3 << 20)) + captures.enhanced(3, FRAME))
    assert times(path, buffer_bytes=SMALL_BUFFER) == [1]


def test_pcapng_sections_without_packets_do_not_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    empty = captures.section() + captures.interface() * 2000
    path.write_bytes(empty * 25 + captures.section() + captures.interface(resolution=9) + captures.enhanced(5_000, FRAME))
    tracemalloc.start()
    with closing(CaptureSource(str(path))) as source:
        tracemalloc.reset_peak()
        (batch,) = source.batches()
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.ts_us.tolist() == [5]
    assert peak < 7 << 20  # the buffer is most of it; 50,000 interfaces would take 5 MB more


@pytest.mark.parametrize(
    "damage",
    [
        captures.enhanced(2, FRAME, captured=len(FRAME) + 40),
        struct.pack("<II", 6, 13) + bytes(40),
        struct.pack("<II", 6, 8) + bytes(40),
        captures.enhanced(2, FRAME)[:-5],
    ],
    ids=["packet longer than block", "odd length", "tiny length", "cut"],
)
def test_pcapng_block_that_does_not_fit_ends_the_file_and_earlier_packets_stand(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(captures.section() + captures.interface() + captures.enhanced(1, FRAME) + damage)
    batches, source = read(path)
    assert [t for b in batches for t in b.ts_us.tolist()] == [1]
    assert source.counters.ended


@pytest.mark.parametrize(
    "tail",
    [struct.pack("<IIII", 1, 0, 262_145, 60) + bytes(300_000), struct.pack("<IIII", 1, 0, 60, 60) + bytes(59), bytes(15)],
)
def test_pcap_record_that_is_too_long_or_cut_ends_the_file_and_earlier_packets_stand(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(captures.pcap([(1, FRAME), (2, FRAME)]) + tail)
    batches, source = read(path)
    assert [t for b in batches for t in b.ts_us.tolist()] == [1, 2]
    assert f"byte {len(captures.pcap([(1, FRAME), (2, FRAME)]))}" in source.counters.ended


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.compress, lambda d: gzip.compress(d[:9]) + gzip.compress(d[9:]) + bytes(8)]
)
def test_compressed_captures_are_read_as_they_are(tmp_path: Path, pack) -> None:
    path = tmp_path / "a.pcap.packed"
    path.write_bytes(pack(captures.pcap([(n, FRAME) for n in range(50)])))
    batches, source = read(path)
    assert [t for b in batches for t in b.ts_us.tolist()] == list(range(50))
    assert source.counters.ended == ""


def test_cut_and_damaged_compression_keeps_what_came_before(tmp_path: Path) -> None:
    data = captures.pcap([(n, frames.ethernet(frames.ipv4(17, frames.udp(n, 2, bytes([n]))))) for n in range(200)])
    packed = gzip.compress(data)
    path = tmp_path / "a.pcap.gz"
    for broken in (packed[:-400], packed[:-6] + b"\xff\xff" + packed[-4:]):
        path.write_bytes(broken)
        batches, source = read(path)
        kept = [t for b in batches for t in b.ts_us.tolist()]
        assert kept == list(range(len(kept)))
        assert len(kept) > 100
        assert "compressed data" in source.counters.ended


def test_a_compression_bomb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap.gz"
    path.write_bytes(gzip.compress(captures.pcap([(1, FRAME)]) + bytes(64 << 20), compresslevel=1))
    batches, _ = read(path, buffer_bytes=SMALL_BUFFER, block=1000)
    assert batches[0].ts_us[0] == 1
    assert all(len(batch.data) == SMALL_BUFFER for batch in batches)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello, world, this is text\n" * 9, "neither pcap nor pcapng"),
        (b"\xd4\xc3\xb2\xa1\2\0", "file header"),
    ],
)
def test_foreign_input_is_one_clear_error(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "input"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=says):
        open_source(str(path))
    path.write_bytes(gzip.compress(content))
    with pytest.raises(SourceError, match=says):
        open_source(str(path))


def test_missing_input_folder_and_unknown_kind_are_clear_errors(tmp_path: Path) -> None:
    for spec, says in [
        (str(tmp_path / "no"), "no such file"),
        (str(tmp_path), "holds no files"),
        ("kafka:telemetry.features.v1", "ai role"),
        ("pcap:", "names"),
    ]:
        with pytest.raises(SourceError, match=says):
            open_source(spec)


def test_kind_may_be_named_and_a_file_may_look_like_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "live:eth0"):
        Path(name).write_bytes(captures.pcap([(1, FRAME)]))
    for spec in ("pcap:plain", "plain", "live:eth0"):
        with closing(open_source(spec)) as source:
            assert sum(map(len, source.batches())) == 1


def test_standard_input_is_a_capture_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(captures.pcap([(1, FRAME)] * 5))))
    monkeypatch.setattr(sys, "stdin", stdin)
    source = open_source("-")
    assert sum(map(len, source.batches())) == 5
    source.close()
    assert not stdin.closed


@given(sizes=st.lists(st.integers(0, 3000), max_size=40), block=st.integers(1, 7), name=st.sampled_from(["pcap", "pcapng"]))
def test_position_neither_repeats_nor_skips(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block: int, name: str
) -> None:
    path = tmp_path_factory.mktemp("position") / "a"
    all_frames = [(n, frames.ethernet(frames.ipv4(17, frames.udp(n, 2, bytes(size))))) for n, size in enumerate(sizes)]
    if name == "pcap":
        path.write_bytes(captures.pcap(all_frames))
    else:
        blocks = [captures.simple(f) + captures.interface() + captures.enhanced(t, f) for t, f in all_frames]
        path.write_bytes(captures.section() + captures.interface() + b"".join(blocks))
    seen, position = [], ""
    while True:  # a process that dies after every batch
        with closing(CaptureSource(str(path), block=block, position=position)) as source:
            batch = next(iter(source.batches()), None)
            if batch is None:
                break
            assert len(batch) <= block
            seen += batch.ts_us.tolist()
            assert source.position != position
            position = source.position
    assert seen == list(range(len(sizes)))


def test_batches_are_bounded_by_the_buffer_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(captures.pcap([(n, FRAME + bytes(60_000)) for n in range(100)]))
    batches, _ = read(path, buffer_bytes=SMALL_BUFFER)
    assert len(batches) > 5
    assert [t for b in batches for t in b.ts_us.tolist()] == list(range(100))


def test_joined_batches_are_the_rows_in_order_without_payload(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(captures.pcap([(n, FRAME) for n in range(10)]))
    joined = join_batches(read(path, block=3)[0])
    assert joined.ts_us.tolist() == list(range(10))
    assert set(joined.payload_at.tolist()) == {-1}


@given(st.binary(max_size=400))
def test_any_bytes_behind_a_pcap_header_are_read_or_counted(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    fuzz(tmp_path_factory, captures.pcap([(1, FRAME)]) + tail)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(captures.block, st.sampled_from([1, 2, 3, 6, 0x0A0D0D0A, 5]), st.binary(max_size=60)),
            st.builds(
                captures.interface,
                link=st.integers(0, 300),
                resolution=st.integers(0, 255),
                offset_s=st.integers(-(2**63), 2**63 - 1),
            ),
            st.builds(captures.enhanced, st.integers(0, 2**64 - 1), st.just(FRAME), number=st.integers(0, 3)),
            st.builds(captures.section, order=st.sampled_from("<>")),
        ),
        max_size=12,
    )
)
def test_any_blocks_behind_a_pcapng_header_are_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[bytes]
) -> None:
    fuzz(tmp_path_factory, captures.section() + captures.interface() + b"".join(blocks))


def fuzz(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a"
    path.write_bytes(data)
    batches, source = read(path, block=5)
    counters = source.counters
    assert sum(map(len, batches)) == counters.metered
    assert counters.packets == counters.metered + sum(counters.skipped.values())


@pytest.mark.shared
def test_block_size_and_buffer_change_no_packet(shared_data: Path) -> None:
    for name in ("nDPI__teams.pcap", "zeek__irc-dcc-send.pcapng"):
        path = shared_data / "pcaps" / name
        expected = [time for time, *_ in oracle.read_capture(path.read_bytes())]
        for block, buffer_bytes in ((1, 16 << 20), (700, SMALL_BUFFER)):
            batches, source = read(path, block=block, buffer_bytes=buffer_bytes)
            assert source.counters.packets == len(expected)
            assert all(len(batch) <= block for batch in batches)


class _Steps:
    """A pause in which the next thing happens to the file, and that ends reading when nothing is left to happen."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.left = list(steps)

    def pace(self) -> Pace:
        return Pace(clock=lambda: 0.0, pause=lambda _seconds: self.left.pop(0)() if self.left else None)


def _followed(path: Path, steps: _Steps, *, position: str = "") -> tuple[list[int], CaptureSource]:
    """Follow a capture while things happen to it; return the payload lengths that came."""
    source, found, silent = CaptureSource(str(path), follow=steps.pace(), position=position), [], 0
    for batch in source.batches():
        found += batch.payload.tolist()
        silent = 0 if len(batch) or steps.left else silent + 1
        if silent > 2:
            break
    source.close()
    return found, source


def _sized(*sizes: int) -> bytes:
    return captures.pcap([(n, frames.ethernet(frames.ipv4(17, frames.udp(1, 2, bytes(n))))) for n in sizes])


def test_a_growing_capture_is_followed_over_incomplete_records(tmp_path: Path) -> None:
    path, whole = tmp_path / "grows.pcap", _sized(1, 2, 3, 4, 5)
    path.write_bytes(whole[:100])
    steps = _Steps(*(lambda cut=cut: path.write_bytes(whole[:cut]) for cut in (130, 150, 151, len(whole))))
    found, source = _followed(path, steps)
    assert found == [1, 2, 3, 4, 5]
    assert (source.counters.ended, source.counters.packets) == ("", 5)


@pytest.mark.parametrize("truncating", [False, True], ids=["renamed", "truncated"])
def test_a_capture_that_is_replaced_is_read_from_its_beginning(tmp_path: Path, truncating: bool) -> None:
    path = tmp_path / "rotates.pcap"
    path.write_bytes(_sized(1, 2, 3))
    steps: list[Callable[[], object]] = [lambda: path.write_bytes(b"") if truncating else path.rename(tmp_path / "old.pcap")]
    steps += [lambda: path.write_bytes(_sized(7)[:20]), lambda: path.write_bytes(_sized(7, 8)[:90])]
    assert _followed(path, _Steps(*steps))[0] == [1, 2, 3, 7]


def test_a_capture_that_is_written_anew_between_two_looks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "anew.pcap"
    path.write_bytes(_sized(1, 2))
    assert _followed(path, _Steps(lambda: path.write_bytes(_sized(7, 8, 9))))[0] == [1, 2, 7, 8, 9]


def test_a_followed_capture_goes_on_after_a_restart_and_counts_what_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "restart.pcap"
    path.write_bytes(_sized(1, 2))
    found, source = _followed(path, _Steps())
    path.write_bytes(_sized(1, 2, 3))
    again, _ = _followed(path, _Steps(), position=source.position)
    assert (found, again) == ([1, 2], [3])
    path.rename(tmp_path / "old")
    path.write_bytes(_sized(9))
    anew, source = _followed(path, _Steps(), position=source.position)
    assert anew == [9]
    assert source.counters.skipped == {GONE: 1}


def test_a_damaged_or_compressed_capture_that_is_followed_ends(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pcap"
    path.write_bytes(_sized(1) + b"\xff" * 40)
    found, source = _followed(path, _Steps(lambda: None))
    assert found == [1]
    assert "claims" in source.counters.ended
    path.write_bytes(gzip.compress(_sized(1, 2)))
    assert _followed(path, _Steps(lambda: None))[0] == [1, 2]
