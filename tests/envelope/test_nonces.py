from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.nonces import (
    FLOOR_MS,
    INSTANCES_MAX,
    REMEMBERED_MAX,
    WINDOW_COUNTERS,
    CounterWindow,
    Nonce,
    NonceSource,
    NonceTable,
)

NOW = 1_700_000_000_000
A, B = b"a" * 32, b"b" * 32


def test_nonce_bytes_are_time_instance_counter_big_endian() -> None:
    expected = bytes.fromhex("0000018bcfe56800" + "00000002" + "0000000a")
    assert Nonce(0x018BCFE56800, 2, 10).encode() == expected
    assert Nonce.parse(expected) == Nonce(0x018BCFE56800, 2, 10)


class Reservations:
    instance = 3

    def __init__(self) -> None:
        self.ranges: list[range] = []

    def reserve(self, count: int) -> range:
        start = self.ranges[-1].stop if self.ranges else 0
        self.ranges.append(range(start, start + count))
        return self.ranges[-1]


def test_a_source_takes_each_counter_once_and_reserves_before_use() -> None:
    reservations = Reservations()
    source = NonceSource(reservations, batch=3)
    assert reservations.ranges == []
    made = [Nonce.parse(source.next(NOW + number)) for number in range(7)]
    assert [nonce.counter for nonce in made] == list(range(7))
    assert {nonce.instance for nonce in made} == {3}
    assert [nonce.ts_ms for nonce in made] == [NOW + number for number in range(7)]
    assert len(reservations.ranges) == 3


def test_two_messages_of_one_millisecond_have_two_nonces() -> None:
    source = NonceSource(Reservations())
    assert source.next(NOW) != source.next(NOW)


# Steps that stay, move a little, and jump beyond the window, with ends of bytes and of the ring among them.
STEPS = st.lists(
    st.one_of(
        st.integers(min_value=-40, max_value=40),
        st.sampled_from([WINDOW_COUNTERS - 1, WINDOW_COUNTERS, WINDOW_COUNTERS + 1, 65_000, -65_000, 1 << 20, 7, 8, 9, 255]),
    ),
    max_size=60,
)


@given(st.sampled_from([0, 1, 65_530, 1_000_000]), STEPS)
def test_a_window_agrees_with_a_set_of_counters(start: int, steps: list[int]) -> None:
    window, used, counter = CounterWindow(), set(), start
    probes = {start}
    for step in steps:
        counter = max(0, counter + step)
        probes |= {counter, counter + 1, counter + WINDOW_COUNTERS}
        if not window.is_below(counter):
            window.add(counter)
            used.add(counter)
        for probe in probes:
            below = bool(used) and probe <= max(used) - WINDOW_COUNTERS
            assert window.is_below(probe) == below
            assert (probe in window) == (probe in used and not below)


def code_of(table: NonceTable, producer: bytes, nonce: Nonce, content: bytes, now_ms: int = NOW) -> Code | None:
    try:
        table.check(producer, nonce.encode(), content, now_ms)
    except EnvelopeError as error:
        return error.code
    return None


def admit(table: NonceTable, producer: bytes, nonce: Nonce, content: bytes, now_ms: int = NOW) -> None:
    assert code_of(table, producer, nonce, content, now_ms) is None
    table.record(producer, nonce.encode(), content, now_ms)


def test_the_same_nonce_is_a_duplicate_with_the_same_content_and_a_replay_with_other() -> None:
    table = NonceTable()
    admit(table, A, Nonce(NOW, 1, 5), b"content")
    assert code_of(table, A, Nonce(NOW, 1, 5), b"content") is Code.DUPLICATE
    assert code_of(table, A, Nonce(NOW, 1, 5), b"other") is Code.NONCE_REPLAY
    assert code_of(table, A, Nonce(NOW + 1, 1, 5), b"other") is Code.NONCE_REPLAY, "a new time does not renew a counter"


def test_a_nonce_that_was_only_checked_may_come_again() -> None:
    table = NonceTable()
    assert code_of(table, A, Nonce(NOW, 1, 5), b"content") is None
    assert code_of(table, A, Nonce(NOW, 1, 5), b"content") is None


