"""From findings to verdicts: the engines vote, per accused and type, and each type is decided by itself.

Rules:
1. A finding is a vote with its score (times the engine's trust); an engine that says nothing abstains.
2. Findings of one engine for the same accused and type are one vote, the strongest.
3. The confidence is the weighted mean of the votes. Engines look at different things, so each further one that agrees shrinks
   the doubt that the mean leaves by the factor ``agreement``. Engines only ever accuse, so a vote that would lower the
   confidence is left out: a weak "yes" is no "no".
4. A verdict is reached where the confidence reaches the type's threshold. A vote for one type never touches another type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cybermesh.detect.engines import Finding

WEIGHTS: Mapping[str, float] = {"rules": 0.3, "statistics": 0.2, "classifier": 0.5}
THRESHOLDS: Mapping[str, float] = {"ddos": 0.70, "dos": 0.70, "malware": 0.85}
THRESHOLD = 0.75
AGREEMENT = 0.6


@dataclass(frozen=True, slots=True)
class Verdict:
    """One accused, one type, decided; ``votes`` are the engines' scores, ``findings`` what they rest on, strongest first."""

    type: str
    entity: str
    victim: str | None
    port: int | None
    protocol: int | None
    severity: int
    confidence: float
    threshold: float
    spoofable: bool
    proven: bool
    first_us: int
    last_us: int
    count: int
    votes: Mapping[str, float]
    explanation: str
    findings: tuple[Finding, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two verdicts the same alert."""
        return alert_key(self.findings[0])


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The vote; all numbers are configurable. ``trust`` multiplies an engine's weight (0-1)."""

    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    thresholds: Mapping[str, float] = field(default_factory=lambda: THRESHOLDS)
    threshold: float = THRESHOLD
    trust: Mapping[str, float] = field(default_factory=dict)
    agreement: float = AGREEMENT

    def decide(self, findings: Iterable[Finding]) -> list[Verdict]:
        """Return the verdicts of one round of findings, in order of their first finding."""
        groups: dict[tuple[str, ...], list[Finding]] = {}
        for finding in findings:
            groups.setdefault(vote_key(finding), []).append(finding)
        verdicts = (self.verdict(group) for group in groups.values())
        return [verdict for verdict in verdicts if verdict is not None]

    def verdict(self, group: Iterable[Finding]) -> Verdict | None:
        """Return the verdict on findings of one ``vote_key``, None below the threshold."""
        ordered = sorted(group, key=lambda finding: (-finding.score, -finding.severity, finding.engine, finding.rule_id))
        votes: dict[str, float] = {}
        for finding in ordered:
            votes.setdefault(finding.engine, finding.score)
        confidence = self.confidence(votes)
        best = ordered[0]
        threshold = self.thresholds.get(best.type, self.threshold)
        if confidence < threshold:
            return None
        return Verdict(
            type=best.type,
            entity=best.entity,
            victim=next((finding.victim for finding in ordered if finding.victim is not None), None),
            port=next((finding.port for finding in ordered if finding.port is not None), None),
            protocol=next((finding.protocol for finding in ordered if finding.protocol is not None), None),
            severity=max(finding.severity for finding in ordered),
            confidence=confidence,
            threshold=threshold,
            spoofable=any(finding.spoofable for finding in ordered),
            proven=any(finding.proven for finding in ordered),
            first_us=min(finding.first_us for finding in ordered),
            last_us=max(finding.last_us for finding in ordered),
            count=max(finding.count for finding in ordered),
            votes=votes,
            explanation=min(ordered, key=lambda finding: finding.engine != "rules").explanation,  # a rule says it best
            findings=tuple(ordered),
        )

    def confidence(self, votes: Mapping[str, float]) -> float:
        """Return the confidence 0-1 that a set of votes (engine: score) gives; 0 without a vote of any weight."""
        cast = [
            (score * self.trust.get(engine, 1.0), self.weights[engine])
            for engine, score in votes.items()
            if self.weights.get(engine, 0.0) > 0
        ]
        best = total = weight_sum = 0.0
        for agreeing, (score, weight) in enumerate(sorted(cast, reverse=True)):
            total += score * weight
            weight_sum += weight
            best = max(best, 1 - (1 - total / weight_sum) * self.agreement**agreeing)
        return min(1.0, best)


def vote_key(finding: Finding) -> tuple[str, ...]:
    """Return what makes two findings votes in the same election: the same matter and the same type."""
    return finding.type, *alert_key(finding)


def alert_key(finding: Finding) -> tuple[str, ...]:
    """Return what makes two findings the same matter.

    Floods with possibly forged sources are one matter per victim and protocol, whatever sources they show, and whether many
    (ddos) or one (dos). Everything else is one matter per accused and type.
    """
    if finding.spoofable and finding.victim is not None:
        return "flood", finding.victim, str(finding.protocol or "")
    return finding.type, finding.entity
