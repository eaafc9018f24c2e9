"""Windows: who opened what, what became of it, how many; and that nothing of it depends on blocks, clocks or floods."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cybermesh.telemetry.packets import ACK, FIN, PSH, RST, SYN, PacketBatch
from cybermesh.telemetry.windows import COLUMN, NAMES, Scope, Service, WindowBatch
from cybermesh.telemetry.windows_keys import Slots, group
from cybermesh.telemetry.windows_sliding import SlidingWindows
from cybermesh.telemetry.windows_timeline import CONFIRM, Timeline
from tests.telemetry.packet_batches import Packet, batch, blocks, packed

ALL = dict.fromkeys(Scope, (10, 60))
A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def rows(packets: list[Packet], scope: Scope, window_s: int = 60) -> dict[tuple[str, str, int], dict[str, float]]:
    """Each entity's last row per port, in order of time: (source, destination, port) to the values that are not 0."""
    windows = SlidingWindows(ALL)
    out = windows.update(batch(packets)) + windows.finish()
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for part in out:
        if part.scope is scope and part.window_s == window_s:
            for row in range(len(part)):
                key = (text(part.source[row]), text(part.destination[row]), int(part.port[row]))
                found.pop(key, None)
                found[key] = {name: float(value) for name, value in zip(NAMES, part.values[row], strict=True) if value}
    return found


def text(address: np.ndarray) -> str:
    known = {packed(name): name for name in (A, B, C)}
    return known.get(address.tobytes(), "")


def handshake(at: float, client: str, server: str, sport: int, dport: int) -> list[Packet]:
    return [
        Packet(at, client, server, sport, dport, 6, SYN),
        Packet(at + 0.01, server, client, dport, sport, 6, SYN | ACK),
        Packet(at + 0.02, client, server, sport, dport, 6, ACK),
    ]


def test_a_completed_handshake_is_opened_answered_and_established() -> None:
    assert rows(handshake(0, A, B, 1000, 80), Scope.SERVICE) == {
        (A, B, 80): {
            "packets_out": 2,
            "packets_in": 1,
            "bytes_out": 108,
            "bytes_in": 54,
            "tcp_opened": 1,
            "tcp_answered": 1,
            "established": 1,
            "syn": 1,
            "attempts": 1,
            "span_s": 0.02,
            "open": 1,
        }
    }


def test_a_refused_attempt_is_failed_and_an_unanswered_one_too() -> None:
    packets = [
        Packet(0, A, B, 1000, 80, 6, SYN),
        Packet(0.1, B, A, 80, 1000, 6, RST | ACK),
        Packet(0.2, A, B, 1001, 81, 6, SYN),
        Packet(1.2, A, B, 1001, 81, 6, SYN),
    ]
    found = rows(packets, Scope.PAIR)[(A, B, 81)]
    assert {
        name: found.get(name, 0) for name in ("attempts", "refused", "unanswered", "failed", "syn", "ports", "established")
    } == {
        "attempts": 2,
        "refused": 1,
        "unanswered": 1,
        "failed": 2,
        "syn": 3,
        "ports": 2,
        "established": 0,
    }


def test_a_handshake_that_is_reset_is_half_open() -> None:
    packets = [*handshake(0, A, B, 1000, 80)[:2], Packet(0.02, A, B, 1000, 80, 6, RST)]
    found = rows(packets, Scope.PAIR)[(A, B, 80)]
    assert found["half_open"] == 1
    assert "established" not in found
    assert "failed" not in found


def test_where_only_one_direction_was_captured_acknowledged_data_shows_the_answer() -> None:
    packets = [packet for packet in handshake(0, A, B, 1000, 80) if packet.src == A]
    assert "established" not in rows(packets, Scope.PAIR)[(A, B, 80)]
    packets.append(Packet(0.03, A, B, 1000, 80, 6, PSH | ACK, b"GET"))
    found = rows(packets, Scope.PAIR)[(A, B, 80)]
    assert found["established"] == 1
    assert "unanswered" not in found


def test_the_first_packet_seen_does_not_make_a_server_an_initiator() -> None:
    packets = [
        Packet(0, B, A, 443, 50_000, 6, PSH | ACK, b"data"),
        Packet(0.1, B, A, 8443, 50_001, 6, ACK),
        Packet(0.2, B, A, 80, 50_002, 6, SYN | ACK),
        Packet(0.3, B, A, 53, 50_003, 17, payload=b"answer"),
        Packet(0.4, B, A, proto=1, icmp=(0, 0)),
    ]
    assert {source for source, _, _ in rows(packets, Scope.SOURCE)} == {A}
    found = next(iter(rows(packets, Scope.SOURCE).values()))
    assert found["ports"] == 1  # the one of the SYN+ACK: a handshake was under way
    assert found["packets_in"] == 5


