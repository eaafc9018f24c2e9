"""Cuts a failing plan down to what it takes to fail, so that a person can read its timeline.

Every part of the plan is taken away in turn, and stays away when the run without it still fails; this is repeated until nothing
more can go (one-minimal, in the words of delta debugging: Zeller and Hildebrandt, 2002).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Final

from cybermesh.consensus.simulator.draw import Setup, draw_plan
from cybermesh.consensus.simulator.plan import Plan
from cybermesh.consensus.simulator.scenario import Result, run_plan

_RUNS_MAX: Final = 400
_LISTS: Final = ("arrivals", "cuts", "full_disks", "restores", "traitors")
_CALM: Final[dict[str, object]] = {
    "loss": (),
    "repeat": 0.0,
    "tail": 0.0,
    "crash": 0.0,
    "disk_ms": (),
    "store_ms": 0,
    "crash_at": frozenset(),
    "leaders": (),
}


def shrink(seed: int, setup: Setup) -> tuple[Plan, Result]:
    """Return the smallest plan found that fails like the seed's (unsafe or stalled), and its run with a timeline."""
    plan = draw_plan(random.Random(f"{seed} plan"), setup)  # noqa: S311
    was_unsafe = run_plan(seed, setup, plan).unsafe is not None
    runs = 0
    has_shrunk = True
    while has_shrunk and runs < _RUNS_MAX:
        has_shrunk = False
        for smaller in _without_one_thing(plan):
            runs += 1
            result = run_plan(seed, setup, smaller)
            if result.failure is not None and (result.unsafe is not None) == was_unsafe:
                plan, has_shrunk = smaller, True
                break
    return plan, run_plan(seed, setup, plan, has_timeline=True)


def _without_one_thing(plan: Plan) -> Iterator[Plan]:
    for name, calm in _CALM.items():
        if getattr(plan, name) != calm:
            yield _with(plan, name, calm)
    if any(plan.skews_ms):
        yield dataclasses.replace(plan, skews_ms=(0,) * len(plan.skews_ms))
    for name in _LISTS:
        parts = getattr(plan, name)
        for place in range(len(parts)):
            yield _with(plan, name, parts[:place] + parts[place + 1 :])
    for place, (index, behaviours) in enumerate(plan.traitors):
        for behaviour in behaviours if len(behaviours) > 1 else ():
            fewer = (index, tuple(each for each in behaviours if each != behaviour))
            yield dataclasses.replace(plan, traitors=(*plan.traitors[:place], fewer, *plan.traitors[place + 1 :]))


def _with(plan: Plan, name: str, value: object) -> Plan:
    return dataclasses.replace(plan, **{name: value})  # type: ignore[arg-type]