# Few producers, instances and contents, so that they meet; counters about the window's ends, and times about the floor.
NONCES = st.lists(
    st.tuples(
        st.sampled_from([A, B]),
        st.builds(
            Nonce,
            ts_ms=st.sampled_from([NOW, NOW - FLOOR_MS, NOW - FLOOR_MS - 1]),
            instance=st.integers(0, 1),
            counter=st.one_of(st.integers(0, 12), st.integers(WINDOW_COUNTERS - 2, WINDOW_COUNTERS + 12)),
        ),
        st.sampled_from([b"one", b"other"]),
    ),
    max_size=40,
)


@given(NONCES)
def test_taking_a_nonce_is_checking_and_then_recording_it(offered: list[tuple[bytes, Nonce, bytes]]) -> None:
    in_one, in_two = NonceTable(), NonceTable()
    for producer, nonce, content in offered:
        codes: list[Code | None] = [None, None]
        try:
            in_one.take(producer, nonce.encode(), content, NOW)
        except EnvelopeError as error:
            codes[0] = error.code
        try:
            in_two.check(producer, nonce.encode(), content, NOW)
            in_two.record(producer, nonce.encode(), content, NOW)
        except EnvelopeError as error:
            codes[1] = error.code
        assert codes[0] == codes[1]


def test_producers_and_instances_do_not_share_counters() -> None:
    table = NonceTable()
    admit(table, A, Nonce(NOW, 1, 5), b"x")
    admit(table, A, Nonce(NOW, 2, 5), b"x")
    admit(table, B, Nonce(NOW, 1, 5), b"x")


def test_counters_may_arrive_out_of_order_within_the_window() -> None:
    table = NonceTable()
    for counter in (10, 3, 9, 0, 11):
        admit(table, A, Nonce(NOW, 1, counter), b"x")
    assert code_of(table, A, Nonce(NOW, 1, 3), b"x") is Code.DUPLICATE


def test_what_is_below_the_window_is_stale() -> None:
    table = NonceTable()
    admit(table, A, Nonce(NOW, 1, WINDOW_COUNTERS + 100), b"x")
    assert code_of(table, A, Nonce(NOW, 1, 100), b"x") is Code.STALE
    assert code_of(table, A, Nonce(NOW, 1, 101), b"x") is None


def test_a_nonce_more_than_ten_minutes_old_is_stale() -> None:
    table = NonceTable()
    assert code_of(table, A, Nonce(NOW - FLOOR_MS - 1, 1, 0), b"x") is Code.STALE
    assert code_of(table, A, Nonce(NOW - FLOOR_MS, 1, 0), b"x") is None


def test_a_producer_has_at_most_64_instances_and_idle_ones_make_room() -> None:
    table = NonceTable()
    for instance in range(INSTANCES_MAX):
        admit(table, A, Nonce(NOW, instance, 0), b"x")
    assert code_of(table, A, Nonce(NOW, 99, 0), b"x") is Code.TOO_MANY_INSTANCES
    admit(table, B, Nonce(NOW, 99, 0), b"x")
    later = NOW + FLOOR_MS + 1
    admit(table, A, Nonce(later, 99, 0), b"x", later)
    assert code_of(table, A, Nonce(NOW, 0, 0), b"x", later) is Code.STALE, "a forgotten instance cannot be replayed"


def test_content_of_the_oldest_nonces_is_forgotten_and_they_stay_duplicates() -> None:
    table = NonceTable()
    for instance in range(2):
        for counter in range(REMEMBERED_MAX // 2 + 5):
            table.record(A, Nonce(NOW, instance, counter).encode(), b"x", NOW)
    assert code_of(table, A, Nonce(NOW, 0, 0), b"other") is Code.DUPLICATE
    assert code_of(table, A, Nonce(NOW, 1, 0), b"other") is Code.NONCE_REPLAY
    assert len(table._contents) == REMEMBERED_MAX


@pytest.mark.parametrize("jump", [1, WINDOW_COUNTERS * 3, 2**32 - 1])
def test_a_jump_of_the_counter_forgets_nothing_it_must_keep(jump: int) -> None:
    table = NonceTable()
    admit(table, A, Nonce(NOW, 1, 0), b"x")
    admit(table, A, Nonce(NOW, 1, jump), b"x")
    assert code_of(table, A, Nonce(NOW, 1, 0), b"x") in {Code.DUPLICATE, Code.STALE}
    assert code_of(table, A, Nonce(NOW, 1, jump), b"x") is Code.DUPLICATE
