"""The decoder against the plain oracle: on real captures, on built packets of every kind, and on garbage."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import MAX_LEVELS, Frames, decode
from cybermesh.telemetry.packets import ICMP, OTHER, TCP, UDP, PacketBatch
from cybermesh.telemetry.sources.choose import open_source
from tests.telemetry import frames, oracle

CLASSES = {"other": OTHER, "tcp": TCP, "udp": UDP, "icmp": ICMP}
COLUMNS = (
    *("ts_us", "family", "proto", "klass", "payload", "sport", "dport"),
    *("icmp_type", "icmp_code", "flags", "window", "header"),
)
LINKS = (0, 1, 12, 14, 101, 108, 113, 228, 229, 276, 105)


def as_frames(records: list[tuple[int, int, bytes, int]]) -> Frames:
    """Lay (time, link, bytes, length on the wire) out in one buffer, with foreign bytes between them."""
    data, at = bytearray(b"\xaa" * 7), []
    for _, _, frame, _ in records:
        at.append(len(data))
        data += frame + b"\xbb" * 5
    columns = {
        "at": np.array(at, np.int64),
        "captured": np.array([len(frame) for _, _, frame, _ in records], np.int64),
        "wire": np.array([max(wire, len(frame)) for _, _, frame, wire in records], np.int64),
        "ts_us": np.array([time for time, _, _, _ in records], np.int64),
        "link": np.array([link for _, link, _, _ in records], np.int32),
    }
    return Frames(data=np.frombuffer(bytes(data), np.uint8), **columns)


def mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else bytes(10) + b"\xff\xff" + address


def rows(batch: PacketBatch) -> list[tuple[object, ...]]:
    """Return the batch's rows as plain tuples of what the meter reads."""
    columns = [getattr(batch, name).tolist() for name in COLUMNS]
    ends = [[row.tobytes() for row in column] for column in (batch.src, batch.dst)]
    return list(zip(*columns, *ends, strict=True))


def expected(records: list[tuple[int, int, bytes, int]]) -> list[tuple[object, ...]]:
    packets = (oracle.decode(time, link, frame, max(wire, len(frame))) for time, link, frame, wire in records)
    return [
        (
            *(p.ts, p.family, p.proto, CLASSES[p.klass], p.payload, p.sport, p.dport),
            *(p.kind, p.code, p.flags, p.window, p.header, mapped(p.src), mapped(p.dst)),
        )
        for p in packets
        if p is not None
    ]


def check(records: list[tuple[int, int, bytes, int]]) -> PacketBatch:
    counters = Counters()
    batch = decode(as_frames(records), counters)
    assert rows(batch) == expected(records)
    assert counters.packets == len(records) == counters.metered + sum(counters.skipped.values())
    return batch


@pytest.mark.shared
def test_decoder_agrees_with_the_oracle_on_every_packet_of_the_shared_captures(shared_data: Path) -> None:
    for path in sorted((shared_data / "pcaps").glob("*.pcap*")):
        records = oracle.read_capture(path.read_bytes())
        with closing(open_source(str(path))) as source:
            found = [row for batch in source.batches() for row in rows(batch)]
        assert found == expected(records), path.name
        assert source.counters.packets == len(records), path.name


@given(st.lists(frames.records(), max_size=12))
def test_decoder_agrees_with_the_oracle_on_built_and_cut_and_damaged_packets(records) -> None:
    check(records)


@given(st.lists(frames.records(), min_size=1, max_size=3))
def test_vectorised_paths_agree_with_the_oracle_too(records) -> None:
    check(records * 30)  # more rows than the one-by-one paths take


@given(st.lists(st.tuples(st.just(0), st.sampled_from(LINKS), st.binary(max_size=120), st.integers(0, 2**32 - 1)), max_size=8))
def test_garbage_never_raises_and_is_counted(records) -> None:
    check(records)


@given(st.lists(frames.records(), min_size=1, max_size=8))
def test_payload_is_inside_its_frame(records) -> None:
    laid = as_frames(records)
    batch = decode(laid, Counters())
    for at, captured, payload in zip(batch.payload_at, batch.payload_captured, batch.payload, strict=True):
        assert captured <= payload
        if at < 0:
            assert captured == 0
            continue
        frame = int(np.searchsorted(laid.at, at, side="right")) - 1
        assert laid.at[frame] <= at
        assert at + captured <= laid.at[frame] + laid.captured[frame]


