"""From a seed to a verdict: draws how bad the world is, runs it, heals it, and says whether it stayed safe and went on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.simulator.oracles import ViolationError
from cybermesh.consensus.simulator.tokens import make_keys
from cybermesh.consensus.simulator.world import Partition, Plan, World

_CHAIN_ID: Final = bytes(range(32))
_HEAL_LIMIT_MS: Final = 20_000
_PROGRESS_LIMIT_MS: Final = 5_000


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated; ``quorum`` overrides n - f and exists to show what a wrong one does."""

    validators: int = 4
    twins: int = 0
    quorum: int | None = None
    has_real_keys: bool = False


@dataclass(slots=True)
class Result:
    """The verdict on one seed: ``unsafe`` and ``stalled`` say what went wrong, None when nothing did.

    ``recovery_ms`` is the time from healing to the first commit after it.
    """

    seed: int
    unsafe: str | None
    stalled: str | None
    events: int
    commits: int
    recovery_ms: int
    held_max: int
    trace_hash: str
    timeline: list[str] = field(default_factory=list)


def draw_plan(rng: random.Random, setup: Setup) -> Plan:
    """Draw how bad the world is."""
    machines = setup.validators + setup.twins
    heal_ms = rng.choice((600, 1_200, 2_000))
    delay_max_ms = rng.choice((2, 5, 20, 60))
    partitions = []
    start_ms = rng.randrange(200)
    while start_ms < heal_ms and rng.random() < 0.7:
        end_ms = min(heal_ms, start_ms + rng.randrange(100, 800))
        group_count = rng.choice((2, 2, 3))
        groups = tuple(rng.randrange(group_count) for _ in range(machines))
        partitions.append(Partition(start_ms, end_ms, groups))
        start_ms = end_ms + rng.randrange(200)
    arrivals = []
    for number in range(rng.randrange(2, 6)):
        learners = [position for position in range(machines) if rng.random() < 0.8] or [0]
        text = b"alarm %d" % rng.randrange(50, 3_000) if rng.random() < 0.2 else b"before %d" % number
        arrivals.append((rng.randrange(heal_ms), tuple(learners), text))
    # What arrives after healing must be committed by everybody: that is the test of liveness.
    for number in range(2):
        learner = rng.randrange(machines)
        arrivals.append((heal_ms + 1 + 40 * number, (learner,), b"after %d" % number))
    return Plan(
        heal_ms=heal_ms,
        delay_min_ms=1,
        delay_max_ms=delay_max_ms,
        loss=rng.choice((0.0, 0.0, 0.02, 0.1)),
        repeat=rng.choice((0.0, 0.0, 0.05)),
        crash=rng.choice((0.0, 0.0, 0.005, 0.02)),
        partitions=tuple(partitions),
        skews_ms=tuple(rng.choice((0, 0, rng.randrange(-1_000, 1_000))) for _ in range(machines)),
        twins=tuple(sorted(rng.sample(range(setup.validators), setup.twins))),
        arrivals=tuple(arrivals),
        # Half of the worlds are idle often enough for heartbeats to matter.
        timing=Timing(heartbeat_ms=rng.choice((300, 5_000))),
    )


PlanMaker = Callable[[random.Random, Setup], Plan]


def run_scenario(seed: int, setup: Setup | None = None, *, has_timeline: bool = False, draw: PlanMaker = draw_plan) -> Result:
    """Run the scenario of a seed; the same seed and setup give the same result, in every process."""
    setup = setup or Setup()
    rng = random.Random(seed)  # noqa: S311 - a simulation must be repeatable
    signers, check = make_keys(setup.validators, is_real=setup.has_real_keys)
    committee = Committee.of(_CHAIN_ID, signers)
    if setup.quorum is not None:
        committee = dataclasses.replace(committee, quorum=setup.quorum)
    plan = draw(rng, setup)
    timeline: list[str] = []

    def note(moment: int, text: str) -> None:
        timeline.append(f"{moment:6d} ms  {text}")

    world = World(committee, (signers, check), plan, rng, note if has_timeline else None)
    unsafe = stalled = None
    recovery_ms = 0
    try:
        world.run(plan.heal_ms, lambda: False)
        before = _lowest_height(world)
        if world.run(plan.heal_ms + _HEAL_LIMIT_MS, lambda: _highest_height(world) > before):
            recovery_ms = world.now_ms - plan.heal_ms
        after = [transaction for moment, _, transaction in plan.arrivals if moment > plan.heal_ms]
        if not world.run(plan.heal_ms + _HEAL_LIMIT_MS, lambda: _all_committed(world, after)):
            stalled = f"not everything was committed {_HEAL_LIMIT_MS} ms after healing"
        elif recovery_ms > _PROGRESS_LIMIT_MS:
            stalled = f"the first commit came {recovery_ms} ms after healing"
        elif world.held_max > _held_limit(committee.n):
            stalled = f"a node held {world.held_max} blocks, votes and timeouts"
    except ViolationError as error:
        unsafe = str(error)
        note(world.now_ms, unsafe)
    return Result(
        seed, unsafe, stalled, world.events, len(world.agreement.chain), recovery_ms, world.held_max, world.trace_hash, timeline
    )


def _held_limit(n: int) -> int:
    """Votes of 2n rounds and beyond, timeouts, and the blocks that can lie above the root (two per round of the window)."""
    return 2 * n * n + 2 * n + 8 * n


def _lowest_height(world: World) -> int:
    return min(len(node.disk.chain) for node in world.honest)


def _highest_height(world: World) -> int:
    return max(len(node.disk.chain) for node in world.honest)


def _all_committed(world: World, transactions: list[bytes]) -> bool:
    wanted = set(transactions)
    for node in world.honest:
        chain = node.disk.chain
        if not wanted <= {transaction for block in chain[-40:] for transaction in block.payload}:
            return False
    return True
