"""Many bans at once, in short; ``make nightly`` sends 20,000 (tests/campaigns/bans.py says what must hold)."""

from __future__ import annotations

from tests.campaigns.bans import faults, run


def test_bans_of_a_hundred_producers_are_all_decided_within_the_limits_and_by_turns() -> None:
    report = run(bans=1_000, producers=100, per_minute=300)
    assert faults(report) == []
    assert report.deferred == 700
    assert report.decided_after_s > 180