def test_first_fragment_has_ports_and_later_ones_have_none() -> None:
    first = frames.ethernet(frames.ipv4(17, frames.udp(5, 6, b"x" * 24), fragment=0x2000))
    later = frames.ethernet(frames.ipv4(17, b"y" * 16, fragment=4))
    batch = check([(0, 1, first, 0), (1, 1, later, 0)])
    assert batch.klass.tolist() == [UDP, OTHER]
    assert batch.sport.tolist() == [5, 0]
    assert batch.payload.tolist() == [24, 16]


def test_ethernet_padding_is_not_payload() -> None:
    batch = check([(0, 1, frames.ethernet(frames.ipv4(6, frames.tcp(1, 2, 0x10, b""))) + bytes(6), 0)])
    assert batch.payload.tolist() == [0]
    assert batch.payload_at.tolist() == [-1]


def test_snap_length_changes_no_length() -> None:
    frame = frames.ethernet(frames.ipv4(6, frames.tcp(1, 2, 0x10, b"z" * 1000)))
    batch = check([(0, 1, frame[:54], len(frame))])
    assert batch.payload.tolist() == [1000]
    assert batch.payload_captured.tolist() == [0]


def test_length_of_zero_is_what_the_wire_leaves() -> None:
    frame = frames.ethernet(frames.ipv4(6, frames.tcp(1, 2, 0x10, b"z" * 100), total=0))
    assert check([(0, 1, frame, 60_000)]).payload.tolist() == [60_000 - 14 - 20 - 20]


@pytest.mark.parametrize("kind", ["gre", "vxlan", "geneve"])
def test_innermost_packet_of_a_tunnel_is_metered_and_a_broken_inside_leaves_the_carrier(kind: str) -> None:
    inner = frames.ipv4(6, frames.tcp(1000, 80, 2, b""), src=b"\x0a\0\0\x07")
    batch = check(
        [(0, 1, frames.ethernet(frames.tunnel(kind, inner)), 0), (1, 1, frames.ethernet(frames.tunnel(kind, b"\x45\0")), 0)]
    )
    assert batch.dport[0] == 80
    assert batch.src[0, 12:].tobytes() == b"\x0a\0\0\x07"
    assert batch.proto[1] == (47 if kind == "gre" else 17)


@pytest.mark.parametrize("flags", [0x0001, 0x4000, 0x0007], ids=["version 1", "routing", "version 7"])
def test_gre_of_another_version_or_with_routing_is_not_opened(flags: int) -> None:
    inner = frames.ipv4(6, frames.tcp(1000, 80, 2, b""))
    assert check([(0, 101, frames.ipv4(47, struct.pack(">HH", flags, 0x0800) + inner), 0)]).proto.tolist() == [47]


def test_tunnels_are_opened_eight_levels_deep_and_no_further() -> None:
    packet = frames.ipv4(6, frames.tcp(1, 2, 2, b""))
    for _ in range(MAX_LEVELS):
        packet = frames.tunnel("gre", packet)
    deeper = frames.tunnel("gre", packet)
    assert check([(0, 101, packet, 0), (0, 101, deeper, 0)]).proto.tolist() == [6, 47]


def test_frames_made_of_tags_or_extension_headers_only_cost_their_length() -> None:
    tags = bytes(12) + b"\x81\x00" + b"\0\0\x81\x00" * 60_000
    headers = frames.ipv6(0, b"\0\0" * 4 * 8_000 + struct.pack(">BBHI", 59, 0, 0, 0))
    batch = check([(0, 1, tags, 0), (0, 101, headers, 0)])
    assert batch.proto.tolist() == [59]


def test_null_family_is_read_in_both_byte_orders() -> None:
    packet = frames.ipv4(17, frames.udp(1, 2, b""))
    six = frames.ipv6(17, frames.udp(1, 2, b""))
    records = [
        (0, link, family + body, 0) for link in (0, 108) for family, body in [(b"\2\0\0\0", packet), (b"\0\0\0\2", packet)]
    ]
    records += [(0, 0, bytes([0, 0, 0, family]), 0) for family in (24, 28, 30)]
    records += [(0, 0, bytes([family, 0, 0, 0]) + six, 0) for family in (24, 28, 30)]
    assert check(records).family.tolist() == [4, 4, 4, 4, 6, 6, 6]
