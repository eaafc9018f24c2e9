"""Seeded worlds: no seed may make honest nodes disagree, break a rule, or stay stuck after the world has healed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cybermesh.consensus.simulator.draw import Setup
from cybermesh.consensus.simulator.scenario import Result, run_scenario
from cybermesh.consensus.simulator.shrink import shrink


def failures(results: list[Result], setup: Setup) -> list[str]:
    """One line per bad seed, with the command that repeats it."""
    command = f"cybermesh simulate --validators {setup.validators} --twins {setup.twins} --scenarios 1 --seed"
    return [f"{command} {r.seed}: {r.unsafe or r.stalled}" for r in results if r.unsafe or r.stalled]


@pytest.mark.slow
def test_a_thousand_seeds_of_four_validators_stay_safe_and_recover():
    setup = Setup(validators=4)
    results = [run_scenario(seed, setup) for seed in range(1_000)]
    assert failures(results, setup) == []
    assert sum(result.commits for result in results) > 4 * 1_000
    assert max(result.recovery_ms for result in results) <= 5_000


@pytest.mark.parametrize(
    ("setup", "seeds"),
    [
        pytest.param(Setup(validators=1), 20, id="one validator"),
        pytest.param(Setup(validators=2), 20, id="two, none may fail"),
        pytest.param(Setup(validators=4, twins=1), 150, id="four, one key on two machines"),
        pytest.param(Setup(validators=5, twins=1), 100, id="five, one key on two machines"),
        pytest.param(Setup(validators=7, twins=2), 40, id="seven, two keys on two machines"),
        pytest.param(Setup(validators=13), 4, id="thirteen"),
        pytest.param(Setup(validators=4, twins=1, kind="twins"), 200, id="twins that lead"),
        pytest.param(Setup(validators=4, traitors=1, kind="byzantine"), 200, id="four, one traitor"),
        pytest.param(Setup(validators=7, traitors=2, kind="byzantine"), 30, id="seven, two traitors"),
        pytest.param(Setup(validators=7, twins=1, traitors=1), 30, id="seven, a twin and a traitor"),
        pytest.param(Setup(validators=4, has_epochs=True), 150, id="four, over several epochs"),
        pytest.param(Setup(validators=4, twins=1, kind="twins", has_epochs=True), 60, id="twins, over several epochs"),
        pytest.param(Setup(kind="crash"), 30, id="old and lost safety files, full disks"),
    ],
)
def test_other_committees_stay_safe_and_recover(setup: Setup, seeds: int):
    assert failures([run_scenario(seed, setup) for seed in range(seeds)], setup) == []


def test_real_signatures_change_nothing():
    for seed in range(20):
        tokens = run_scenario(seed, Setup(validators=4))
        real = run_scenario(seed, Setup(validators=4, has_real_keys=True))
        assert real.unsafe is None
        assert real.stalled is None
        assert real.commits >= 2
        assert tokens.commits >= 2


def test_a_quorum_of_three_in_five_forks_and_is_caught_with_its_timeline():
    setup = Setup(validators=5, twins=1, quorum=3)
    forked = next(result for seed in range(400) if (result := run_scenario(seed, setup)).unsafe)
    again = run_scenario(forked.seed, setup, has_timeline=True)
    assert again.unsafe == forked.unsafe
    assert any("proposes" in line for line in again.timeline)
    assert forked.unsafe in again.timeline[-1]


def test_a_failure_shrinks_to_a_plan_that_still_fails():
    setup = Setup(validators=5, twins=1, quorum=3, kind="twins")
    forked = next(seed for seed in range(400) if run_scenario(seed, setup).unsafe)
    plan, result = shrink(forked, setup)
    assert result.unsafe is not None
    assert result.unsafe in result.timeline[-1]
    assert plan.twins, "without a twin nobody votes twice"
    assert len(plan.cuts) <= 6


def test_too_many_twins_fork_and_their_signatures_convict_them():
    for seed in range(5):
        result = run_scenario(seed, Setup(validators=4, twins=2, kind="split"))
        assert result.unsafe is not None
        assert len(result.convicted) == 2


def test_a_seed_gives_the_same_trace_in_every_process():
    program = (
        "from cybermesh.consensus.simulator.draw import Setup\n"
        "from cybermesh.consensus.simulator.scenario import run_scenario\n"
        "print([run_scenario(seed, Setup(5, 1, 1, kind=kind)).trace_hash "
        "for kind in ('mixed', 'twins', 'byzantine') for seed in range(4)])"
    )
    traces = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        traces.add(done.stdout)
    assert len(traces) == 1
    assert len(set(eval(traces.pop()))) == 12