def test_an_unreachable_answer_refuses_the_packet_it_quotes() -> None:
    quoted = bytes([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]) + packed(A)[12:] + packed(B)[12:]
    quoted += (5000).to_bytes(2, "big") + (161).to_bytes(2, "big")
    packets = [Packet(0, A, B, 5000, 161, 17), Packet(0.1, C, A, proto=1, payload=quoted, icmp=(3, 3))]
    found = rows(packets, Scope.PAIR)
    assert found[(A, B, 161)]["refused"] == 1
    assert found[(A, B, 161)]["unreachable"] == 1
    assert (A, C, 0) not in found


@pytest.mark.parametrize("cut", range(24))
def test_a_damaged_quotation_stays_a_plain_icmp_packet(cut: int) -> None:
    quoted = (bytes([0x45]) + bytes(23))[:cut]
    found = rows([Packet(0, C, A, proto=1, payload=quoted, icmp=(3, 3))], Scope.DESTINATION)
    assert sum(row["unreachable"] for row in found.values()) == 1


def test_a_session_counts_as_short_only_if_both_sides_spoke_and_little() -> None:
    def ended(sport: int, sent: int, got: int) -> list[Packet]:
        return [
            *handshake(0, A, B, sport, 22),
            Packet(0.1, B, A, 22, sport, 6, PSH | ACK, b"b" * got),
            Packet(0.2, A, B, sport, 22, 6, PSH | ACK, b"a" * sent),
            Packet(0.3, A, B, sport, 22, 6, FIN | ACK),
            Packet(0.31, B, A, 22, sport, 6, FIN | ACK),
        ]

    # Who only listens is no scanner: a passive FTP download, a health check that reads the greeting.
    sessions = [*ended(1, 500, 900), *ended(2, 0, 20), *ended(3, 500, 40_000), *ended(4, 0, 0)]
    found = rows(sessions, Scope.SERVICE)[(A, B, 22)]
    assert (found["sessions"], found["short_sessions"], found["empty_sessions"]) == (4, 1, 1)


@pytest.mark.parametrize(
    ("port", "greeting", "service"),
    [
        (902, b"SSH-2.0-x", Service.SSH),
        (2121, b"220 ftp ready", Service.FTP),
        (25, b"220 mail ESMTP", Service.SMTP),
        (4444, b"RFB 003.008\n", Service.VNC),
        (4445, b"\xff\xfd\x18\xff\xfd", Service.TELNET),
        (3389, b"", Service.RDP),
        (8080, b"HTTP/1.1 200", Service.UNKNOWN),
    ],
)
def test_a_service_is_known_by_its_greeting_or_its_port(port: int, greeting: bytes, service: Service) -> None:
    windows = SlidingWindows({Scope.SERVICE: (60,)})
    packets = [*handshake(0, A, B, 1000, port), Packet(0.1, B, A, port, 1000, 6, PSH | ACK, greeting)]
    (part,) = windows.update(batch(packets)) + windows.finish()
    assert part.service.tolist() == [service]


def test_refused_logins_are_counted_where_they_can_be_read() -> None:
    packets = [*handshake(0, A, B, 1000, 21), Packet(0.05, B, A, 21, 1000, 6, PSH | ACK, b"220 ready\r\n")]
    packets += [Packet(0.1 + n / 10, B, A, 21, 1000, 6, PSH | ACK, b"530 Login incorrect\r\n") for n in range(3)]
    assert rows(packets, Scope.SERVICE)[(A, B, 21)]["login_failures"] == 3


def test_counts_leave_a_window_when_its_time_has_passed() -> None:
    packets = [Packet(n, A, B, 1000 + n, n + 1, 6, SYN) for n in range(30)]
    last = rows(packets, Scope.PAIR, 10)
    assert list(last.values())[-1]["ports"] == 10
    assert list(rows(packets, Scope.PAIR, 60).values())[-1]["ports"] == 30


def test_fan_out_counts_hosts_and_networks_per_port() -> None:
    packets = [Packet(n / 100, A, f"10.0.{n // 50}.{n % 50 + 1}", 1000, 445, 6, SYN) for n in range(100)]
    found = rows(packets, Scope.FANOUT)[(A, "", 445)]
    assert (found["peers"], found["networks"], found["failed"]) == (100, 2, 100)


