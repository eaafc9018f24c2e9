"""How bad a simulated world is: all that a seed decides, written down, so that it can be printed, cut down and repeated."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

from cybermesh.consensus.pacemaker import Timing

BEHAVIOURS: Final = (
    "equivocate",  # two proposals in a round, one for each half of the others
    "stale proposal",  # extends an older certificate than the one it knows
    "bad root",  # a proposal whose state root is not what its payload gives
    "junk",  # a proposal of transactions that are invalid, doubled, or applied long ago
    "forge",  # claims a certificate that only its own key signed
    "double vote",  # another vote for each half
    "impersonate",  # votes in the names of others
    "stale timeout",  # reports an older certificate than the one it knows, another one to each half
    "hide",  # sends what it signs to some only
    "hurry",  # gives up every round at once
    "replay",  # repeats what others said long ago, to anybody
    "far future",  # votes and timeouts of rounds far ahead
    "bad blocks",  # answers questions for blocks with other blocks
    "mute",  # says nothing at all
)
"""What a scripted Byzantine validator may do; a plan gives it some of these."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Between two moments nothing gets over ``links``, pairs of machines (from, to): a cut need not be mutual."""

    start_ms: int
    end_ms: int
    links: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class FullDisk:
    """Between two moments a machine's disk takes nothing: whoever waits for a write waits."""

    machine: int
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Restore:
    """A machine is stopped, and started with the safety file (and journal) that it had at ``copied_ms``; None: with none."""

    machine: int
    copied_ms: int | None
    at_ms: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How bad the world is until ``heal_ms``; afterwards it is perfect but for delays, skews, twins and traitors.

    Probabilities are per message (``loss`` by [from][to], ``repeat``, ``tail`` for a delay twenty times as long) or per step of
    a machine (``crash``); delays, ``disk_ms`` (of a write) and ``store_ms`` (from a commit to its being stored) are
    milliseconds. ``twins`` names validators whose key runs on two machines, ``traitors`` validators that follow a script;
    ``arrivals`` are (moment, machines that learn of it, transaction); ``crash_at`` numbers effects before which their machine
    crashes; ``leaders`` are imposed on the first rounds. A world that ``must_fork`` ends when it would heal.
    """

    heal_ms: int
    delay_min_ms: int
    delay_max_ms: int
    skews_ms: tuple[int, ...]
    timing: Timing
    arrivals: tuple[tuple[int, tuple[int, ...], bytes], ...]
    loss: tuple[tuple[float, ...], ...] = ()
    repeat: float = 0.0
    tail: float = 0.0
    crash: float = 0.0
    disk_ms: tuple[int, ...] = ()
    store_ms: int = 0
    cuts: tuple[Cut, ...] = ()
    full_disks: tuple[FullDisk, ...] = ()
    restores: tuple[Restore, ...] = ()
    twins: tuple[int, ...] = ()
    traitors: tuple[tuple[int, tuple[str, ...]], ...] = ()
    crash_at: frozenset[int] = frozenset()
    leaders: tuple[int, ...] = ()
    must_fork: bool = False


def partition(start_ms: int, end_ms: int, groups: tuple[int, ...]) -> Cut:
    """Return the cut under which only machines of the same group hear each other; ``groups`` gives each machine's group."""
    machines = range(len(groups))
    return Cut(start_ms, end_ms, frozenset((a, b) for a, b in product(machines, machines) if groups[a] != groups[b]))
