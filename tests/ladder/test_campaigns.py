"""The long rungs of the ladder (``make ladder``): thousands of seeded worlds, in pieces that run side by side.

Rung 3: twins. Rung 4: Byzantine validators. Rung 5: a crash before every effect. Rung 8: too many twins must fork and be named.
Rung 6, the mutants, and rung 9, determinism, are quick enough for every run of the suite: tests/simulation.
"""

from __future__ import annotations

import pytest

from cybermesh.consensus.committee import faults
from cybermesh.consensus.simulator.draw import Setup
from cybermesh.consensus.simulator.scenario import Result, run_scenario

pytestmark = pytest.mark.ladder

PIECE = 250


def failures(results: list[Result], setup: Setup) -> list[str]:
    """One line per bad seed, with the command that repeats it."""
    command = (
        f"cybermesh simulate --kind {setup.kind} --validators {setup.validators} --twins {setup.twins} "
        f"--byzantine {setup.traitors} --scenarios 1 --seed"
    )
    return [f"{command} {result.seed}: {result.failure}" for result in results if result.failure]


def pieces(*campaigns: tuple[Setup, int]) -> list[object]:
    return [
        pytest.param(setup, start, min(PIECE, count - start), id=f"{setup.kind}-{setup.validators}-{setup.twins}-from-{start}")
        for setup, count in campaigns
        for start in range(0, count, PIECE)
    ]


@pytest.mark.parametrize(
    ("setup", "first", "count"),
    pieces(
        (Setup(4, twins=0, kind="twins"), 1_000),
        (Setup(4, twins=1, kind="twins"), 16_500),
        (Setup(5, twins=1, kind="twins"), 1_500),
        (Setup(6, twins=1, kind="twins"), 500),
        (Setup(7, twins=2, kind="twins"), 500),
    ),
)
def test_rung_3_twins_neither_fork_nor_stall_a_committee(setup: Setup, first: int, count: int):
    results = [run_scenario(seed, setup) for seed in range(first, first + count)]
    assert failures(results, setup) == []
    assert all(result.commits >= 1 for result in results), "what arrived after healing was committed"


@pytest.mark.parametrize(
    ("setup", "first", "count"),
    pieces((Setup(4, traitors=1, kind="byzantine"), 4_500), (Setup(7, traitors=2, kind="byzantine"), 500)),
)
def test_rung_4_byzantine_validators_neither_fork_nor_stall_the_others(setup: Setup, first: int, count: int):
    results = [run_scenario(seed, setup) for seed in range(first, first + count)]
    assert failures(results, setup) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("piece", range(8))
def test_rung_5_a_crash_before_any_effect_loses_nothing(seed: int, piece: int):
    calm = run_scenario(seed, Setup(kind="crash", crash_at=0))
    assert calm.failure is None
    assert calm.commits >= 25, "a trace of about fifty rounds"
    for effect in range(piece + 1, calm.effects + 1, 8):
        result = run_scenario(seed, Setup(kind="crash", crash_at=effect))
        assert result.failure is None, f"a crash before effect {effect} of seed {seed}: {result.failure}"


@pytest.mark.parametrize("piece", range(4))
def test_rung_5_old_and_lost_safety_files_and_full_disks_lose_nothing(piece: int):
    setup = Setup(kind="crash")
    results = [run_scenario(seed, setup) for seed in range(1_000 + 60 * piece, 1_060 + 60 * piece)]
    assert [f"{result.seed}: {result.failure}" for result in results if result.failure] == []


@pytest.mark.parametrize("validators", [4, 7])
def test_rung_8_too_many_twins_fork_and_the_evidence_names_them(validators: int):
    twins = faults(validators) + 1
    setup = Setup(validators, twins=twins, kind="split")
    for seed in range(100):
        result = run_scenario(seed, setup)
        assert result.unsafe is not None, f"seed {seed} did not fork"
        assert len(result.convicted) >= twins, (
            f"seed {seed}: {result.unsafe}, but only {sorted(result.convicted)} are convicted"
        )
