"""Deaths and absences with real processes, in short; ``make nightly`` has the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns import kills, outage
from tools.kafka_broker import Broker

DEATHS = {"broker": 3, "consumer": 7, "producer": 10}


@pytest.mark.slow
def test_what_the_broker_accepted_is_in_the_ledger_once_whoever_dies(kafka_broker: Broker, tmp_path: Path) -> None:
    report = kills.run(tmp_path, kafka_broker, DEATHS, seed=6)
    assert report.accepted >= 100
    assert report.in_ledger >= report.accepted
    assert report.positions_checked > 0


@pytest.mark.slow
def test_a_broker_that_is_away_is_told_by_ready_and_nothing_is_lost(kafka_broker: Broker, tmp_path: Path) -> None:
    report = outage.run(tmp_path, kafka_broker, away_s=15)
    assert report.in_ledger >= report.accepted >= 150
    assert "broker" in report.reason
    assert "127.0.0.1" not in report.reason
