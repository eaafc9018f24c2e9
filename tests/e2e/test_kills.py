"""Twenty deaths by SIGKILL, three of them the broker's, lose nothing and write nothing twice; ``make nightly`` does 200."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns import kills
from tools.kafka_broker import Broker

DEATHS = {"broker": 3, "consumer": 7, "producer": 10}


@pytest.mark.slow
def test_what_the_broker_accepted_is_in_the_ledger_once_whoever_dies(kafka_broker: Broker, tmp_path: Path) -> None:
    report = kills.run(tmp_path, kafka_broker, DEATHS, seed=6)
    assert report.accepted >= 100
    assert report.in_ledger >= report.accepted
    assert report.positions_checked > 0
