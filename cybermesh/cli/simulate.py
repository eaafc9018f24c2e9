"""``cybermesh simulate``: consensus against seeded faults; a failure prints the seed that repeats it and what happened."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cybermesh.cli import output
from cybermesh.consensus.committee import faults
from cybermesh.consensus.simulator.scenario import Result, Setup, run_scenario
from cybermesh.consensus.types import COMMITTEE_MAX

_TIMELINE_MAX = 120


def simulate(
    scenarios: Annotated[int, typer.Option(min=1, help="How many seeds to run, from --seed on.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="The first seed; the same seed gives the same run everywhere.")] = 0,
    validators: Annotated[int, typer.Option(min=1, max=COMMITTEE_MAX, help="Size of the committee.")] = 4,
    twins: Annotated[int | None, typer.Option(min=0, help="Validators whose key runs on two machines at once.")] = None,
    quorum: Annotated[int | None, typer.Option(min=1, hidden=True, help="A wrong quorum, to see it caught.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Run whole committees under loss, delay, reordering, partitions, crashes and twins, and check every promise."""
    if twins is None:
        # A wrong quorum shows only when somebody cheats: honest validators never vote twice.
        twins = faults(validators) if quorum is not None else 0
    if twins > validators:
        raise output.CommandError(f"--twins {twins}: there are only {validators} validators", 2)
    if quorum is not None and quorum > validators:
        raise output.CommandError(f"--quorum {quorum}: there are only {validators} validators", 2)
    setup = Setup(validators, twins, quorum)
    started = time.perf_counter()
    results = [run_scenario(each, setup) for each in range(seed, seed + scenarios)]
    seconds = time.perf_counter() - started
    unsafe = [result for result in results if result.unsafe is not None]
    stalled = [result for result in results if result.stalled is not None]
    summary = {
        "scenarios": scenarios,
        "seed": seed,
        "unsafe": len(unsafe),
        "stalled": len(stalled),
        "scenarios_per_s": round(scenarios / seconds, 1),
        "events": sum(result.events for result in results),
        "commits": sum(result.commits for result in results),
    }
    if json:
        output.emit_one(summary)
    else:
        output.console().print(
            f"{scenarios} scenarios from seed {seed}, {validators} validators, {twins} twins: {len(unsafe)} unsafe, "
            f"{len(stalled)} stalled; {summary['commits']} blocks, {summary['events']} events, "
            f"{summary['scenarios_per_s']} scenarios/s"
        )
    if unsafe or stalled:
        _explain((unsafe or stalled)[0], setup)
        raise typer.Exit(1)


def _explain(result: Result, setup: Setup) -> None:
    """Print what happened in a failed scenario and how to repeat it."""
    timeline = run_scenario(result.seed, setup, has_timeline=True).timeline
    if len(timeline) > _TIMELINE_MAX:
        output.note(f"... {len(timeline) - _TIMELINE_MAX} earlier lines")
    for line in timeline[-_TIMELINE_MAX:]:
        output.note(line)
    quorum = "" if setup.quorum is None else f" --quorum {setup.quorum}"
    output.complain(
        f"seed {result.seed}: {result.unsafe or result.stalled}; repeat with cybermesh simulate --scenarios 1 "
        f"--seed {result.seed} --validators {setup.validators} --twins {setup.twins}{quorum}"
    )
