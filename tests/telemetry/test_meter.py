"""The meter against the plain oracle, cell by cell, and what must hold however packets reach it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cybermesh.telemetry.flows import EndReason
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.meter_clock import Watermark
from cybermesh.telemetry.packets import join_batches
from cybermesh.telemetry.sources.choose import open_source
from tests.telemetry import oracle
from tests.telemetry.flow_rows import assert_same, metered, of_meter, of_oracle, pieces, to_batch
from tests.telemetry.oracle import ACK, FIN, PSH, RST, SYN, URG, Packet

KEEP_ALL = 1 << 30
S = 1_000_000
A, B, C = b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x0a\0\0\3"

SMALL_STEPS = (0, 0, 1, 2, 500, 300_000, S - 1, S, S + 1, 5 * S - 1, 5 * S, 5 * S + 1, 40 * S)
STEPS = st.sampled_from([*SMALL_STEPS, 120 * S - 1, 120 * S, 120 * S + 1, 200 * S, 7200 * S])
USUAL_FLAGS = (0, SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, FIN | ACK, FIN, RST, RST | ACK)
FLAGS = st.sampled_from([*USUAL_FLAGS, SYN | FIN, SYN | RST, ACK | PSH | URG, 0xFF, 0xC2])
PAYLOADS = st.sampled_from([0, 0, 1, 2, 7, 100, 1460, 1460, 65_495, 70_000, 2**31, 2**32 - 1])


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    """Draw a packet among few endpoints, so that they meet in flows; its time is set later."""
    src, dst = draw(st.sampled_from([(A, B), (B, A), (A, B), (B, A), (A, C), (A, A)]))
    klass = draw(st.sampled_from(["tcp", "tcp", "tcp", "udp", "icmp", "other"]))
    packet = Packet(0, 4, src, dst, 0, klass, draw(PAYLOADS))
    if klass == "tcp":
        packet.proto, packet.flags, packet.header = 6, draw(FLAGS), draw(st.sampled_from([20, 32, 60]))
        packet.window = draw(st.sampled_from([0, 1, 1024, 65_535]))
    elif klass == "udp":
        packet.proto, packet.header = 17, 8
    elif klass == "icmp":
        packet.proto, packet.header = 1, 8
        packet.kind, packet.code = draw(st.sampled_from([(8, 0), (0, 0), (8, 1), (3, 1), (13, 0), (14, 0)]))
    else:
        packet.proto = draw(st.sampled_from([6, 17, 1, 47, 50]))
    if klass in ("tcp", "udp"):
        low, high = draw(st.sampled_from([(80, 1000), (80, 80), (1000, 1001)]))
        packet.sport, packet.dport = (low, high) if src < dst else (high, low)
    return packet


@st.composite
def sequences(draw: st.DrawFn, late_us: int, max_size: int = 40) -> list[Packet]:
    """Draw packets in file order, each at most ``late_us`` earlier than the newest before it."""
    newest, sequence = 1_500_000_000 * S, []
    for packet in draw(st.lists(packets(), min_size=1, max_size=max_size)):
        if draw(st.integers(0, 5)) == 0:
            packet.ts = newest - draw(st.sampled_from([1, 900, S, 5 * S, 10 * S, 100 * S, 120 * S + 1, 400 * S])) % (
                late_us + 1
            )
        else:
            newest += draw(STEPS)
            packet.ts = newest
        sequence.append(packet)
    return sequence


@given(sequences(late_us=10**9), st.integers(1, 50))
def test_meter_agrees_with_the_oracle_on_any_sequence_when_flows_are_kept(sequence: list[Packet], block: int) -> None:
    found = of_meter(metered(pieces(to_batch(sequence), block), retain=KEEP_ALL))
    assert_same(found, of_oracle(oracle.meter(sequence)))


@given(sequences(late_us=10 * S), st.integers(1, 12))
def test_emitting_early_changes_nothing_for_packets_up_to_10_s_late(sequence: list[Packet], block: int) -> None:
    found = of_meter(metered(pieces(to_batch(sequence), block)))
    assert_same(found, of_oracle(oracle.meter(sequence)))


@st.composite
def conversations(draw: st.DrawFn) -> list[Packet]:
    """Draw one TCP port pair used again and again: long, with data runs, FINs in any order, resets and new connections."""
    sequence, now = [], 0
    for _ in range(draw(st.integers(1, 80))):
        now += draw(st.sampled_from([0, 10, 10, 10, 2000, 400_000, S, S + 1, 5 * S + 1, 30 * S]))
        src, sport, dst, dport = draw(st.sampled_from([(A, 1000, B, 80), (B, 80, A, 1000)]))
        flags = draw(st.sampled_from([ACK] * 6 + [SYN, SYN | ACK, FIN | ACK, FIN | ACK, RST, FIN | SYN]))
        size = draw(st.sampled_from([0, 1460, 1460, 1460, 12]))
        sequence.append(Packet(now, 4, src, dst, 6, "tcp", size, sport, dport, flags=flags, header=20, window=len(sequence)))
    return sequence


@given(conversations(), st.integers(1, 90))
def test_meter_agrees_with_the_oracle_on_long_conversations(sequence: list[Packet], block: int) -> None:
    assert_same(of_meter(metered(pieces(to_batch(sequence), block))), of_oracle(oracle.meter(sequence)))


@pytest.mark.shared
def test_meter_agrees_with_the_oracle_on_every_shared_capture_and_block_size(shared_data: Path) -> None:
    for path in sorted((shared_data / "pcaps").glob("*.pcap*")):
        decoded = [oracle.decode(*record) for record in oracle.read_capture(path.read_bytes())]
        expected = of_oracle(oracle.meter([packet for packet in decoded if packet is not None]))
        with closing(open_source(str(path))) as source:
            batches = [join_batches([batch]) for batch in source.batches()]
        if not batches:
            assert expected == []
            continue
        whole = join_batches(batches)
        first = of_meter(metered([whole], retain=KEEP_ALL))
        assert_same(first, expected)
        for size in (5_000, 16_384, 131_072, 1 if len(whole) < 200 else 977):
            assert of_meter(metered(pieces(whole, size), retain=KEEP_ALL)) == first, (path.name, size)


@pytest.mark.shared
def test_one_meter_over_two_halves_of_a_capture_gives_the_flows_of_the_whole(shared_data: Path) -> None:
    path = shared_data / "pcaps" / "nDPI__gnutella.pcap"
    with closing(open_source(str(path))) as source:
        whole = join_batches([join_batches([batch]) for batch in source.batches()])
    halves = [whole.take(slice(0, 1700)), whole.take(slice(1700, None))]
    assert of_meter(metered(halves)) == of_meter(metered([whole]))


def tcp(ts: int, flags: int, *, back: bool = False, sport: int = 1000, payload: int = 0) -> Packet:
    src, dst, source_port, port = (B, A, 80, sport) if back else (A, B, sport, 80)
    return Packet(ts, 4, src, dst, 6, "tcp", payload, source_port, port, flags=flags, header=20)


def flows_of(sequence: list[Packet]) -> list[tuple[int, int]]:
    """Return (start, packets) of each flow, after checking that no cut into blocks changes a cell."""
    rows = of_meter(metered([to_batch(sequence)]))
    assert_same(rows, of_oracle(oracle.meter(sequence)))
    for block in range(1, len(sequence)):
        assert of_meter(metered(pieces(to_batch(sequence), block))) == rows
    return [(row.identity[0], int(row.features[4] + row.features[5])) for row in rows]


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([tcp(0, ACK), tcp(120 * S, ACK), tcp(120 * S + 1, ACK)], [(0, 2), (120 * S + 1, 1)]),
        ([tcp(200 * S, ACK), tcp(80 * S, ACK), tcp(80 * S - 1, ACK)], [(80 * S - 1, 1), (200 * S, 2)]),
        ([tcp(0, SYN), tcp(1, RST, back=True), tcp(2, ACK), tcp(3, SYN), tcp(4, ACK)], [(0, 3), (3, 2)]),
        ([tcp(0, SYN), tcp(1, SYN), tcp(2, FIN), tcp(3, FIN, back=True), tcp(4, SYN)], [(0, 5)]),
        ([tcp(0, FIN), tcp(1, FIN | ACK, back=True), tcp(2, ACK), tcp(3, SYN)], [(0, 3), (3, 1)]),
        ([tcp(0, FIN), tcp(1, FIN | ACK, back=True), tcp(2, SYN | ACK), tcp(3, SYN)], [(0, 4)]),
        ([tcp(0, FIN), tcp(1, FIN), tcp(2, ACK, back=True), tcp(3, SYN)], [(0, 4)]),
        ([tcp(0, FIN, back=True), tcp(1, FIN), tcp(2, ACK), tcp(3, ACK), tcp(4, SYN)], [(0, 4), (4, 1)]),
    ],
    ids=[
        *("cut after 120 s", "clock step back", "reset", "no last ack", "last ack"),
        *("syn+ack is no last ack", "one side's fins", "late packets of an ended flow"),
    ],
)
def test_flow_borders(sequence: list[Packet], expected: list[tuple[int, int]]) -> None:
    assert flows_of(sequence) == expected


def test_syn_ack_first_makes_its_receiver_the_forward_side() -> None:
    flows = metered([to_batch([tcp(0, SYN | ACK, back=True), tcp(1, ACK)])])[-1]
    assert flows.src[0, 12:].tobytes() == A
    assert flows.sport.tolist() == [1000]
    assert flows.features[0, 4:6].tolist() == [1, 1]


def test_with_equal_endpoints_every_packet_is_forward() -> None:
    sequence = [
        Packet(n, 4, A, A, 6, "tcp", 5, 80, 80, flags=flags, header=20) for n, flags in enumerate([SYN | ACK, FIN, ACK])
    ]
    assert flows_of(sequence) == [(0, 3)]
    assert metered([to_batch(sequence)])[-1].features[0, 4:6].tolist() == [3, 0]


@pytest.mark.parametrize(
    ("proto", "reply", "request_type"),
    [(1, 0, 8), (1, 14, 13), (1, 16, 15), (1, 18, 17), (58, 129, 128), (1, 129, 129), (58, 0, 0)],
)
def test_icmp_reply_is_of_its_requests_flow(proto: int, reply: int, request_type: int) -> None:
    asked = Packet(0, 4, A, B, proto, "icmp", 4, kind=request_type, code=2, header=8)
    answered = Packet(1, 4, B, A, proto, "icmp", 4, kind=reply, code=2, header=8)
    assert flows_of([asked, answered]) == [(0, 2)]
    alone = metered([to_batch([answered])])[-1]
    assert (alone.icmp_type[0], alone.icmp_code[0], alone.src[0, 15]) == (request_type, 2, B[3])


def test_data_run_goes_on_over_a_block_border_until_more_than_a_second_passes() -> None:
    for pause, bulks in ((S, 5), (S + 1, 4)):
        times = [0, 1, 2, 3, 3 + pause]
        flows = metered(pieces(to_batch([tcp(time, ACK, payload=10) for time in times]), 4))[-1]
        assert flows.features[0, 58] == bulks  # fwd_pkts_b_avg


def test_flow_is_kept_until_ten_seconds_behind_its_last_possible_packet() -> None:
    meter = FlowMeter()
    sequence = [tcp(0, ACK), tcp(130 * S, ACK, sport=2000), tcp(120 * S, ACK), tcp(130 * S + 1, ACK, sport=2000)]
    finished = [meter.add(batch).features[:, 4].tolist() for batch in pieces(to_batch(sequence), 1)]
    assert finished == [[], [], [], [2]]


def test_flow_that_begins_late_is_not_taken_for_an_old_one() -> None:
    sequence = [tcp(1000 * S, ACK, sport=2000), *(tcp(n * S, ACK) for n in range(3))]
    assert flows_of(sequence) == [(0, 3), (1000 * S, 1)]


def test_single_packet_flows_are_marked_and_end_reasons_told() -> None:
    sequence = [tcp(0, RST), tcp(0, SYN, sport=1001), tcp(1, ACK, sport=1001), tcp(125 * S, SYN, sport=1001)]
    sequence += [tcp(125 * S, SYN, sport=1002), tcp(300 * S, SYN, sport=1003)]
    meter = FlowMeter()
    first, rest = meter.add(to_batch(sequence)), meter.flush()
    told = {
        (int(port), int(start)): (EndReason(reason), bool(single))
        for flows in (first, rest)
        for port, start, reason, single in zip(flows.sport, flows.start_us, flows.end_reason, flows.single_packet, strict=True)
    }
    assert told == {
        (1000, 0): (EndReason.TCP_END, True),
        (1001, 0): (EndReason.CUT, False),
        (1001, 125 * S): (EndReason.WATERMARK, True),
        (1002, 125 * S): (EndReason.WATERMARK, True),
        (1003, 300 * S): (EndReason.CAPTURE_END, True),
    }
    assert len(rest) == 1
    assert len(meter) == 0


def flood(count: int, start: int) -> list[Packet]:
    return [Packet(start + n, 4, n.to_bytes(4, "big"), B, 6, "tcp", 0, 7, 80, flags=SYN, header=20) for n in range(count)]


def test_hard_cap_evicts_the_longest_silent_flows_and_keeps_the_talking_one() -> None:
    sequence = [tcp(0, SYN)]
    for n in range(20):
        sequence += flood(100, 1 + n * 1000)[: 100 if n % 2 else 60]
        sequence.append(tcp(n * 1000 + 999, ACK))
    for n, packet in enumerate(sequence):
        if packet.src != A:
            packet.sport = n  # every packet of the flood is a flow
    meter = FlowMeter(max_flows=120)
    emitted = [meter.add(batch) for batch in pieces(to_batch(sequence), 50)]
    assert len(meter) <= 120
    emitted.append(meter.flush())
    everything = [
        row for batch in emitted for row in zip(batch.sport.tolist(), batch.features.tolist(), batch.end_reason, strict=True)
    ]
    assert meter.evicted == sum(reason == EndReason.EVICTED for *_, reason in everything) > 1000
    assert len(everything) == 1601
    talking = [cells for port, cells, _ in everything if port == 1000 and cells[4] > 1]
    assert [cells[4] for cells in talking] == [21]


def test_one_wrong_clock_does_not_end_the_open_flows() -> None:
    year = 365 * 86_400 * S
    sequence = [tcp(0, SYN)] + [tcp(year, SYN, sport=2000)] * 63 + [tcp(S, ACK)]
    meter = FlowMeter()
    assert len(meter.add(to_batch(sequence))) == 0
    rest = meter.flush()
    assert sorted(rest.features[:, 4].tolist()) == [2, 63]


def test_sixty_four_packets_of_a_new_time_move_the_watermark_forwards_and_backwards() -> None:
    year = 365 * 86_400 * S
    meter = FlowMeter()
    assert len(meter.add(to_batch([tcp(year, SYN)]))) == 0
    # Backwards: what was open before is 130 s from its end on the new clock; what begins now is not taken for old.
    assert len(meter.add(to_batch([tcp(n, ACK, sport=2000) for n in range(64)]))) == 0
    assert len(meter.add(to_batch([tcp(100 * S, ACK, sport=2000)]))) == 0
    assert len(meter.add(to_batch([tcp(131 * S, ACK, sport=3000)]))) == 2
    # Forwards again.
    assert len(meter.add(to_batch([tcp(2 * year + n, ACK, sport=4000) for n in range(64)]))) == 1
    assert len(meter) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, -5, 1_800, -1_801, 3_599, 3_601, -3_600, 9_000]), st.integers(1, 70)), max_size=12
    ),
    st.integers(2, 200),
)
@example([(0, 1), (1_800, 1), (-1_801, 64)], 100)  # each within an hour of the watermark before the block
@example([(0, 1), (3_000, 1), (-3_000, 40), (3_000, 1), (-3_000, 64)], 43)
def test_the_watermark_does_not_depend_on_how_times_come_in_blocks(runs: list[tuple[int, int]], block: int) -> None:
    times = np.array([shift * S + n for shift, count in runs for n in range(count)], np.int64)
    one, many = Watermark(), Watermark()
    single = [int(one.advance(times[n : n + 1])[0]) for n in range(len(times))]
    assert [mark for n in range(0, len(times), block) for mark in many.advance(times[n : n + block]).tolist()] == single
    assert (one.now_us, one.steps_back) == (many.now_us, many.steps_back)


def test_colliding_hashes_do_not_mix_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = [tcp(n, ACK, sport=1000 + n % 3, back=n % 2 == 0) for n in range(30)]
    expected = of_meter(metered([to_batch(sequence)]))
    monkeypatch.setattr("cybermesh.telemetry.meter_group._hash", lambda words: np.zeros(len(words), np.uint64))
    assert of_meter(metered([to_batch(sequence)])) == expected


def test_flow_ids_are_of_the_flow_not_of_the_run() -> None:
    sequence = [tcp(n, ACK, sport=1000 + n) for n in range(40)]
    whole = metered([to_batch(sequence)])[-1].flow_id.tolist()
    parts = [number for flows in metered(pieces(to_batch(sequence), 7)) for number in flows.flow_id.tolist()]
    assert whole == parts
    assert len(set(whole)) == 40


def test_draining_gives_the_flows_of_a_flush_in_parts() -> None:
    sequence = [tcp(n, ACK, sport=1000 + n % 10) for n in range(40)]
    meter = FlowMeter()
    meter.add(to_batch(sequence))
    parts = list(meter.drain(4))
    assert [len(flows) for flows in parts] == [4, 4, 2]
    assert of_meter(parts) == of_meter(metered([to_batch(sequence)]))
    assert len(meter) == 0


def test_an_empty_meter_gives_empty_batches() -> None:
    flows = FlowMeter().flush()
    assert len(flows) == 0
    assert flows.features.shape == (0, 79)
