"""Which dead letters of a flood are kept, and under whose name they are counted."""

from __future__ import annotations

from cybermesh.envelope import Code
from cybermesh.messages import TxKind
from cybermesh.roles.dead_letters import KEPT_ONE_OF, KEPT_WHOLE_MAX, STRANGER, WINDOW_MS, Sampler, claimed_producer
from cybermesh.wire.codec import encode
from tests.wire import test_faults as wire

ONE, OTHER = b"1" * 32, b"2" * 32


def kept(sampler: Sampler, count: int, now_ms: int, producer: bytes = ONE, code: Code = Code.STALE) -> list[int]:
    return [found for _ in range(count) if (found := sampler.take(producer, code, now_ms)) is not None]


def test_the_first_of_a_minute_are_kept_and_then_one_of_a_hundred() -> None:
    assert kept(Sampler(), KEPT_WHOLE_MAX + 2 * KEPT_ONE_OF, 0) == [0] * KEPT_WHOLE_MAX + [KEPT_ONE_OF - 1] * 2


def test_a_new_minute_begins_anew_and_tells_what_the_last_one_left_out() -> None:
    sampler = Sampler()
    kept(sampler, KEPT_WHOLE_MAX + 7, 5)
    assert kept(sampler, 1, 5 + WINDOW_MS - 1) == []
    assert kept(sampler, 2, 5 + WINDOW_MS) == [8, 0]


def test_a_clock_that_is_set_back_does_not_silence_anybody() -> None:
    sampler = Sampler()
    kept(sampler, KEPT_WHOLE_MAX + 1, 10 * WINDOW_MS)
    assert kept(sampler, 1, 0) == [1]


def test_producers_and_codes_do_not_share_their_numbers() -> None:
    sampler = Sampler()
    kept(sampler, KEPT_WHOLE_MAX, 0)
    assert kept(sampler, 1, 0) == []
    assert kept(sampler, 1, 0, producer=OTHER) == [0]
    assert kept(sampler, 1, 0, code=Code.FUTURE) == [0]


def test_strangers_and_messages_of_nobody_count_as_one() -> None:
    kind, stranger = wire.with_content(wire.ANOMALY.payload, wire.STRANGER)
    assert claimed_producer(kind, stranger, wire.RING) == STRANGER
    assert claimed_producer(TxKind.ANOMALY, b"\xff", wire.RING) == STRANGER
    assert claimed_producer(TxKind.ANOMALY, encode(wire.ANOMALY), wire.RING) == wire.KEY.public
