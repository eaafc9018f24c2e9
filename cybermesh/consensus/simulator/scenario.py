"""From a seed to a verdict: draws how bad the world is, runs it, heals it, and says whether it stayed safe and went on."""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass, field
from typing import Final

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.forensics import charges, is_proven
from cybermesh.consensus.simulator.draw import Setup, draw_plan
from cybermesh.consensus.simulator.oracles import ViolationError
from cybermesh.consensus.simulator.plan import Plan
from cybermesh.consensus.simulator.tokens import make_keys
from cybermesh.consensus.simulator.world import World

_CHAIN_ID: Final = bytes(range(32))
_HEAL_LIMIT_MS: Final = 20_000
_PROGRESS_LIMIT_MS: Final = 5_000


@dataclass(slots=True)
class Result:
    """The verdict on one seed: ``unsafe`` and ``stalled`` say what went wrong, None when nothing did.

    ``recovery_ms`` is the time from healing to the first commit after it, ``recovery_rounds`` the rounds
    until then; ``accused`` are the validators that evidence names, ``convicted``
    those whose signatures in two conflicting chains prove them guilty (forensics.py).
    """

    seed: int
    unsafe: str | None
    stalled: str | None
    events: int
    commits: int
    effects: int
    recovery_ms: int
    recovery_rounds: int
    held_max: int
    accused: frozenset[int]
    convicted: frozenset[int]
    trace_hash: str
    timeline: list[str] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """What went wrong, None when nothing did."""
        return self.unsafe or self.stalled


def run_scenario(seed: int, setup: Setup | None = None, *, has_timeline: bool = False) -> Result:
    """Run the scenario of a seed; the same seed and setup give the same result, in every process."""
    setup = setup or Setup()
    return run_plan(seed, setup, draw_plan(random.Random(f"{seed} plan"), setup), has_timeline=has_timeline)  # noqa: S311


def run_plan(seed: int, setup: Setup, plan: Plan, *, has_timeline: bool = False) -> Result:
    """Run a plan; ``seed`` decides what the plan leaves to chance."""
    signers, check = make_keys(setup.validators, is_real=setup.has_real_keys)
    committee = Committee.of(_CHAIN_ID, signers)
    if setup.quorum is not None:
        committee = dataclasses.replace(committee, quorum=setup.quorum)
    timeline: list[str] = []

    def note(moment: int, text: str) -> None:
        timeline.append(f"{moment:6d} ms  {text}")

    rng = random.Random(f"{seed} run")  # noqa: S311 - a simulation must be repeatable
    world = World(committee, (signers, check), plan, rng, note if has_timeline else None)
    unsafe = stalled = None
    recovery = _Recovery()
    try:
        world.run(plan.heal_ms, lambda: False)
        if plan.must_fork:
            unsafe = world.agreement.fault
        else:
            recovery, stalled = _heal(world)
    except ViolationError as error:
        unsafe = str(error)
    if unsafe is not None:
        note(world.now_ms, unsafe)
    return Result(
        seed, unsafe, stalled, world.events, len(world.agreement.chain), world.effects, recovery.first_ms, recovery.rounds,
        world.held_max, frozenset(world.accused), _convict(world) if unsafe else frozenset(), world.trace_hash, timeline,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Recovery:
    first_ms: int = 0
    rounds: int = 0


def _heal(world: World) -> tuple[_Recovery, str | None]:
    """Let the world heal and return how that went, and what kept it from going on."""
    plan, n = world.plan, world.committee.n
    height, round_ = _lowest_height(world), _highest_round(world)
    limit_ms = plan.heal_ms + _HEAL_LIMIT_MS
    first_ms = world.now_ms - plan.heal_ms if world.run(limit_ms, lambda: _highest_height(world) > height) else 0
    rounds = _highest_round(world) - round_
    after = {transaction for moment, _, transaction in plan.arrivals if moment > plan.heal_ms}
    is_done = world.run(limit_ms, lambda: _all_committed(world, after, height))
    recovery = _Recovery(first_ms, rounds)
    if not is_done:
        return recovery, f"not everything was committed {_HEAL_LIMIT_MS} ms after healing"
    if recovery.first_ms > _PROGRESS_LIMIT_MS:
        return recovery, f"the first commit came {recovery.first_ms} ms after healing"
    if recovery.rounds > max(16, 4 * n) + len(plan.leaders):
        return recovery, f"it took {recovery.rounds} rounds after healing"
    if world.held_max > _held_limit(n):
        return recovery, f"a machine held {world.held_max} blocks, votes and timeouts"
    return recovery, None


def _convict(world: World) -> frozenset[int]:
    """Return whom the honest machines' chains, and the certificates that committed them, convict of the first epoch."""
    found: set[int] = set()
    for one, other in itertools.combinations(world.honest, 2):
        if one.testimony is None or other.testimony is None:
            continue
        for culprit, charge in charges(one.testimony, other.testimony, world.committee.epoch).items():
            assert is_proven(charge, world.committee, world.verifier)
            found.add(culprit)
    return frozenset(found)


def _held_limit(n: int) -> int:
    """Votes of 2n rounds and beyond, timeouts, and the blocks that can lie above the root (two per round of the window)."""
    return 2 * n * n + 2 * n + 8 * n


def _lowest_height(world: World) -> int:
    return min(len(machine.disk.chain) for machine in world.honest)


def _highest_height(world: World) -> int:
    return max(len(machine.disk.chain) for machine in world.honest)


def _highest_round(world: World) -> int:
    return max((machine.replica.round for machine in world.honest if machine.replica is not None), default=0)


def _all_committed(world: World, transactions: set[bytes], above: int) -> bool:
    for machine in world.honest:
        chain = machine.disk.chain
        if not transactions <= {transaction for block in chain[above:] for transaction in block.payload}:
            return False
    return True
