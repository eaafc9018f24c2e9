"""From an alert to a proposed policy: whom to hit, how, and for how long. Proposals only; the quorum decides.

Rules:
1. Only severity >= 8 with confidence >= .9, and never an address that is no unicast host's or that the site excludes. A
   classifier knows one network and may be wrong about another, so without another engine's vote it proposes nothing.
2. An accused is blocked by its address only if that cannot be forged: it completed handshakes, or acted on the answers it got
   (a rule's ``proof``). A flood's victim has its port rate limited instead; any other unproven accusation is an alert without a
   policy. Nobody is blocked for a packet that somebody else sent.
3. Always hosts, so never wider than /24 or /64; the policy carries that limit for whoever reads it.
4. A target is proposed once per type of attack, and again at the earliest ``cooldown_s`` after the last proposal and when
   that has run out; a repeat offender's time is four times the last, up to a day.
5. At most ``rate_per_s`` proposals a second of packet time; more are counted and come later, if their alert goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cybermesh.addresses import UNBLOCKABLE, Network, host, overlaps, parse_address
from cybermesh.detect.alerts import Alert
from cybermesh.detect.ratelimit import RateLimit

PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_WITH_PORTS = frozenset({6, 17})
TARGETS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class CandidateRules:
    """When a policy is proposed; times in seconds."""

    severity: int = 8
    confidence: float = 0.9
    ttl_s: int = 900
    ttl_factor: int = 4
    ttl_max_s: int = 86_400
    cooldown_s: int = 120
    rate_per_s: int = 10
    floor_per_s: int = 50  # packets a rate-limited port is always left
    witnesses: frozenset[str] = frozenset({"rules", "statistics"})  # engines of which at least one must have voted


@dataclass(slots=True)
class _Proposed:
    at_us: int
    ttl_s: int


class Candidates:
    """Proposes policies; remembers whom it has proposed."""

    def __init__(self, rules: CandidateRules, excluded: Sequence[Network] = ()) -> None:
        self.rules = rules
        self.refused_targets = 0
        self.unproven = 0  # accusations that a forger could have caused
        self._limit = RateLimit(rules.rate_per_s)
        self._excluded = (*(network for _, network in UNBLOCKABLE), *excluded)
        self._proposed: dict[str, _Proposed] = {}

    @property
    def overflow(self) -> int:
        """Proposals put off by the rate limit."""
        return self._limit.refused

    def has_room(self, now_us: int) -> bool:
        """Return whether the rate limit lets a proposal through at ``now_us``."""
        return self._limit.has_room(now_us)

    def propose(self, alert: Alert, evidence_digest: str) -> dict[str, object] | None:
        """Return a policy for the alert, or None where there is nothing to propose now."""
        verdict = alert.verdict
        if verdict.severity < self.rules.severity or verdict.confidence < self.rules.confidence:
            return None
        if not self.rules.witnesses & verdict.votes.keys():
            return None
        if not verdict.spoofable and not alert.proven:
            self.unproven += 1
            return None
        target = verdict.victim if verdict.spoofable else verdict.entity
        if target is None or not self._is_allowed(target):
            self.refused_targets += 1
            return None
        name = f"{verdict.type} {target}" if not verdict.spoofable else f"{target} {verdict.port} {verdict.protocol}"
        ttl_s = self._ttl_s(name, alert.last_us)
        alert.policy_put_off = ttl_s is not None and not self._limit.allows(alert.last_us)
        if ttl_s is None or alert.policy_put_off:
            return None
        self._remember(name, alert.last_us, ttl_s)
        return _policy(alert, target, ttl_s, evidence_digest, self.rules)

    def _is_allowed(self, target: str) -> bool:
        network = host(parse_address(target))
        return not any(overlaps(network, excluded) for excluded in self._excluded)

    def _ttl_s(self, name: str, now_us: int) -> int | None:
        """Return the time for a new proposal; None while the last one holds or is too recent."""
        last = self._proposed.get(name)
        if last is None:
            return self.rules.ttl_s
        since_s = (now_us - last.at_us) / 1e6
        if since_s < max(self.rules.cooldown_s, last.ttl_s):
            return None
        return min(self.rules.ttl_max_s, last.ttl_s * self.rules.ttl_factor)

    def _remember(self, name: str, now_us: int, ttl_s: int) -> None:
        self._proposed.pop(name, None)
        self._proposed[name] = _Proposed(now_us, ttl_s)
        if len(self._proposed) > TARGETS_MAX:
            del self._proposed[next(iter(self._proposed))]


def _policy(alert: Alert, target: str, ttl_s: int, evidence_digest: str, rules: CandidateRules) -> dict[str, object]:
    """Return the policy in the schema of ``cybermesh.policy``."""
    verdict = alert.verdict
    wide = 64 if ":" in target else 24
    guardrails: dict[str, object] = {
        "ttl_seconds": ttl_s,
        "cidr_max_prefix_len": wide,
        "max_targets": 1,
        "escalation_cooldown_s": rules.cooldown_s,
    }
    where: dict[str, object] = {"ips": [target], "direction": "ingress", "scope": "cluster"}
    action = "drop"
    if verdict.spoofable:
        seconds = max(1, (verdict.last_us - verdict.first_us) // 1_000_000)
        guardrails["rate_limit"] = {"window_s": 1, "max_actions": max(rules.floor_per_s, verdict.count // seconds // 10)}
        where["direction"] = "egress"
        action = "rate_limit"
        if verdict.protocol in PROTOCOLS:
            where["protocols"] = [PROTOCOLS[verdict.protocol]]
            if verdict.protocol in _WITH_PORTS and verdict.port is not None:
                where["ports"] = [verdict.port]
    identity = "\0".join((verdict.type, target, action, str(alert.decisive_us), str(alert.last_us), evidence_digest))
    return {
        "policy_id": f"pol-{hashlib.sha256(identity.encode()).hexdigest()[:32]}",
        "rule_type": "rate_limit" if action == "rate_limit" else "block",
        "action": action,
        "target": where,
        "criteria": {"min_confidence": rules.confidence},
        "guardrails": guardrails,
        "audit": {"reason_code": verdict.type, "evidence_refs": [evidence_digest]},
    }