def test_distinct_counts_are_exact_up_to_a_bound_and_close_beyond() -> None:
    packets = [Packet(n / 1000, A, B, 1000, n + 1, 6, SYN) for n in range(5000)]
    windows = SlidingWindows({Scope.PAIR: (60,)})
    parts = windows.update(batch(packets[:1000])) + windows.finish()
    assert parts[-1].column("ports").tolist() == [1000]
    parts = windows.update(batch(packets[1000:])) + windows.finish()
    assert parts[-1].column("ports")[0] == pytest.approx(5000, rel=0.03)


def snapshot(parts: list[WindowBatch]) -> list[tuple[object, ...]]:
    return [
        tuple(
            value.tobytes() if isinstance(value := getattr(part, field.name), np.ndarray) else value for field in fields(part)
        )
        for part in parts
    ]


def noise(seed: int, count: int, hosts: int = 20) -> PacketBatch:
    """Packets of every kind between a few hosts, with times that wander, jump and stand still."""
    rng = np.random.default_rng(seed)
    at = 1e6
    packets = []
    for _ in range(count):
        at += float(rng.choice([0, 0.001, 0.2, -0.5, 3.0])) if rng.random() < 0.999 else float(rng.choice([1e7, -1e7]))
        src, dst = (f"10.0.0.{n + 1}" for n in rng.choice(hosts, 2, replace=False))
        proto = int(rng.choice([6, 17, 1, 47]))
        ports = rng.choice([22, 80, 445, 5000, 50_000, 50_001], 2) if proto in (6, 17) else (0, 0)
        flags = int(rng.choice([SYN, SYN | ACK, ACK, RST, FIN | ACK, 0, PSH | ACK])) if proto == 6 else 0
        payload = bytes(rng.choice([b"", b"SSH-2.0", b"530 no", b"x" * 300]))
        packets.append(
            Packet(at, src, dst, int(ports[0]), int(ports[1]), proto, flags, payload, (int(rng.choice([0, 3, 8])), 0))
        )
    return batch(packets)


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 7, 100]))
def test_rows_do_not_depend_on_the_block_size(seed: int, size: int) -> None:
    whole = noise(seed, 250)
    results = []
    for step in (len(whole), size):
        windows = SlidingWindows(
            dict.fromkeys(Scope, (10,)), capacity=16, items_max=40, log_max=300
        )  # so small that everything overflows
        parts = [part for block in blocks(whole, step) for part in windows.update(block)] + windows.finish()
        results.append(snapshot(parts))
        assert all(np.isfinite(part.values).all() and (part.values >= 0).all() for part in parts)
    assert results[0] == results[1]


def flood(count: int, seed: int = 0) -> PacketBatch:
    """SYNs from random IPv4 addresses to one victim."""
    rng = np.random.default_rng(seed)
    one = batch([Packet(5e6, A, B, 1, 80, 6, SYN)])
    columns = {field.name: np.repeat(getattr(one, field.name), count, axis=0) for field in fields(one) if field.name != "data"}
    columns["src"][:, 12:] = rng.integers(1, 224, (count, 4))
    columns["ts_us"] += np.arange(count) * 5
    columns["sport"] = rng.integers(1024, 65_535, count).astype(np.uint16)
    return PacketBatch(**columns, data=one.data)


def test_a_flood_of_forged_sources_costs_bounded_memory_and_evicts_nobody() -> None:
    windows = SlidingWindows(dict.fromkeys(Scope, (10,)))
    calm = [packet for n in range(4) for packet in handshake(5e6 - 5 + n, C, B, 2000 + n, 443)]
    windows.update(batch(calm))
    parts = windows.update(flood(200_000)) + windows.finish()
    victim = next(part for part in reversed(parts) if part.scope is Scope.DESTINATION)
    assert victim.column("syn")[0] == 200_004
    assert victim.column("peers")[0] > 30_000  # the sketch is full, and says so by a large number
    assert all(len(table) <= 32_768 and table.items <= 131_072 for table in windows._tables.values())
    assert windows.strangers > 150_000
    assert windows._tables[Scope.SOURCE].knows(np.frombuffer(packed(C) + bytes(24), np.uint8).reshape(1, 40)).all()


