"""From a seed to a plan: five ways to draw how bad the world is.

``mixed``      everything a network and a disk can do, by time; twins and traitors if asked for.
``twins``      the scenarios of the Twins paper (arXiv 2004.10617): some keys run on two machines, who leads and who hears whom
               changes from slot to slot, and twins lead too.
``byzantine``  validators that follow a script, on lopsided links, between skewed clocks and slow disks.
``crash``      a quiet network in which one machine crashes at a chosen effect, or comes back with an old safety file.
``split``      two halves of a committee with too many twins: they must fork, and leave the evidence of it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.committee import faults
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.simulator.application import EPOCH
from cybermesh.consensus.simulator.plan import BEHAVIOURS, Cut, FullDisk, Plan, Restore, partition

Arrival = tuple[int, tuple[int, ...], bytes]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated: a committee, how many of its keys are misused, and how worlds are drawn.

    ``quorum`` overrides n - f and exists to show what a wrong one does; ``crash_at`` numbers the effect before which a
    ``crash`` world stops its machine (0: none); without it the world's disk is what fails.
    """

    validators: int = 4
    twins: int = 0
    traitors: int = 0
    quorum: int | None = None
    kind: str = "mixed"
    crash_at: int | None = None
    has_epochs: bool = False
    has_real_keys: bool = False


def draw_plan(rng: random.Random, setup: Setup) -> Plan:
    """Draw a plan of the setup's kind; with ``has_epochs`` a tenth of what arrives before healing ends the epoch."""
    plan = KINDS[setup.kind](rng, setup)
    if setup.has_epochs:
        return plan
    return dataclasses.replace(plan, arrivals=tuple(each for each in plan.arrivals if not each[2].startswith(EPOCH)))


def _mixed(rng: random.Random, setup: Setup) -> Plan:
    machines = setup.validators + setup.twins
    heal_ms = rng.choice((600, 1_200, 2_000))
    twins = tuple(sorted(rng.sample(range(setup.validators), setup.twins)))
    traitors = _traitors(rng, setup.validators, setup.traitors, spare=twins)
    return Plan(
        heal_ms=heal_ms,
        delay_min_ms=1,
        delay_max_ms=rng.choice((2, 5, 20, 60)),
        loss=_even_loss(rng.choice((0.0, 0.0, 0.02, 0.1)), machines),
        repeat=rng.choice((0.0, 0.0, 0.05)),
        crash=rng.choice((0.0, 0.0, 0.005, 0.02)),
        store_ms=rng.choice((0, 0, 5, 100)),
        cuts=_cuts(rng, machines, heal_ms),
        full_disks=_full_disks(rng, machines, heal_ms),
        skews_ms=tuple(rng.choice((0, 0, rng.randrange(-1_000, 1_000))) for _ in range(machines)),
        twins=twins,
        traitors=traitors,
        arrivals=_arrivals(rng, machines, heal_ms, _dishonest(setup, twins, traitors)),
        # Half of the worlds are idle often enough for heartbeats to matter.
        timing=Timing(heartbeat_ms=rng.choice((300, 5_000))),
    )


def _twins(rng: random.Random, setup: Setup) -> Plan:
    machines = setup.validators + setup.twins
    slots = rng.randrange(8, 13)
    slot_ms = rng.choice((8, 30, 250))
    twins = tuple(sorted(rng.sample(range(setup.validators), setup.twins)))
    traitors = _traitors(rng, setup.validators, setup.traitors, spare=twins)
    cuts: list[Cut] = []
    for slot in range(slots):
        group_count = rng.choice((1, 2, 2, 3))
        groups = tuple(rng.randrange(group_count) for _ in range(machines))
        cuts.append(partition(slot * slot_ms, (slot + 1) * slot_ms, groups))
    heal_ms = slots * slot_ms
    # A twin leads every second round: an equivocating leader is what the scenarios are about.
    leaders = tuple(
        rng.choice(twins) if twins and rng.random() < 0.5 else rng.randrange(setup.validators) for _ in range(slots)
    )
    return Plan(
        heal_ms=heal_ms,
        delay_min_ms=1,
        delay_max_ms=3,
        cuts=tuple(cuts),
        skews_ms=(0,) * machines,
        twins=twins,
        traitors=traitors,
        arrivals=_arrivals(rng, machines, heal_ms, _dishonest(setup, twins, traitors)),
        leaders=leaders,
        timing=Timing(heartbeat_ms=300),
    )


