"""Who may cause a block: the judgements, each a pure question to the state.

Every validator answers them identically, so not even the proposer can pass a policy that breaks one. Rules:

- a target that meets a protected or an allowed network is refused, whoever asks, whatever the route;
- without an operator a target must be what the anomaly is about: its entity, or for a rate limit also the victim it names
  (floods with forged sources are limited at the victim's address, not blocked at the innocents'), and the victim is left at
  least 50 packets a second: a limit of next to nothing would be a block of the victim, which one hacked sensor could word;
- (a) two sites (k, genesis) have reported the same entity and type within the window, each above the floors; for a rate limit
  at a victim the same victim and type;
- (b) an operator approves; what reaches wide (prefixes, many targets, a long time) always needs this;
- (c) the producer's budget: single hosts, short, few, inside the networks that the key ring lists for it.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Final

from cybermesh.addresses import AddressError, parse_address, parse_network
from cybermesh.ledger.draft import Draft, subject_of
from cybermesh.ledger.index import Span, Subject, span_of, spans_of
from cybermesh.ledger.receipts import Code, Why
from cybermesh.ledger.records import AnomalyRecord, RequestRecord
from cybermesh.policy import Action, Guardrails, PolicySpec

MINUTE_MS: Final = 60_000
VICTIM_RATE_MIN_PER_S: Final = 50
"""Packets a second that a rate limit must leave a victim unless an operator agrees; no detector of ours asks for less."""

_SECONDS_COUNTED: Final = 61


@dataclass(frozen=True, slots=True)
class Grant:
    """What makes a policy a decision: the case, who reported, who approved, and whose budget carries it (empty: nobody's)."""

    why: Why
    reporters: tuple[bytes, ...]
    approvers: tuple[bytes, ...] = ()
    holder: bytes = b""


class BudgetAnswer(enum.Enum):
    """Whether a request fits its producer's budget: it does, it would but for what is spent, or it is not of that kind."""

    FITS = enum.auto()
    SPENT = enum.auto()
    UNFIT = enum.auto()


def rule_key(spec: PolicySpec) -> bytes:
    """Return what makes two policies the same rule: everything but the id, the time, the criteria and the reasons."""
    bare = Guardrails(ttl_seconds=1, dry_run=spec.guardrails.dry_run)
    rule = PolicySpec("-", spec.rule_type, spec.action, spec.target, bare, spec.tenant, spec.region)
    return hashlib.sha256(b"cm/rule/1" + rule.to_json()).digest()


def target_spans(spec: PolicySpec) -> tuple[Span, ...]:
    """Return the policy's targets as spans."""
    hosts = tuple(Span(address.version, int(address), int(address)) for address in spec.target.ips)
    return hosts + tuple(map(span_of, spec.target.cidrs))


def target_count(spec: PolicySpec) -> int:
    """Return for how many targets the policy counts."""
    return len(spec.target.ips) + len(spec.target.cidrs)


def shield_fault(draft: Draft, spans: tuple[Span, ...]) -> Code | None:
    """Return why the targets may not be blocked by anybody, None when they may."""
    if _meet(spans, draft.protected_spans):
        return Code.PROTECTED_TARGET
    if _meet(spans, draft.allowed_spans):
        return Code.ALLOWED_TARGET
    return None


def _meet(spans: tuple[Span, ...], shields: tuple[Span, ...]) -> bool:
    return any(span.meets(shield) for span in spans for shield in shields)


def limit_fault(draft: Draft, spec: PolicySpec) -> str | None:
    """Return the name of the genesis limit that the policy breaks by itself, None when it keeps all."""
    limits = draft.genesis.limits
    if not limits.ttl_min_s <= spec.guardrails.ttl_seconds <= limits.ttl_max_s:
        return "ttl_max_s" if spec.guardrails.ttl_seconds > limits.ttl_max_s else "ttl_min_s"
    if target_count(spec) > limits.targets_per_policy:
        return "targets_per_policy"
    for network in spec.target.cidrs:
        if network.prefixlen < (limits.prefix_min_v4 if network.version == 4 else limits.prefix_min_v6):
            return f"prefix_min_v{network.version}"
    return None


def is_wide(draft: Draft, spec: PolicySpec) -> bool:
    """Return whether the policy reaches so wide that it always needs an operator."""
    limits = draft.genesis.limits
    is_long = spec.guardrails.ttl_seconds > limits.wide_ttl_s
    return is_long or bool(spec.target.cidrs) or target_count(spec) > limits.wide_targets


def is_above_floors(draft: Draft, confidence_ppm: int, severity: int) -> bool:
    """Return whether an anomaly is sure and severe enough to cause anything without an operator."""
    limits = draft.genesis.limits
    return confidence_ppm >= limits.confidence_floor_ppm and severity >= limits.severity_floor


def corroboration(draft: Draft, request: RequestRecord, spec: PolicySpec) -> Grant | None:
    """Case (a): return the grant if enough sites have reported this subject, with these targets in it, within the window."""
    spans = target_spans(spec)
    agreeing = [
        (producer, site)
        for producer, site, report in recent_reports(draft, subject_of(request))
        if is_about(report.entity, report.victim, spec, spans)
    ]
    if len({site for _, site in agreeing}) < draft.genesis.governance.corroborating_sites:
        return None
    return Grant(Why.CORROBORATED, tuple(producer for producer, _ in agreeing))


def recent_reports(draft: Draft, subject: Subject) -> list[tuple[bytes, str, AnomalyRecord]]:
    """Return (producer, its site, its newest report) of the subject within the window, above the floors, by producer."""
    since = draft.time_ms - draft.genesis.governance.corroboration_window_ms
    found = []
    for producer, report in draft.reports(subject):
        registered = draft.producers.get(producer)
        if registered is None or report.admitted_ms < since:
            continue
        if is_above_floors(draft, report.confidence_ppm, report.severity):
            found.append((producer, registered.site, report))
    return found


def is_about_victim(request: RequestRecord, spec: PolicySpec) -> bool:
    """Return whether the policy limits traffic to the victim and does not touch the entity: forged sources differ by site."""
    return bool(request.victim) and spec.action is Action.RATE_LIMIT and not _lies_in(target_spans(spec), [request.entity])


def is_about(entity: str, victim: str, spec: PolicySpec, spans: tuple[Span, ...]) -> bool:
    """Return whether every target is what an anomaly with this entity and victim is about."""
    return _lies_in(spans, [entity, victim] if _spares_victim(spec) else [entity])


def _spares_victim(spec: PolicySpec) -> bool:
    limit = spec.packet_limit()
    return limit is not None and limit.max_actions >= VICTIM_RATE_MIN_PER_S * limit.window_s


def _lies_in(spans: tuple[Span, ...], texts: list[str]) -> bool:
    about = [span for span in map(_span_of_text, texts) if span is not None]
    return all(any(own.holds(span) for own in about) for span in spans)


def _span_of_text(text: str) -> Span | None:
    try:
        return span_of(parse_network(text))
    except AddressError:
        return None


def budget_answer(draft: Draft, request: RequestRecord, spec: PolicySpec) -> BudgetAnswer:
    """Case (c): return whether the producer's own budget carries the request; a renewal counts per minute, not as active."""
    registered = draft.producers.get(request.producer)
    if registered is None or not registered.budget:
        return BudgetAnswer.UNFIT
    budget, spans = registered.budget[0], target_spans(spec)
    if spec.guardrails.ttl_seconds > budget.max_ttl_s or is_wide(draft, spec):
        return BudgetAnswer.UNFIT
    seen = spans_of(list(registered.networks))
    inside = all(any(own.holds(span) for own in seen) for span in spans)
    if not inside or not is_about(request.entity, request.victim, spec, spans):
        return BudgetAnswer.UNFIT
    active = draft.tally(request.producer).budget_targets
    decision = draft.decision_on(request.rule_key)
    more = 0 if decision is not None and decision.holder == request.producer else len(spans)
    if active + more > budget.max_active or len(recent_spending(draft, request.producer)) + len(spans) > budget.max_per_minute:
        return BudgetAnswer.SPENT
    return BudgetAnswer.FITS


def recent_spending(draft: Draft, producer: bytes) -> tuple[int, ...]:
    """Return when the producer spent its budget within the last minute."""
    record = draft.spending.get(producer)
    return () if record is None else tuple(when for when in record.spent_ms if when > draft.time_ms - MINUTE_MS)


def recent_openings(opened: tuple[int, ...], time_ms: int) -> tuple[tuple[int, int], ...]:
    """Return (second, count) of the new targets that may lie within the last minute; a second counts until all is past."""
    pairs = zip(opened[::2], opened[1::2], strict=True)
    return tuple((second, count) for second, count in pairs if (second + _SECONDS_COUNTED) * 1_000 > time_ms)


def room_for_targets(draft: Draft) -> int:
    """Return how many targets detectors may open now, by the active and by the per-minute limit."""
    limits = draft.genesis.limits
    recent = sum(count for _, count in recent_openings(draft.opened, draft.time_ms))
    return max(0, min(limits.targets_active - draft.targets_detectors, limits.targets_per_minute - recent))


def room_again_ms(draft: Draft, targets: int) -> int | None:
    """Return the block time from which detectors may open this many targets; None when only an ending can make room."""
    limits = draft.genesis.limits
    if limits.targets_active - draft.targets_detectors < targets or targets > limits.targets_per_minute:
        return None
    recent = recent_openings(draft.opened, draft.time_ms)
    total, when = sum(count for _, count in recent), draft.time_ms
    for second, count in recent:
        if limits.targets_per_minute - total >= targets:
            break
        total -= count
        when = (second + _SECONDS_COUNTED) * 1_000
    return when


def anomaly_subject(entity: str) -> str:
    """Return the one form of an entity: an address or prefix as we write it, any other text as it is."""
    try:
        return str(parse_address(entity))
    except AddressError:
        span = _span_of_text(entity)
        return entity if span is None else str(parse_network(entity))
