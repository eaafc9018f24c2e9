"""Bans by the ten thousand, from a hundred producers at once: what the ledger decides when, within its limits.

Run as ``python -m tests.campaigns.bans --bans 20000``; prints a report as JSON. Each ban is corroborated by a second site. What
must hold: never more new targets within 60 s of block time than the genesis allows; what is over it is deferred, not lost;
each is decided exactly once, in the minutes that the limit makes of it; producers are served by turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address

from cybermesh import genesis as g
from cybermesh.ledger.receipts import Change, Code
from tests.ledger.world import World, codes, decisions, deployment, key

_FIRST_HOST = int(ip_address("11.0.0.0"))
_BANS_PER_BLOCK = 250  # four transactions each


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the bans; times are block time, but for ``wall_s``."""

    bans: int
    per_minute: int
    opened: int
    deferred: int
    most_in_a_minute: int
    least_of_a_producer: int
    most_of_a_producer: int
    turns_apart_max: int
    decided_after_s: float
    wall_s: float


def run(bans: int, producers: int, per_minute: int) -> Report:
    """Send them as fast as blocks take them, one block a second, and let time pass until nothing waits."""
    began_s = time.perf_counter()
    names = [f"sensor-{number}" for number in range(producers)]
    ring = tuple(g.Producer(name, key(name).public, f"site-{name}") for name in names)
    base = deployment()
    world = World(replace(base, producers=ring, limits=replace(base.limits, targets_per_minute=per_minute)))
    began_ms = world.now_ms
    opened_ms: dict[str, int] = {}
    of_producer: Counter[str] = Counter()
    deferred = apart = 0
    most_sent = -(-bans // producers)

    def look() -> None:
        for effect in decisions(world.receipts):
            assert effect.change is Change.OPENED
            assert effect.policy_id not in opened_ms, f"{effect.policy_id} is opened twice"
            opened_ms[effect.policy_id] = world.now_ms
            of_producer[effect.policy_id.partition("/")[0]] += 1
        world.receipts.clear()

    for first in range(0, bans, _BANS_PER_BLOCK):
        sent: list[bytes] = []
        for number in range(first, min(first + _BANS_PER_BLOCK, bans)):
            who, other = names[number % producers], names[(number + 1) % producers]
            host = str(ip_address(_FIRST_HOST + number))
            sent += [world.anomaly(other, f"o{number}", host), *world.case(who, f"{who}/{number}", entity=host)]
        found = Counter(codes(world.after(1).apply(*sent))[3::4])
        assert set(found) <= {Code.OK, Code.DEFERRED}, found
        deferred += found[Code.DEFERRED]
        look()
    while (due_ms := world.state.next_due_ms) is not None and len(opened_ms) < bans:
        world.wait(max(0, due_ms - world.now_ms) / 1_000)
        look()
        shares = [of_producer[name] for name in names]
        apart = max(apart, max(shares) - min(shares))
    times = sorted(opened_ms.values())
    return Report(
        bans, per_minute, len(opened_ms), deferred, _most_within_a_minute(times), min(of_producer.values()),
        max(of_producer.values()), min(apart, most_sent), (times[-1] - began_ms) / 1_000, time.perf_counter() - began_s,
    )  # fmt: skip


def _most_within_a_minute(times: list[int]) -> int:
    most = first = 0
    for last, when in enumerate(times):
        while times[first] <= when - 60_000:
            first += 1
        most = max(most, last - first + 1)
    return most


def faults(report: Report) -> list[str]:
    """Return what does not hold."""
    # Whole minutes for what exceeds the first one, a second's grain each, and the time of sending.
    sending_s = -(-report.bans // _BANS_PER_BLOCK)
    limit_s = (-(-report.bans // report.per_minute) - 1) * 62 + sending_s
    checks = {
        "some were lost": report.opened == report.bans,
        "over the limit of a minute": report.most_in_a_minute <= report.per_minute,
        "later than the limit asks": report.decided_after_s <= limit_s,
        "producers were not served by turns": report.turns_apart_max <= 2,
    }
    return [fault for fault, holds in checks.items() if not holds]


def main() -> None:
    """Run one campaign; exit code 1 when something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bans", type=int, default=20_000)
    parser.add_argument("--producers", type=int, default=100)
    parser.add_argument("--per-minute", type=int, default=6_000)
    options = parser.parse_args()
    report = run(options.bans, options.producers, options.per_minute)
    found = faults(report)
    sys.stdout.write(json.dumps(asdict(report) | {"faults": found}) + "\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
