"""Packets, flows or events in, detections out: windows, meter and detector in one piece, the same for files and live traffic.

``feed`` works off whole hops of packet time, so what it returns does not depend on how a file is cut into batches. With
``prompt`` it also looks at what has grown since, which is what live traffic needs: nobody waits for a second to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, assert_never

from cybermesh.detect.detector import Detection, Detector, Limits
from cybermesh.detect.engines import Engine
from cybermesh.detect.engines.rule_file import RuleSet
from cybermesh.detect.engines.rules import RuleEngine
from cybermesh.detect.engines.statistics import METRICS, WINDOW_S, StatisticsEngine
from cybermesh.detect.ensemble import Ensemble
from cybermesh.telemetry.dns import DnsBatch
from cybermesh.telemetry.dns_packets import DnsReader
from cybermesh.telemetry.events import EventBatch
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import Batch
from cybermesh.telemetry.windows import EVENT_COUNTS, Scope, WindowBatch
from cybermesh.telemetry.windows_dns import DnsWindows
from cybermesh.telemetry.windows_reports import EventWindows, FlowWindows
from cybermesh.telemetry.windows_sliding import SlidingWindows


class Meter(Protocol):
    """Turns packets into finished flows."""

    def add(self, batch: PacketBatch) -> FlowBatch:
        """Return the flows that ended with this batch."""
        ...

    def flush(self) -> FlowBatch:
        """Return the flows still open."""
        ...


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows over what sources yield: packets, flows, events."""

    packets: SlidingWindows
    flows: FlowWindows
    events: EventWindows
    dns: DnsWindows


class Pipeline:
    """Windows, an optional meter, and the detector they feed."""

    def __init__(self, windows: Windows, meter: Meter | None, detector: Detector, rules: RuleEngine) -> None:
        self._rules = rules
        self.windows = windows.packets
        self.flow_windows = windows.flows
        self.event_windows = windows.events
        self.dns_windows = windows.dns
        self.detector = detector
        self.packets = 0
        self.flows = 0
        self.events = 0
        self._meter = meter
        self._dns = DnsReader()

    def feed(self, batch: Batch, *, prompt: bool = False) -> list[Detection]:
        """Take a batch of a source; return the alerts that are new or escalate."""
        match batch:
            case PacketBatch():
                self.packets += len(batch)
                rows = self.windows.update(batch) + self.dns_windows.update(self._dns.read(batch))
                flows = self._metered(batch)
            case FlowBatch():
                self.flows += len(batch)
                rows, flows = self.flow_windows.update(batch), batch
            case EventBatch():
                self.events += len(batch)
                rows, flows = self.event_windows.update(batch), None
            case DnsBatch():
                self.events += len(batch)
                rows, flows = self.dns_windows.update(batch), None
            case _:
                assert_never(batch)
        if prompt:
            rows += [row for windows in self._windows for row in windows.prompt()]
        return self.detector.detect(flows, rows)

    def replace_rules(self, rules: RuleSet) -> list[Detection]:
        """Go on with another rule set; return what the windows so far still gave under the old one.

        Open alerts, baselines and flows stay. Windows begin anew where the new rules want other lengths.
        """
        found: list[Detection] = []
        if rules.wanted() != self._rules.rules.wanted():
            rows: list[WindowBatch] = [row for windows in self._windows for row in windows.finish()]
            found = self.detector.detect(None, rows)
            fresh = windows_for(rules)
            self.windows, self.flow_windows = fresh.packets, fresh.flows
            self.event_windows, self.dns_windows = fresh.events, fresh.dns
        self._rules.replace(rules)
        self.detector.replace_rules(rules)
        return found

    @property
    def rules(self) -> RuleSet:
        """The rule set in use."""
        return self._rules.rules

    def finish(self) -> list[Detection]:
        """End the input: score what is still open; return new and escalating alerts, then the last state of the others."""
        flows = self._meter.flush() if self._meter is not None else None
        self.flows += len(flows) if flows is not None else 0
        rows: list[WindowBatch] = [row for windows in self._windows for row in windows.finish()]
        return self.detector.detect(flows, rows) + self.detector.finish()

    @property
    def _windows(self) -> tuple[SlidingWindows, FlowWindows, EventWindows, DnsWindows]:
        return self.windows, self.flow_windows, self.event_windows, self.dns_windows

    def _metered(self, batch: PacketBatch) -> FlowBatch | None:
        if self._meter is None:
            return None
        flows = self._meter.add(batch)
        self.flows += len(flows)
        return flows


def latest(detections: Iterable[Detection]) -> list[Detection]:
    """Return one detection per alert: its last state, with the last policy that any of its revisions proposed."""
    last: dict[str, Detection] = {}
    for detection in detections:
        earlier = last.get(detection.alert_id)
        if earlier is not None and detection.policy is None:
            detection = replace(detection, policy=earlier.policy)
        last[detection.alert_id] = detection
    return list(last.values())


@dataclass(frozen=True, slots=True)
class Decision:
    """How findings become detections; ``model_digest`` is that of the classifier's model, for the evidence."""

    ensemble: Ensemble = field(default_factory=Ensemble)
    limits: Limits = field(default_factory=Limits)
    model_digest: str = ""


def build(
    rules: RuleSet,
    *,
    meter: Meter | None = None,
    flow_names: tuple[str, ...] = (),
    more_engines: Sequence[Engine] = (),
    statistics: StatisticsEngine | None = None,
    decision: Decision | None = None,
) -> Pipeline:
    """Return a pipeline over a rule set, with a statistics engine (a new one by default) and whatever else is given."""
    decision = decision if decision is not None else Decision()
    rule_engine = RuleEngine(rules, flow_names)
    engines: list[Engine] = [rule_engine, statistics if statistics is not None else StatisticsEngine()]
    engines += more_engines
    detector = Detector(engines, decision.ensemble, decision.limits, rules, decision.model_digest)
    return Pipeline(windows_for(rules), meter, detector, rule_engine)


def windows_for(rules: RuleSet) -> Windows:
    """Return empty windows of the scopes and lengths that a rule set and the statistics engine read."""
    for_packets = RuleSet(tuple(rule for rule in rules.rules if not rule.names & EVENT_COUNTS))
    of_packets = wanted(for_packets)
    watched = {(metric.scope, WINDOW_S[metric.scope]) for metric in METRICS}  # baselines are made of all rows
    floors = {kind: floor for kind, floor in for_packets.floors().items() if kind not in watched}
    return Windows(
        SlidingWindows(of_packets, floors=floors),
        FlowWindows(of_packets),
        EventWindows(rules.wanted()),
        DnsWindows(rules.wanted()),
    )


def wanted(rules: RuleSet) -> Mapping[Scope, tuple[int, ...]]:
    """Return the window lengths that the rules and the statistics engine read, per scope."""
    lengths = {scope: set(seconds) for scope, seconds in rules.wanted().items()}
    for metric in METRICS:
        lengths.setdefault(metric.scope, set()).add(WINDOW_S[metric.scope])
    return {scope: tuple(sorted(seconds)) for scope, seconds in sorted(lengths.items())}
