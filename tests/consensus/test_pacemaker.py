"""Deadlines of a round."""

from __future__ import annotations

import pytest

from cybermesh.consensus.pacemaker import Pacemaker, Timing
from cybermesh.consensus.types import Round


@pytest.mark.parametrize(
    ("round_", "certified", "timer_ms"),
    [(1, 0, 200), (5, 4, 200), (6, 4, 300), (7, 4, 450), (11, 4, 2278), (100, 4, 2278)],
)
def test_the_timer_grows_by_half_per_round_without_a_certificate_six_times(round_: int, certified: int, timer_ms: int):
    assert Timing().round_timer_ms(Round(round_), Round(certified)) == timer_ms


def test_twice_the_largest_timer_is_within_the_promise_for_healing():
    largest = Timing().round_timer_ms(Round(100), Round(0))
    assert 2 * largest * 1.1 <= 5_100


def test_entering_a_round_arms_nothing():
    pacemaker = Pacemaker(Timing(), lambda: 0.0, Round(1), 0)
    pacemaker.arm(0, Round(0))
    pacemaker.enter(Round(2))
    assert pacemaker.deadline is None
    assert not pacemaker.is_over(1_000_000)


def test_the_timer_runs_from_the_earliest_reason_and_later_reasons_do_not_extend_it():
    pacemaker = Pacemaker(Timing(), lambda: 0.0, Round(1), 0)
    pacemaker.arm(5_000, Round(0))
    assert pacemaker.deadline == 5_200
    pacemaker.arm(100, Round(0))
    pacemaker.arm(250, Round(0))
    assert pacemaker.deadline == 300
    assert not pacemaker.is_over(299)
    assert pacemaker.is_over(300)


def test_jitter_adds_at_most_a_tenth():
    pacemaker = Pacemaker(Timing(), lambda: 0.999, Round(1), 0)
    pacemaker.arm(0, Round(0))
    assert pacemaker.deadline == 219


def test_a_transaction_without_a_proposal_is_due_for_forwarding_once_per_round():
    pacemaker = Pacemaker(Timing(), lambda: 0.0, Round(1), 0)
    assert not pacemaker.misses_proposal(100)
    assert pacemaker.forward_at == 150
    assert pacemaker.misses_proposal(150)
    assert not pacemaker.misses_proposal(400)
    assert pacemaker.forward_at is None
    pacemaker.enter(Round(2))
    assert not pacemaker.misses_proposal(400)
    pacemaker.stop_missing()
    assert not pacemaker.misses_proposal(600)
    assert pacemaker.misses_proposal(650)
