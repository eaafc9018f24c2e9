"""Statistics over days and crowds: seasons, entropies, beacons; and that nobody can flood a baseline out of memory."""

from __future__ import annotations

import random

import numpy as np
import orjson
import pytest

from cybermesh.detect.engines.beacons import SIGHTINGS_MIN, Beacons, rhythm
from cybermesh.detect.engines.statistics import WARM, StatisticsEngine
from cybermesh.detect.pipeline import build
from cybermesh.telemetry.features import COLUMN as FEATURE
from cybermesh.telemetry.features import NAMES as FEATURES
from cybermesh.telemetry.flow_rows import Ends, Times, flow_batch
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.windows import Scope
from tests.detect.test_detector import RULES, windows
from tests.telemetry.packet_batches import packed

S = 1_000_000
HOUR, DAY = 3600, 86_400


def upload(engine: StatisticsEngine, at_s: int, amount: float) -> bool:
    return bool(engine.score_windows(windows(Scope.SOURCE, "10.0.0.9", at_s, 60, payload_out=amount)))


def day_of(engine: StatisticsEngine, day: int, backup: float) -> list[bool]:
    """Sixty minutes of little traffic from midnight, and a backup in one of them at two in the morning."""
    for minute in range(60):
        upload(engine, day * DAY + 60 * minute, 100_000 + 10_000 * (minute % 5))
    return [upload(engine, day * DAY + 2 * HOUR + 60 * minute, backup) for minute in range(2)]


def test_a_nightly_backup_is_expected_after_some_nights_and_at_its_hour_only() -> None:
    engine = StatisticsEngine()
    surprises = [any(day_of(engine, day, 900_000_000.0)) for day in range(6)]
    assert surprises == [True, True, True, True, False, False] or surprises == [True, True, True, False, False, False]
    day_of(engine, 6, 900_000_000.0)
    assert upload(engine, 6 * DAY + 15 * HOUR, 900_000_000.0)
    assert upload(engine, 7 * DAY + 2 * HOUR + 300, 9_000_000_000.0)  # at its hour, but ten times as much


def test_seasons_survive_a_restart() -> None:
    engine = StatisticsEngine()
    for day in range(5):
        day_of(engine, day, 900_000_000.0)
    restored = StatisticsEngine.from_state(orjson.loads(orjson.dumps(engine.to_state())))
    assert not any(day_of(restored, 5, 900_000_000.0))


@pytest.mark.parametrize("spread", [0.0, 9.0])
def test_a_change_of_counterparts_shows_in_their_entropy_both_ways(spread: float) -> None:
    engine = StatisticsEngine()
    for n in range(WARM + 5):
        calm = windows(Scope.SOURCE, "10.0.0.9", 60 * n, 60, packets_out=5000, peer_entropy=5 + 0.1 * (n % 3))
        assert engine.score_windows(calm) == []
    (found,) = engine.score_windows(windows(Scope.SOURCE, "10.0.0.9", 9000, 60, packets_out=5000, peer_entropy=spread))
    assert (found.type, found.details["metric"]) == ("anomaly", "peer_entropy")


def test_a_flood_of_new_sources_costs_no_warm_entity_its_baseline() -> None:
    engine = StatisticsEngine(entities_max=50)
    for n in range(WARM + 10):
        engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 10 * n, syn=20 + n % 5))
    for n in range(2000):
        engine.score_windows(windows(Scope.DESTINATION, f"172.16.{n // 250}.{n % 250}", 400 + n // 500, syn=1))
    assert len(engine) == 50
    assert engine.forgotten > 1900
    assert engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 500, syn=5000)) != []


def calls(
    starts_s: list[float],
    *,
    server: str = "198.51.100.9",
    port: int = 443,
    sizes: list[int] | None = None,
    sport: int | None = None,
) -> FlowBatch:
    ends = [
        Ends(packed("10.0.0.9"), packed(server), 20_000 + n if sport is None else sport, port, 6) for n in range(len(starts_s))
    ]
    features = np.zeros((len(starts_s), len(FEATURES)))
    features[:, FEATURE["tot_bwd_pkts"]] = 5
    features[:, FEATURE["totlen_fwd_pkts"]] = sizes if sizes is not None else 841
    start = np.array([round(at * S) for at in starts_s], np.int64)
    return flow_batch(ends, Times(start, start + S // 5), features, np.ones(len(FEATURES), np.bool_))


@pytest.mark.parametrize("period_s", [2.2, 60.0, 600.0])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_a_beacon_is_found_through_jitter_and_missed_beats(period_s: float, jitter: float) -> None:
    rng = random.Random(3)
    beats = [n for n in range(60) if n % 7 != 3]
    found = Beacons().score(calls([1000 + period_s * (n + rng.uniform(-jitter, jitter) / 2) for n in beats]))
    assert found
    assert {(each.type, each.entity, each.victim, each.port) for each in found} == {("botnet", "10.0.0.9", "198.51.100.9", 443)}
    period = found[-1].details["period_us"]
    assert isinstance(period, int)
    assert abs(period / 1e6 - period_s) <= 0.15 * period_s


def test_what_has_no_rhythm_is_no_beacon() -> None:
    rng = random.Random(5)
    at, irregular = 0.0, []
    for _ in range(60):
        at += rng.expovariate(1 / 30)
        irregular.append(at)
    regular = [30.0 * n for n in range(40)]
    innocent = {
        "a person": calls(irregular),
        "a download per minute, each of another size": calls(regular, sizes=[200 + 97 * n % 5000 for n in range(40)]),
        "a monitor inside": calls(regular, server="10.0.0.20"),
        "a clock": calls(regular, port=123),
        "pieces of one connection": calls(regular, sport=5555),
        "a few calls": calls(regular[: SIGHTINGS_MIN - 1]),
        "a burst": calls([n / 10 for n in range(60)]),
    }
    assert {name: Beacons().score(flows) for name, flows in innocent.items()} == {name: [] for name in innocent}


def test_a_beacon_outlives_a_flood_of_other_calls_and_memory_is_bounded() -> None:
    beacons = Beacons(keys_max=64)
    found = []
    for n in range(20):
        found += beacons.score(calls([60.0 * n], sizes=[841]) if n % 2 == 0 else calls([60.0 * n], sport=1000 + n))
        for other in range(30):
            beacons.score(calls([60.0 * n + 1], server=f"198.51.{n}.{other}"))
    assert found
    assert len(beacons) <= 64
    assert beacons.forgotten > 0


def test_a_rhythm_needs_enough_calls_over_enough_time() -> None:
    assert rhythm([0] * 5, [1] * 5) is None
    assert rhythm([n * S for n in range(20)], [1] * 20) is None
    told = rhythm([n * 10 * S for n in range(20)], [50] * 20)
    assert told is not None
    assert (told.period_us, told.regular, told.same_size) == (10 * S, 1.0, 1.0)


def test_a_beacon_is_an_alert_without_a_policy() -> None:
    pipeline = build(RULES)
    found = pipeline.feed(calls([1_700_000_000 + 5.0 * n for n in range(40)])) + pipeline.finish()
    assert {(each.type, each.entity, each.severity) for each in found} == {("botnet", "10.0.0.9", 5)}
    assert all(each.policy is None for each in found)
