"""The committee of the benchmark really is one: processes that commit what they were given, and count it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh.cli import bench_null
from cybermesh.cli.bench_consensus import Run, percentile_ms, write_transactions
from cybermesh.keys import SigningKey


@pytest.fixture
def run(tmp_path: Path) -> Run:
    transactions = tmp_path / "transactions"
    write_transactions(transactions, 400)
    return Run(tmp_path, transactions)


def test_validators_of_two_processes_commit_and_verify_every_transaction(run: Run):
    one, other = run.measure("paced", [[0, 1], [2, 3]], rate_per_s=200, seconds=1.0, warm_s=0.5)
    for measured in (one, other):
        assert measured.blocks > 0
        assert 50 < measured.transactions <= 400
        assert abs(measured.verified - measured.transactions) < 50
        assert all(latency > 0 for latency in measured.latencies_us)
        assert len(measured.latencies_us) > 100


def test_a_validator_that_starts_late_catches_up(run: Run):
    assert 0 < run.catch_up(20) < 30


def test_a_transaction_of_the_benchmark_is_signed_as_a_whole():
    transaction = bench_null.make_transaction(SigningKey(bytes(32)), 7)
    assert len(transaction) == bench_null.TRANSACTION_BYTES
    assert bench_null.number_of(transaction) == 7
    assert bench_null.is_signed(transaction)
    application = bench_null.NullApplication()
    assert not application.is_valid(transaction[:-1] + b"?")
    assert application.is_valid(transaction)
    assert application.is_valid(transaction)
    assert application.verified == 1


def test_percentiles_are_milliseconds_and_unknown_without_values():
    assert percentile_ms([], 50) is None
    assert percentile_ms(range(1000, 102_000, 1000), 50) == 51


def test_whole_validators_of_the_benchmark_store_what_is_on_their_bus(run: Run):
    assert run.with_ledger(200) > 0
