"""The statistics engine: entities that leave their own past, by robust z and by CUSUM over window counts.

For each entity and metric the last ``SAMPLES`` counts of whole, non-overlapping windows are its baseline. Median and MAD do not
follow outliers, a CUSUM of the standardised counts finds shifts too small for any single window, and resets after it fired.
The engine abstains while an entity is cold (fewer than ``WARM`` samples), and for entities it has no place for. Samples far
outside enter the baseline clipped, so an attack cannot teach it quickly, and a lasting change is learnt in the end.

State is a JSON-able dict (``to_state``, ``from_state``), so baselines survive restarts. No clock, no randomness.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from cybermesh.detect.engines import Finding
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
STATE_VERSION = 1


WINDOW_S: Mapping[Scope, int] = {Scope.DESTINATION: 10, Scope.SOURCE: 60}


@dataclass(frozen=True, slots=True)
class Metric:
    """What is watched: a window count of a scope, the type it speaks for, and the count below which nobody cares."""

    scope: Scope
    name: str
    type: str
    least: float
    spoofable: bool = False


METRICS = (
    Metric(Scope.DESTINATION, "syn", "dos", 200, spoofable=True),
    Metric(Scope.DESTINATION, "udp_out", "dos", 1000, spoofable=True),
    Metric(Scope.DESTINATION, "icmp_out", "dos", 200, spoofable=True),
    Metric(Scope.SOURCE, "failed", "port_scan", 30),
    Metric(Scope.SOURCE, "payload_out", "exfiltration", 20_000_000),
    Metric(Scope.SOURCE, "peers", "anomaly", 50),
)


class StateError(Exception):
    """A saved state is not one of this engine; the text says why."""


@dataclass(slots=True)
class _Baseline:
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    sampled_us: int | None = None
    cusum: float = 0.0

    def judge(self, value: float) -> tuple[float, float, float]:
        """Return the robust z of a value, and the baseline's median and scale; z is 0 while cold."""
        if len(self.samples) < WARM:
            return 0.0, 0.0, 0.0
        middle = float(median(self.samples))
        mad = float(median(abs(sample - middle) for sample in self.samples))
        # Counts scatter at least like a Poisson variable; a constant past does not make one more an outlier.
        scale = max(_MAD_TO_SIGMA * mad, max(middle, 1.0) ** 0.5)
        return (value - middle) / scale, middle, scale

    def learn(self, value: float, now_us: int, window_s: int) -> float:
        """Take a sample if the last one's window is over; return the CUSUM including it, reset if it fires."""
        if self.sampled_us is not None and 0 <= now_us - self.sampled_us < window_s * 1_000_000:
            return 0.0
        z, middle, scale = self.judge(value)
        self.sampled_us = now_us
        self.samples.append(min(value, middle + _CLIP_Z * scale) if scale > 0 else value)
        self.cusum = max(0.0, self.cusum + min(z, Z_FIRES) - CUSUM_SLACK)
        reached = self.cusum
        if reached >= CUSUM_FIRES:
            self.cusum = 0.0
        return reached


class StatisticsEngine:
    """Watches ``METRICS`` per entity; of at most ``ENTITIES_MAX`` entities, the longest unseen is forgotten first."""

    def __init__(self, entities_max: int = ENTITIES_MAX) -> None:
        self.abstained = 0  # judgements left out because the entity was cold
        self.forgotten = 0
        self._entities_max = entities_max
        self._baselines: OrderedDict[str, dict[str, _Baseline]] = OrderedDict()

    @property
    def name(self) -> str:
        """``statistics``."""
        return "statistics"

    def __len__(self) -> int:
        return len(self._baselines)

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        """Return nothing: baselines are over windows."""
        del flows
        return []

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
        baselines = self._baselines.setdefault(key, {})
        self._baselines.move_to_end(key)
        if len(self._baselines) > self._entities_max:
            self._baselines.popitem(last=False)
            self.forgotten += 1
        return baselines

    def _judge(self, metric: Metric, baseline: _Baseline, windows: WindowBatch, row: int) -> Finding | None:
        value = float(windows.values[row, COLUMN[metric.name]])
        z, middle, scale = baseline.judge(value)
        if scale == 0:
            self.abstained += 1
        cusum = baseline.learn(value, int(windows.last_us[row]), windows.window_s)
        if value < metric.least or (z < Z_FIRES and cusum < CUSUM_FIRES):
            return None
        score = min(_SCORE_MAX, 1 - 0.5 ** (max(z / Z_FIRES, cusum / CUSUM_FIRES)))
        return _finding(metric, windows, row, score, {"value": value, "median": middle, "scale": scale, "z": z, "cusum": cusum})

    def to_state(self) -> dict[str, object]:
        """Return the baselines as a JSON-able dict."""
        entities = {
            key: {
                name: {"samples": list(baseline.samples), "sampled_us": baseline.sampled_us, "cusum": baseline.cusum}
                for name, baseline in baselines.items()
            }
            for key, baselines in self._baselines.items()
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
            for key, baselines in list(entities.items())[-entities_max:]:
                engine._baselines[str(key)] = {str(name): _restored(saved) for name, saved in baselines.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"damaged statistics state: {error}") from error
        return engine


def _restored(saved: Mapping[str, object]) -> _Baseline:
    samples, sampled_us, cusum = saved["samples"], saved["sampled_us"], saved["cusum"]
    if not isinstance(samples, list) or not isinstance(cusum, int | float) or not isinstance(sampled_us, int | None):
        raise TypeError("samples is a list, cusum a number, sampled_us a whole number or null")
    return _Baseline(deque((float(sample) for sample in samples), maxlen=SAMPLES), sampled_us, float(cusum))


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
            f"{metric.name} of this {windows.scope} is {details['value']:,.0f} in {windows.window_s} s, "
            f"usually {details['median']:,.0f} (z {details['z']:.1f})"
        ),
        details={"metric": metric.name, "over": str(windows.scope), "window_s": windows.window_s, **details},
    )
