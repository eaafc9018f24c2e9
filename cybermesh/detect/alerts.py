"""One incident, one alert: verdicts of the same matter are folded, so that a flood is one alert with a growing count.

An alert is reported when it begins and when it escalates: the severity rises, it becomes a distributed one, its confidence
reaches the level of a policy for the first time, or its count is ten times the one last reported. After ``quiet_s`` seconds of
packet time without a verdict the matter has ended, and what follows is a new alert; so it is after time stepped back by more
than an hour (the clock was set, or another input is older). The number of open alerts is bounded; the
one longest without a verdict makes room, counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cybermesh.detect.ensemble import Verdict

QUIET_S = 300
OPEN_MAX = 10_000
VICTIMS_MAX = 16
_GROWTH = 10
_PAUSES = 3
_STEP_US = 3_600_000_000
_RANK = {"dos": 0, "ddos": 1}


@dataclass(slots=True)
class _Tally:
    """One finding's count over windows that overlap: exact while a window grows, pro rata while it slides."""

    base: int
    first_us: int
    last_us: int
    count: int

    def add(self, first_us: int, last_us: int, count: int) -> int:
        """Take one window's count; return the total so far."""
        if first_us >= self.last_us:
            self.base += self.count
            self.first_us, self.last_us, self.count = first_us, last_us, count
        elif first_us <= self.first_us:
            self.last_us, self.count = max(self.last_us, last_us), max(self.count, count)
        elif last_us > self.last_us:
            beyond = count * (last_us - self.last_us) // max(1, last_us - first_us)
            return self.base + self.count + beyond
        return self.base + self.count


@dataclass(slots=True)
class Alert:
    """An open matter; ``revision`` counts its reports, 0 the first, -1 none yet."""

    key: tuple[str, ...]
    verdict: Verdict  # the strongest so far
    first_us: int
    last_us: int
    decisive_us: int
    count: int = 0
    votes: dict[str, float] = field(default_factory=dict)
    victims: list[str] = field(default_factory=list)
    revision: int = -1
    reported_count: int = 0
    reported_confidence: float = 0.0
    reported_severity: int = 0
    reported_type: str = ""
    proven: bool = False  # by any verdict so far
    reported_proven: bool = False
    policy_put_off: bool = False  # its policy was refused by the rate limit and is still to be proposed
    tallies: dict[str, _Tally] = field(default_factory=dict)

    def fold(self, verdict: Verdict) -> None:
        """Take another verdict of the same matter."""
        self.first_us, self.last_us = min(self.first_us, verdict.first_us), max(self.last_us, verdict.last_us)
        self.proven |= verdict.proven
        for engine, score in verdict.votes.items():
            self.votes[engine] = max(score, self.votes.get(engine, 0.0))
        if verdict.victim is not None and verdict.victim not in self.victims and len(self.victims) < VICTIMS_MAX:
            self.victims.append(verdict.victim)
        for finding in verdict.findings:
            tally = self.tallies.setdefault(finding.engine + finding.rule_id, _Tally(0, finding.first_us, finding.last_us, 0))
            self.count = max(self.count, tally.add(finding.first_us, finding.last_us, finding.count))
        if _weight(verdict) > _weight(self.verdict):
            self.verdict = verdict


def _weight(verdict: Verdict) -> tuple[int, float, int]:
    """Order of verdicts: distributed before single, then severity by how sure it is, then count."""
    return _RANK.get(verdict.type, 0), verdict.severity * verdict.confidence, verdict.count


class AlertBook:
    """The open alerts."""

    def __init__(self, policy_confidence: float, quiet_s: int = QUIET_S, open_max: int = OPEN_MAX) -> None:
        self.forgotten = 0
        self._policy_confidence = policy_confidence
        self._quiet_us = quiet_s * 1_000_000
        self._open_max = open_max
        self._alerts: dict[tuple[str, ...], Alert] = {}

    def __len__(self) -> int:
        return len(self._alerts)

    @property
    def alerts(self) -> Mapping[tuple[str, ...], Alert]:
        """The open alerts by key, the one longest without a verdict first."""
        return self._alerts

    def fold(self, verdict: Verdict) -> tuple[Alert, bool]:
        """Fold a verdict in; return its alert, and whether that is to be reported now."""
        alert = self._alerts.pop(verdict.key, None)
        if alert is None or self._is_over(alert, verdict):
            alert = Alert(verdict.key, verdict, verdict.first_us, verdict.last_us, verdict.last_us)
        self._alerts[verdict.key] = alert  # most recent last
        alert.fold(verdict)
        if len(self._alerts) > self._open_max:
            del self._alerts[next(iter(self._alerts))]
            self.forgotten += 1
        return alert, self._is_due(alert)

    def _is_over(self, alert: Alert, verdict: Verdict) -> bool:
        # Who takes minutes between two tries is not done because he is silent for a few.
        pace_us = (verdict.last_us - verdict.first_us) // max(1, verdict.count)
        quiet_us = max(self._quiet_us, _PAUSES * pace_us)
        return verdict.last_us - alert.last_us > quiet_us or alert.first_us - verdict.last_us > _STEP_US

    def _is_due(self, alert: Alert) -> bool:
        verdict, level = alert.verdict, self._policy_confidence
        return (
            alert.revision < 0
            or verdict.severity > alert.reported_severity
            or verdict.type != alert.reported_type
            or verdict.confidence >= level > alert.reported_confidence
            or (verdict.confidence >= level and alert.proven and not alert.reported_proven)
            or alert.count >= _GROWTH * alert.reported_count
        )

    def reported(self, alert: Alert) -> None:
        """Note that the alert has been reported as it is now."""
        alert.revision += 1
        alert.reported_count, alert.reported_confidence = alert.count, alert.verdict.confidence
        alert.reported_severity, alert.reported_type = alert.verdict.severity, alert.verdict.type
        alert.reported_proven = alert.proven
