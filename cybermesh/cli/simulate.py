"""``cybermesh simulate``: consensus against seeded faults; a failure prints the seed that repeats it and what happened."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated, Final, Literal

import typer
from rich.progress import track

from cybermesh.cli import output
from cybermesh.consensus.committee import faults
from cybermesh.consensus.simulator.campaign import run_campaign
from cybermesh.consensus.simulator.draw import Setup
from cybermesh.consensus.simulator.plan import Plan
from cybermesh.consensus.simulator.scenario import Result
from cybermesh.consensus.simulator.shrink import shrink
from cybermesh.consensus.types import COMMITTEE_MAX

_TIMELINE_MAX: Final = 120

Kind = Literal["mixed", "twins", "byzantine", "crash", "split"]


def simulate(
    scenarios: Annotated[int, typer.Option(min=1, help="How many seeds to run, from --seed on.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="The first seed; the same seed gives the same run everywhere.")] = 0,
    validators: Annotated[int, typer.Option(min=1, max=COMMITTEE_MAX, help="Size of the committee.")] = 4,
    twins: Annotated[int | None, typer.Option(min=0, help="Validators whose key runs on two machines at once.")] = None,
    byzantine: Annotated[int, typer.Option(min=0, help="Validators that follow a script against the protocol.")] = 0,
    kind: Annotated[
        Kind | None, typer.Option(help="How worlds are drawn; twins or byzantine when there are some, else mixed.")
    ] = None,
    epochs: Annotated[bool, typer.Option("--epochs", help="Let epochs end, too.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 for one per core.")] = 0,
    quorum: Annotated[int | None, typer.Option(min=1, hidden=True, help="A wrong quorum, to see it caught.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Run whole committees under loss, delay, partitions, crashes, full disks, twins and traitors, and check every promise."""
    if twins is None:
        # A wrong quorum shows only when somebody cheats: honest validators never vote twice.
        twins = faults(validators) if quorum is not None else 0
    if twins + byzantine > validators:
        raise output.CommandError(f"--twins {twins} --byzantine {byzantine}: there are only {validators} validators", 2)
    if quorum is not None and quorum > validators:
        raise output.CommandError(f"--quorum {quorum}: there are only {validators} validators", 2)
    setup = Setup(
        validators,
        twins,
        byzantine,
        quorum,
        kind or ("twins" if twins else "byzantine" if byzantine else "mixed"),
        has_epochs=epochs,
    )
    started = time.perf_counter()
    campaign = run_campaign(seed, scenarios, setup, workers=workers or len(os.sched_getaffinity(0)))
    progress = track(campaign, "simulating", total=scenarios, console=output.console(stderr=True), transient=True)
    summary = {"scenarios": 0, "seed": seed, "unsafe": 0, "stalled": 0, "scenarios_per_s": 0.0, "events": 0, "commits": 0}
    first: Result | None = None
    for result in progress if sys.stderr.isatty() else campaign:
        summary["scenarios"] += 1
        summary["unsafe"] += result.unsafe is not None
        summary["stalled"] += result.stalled is not None
        summary["events"] += result.events
        summary["commits"] += result.commits
        if result.unsafe is not None and (first is None or first.unsafe is None):
            first = result
        first = first or (result if result.stalled is not None else None)
    summary["scenarios_per_s"] = round(scenarios / (time.perf_counter() - started), 1)
    if json:
        output.emit_one(summary)
    else:
        output.console().print(
            f"{scenarios} {setup.kind} scenarios from seed {seed}, {validators} validators, {twins} twins, "
            f"{byzantine} byzantine: {summary['unsafe']} unsafe, {summary['stalled']} stalled; {summary['commits']} blocks, "
            f"{summary['events']} events, {summary['scenarios_per_s']} scenarios/s"
        )
    if first is not None:
        _explain(first, setup)
        raise typer.Exit(1)


def _explain(failed: Result, setup: Setup) -> None:
    """Print the least that makes the scenario fail, what happened then, and how to repeat it."""
    plan, result = shrink(failed.seed, setup)
    for line in _describe(plan):
        output.note(line)
    timeline = result.timeline
    if len(timeline) > _TIMELINE_MAX:
        output.note(f"... {len(timeline) - _TIMELINE_MAX} earlier lines")
    for line in timeline[-_TIMELINE_MAX:]:
        output.note(line)
    quorum = "" if setup.quorum is None else f" --quorum {setup.quorum}"
    epochs = " --epochs" if setup.has_epochs else ""
    output.complain(
        f"seed {failed.seed}: {failed.failure}; repeat with cybermesh simulate --kind {setup.kind} --scenarios 1 "
        f"--seed {failed.seed} --validators {setup.validators} --twins {setup.twins} --byzantine {setup.traitors}"
        f"{quorum}{epochs}"
    )


def _describe(plan: Plan) -> list[str]:
    """Return what is left of the world after shrinking, a line for each fault."""
    lines = [f"the least that fails: delays {plan.delay_min_ms} to {plan.delay_max_ms} ms, healed at {plan.heal_ms} ms"]
    lines += [f"  v{index} runs on two machines" for index in plan.twins]
    lines += [f"  v{index} does {', '.join(behaviours)}" for index, behaviours in plan.traitors]
    for cut in plan.cuts:
        links = ", ".join(f"{one}>{other}" for one, other in sorted(cut.links))
        lines.append(f"  {cut.start_ms} to {cut.end_ms} ms: nothing gets from one machine to the other: {links}")
    lines += [f"  {full.start_ms} to {full.end_ms} ms: the disk of machine {full.machine} is full" for full in plan.full_disks]
    lines += [
        f"  {each.at_ms} ms: machine {each.machine} gets its safety file of {each.copied_ms} ms" for each in plan.restores
    ]
    rates = {"crash": plan.crash, "repeat": plan.repeat, "tail": plan.tail}
    lines += [f"  {name} {rate} until then" for name, rate in rates.items() if rate]
    if plan.loss:
        lines.append(f"  up to {max(max(row) for row in plan.loss):.2f} of the messages of a link are lost until then")
    return lines