def _byzantine(rng: random.Random, setup: Setup) -> Plan:
    machines = setup.validators
    heal_ms = rng.choice((600, 1_200, 2_500))
    lossy = rng.choice((0.0, 0.1, 0.3))
    traitors = _traitors(rng, setup.validators, setup.traitors or faults(setup.validators))
    return Plan(
        heal_ms=heal_ms,
        delay_min_ms=1,
        delay_max_ms=rng.choice((2, 5, 20)),
        loss=tuple(tuple(lossy * rng.random() for _ in range(machines)) for _ in range(machines)),
        repeat=rng.choice((0.0, 0.05)),
        tail=rng.choice((0.0, 0.05)),
        crash=rng.choice((0.0, 0.0, 0.0, 0.005)),
        disk_ms=tuple(rng.choice((0, 0, 0, 5, 40)) for _ in range(machines)),
        cuts=_cuts(rng, machines, heal_ms) if rng.random() < 0.3 else (),
        skews_ms=tuple(rng.choice((0, rng.randrange(-9_000, 9_000) // 10)) for _ in range(machines)),
        traitors=traitors,
        arrivals=_arrivals(rng, machines, heal_ms, _dishonest(setup, (), traitors)),
        timing=Timing(heartbeat_ms=rng.choice((300, 1_000))),
    )


def _crash(rng: random.Random, setup: Setup) -> Plan:
    machines = setup.validators
    # Heartbeats make the rounds: fifty of them in half a second.
    restores: tuple[Restore, ...] = ()
    full: tuple[FullDisk, ...] = ()
    fate = rng.choice(("restore", "lost", "full")) if setup.crash_at is None else "crash"
    victim, at_ms = rng.randrange(machines), rng.randrange(50, 400)
    if fate == "restore":
        restores = (Restore(victim, rng.randrange(at_ms), at_ms),)
    elif fate == "lost":
        restores = (Restore(victim, None, at_ms),)
    elif fate == "full":
        full = (FullDisk(victim, at_ms, rng.randrange(at_ms, 600)),)
    return Plan(
        heal_ms=600,
        delay_min_ms=1,
        delay_max_ms=2,
        store_ms=rng.choice((0, 3, 20)),
        skews_ms=(0,) * machines,
        arrivals=_arrivals(rng, machines, 600, [restore.machine for restore in restores]),
        restores=restores,
        full_disks=full,
        crash_at=frozenset(() if setup.crash_at is None else (setup.crash_at,)),
        timing=Timing(heartbeat_ms=8),
    )


def _split(rng: random.Random, setup: Setup) -> Plan:
    """Draw two halves that hear nothing of each other while f + 1 or more twins, one in each, make both of them a quorum."""
    machines = setup.validators + setup.twins
    twins = tuple(sorted(rng.sample(range(setup.validators), setup.twins)))
    honest = rng.sample([each for each in range(setup.validators) if each not in twins], setup.validators - setup.twins)
    side = set(honest[: len(honest) // 2]) | set(range(setup.validators, machines))
    heal_ms = rng.choice((2_000, 4_000))
    return Plan(
        heal_ms=heal_ms,
        delay_min_ms=1,
        delay_max_ms=rng.choice((2, 20, 60)),
        cuts=(partition(0, heal_ms, tuple(int(each in side) for each in range(machines))),),
        skews_ms=(0,) * machines,
        twins=twins,
        arrivals=_arrivals(rng, machines, heal_ms),
        timing=Timing(heartbeat_ms=rng.choice((50, 300))),
        must_fork=True,
    )


KINDS: Final[dict[str, Callable[[random.Random, Setup], Plan]]] = {
    "mixed": _mixed,
    "twins": _twins,
    "byzantine": _byzantine,
    "crash": _crash,
    "split": _split,
}


def _even_loss(share: float, machines: int) -> tuple[tuple[float, ...], ...]:
    return ((share,) * machines,) * machines if share else ()


def _cuts(rng: random.Random, machines: int, heal_ms: int) -> tuple[Cut, ...]:
    cuts: list[Cut] = []
    start_ms = rng.randrange(200)
    while start_ms < heal_ms and rng.random() < 0.7:
        end_ms = min(heal_ms, start_ms + rng.randrange(100, 800))
        group_count = rng.choice((2, 2, 3))
        groups = tuple(rng.randrange(group_count) for _ in range(machines))
        cut = partition(start_ms, end_ms, groups)
        if rng.random() < 0.3:  # one way only: somebody hears and is not heard, or the other way round
            cut = Cut(start_ms, end_ms, frozenset(link for link in cut.links if groups[link[0]] == 0))
        cuts.append(cut)
        start_ms = end_ms + rng.randrange(200)
    return tuple(cuts)


def _full_disks(rng: random.Random, machines: int, heal_ms: int) -> tuple[FullDisk, ...]:
    if rng.random() < 0.8:
        return ()
    start_ms = rng.randrange(heal_ms)
    return (FullDisk(rng.randrange(machines), start_ms, rng.randrange(start_ms, heal_ms)),)


def _traitors(
    rng: random.Random, validators: int, count: int, spare: tuple[int, ...] = ()
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    chosen = sorted(rng.sample([each for each in range(validators) if each not in spare], count))
    return tuple((index, tuple(rng.sample(BEHAVIOURS, rng.randrange(1, 5)))) for index in chosen)


def _dishonest(setup: Setup, twins: tuple[int, ...], traitors: tuple[tuple[int, tuple[str, ...]], ...]) -> tuple[int, ...]:
    """Return the machines of twins and traitors."""
    copies = range(setup.validators, setup.validators + len(twins))
    return (*twins, *copies, *(index for index, _ in traitors))


def _arrivals(rng: random.Random, machines: int, heal_ms: int, deaf: Collection[int] = ()) -> tuple[Arrival, ...]:
    """Return what arrives where; ``deaf`` are machines that need not pass on what only they have learned.

    Those are traitors, machines without their safety file, and twins: their blocks lose against their own key's other ones.
    """
    arrivals: list[Arrival] = []
    for number in range(rng.randrange(2, 6)):
        somebody = [position for position in range(machines) if rng.random() < 0.8] or [0]
        text = rng.choices((b"before %d" % number, b"alarm %d" % rng.randrange(50, 3_000), b"epoch %d" % number), (7, 2, 1))[0]
        arrivals.append((rng.randrange(heal_ms), tuple(somebody), text))
    # What arrives after healing must be committed by everybody: that is the test of liveness.
    learners = [position for position in range(machines) if position not in deaf]
    after = [(heal_ms + 1 + 40 * number, (rng.choice(learners),), b"after %d" % number) for number in range(2)]
    return (*arrivals, *after)
