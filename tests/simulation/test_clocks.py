"""What must not slow a committee down: clocks that disagree, a leader's junk, a producer at the edge of the clock window."""

from __future__ import annotations

import random

import pytest

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.simulator.application import WINDOW_MS
from cybermesh.consensus.simulator.plan import Plan
from cybermesh.consensus.simulator.tokens import make_keys
from cybermesh.consensus.simulator.world import START_WALL_MS, World

EVERYBODY = (0, 1, 2, 3)
SPAN_MS = 6_000


def run(**fields) -> World:
    """Run four validators for six seconds in a good network."""
    plan = Plan(**{"heal_ms": 0, "delay_min_ms": 1, "delay_max_ms": 2, "skews_ms": (0,) * 4, "timing": Timing()} | fields)
    signers, check = make_keys(4, is_real=False)
    world = World(Committee.of(bytes(32), signers), (signers, check), plan, random.Random(1))
    world.run(SPAN_MS, lambda: False)
    return world


def steady(pause_ms: int, until_ms: int = SPAN_MS):
    return tuple((moment, EVERYBODY, b"tx %d" % moment) for moment in range(500, until_ms, pause_ms))


def heights(world: World) -> set[int]:
    return {len(machine.disk.chain) for machine in world.machines}


@pytest.mark.parametrize("skew_ms", [110, 1_000, 9_000])
def test_clocks_that_differ_cost_no_block(skew_ms: int):
    arrivals = steady(50)
    together, apart = run(arrivals=arrivals), run(arrivals=arrivals, skews_ms=(skew_ms, -skew_ms, skew_ms // 2, 0))
    assert min(heights(apart)) >= 0.98 * min(heights(together))
    assert min(heights(together)) > 1.5 * len(arrivals), "a block for each, and for its proof"


def test_a_leader_that_fills_its_blocks_with_junk_delays_the_others_by_one_timer():
    arrivals = steady(150, SPAN_MS - 1_000)
    world = run(arrivals=arrivals, traitors=((2, ("junk",)),), timing=Timing(base_ms=200))
    committed_at = dict(world.committed_at)
    delays = [committed_at[transaction] - moment for moment, _, transaction in arrivals]
    timer_ms = 220
    assert max(delays) <= timer_ms + 50
    assert sum(delay > timer_ms / 2 for delay in delays) <= len(delays) / 3, "only what meets its turn waits for a timer"


def test_stamps_at_the_edge_of_the_window_stall_nobody_whose_clock_differs():
    edges = []
    for number, offset_ms in enumerate((-WINDOW_MS, WINDOW_MS)):
        for place in range(30):
            moment = 700 + 100 * place
            stamp = START_WALL_MS + moment + offset_ms + (place - 15) * 200 + number
            edges.append((moment, EVERYBODY, b"stamp %d" % stamp))
    usual = steady(150, SPAN_MS - 1_000)
    world = run(arrivals=(*usual, *edges), skews_ms=(2_000, -2_000, 1_000, 0))
    committed_at = dict(world.committed_at)
    delays = [committed_at[transaction] - moment for moment, _, transaction in usual]
    assert max(delays) < 150, "no round was given up for them"
    assert sum(transaction in committed_at for _, _, transaction in edges) >= 20, "whoever finds one timely proposes it"
    for machine in world.machines:
        assert len(machine.mempool) == 0, "what nobody proposes any more is forgotten"


def test_an_idle_committee_makes_at_most_twenty_thousand_blocks_a_day():
    plan = Plan(heal_ms=0, delay_min_ms=1, delay_max_ms=2, skews_ms=(0,) * 4, timing=Timing(), arrivals=())
    signers, check = make_keys(4, is_real=False)
    world = World(Committee.of(bytes(32), signers), (signers, check), plan, random.Random(1))
    quarter_hour_ms = 900_000
    world.run(quarter_hour_ms, lambda: False)
    a_day = max(heights(world)) * 86_400_000 / quarter_hour_ms
    assert 5_000 < a_day <= 20_000
    assert world.events / 4 / (quarter_hour_ms / 1_000) < 5, "events per second and validator"
