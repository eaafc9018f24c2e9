"""The statistics engine: entities that leave their own past, by robust z and by CUSUM over window counts and entropies.

For each entity and metric the last ``SAMPLES`` counts of whole, non-overlapping windows are its baseline. Median and MAD do not
follow outliers, a CUSUM of the standardised counts finds shifts too small for any single window, and resets after it fired.
The engine abstains while an entity is cold (fewer than ``WARM`` samples), and for entities it has no place for. Samples far
outside enter the baseline clipped, so an attack cannot teach it quickly, and a lasting change is learnt in the end.

What comes every day or week at the same hour (a backup, a report) is no surprise: the peaks that an hour of the day or the week
showed before are kept, and a value within them is left alone (``_Season``). Beacons are found in flows (``beacons``).

Memory is bounded, and who floods cannot make the engine forget: entities are ranked by how long they have been watched, warm
ones last, and the least watched and longest unseen is forgotten first.

State is a JSON-able dict (``to_state``, ``from_state``), so baselines survive restarts. No clock, no randomness.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from cybermesh.detect.engines import Finding
from cybermesh.detect.engines.beacons import Beacons
from cybermesh.detect.engines.rules import address_text
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.windows import COLUMN, Scope, WindowBatch

SAMPLES = 64
WARM = 20
ENTITIES_MAX = 5_000
Z_FIRES = 8.0
CUSUM_SLACK = 1.0  # standard deviations a shift must exceed to add up
CUSUM_FIRES = 24.0
_MAD_TO_SIGMA = 1.4826
_CLIP_Z = 4.0
_SCORE_MAX = 0.9
STATE_VERSION = 2
_DAY_US = 86_400_000_000
_HOUR_US = 3_600_000_000
SEASON_DAYS = 3  # days on which an hour must have shown a peak before it is expected
SEASON_WEEKS = 2
_SEASON_SLACK = 1.5
_SEASON_KEEPS = 0.6  # of the old level, where a day's peak is lower
_WATCHED = (3, WARM)  # samples from which an entity is forgotten later


WINDOW_S: Mapping[Scope, int] = {Scope.DESTINATION: 10, Scope.SOURCE: 60}


@dataclass(frozen=True, slots=True)
class Metric:
    """What is watched: a window count of a scope, the type it speaks for, and the count below which nobody cares."""

    scope: Scope
    name: str
    type: str
    least: float
    spoofable: bool = False
    floor: float = 0.0  # smallest standard deviation; 0: that of a Poisson variable
    both: bool = False  # a fall is as telling as a rise
    volume: str = ""  # the count that ``least`` is about, where it is not the metric itself


METRICS = (
    Metric(Scope.DESTINATION, "syn", "dos", 200, spoofable=True),
    Metric(Scope.DESTINATION, "udp_out", "dos", 1000, spoofable=True),
    Metric(Scope.DESTINATION, "icmp_out", "dos", 200, spoofable=True),
    Metric(Scope.SOURCE, "failed", "port_scan", 30),
    Metric(Scope.SOURCE, "payload_out", "exfiltration", 20_000_000),
    Metric(Scope.SOURCE, "peers", "anomaly", 50),
    Metric(Scope.SOURCE, "port_entropy", "port_scan", 100, floor=0.4, volume="failed"),
    Metric(Scope.SOURCE, "peer_entropy", "anomaly", 1000, floor=0.4, both=True, volume="packets_out"),
    Metric(Scope.DESTINATION, "peer_entropy", "ddos", 2000, spoofable=True, floor=0.4, volume="packets_out"),
)


class StateError(Exception):
    """A saved state is not one of this engine; the text says why."""


@dataclass(slots=True)
class _Season:
    """Peaks by hour of the day (0-23) and of the week (24-191): the level expected, the days it rests on, and today's."""

    hours: dict[int, list[float]] = field(default_factory=dict)  # [level, days, day, today's peak]

    def expected(self, now_us: int) -> float:
        """Return the level that this hour usually reaches, 0 if there is none yet."""
        levels = [0.0]
        for key, enough in zip(_hours(now_us), (SEASON_DAYS, SEASON_WEEKS), strict=True):
            level, days = self.hours.get(key, (0.0, 0.0))[:2]
            if days >= enough:
                levels.append(level)
        return max(levels)

    def learn(self, value: float, now_us: int) -> None:
        """Take a value of this hour."""
        day = float(now_us // _DAY_US)
        for key in _hours(now_us):
            hour = self.hours.setdefault(key, [0.0, 0.0, day, 0.0])
            if hour[2] != day:
                hour[0] = max(hour[3], _SEASON_KEEPS * hour[0] + (1 - _SEASON_KEEPS) * hour[3])
                hour[1:] = [hour[1] + 1, day, 0.0]
            hour[3] = max(hour[3], value)


def _hours(now_us: int) -> tuple[int, int]:
    hour = now_us // _HOUR_US
    return hour % 24, 24 + hour % 168


@dataclass(slots=True)
class _Baseline:
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    sampled_us: int | None = None
    cusum: float = 0.0
    season: _Season = field(default_factory=_Season)

    def judge(self, value: float, floor: float = 0.0) -> tuple[float, float, float]:
        """Return the robust z of a value, and the baseline's median and scale; z is 0 while cold."""
        if len(self.samples) < WARM:
            return 0.0, 0.0, 0.0
        middle = float(median(self.samples))
        mad = float(median(abs(sample - middle) for sample in self.samples))
        # Counts scatter at least like a Poisson variable; a constant past does not make one more an outlier.
        scale = max(_MAD_TO_SIGMA * mad, floor if floor > 0 else max(middle, 1.0) ** 0.5)
        return (value - middle) / scale, middle, scale

    def learn(self, value: float, now_us: int, window_s: int, floor: float = 0.0) -> float:
        """Take a sample if the last one's window is over; return the CUSUM including it, reset if it fires."""
        if self.sampled_us is not None and 0 <= now_us - self.sampled_us < window_s * 1_000_000:
            return 0.0
        z, middle, scale = self.judge(value, floor)
        self.sampled_us = now_us
        clipped = max(middle - _CLIP_Z * scale, min(value, middle + _CLIP_Z * scale))
        self.samples.append(clipped if scale > 0 else value)
        self.cusum = max(0.0, self.cusum + min(z, Z_FIRES) - CUSUM_SLACK)
        reached = self.cusum
        if reached >= CUSUM_FIRES:
            self.cusum = 0.0
        return reached


class StatisticsEngine:
    """Watches ``METRICS`` per entity, at most ``ENTITIES_MAX`` of them, and beacons."""

    def __init__(self, entities_max: int = ENTITIES_MAX) -> None:
        self.abstained = 0  # judgements left out because the entity was cold
        self.forgotten = 0
        self._entities_max = entities_max
        self.beacons = Beacons()
        self._ranks: tuple[OrderedDict[str, dict[str, _Baseline]], ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    @property
    def name(self) -> str:
        """``statistics``."""
        return "statistics"

    def __len__(self) -> int:
        return sum(len(rank) for rank in self._ranks)

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        """Return the beacons; baselines are over windows."""
        return self.beacons.score(flows)

    def score_windows(self, windows: WindowBatch) -> list[Finding]:
        """Judge each row against its entity's past, then learn it."""
        metrics = [metric for metric in METRICS if metric.scope is windows.scope and windows.known[COLUMN[metric.name]]]
        if not metrics or windows.window_s != WINDOW_S[windows.scope]:
            return []
        found: list[Finding] = []
        packed = windows.destination if windows.scope is Scope.DESTINATION else windows.source
        for row in range(len(windows)):
            entity = address_text(packed[row])
            baselines = self._of(f"{windows.scope} {windows.window_s} {entity}")
            for metric in metrics:
                finding = self._judge(metric, baselines.setdefault(metric.name, _Baseline()), windows, row)
                if finding is not None:
                    found.append(finding)
        return found

    def _of(self, key: str) -> dict[str, _Baseline]:
        baselines: dict[str, _Baseline] = {}
        for rank in self._ranks:
            baselines = rank.pop(key, baselines)
        self._ranks[_rank(baselines)][key] = baselines
        if len(self) > self._entities_max:
            next(rank for rank in self._ranks if rank).popitem(last=False)
            self.forgotten += 1
        return baselines

    def _judge(self, metric: Metric, baseline: _Baseline, windows: WindowBatch, row: int) -> Finding | None:
        value = float(windows.values[row, COLUMN[metric.name]])
        volume = float(windows.values[row, COLUMN[metric.volume]]) if metric.volume else value
        now_us = int(windows.last_us[row])
        z, middle, scale = baseline.judge(value, metric.floor)
        if scale == 0:
            self.abstained += 1
        cusum = baseline.learn(value, now_us, windows.window_s, metric.floor)
        if volume < metric.least:
            return None
        is_usual = not metric.both and value <= _SEASON_SLACK * baseline.season.expected(now_us)
        baseline.season.learn(value, now_us)
        strength = abs(z) if metric.both else z
        if is_usual or (strength < Z_FIRES and cusum < CUSUM_FIRES):
            return None
        score = min(_SCORE_MAX, 1 - 0.5 ** (max(strength / Z_FIRES, cusum / CUSUM_FIRES)))
        return _finding(metric, windows, row, score, {"value": value, "median": middle, "scale": scale, "z": z, "cusum": cusum})

    def to_state(self) -> dict[str, object]:
        """Return the baselines as a JSON-able dict."""
        entities = {
            key: {
                name: {
                    "samples": list(baseline.samples),
                    "sampled_us": baseline.sampled_us,
                    "cusum": baseline.cusum,
                    "season": {str(hour): list(kept) for hour, kept in baseline.season.hours.items()},
                }
                for name, baseline in baselines.items()
            }
            for rank in self._ranks
            for key, baselines in rank.items()
        }
        return {"version": STATE_VERSION, "entities": entities}

    @classmethod
    def from_state(cls, state: Mapping[str, object], entities_max: int = ENTITIES_MAX) -> StatisticsEngine:
        """Return an engine that goes on from a saved state.

        Raises:
            StateError: It is not a state of this version.
        """
        engine = cls(entities_max)
        entities = state.get("entities")
        if state.get("version") != STATE_VERSION or not isinstance(entities, dict):
            raise StateError(f"not a statistics state of version {STATE_VERSION}")
        try:
            for key, saved in list(entities.items())[-entities_max:]:
                baselines = {str(name): _restored(each) for name, each in saved.items()}
                engine._ranks[_rank(baselines)][str(key)] = baselines
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"damaged statistics state: {error}") from error
        return engine


def _rank(baselines: Mapping[str, _Baseline]) -> int:
    """Return 0 for an entity hardly seen, 1 for one being learnt, 2 for a warm one."""
    samples = max((len(baseline.samples) for baseline in baselines.values()), default=0)
    return sum(samples >= enough for enough in _WATCHED)


def _restored(saved: Mapping[str, object]) -> _Baseline:
    samples, sampled_us, cusum, season = (saved[name] for name in ("samples", "sampled_us", "cusum", "season"))
    if not isinstance(samples, list) or not isinstance(cusum, int | float) or not isinstance(sampled_us, int | None):
        raise TypeError("samples is a list, cusum a number, sampled_us a whole number or null")
    if not isinstance(season, dict) or any(len(kept) != 4 for kept in season.values()):
        raise TypeError("season is a mapping of hours to four numbers")
    hours = {int(hour): [float(number) for number in kept] for hour, kept in season.items()}
    return _Baseline(deque((float(each) for each in samples), maxlen=SAMPLES), sampled_us, float(cusum), _Season(hours))


def _finding(metric: Metric, windows: WindowBatch, row: int, score: float, details: Mapping[str, float]) -> Finding:
    source, victim = windows.source[row], windows.destination[row]
    if windows.scope is Scope.DESTINATION:
        source = windows.peer[row]
    else:
        victim = windows.peer[row]
    port_share = float(windows.values[row, COLUMN["port_share"]])
    return Finding(
        engine="statistics",
        type=metric.type,
        entity=address_text(source),
        victim=address_text(victim) if victim.any() else None,
        port=int(windows.port[row]) or None if port_share >= 0.5 else None,
        protocol=int(windows.protocol[row]) or None,
        score=score,
        severity=5,
        first_us=int(windows.first_us[row]),
        last_us=int(windows.last_us[row]),
        count=max(1, int(details["value"])),
        spoofable=metric.spoofable,
        explanation=(
            f"{metric.name} of this {windows.scope} is {details['value']:,.4g} in {windows.window_s} s, "
            f"usually {details['median']:,.4g} (z {details['z']:.1f})"
        ),
        details={"metric": metric.name, "over": str(windows.scope), "window_s": windows.window_s, **details},
    )
