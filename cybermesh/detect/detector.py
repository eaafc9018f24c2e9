"""The detector: every engine scores every flow and window, the ensemble decides, and what is new becomes a detection.

It is pure: time is the packets', nothing is random, and the same input in the same order gives the same detections. A failing
engine is counted and left out of that call; the others go on. Overflow is never silent: alerts beyond ``rate_per_s`` wait
for a later call, are counted, and are told of in one summary per type at the end.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cybermesh.addresses import Network
from cybermesh.detect import evidence as evidence_form
from cybermesh.detect.alerts import Alert, AlertBook
from cybermesh.detect.candidates import CandidateRules, Candidates
from cybermesh.detect.engines import Engine, Finding
from cybermesh.detect.engines.rule_file import RuleSet
from cybermesh.detect.ensemble import Ensemble
from cybermesh.detect.ratelimit import RateLimit
from cybermesh.detect.recent import RecentFindings
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.windows import WindowBatch

RATE_PER_S = 100
NAMED_IN_SUMMARY_MAX = 20


@dataclass(frozen=True, slots=True)
class Detection:
    """An alert as it is reported; ``revision`` 0 is its first report, later ones escalate it or close the books.

    ``alert_id`` is a digest and the same for all revisions. ``entity`` is the accused address (of a distributed flood the most
    active source); ``decisive_us`` the time of the packet that made the alert due the first time. ``evidence`` is JSON-able
    and free of floats, ``policy`` in the schema of ``cybermesh.policy`` or None.
    """

    alert_id: str
    revision: int
    type: str
    entity: str
    victim: str | None
    port: int | None
    protocol: int | None
    severity: int
    confidence: float
    spoofable: bool
    first_us: int
    last_us: int
    decisive_us: int
    count: int
    votes: Mapping[str, float]
    explanation: str
    evidence: Mapping[str, object]
    evidence_digest: str
    policy: Mapping[str, object] | None


@dataclass(slots=True)
class EngineCounters:
    """What one engine did since the start."""

    calls: int = 0
    findings: int = 0
    failures: int = 0
    last_failure: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is reported; see ``CandidateRules`` for the policies'."""

    rate_per_s: int = RATE_PER_S
    candidates: CandidateRules = field(default_factory=CandidateRules)
    excluded: tuple[Network, ...] = ()  # never a policy's target