def test_repeated_forged_sources_evict_their_like_first() -> None:
    windows = SlidingWindows(dict.fromkeys(Scope, (10,)), capacity=256)
    calm = [packet for n in range(4) for packet in handshake(100 + n, C, B, 2000 + n, 443)]
    twice = [Packet(105 + n / 1000, f"172.16.{n // 2 // 250}.{n // 2 % 250 + 1}", B, 7, 80, 6, SYN) for n in range(4000)]
    windows.update(batch(calm + twice))
    windows.finish()
    assert windows.overflow[Scope.SOURCE].entities > 0
    assert len(windows._tables[Scope.SOURCE]) <= 256
    assert windows._tables[Scope.SOURCE].knows(np.frombuffer(packed(C) + bytes(24), np.uint8).reshape(1, 40)).all()


def test_time_never_goes_back_and_late_packets_belong_to_now() -> None:
    timeline = Timeline()
    hops = timeline.place(np.array([10, 12, 11, 13], np.int64) * 1_000_000)[0]
    assert hops.tolist() == [10, 12, 12, 13]
    assert timeline.strays == 0


@pytest.mark.parametrize("jump_s", [1e7, -1e7])
def test_a_clock_step_counts_when_enough_packets_confirm_it(jump_s: float) -> None:
    timeline = Timeline()
    times = np.concatenate([np.full(5, 1e9), np.full(CONFIRM + 10, 1e9 + jump_s)])
    hops = timeline.place((times * 1e6).astype(np.int64))[0]
    assert (np.diff(hops) >= 0).all()
    assert timeline.steps == 1
    later = timeline.place(((1e9 + jump_s + np.arange(3)) * 1e6).astype(np.int64))[0]
    assert np.diff(later).tolist() == [1, 1]  # it goes on from there


def test_a_single_packet_from_another_year_moves_nothing() -> None:
    timeline = Timeline()
    hops = timeline.place((np.array([1e9, 2e9, 1e9 + 1, 5, 1e9 + 2]) * 1e6).astype(np.int64))[0]
    assert (hops - hops[0]).tolist() == [0, 0, 1, 1, 2]
    assert timeline.strays == 2


def test_no_sequence_of_hostile_clocks_overflows() -> None:
    ends = np.array([2**62 - 1, -(2**62) + 1], np.int64)
    timeline = Timeline()
    hops = np.concatenate([timeline.place(np.repeat(ends, CONFIRM + 6))[0] for _ in range(40)])
    assert timeline.steps >= 40
    assert (np.diff(hops) >= 0).all()
    assert 0 < hops[-1] - hops[0] < 2**45


@given(st.lists(st.integers(0, 2**45), min_size=1, max_size=200), st.integers(1, 50))
def test_hops_never_decrease_and_do_not_depend_on_blocks(times: list[int], size: int) -> None:
    ts = np.array(times, np.int64)
    whole = Timeline().place(ts)[0]
    timeline = Timeline()
    parts = np.concatenate([timeline.place(ts[start : start + size])[0] for start in range(0, len(ts), size)])
    assert whole.tolist() == parts.tolist()
    assert (np.diff(whole) >= 0).all()


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=60))
def test_rows_are_grouped_by_their_whole_key(keys: list[bytes]) -> None:
    first, inverse = group(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))
    assert len(first) == len(set(keys))
    assert [keys[first[g]] for g in inverse] == keys


def test_slots_are_reused_after_removal() -> None:
    slots = Slots(4)
    first = slots.insert([b"a", b"b", b"c", b"d"])
    assert slots.room == 0
    slots.remove(first[:2])
    assert slots.find([b"a", b"c"]).tolist() == [-1, 2]
    again = slots.insert([b"e", b"f"])
    assert sorted(again.tolist()) == [0, 1]


def test_prompt_rows_come_once_until_the_entity_grows() -> None:
    windows = SlidingWindows({Scope.PAIR: (60,)})
    windows.update(batch([Packet(0, A, B, n, 80, 6, SYN) for n in range(1, 101)]))
    assert [part.column("syn").tolist() for part in windows.prompt()] == [[100]]
    windows.update(batch([Packet(0, A, B, 5000, 80, 6, SYN)]))
    assert windows.prompt() == []
    windows.update(batch([Packet(0, A, B, n, 80, 6, SYN) for n in range(6000, 6100)]))
    assert [part.column("syn").tolist() for part in windows.prompt()] == [[201]]
    assert [part.column("syn").tolist() for part in windows.finish()] == [[201]]


def test_every_name_has_a_column_and_a_batch_is_looked_up_by_it() -> None:
    assert len(set(NAMES)) == len(NAMES) == len(COLUMN)
