"""What fired and why, as a JSON object that can be checked later without the traffic.

Evidence is hashed and signed, so it holds integers, strings, lists and objects only: a number that is not whole is written as
its shortest exact decimal text, a confidence in parts per million. The digest is SHA-256 over the canonical JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import orjson

from cybermesh.detect.alerts import Alert
from cybermesh.detect.engines.rule_file import RuleSet

PPM = 1_000_000
FINDINGS_MAX = 8


class EvidenceError(Exception):
    """Evidence does not replay; the text says what differs."""


def make(alert: Alert, rules: RuleSet | None, model_digest: str) -> dict[str, object]:
    """Return the evidence of an alert as it stands, JSON-able and free of floats."""
    verdict = alert.verdict
    by_id = {rule.id: rule for rule in rules.rules} if rules is not None else {}
    findings: list[dict[str, object]] = []
    for finding in verdict.findings[:FINDINGS_MAX]:
        rule = by_id.get(finding.rule_id)
        told: dict[str, object] = {
            "engine": finding.engine,
            "rule": finding.rule_id,
            "score_ppm": _ppm(finding.score),
            "explanation": finding.explanation,
            "values": {name: _plain(value) for name, value in sorted(finding.details.items())},
            "first_us": finding.first_us,
            "last_us": finding.last_us,
            "count": finding.count,
        }
        if rule is not None:
            told |= {
                "condition": rule.condition.text,
                "fires_at": dict(rule.condition.ranges),
                "references": list(rule.references),
            }
        findings.append(told)
    return {
        "version": 1,
        "type": verdict.type,
        "entity": verdict.entity,
        "victims": list(alert.victims),
        "port": verdict.port,
        "protocol": verdict.protocol,
        "severity": verdict.severity,
        "confidence_ppm": _ppm(verdict.confidence),
        "threshold_ppm": _ppm(verdict.threshold),
        "votes_ppm": {engine: _ppm(score) for engine, score in sorted(verdict.votes.items())},
        "spoofable": verdict.spoofable,
        "proven": alert.proven,
        "first_us": alert.first_us,
        "last_us": alert.last_us,
        "decisive_us": alert.decisive_us,
        "count": alert.count,
        "findings": findings,
        "rules_digest": rules.digest if rules is not None else "",
        "model_digest": model_digest,
    }


def encode(evidence: Mapping[str, object]) -> bytes:
    """Return the canonical JSON."""
    return orjson.dumps(dict(evidence), option=orjson.OPT_SORT_KEYS)


def digest(evidence: Mapping[str, object]) -> str:
    """Return the content digest, lower-case hex."""
    return hashlib.sha256(b"cybermesh.evidence/1\0" + encode(evidence)).hexdigest()


def replay(evidence: Mapping[str, object], rules: RuleSet) -> int:
    """Evaluate the rules of the evidence again on the values it holds; return how many findings were replayed.

    Raises:
        EvidenceError: The rule set is another one, a rule does not fire, or its score differs.
    """
    if evidence.get("rules_digest") != rules.digest:
        raise EvidenceError(f"made with the rule set {evidence.get('rules_digest')}, not with {rules.digest}")
    by_id = {rule.id: rule for rule in rules.rules}
    replayed = 0
    findings = evidence.get("findings")
    for told in findings if isinstance(findings, list) else []:
        rule = by_id.get(told["rule"])
        if told["engine"] != "rules" or rule is None:
            continue
        columns = {name: np.array([float(told["values"][name])]) for name in rule.names}
        if not bool(np.ravel(rule.condition(columns))[0]):
            raise EvidenceError(f"{rule.id} does not fire on the values given")
        score = _ppm(float(np.clip(np.ravel(rule.confidence(columns))[0], 0, 1)))
        if score != told["score_ppm"]:
            raise EvidenceError(f"{rule.id} scores {score} ppm, not {told['score_ppm']}")
        replayed += 1
    return replayed


def _ppm(share: float) -> int:
    return round(share * PPM)


def _plain(value: float | int | str) -> int | str:
    if isinstance(value, str):
        return value
    return int(value) if float(value).is_integer() else repr(float(value))