class Detector:
    """Holds engines, ensemble, open alerts and proposals; call ``detect`` in order of packet time, ``finish`` at the end."""

    def __init__(
        self,
        engines: Sequence[Engine],
        ensemble: Ensemble,
        limits: Limits | None = None,
        rules: RuleSet | None = None,
        model_digest: str = "",
    ) -> None:
        self.engines = tuple(engines)
        self.counters = {engine.name: EngineCounters() for engine in engines}
        self._limits = limits if limits is not None else Limits()
        self._ensemble = ensemble
        self._rules = rules
        self._model_digest = model_digest
        self._book = AlertBook(self._limits.candidates.confidence)
        self._candidates = Candidates(self._limits.candidates, self._limits.excluded)
        self._rate = RateLimit(self._limits.rate_per_s)
        self._recent = RecentFindings()
        self._waiting: dict[tuple[str, ...], Alert] = {}

    @property
    def suppressed(self) -> int:
        """Reports put off by the rate limit so far."""
        return self._rate.refused

    @property
    def policies_put_off(self) -> int:
        """Policy proposals put off by their rate limit so far."""
        return self._candidates.overflow

    def replace_rules(self, rules: RuleSet) -> None:
        """Name another rule set in evidence from now on; open alerts go on."""
        self._rules = rules

    def detect(self, flows: FlowBatch | None, windows: Sequence[WindowBatch]) -> list[Detection]:
        """Score a batch of finished flows and window rows; return the alerts that are new or escalate, in order.

        The rows of one hop (equal ``end_us``) are decided together, so it does not matter how many hops a call brings.
        """
        found: list[Detection] = []
        if flows is not None and len(flows):
            found += self._decide([finding for engine in self.engines for finding in self._flows(engine, flows)])
        for _, hop in itertools.groupby(windows, key=lambda batch: batch.end_us):
            batches = list(hop)
            found += self._decide([f for engine in self.engines for batch in batches for f in self._windows(engine, batch)])
        return found

    def _decide(self, findings: Sequence[Finding]) -> list[Detection]:
        """Let what was found now, and lately by other engines, be voted on; report what is due."""
        due, self._waiting = self._waiting, {}
        without_policy: dict[tuple[str, ...], Alert] = {}
        for group in self._recent.with_new(findings):
            verdict = self._ensemble.verdict(group)
            if verdict is None:
                continue
            alert, is_due = self._book.fold(verdict)
            if is_due:
                due[alert.key] = alert
            elif alert.policy_put_off:
                without_policy[alert.key] = alert
        reports = [self._report(alert) for alert in due.values()]
        for key, alert in without_policy.items():
            if key not in due and self._candidates.has_room(alert.last_us):
                reports.append(self._report(alert))
        return [detection for detection in reports if detection is not None]

    def _flows(self, engine: Engine, flows: FlowBatch) -> list[Finding]:
        return self._supervised(engine, lambda: engine.score_flows(flows))

    def _windows(self, engine: Engine, batch: WindowBatch) -> list[Finding]:
        return self._supervised(engine, lambda: engine.score_windows(batch))

    def finish(self) -> list[Detection]:
        """Return the last state of alerts that changed since their last report, and a summary of those never reported."""
        last = [
            self._detection(alert)
            for alert in self._book.alerts.values()
            if alert.revision >= 0 and alert.count > alert.reported_count
        ]
        return last + self._summaries()

    def _supervised(self, engine: Engine, call: Callable[[], list[Finding]]) -> list[Finding]:
        counters = self.counters[engine.name]
        counters.calls += 1
        try:
            found = call()
        except Exception as error:  # noqa: BLE001 - supervisor: one broken engine must not blind the others
            counters.failures += 1
            counters.last_failure = f"{type(error).__name__}: {error}"
            return []
        counters.findings += len(found)
        return found

    def _report(self, alert: Alert) -> Detection | None:
        """Report an alert now, or let it wait if there were too many this second."""
        if not self._rate.allows(alert.last_us):
            self._waiting[alert.key] = alert
            return None
        return self._detection(alert)

    def _detection(self, alert: Alert) -> Detection:
        self._book.reported(alert)
        verdict = alert.verdict
        evidence = evidence_form.make(alert, self._rules, self._model_digest)
        digest = evidence_form.digest(evidence)
        policy = self._candidates.propose(alert, digest)
        return Detection(
            alert_id=_alert_id(alert.key, alert.decisive_us),
            revision=alert.revision,
            type=verdict.type,
            entity=verdict.entity,
            victim=verdict.victim,
            port=verdict.port,
            protocol=verdict.protocol,
            severity=verdict.severity,
            confidence=verdict.confidence,
            spoofable=verdict.spoofable,
            first_us=alert.first_us,
            last_us=alert.last_us,
            decisive_us=alert.decisive_us,
            count=alert.count,
            votes=dict(alert.votes),
            explanation=verdict.explanation,
            evidence=evidence,
            evidence_digest=digest,
            policy=policy,
        )

    def _summaries(self) -> list[Detection]:
        """Tell of alerts that the rate limit kept back, one detection per type, without a policy."""
        by_type: dict[str, list[Alert]] = {}
        for alert in self._waiting.values():
            if alert.revision < 0:
                by_type.setdefault(alert.verdict.type, []).append(alert)
        self._waiting = {}
        return [_summary(kind, alerts) for kind, alerts in by_type.items()]


def _alert_id(key: tuple[str, ...], decisive_us: int) -> str:
    identity = "\0".join((*key, str(decisive_us)))
    return hashlib.sha256(b"cybermesh.alert/1\0" + identity.encode()).hexdigest()[:32]


def _summary(kind: str, alerts: list[Alert]) -> Detection:
    worst = max(alerts, key=lambda alert: (alert.verdict.severity, alert.verdict.confidence))
    named = [alert.verdict.entity for alert in alerts[:NAMED_IN_SUMMARY_MAX]]
    evidence: dict[str, object] = {"version": 1, "type": kind, "summary_of": len(alerts), "entities": named}
    decisive_us = min(alert.decisive_us for alert in alerts)
    return Detection(
        alert_id=_alert_id(("summary", kind), decisive_us),
        revision=0,
        type=kind,
        entity=worst.verdict.entity,
        victim=worst.verdict.victim,
        port=None,
        protocol=None,
        severity=worst.verdict.severity,
        confidence=worst.verdict.confidence,
        spoofable=worst.verdict.spoofable,
        first_us=min(alert.first_us for alert in alerts),
        last_us=max(alert.last_us for alert in alerts),
        decisive_us=decisive_us,
        count=sum(alert.count for alert in alerts),
        votes=dict(worst.votes),
        explanation=f"{len(alerts)} more alerts of this type came too fast; the worst: {worst.verdict.explanation}",
        evidence=evidence,
        evidence_digest=evidence_form.digest(evidence),
        policy=None,
    )
