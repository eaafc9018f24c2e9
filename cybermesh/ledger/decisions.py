"""What a decision goes through: opened, renewed with escalation, ended. Each step is one effect with the next number.

Rules: a decision always has an end; a renewal never shortens it; the time doubles once per expired TTL, up to the maximum, and
never on one producer's word alone; an IPv6 host whose bans keep being needed becomes its /64, unless that would touch what is
shielded. That asking for more than an hour or for a prefix needs an operator is about the asking: an escalation goes on to the
longest time and to the /64 by itself, since each step of it is agreed to anew. ``rule_data`` is the policy as agents must apply
it: the decision's id, the time now granted.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from cybermesh.ledger.draft import Draft
from cybermesh.ledger.governance import Grant, recent_openings, recent_spending, shield_fault, target_spans
from cybermesh.ledger.receipts import Change, DecisionEffect, Ending, Why
from cybermesh.ledger.records import DecisionRecord, OffenceRecord, RequestRecord, SpendingRecord
from cybermesh.policy import PolicySpec, parse

WIDENING_LEVEL: Final = 3
"""After so many doublings an IPv6 host becomes its /64: its owner changes addresses inside it at will."""

NOTICEABLE_MS: Final = 1_000
"""A renewal that changes nothing but moves the end by less than this is none: two sites often ask in the same breath."""

_WIDE_V6: Final = 64


def open_decision(draft: Draft, request: RequestRecord, spec: PolicySpec, grant: Grant, *, by_operator: bool) -> DecisionEffect:
    """Put a rule in force that is not yet; the caller has checked shields, limits and room."""
    offence = draft.offences.get(request.rule_key)
    ttl_s, level = spec.guardrails.ttl_seconds, 0
    # A producer that acts alone gets what its budget says, whoever the offender is.
    if offence is not None and offence.until_ms > draft.time_ms and grant.why is not Why.BUDGET:
        ttl_s, level = _doubled(draft, offence.ttl_s, ttl_s), offence.level + 1
    wide = _widened(draft, spec, level)
    # Most rules are put in force as they were asked for, and then their bytes are there already.
    is_as_asked = wide is spec and ttl_s == spec.guardrails.ttl_seconds and request.policy_id == spec.policy_id
    spec = wide
    record = DecisionRecord(
        action=spec.action,
        approvers=grant.approvers,
        direction=spec.target.direction,
        ending=Ending.NONE,
        expires_at_ms=draft.time_ms + 1_000 * ttl_s,
        holder=grant.holder,
        hosts=len(spec.target.ips),
        is_operators=by_operator,
        level=level,
        level_since_ms=draft.time_ms,
        networks=len(spec.target.cidrs),
        opened_at_ms=draft.time_ms,
        policy_id=request.policy_id,
        producer=request.producer,
        reporters=grant.reporters,
        request_id=request.request_id,
        rule_data=request.rule_data if is_as_asked else _rule_data(spec, request.policy_id, ttl_s),
        rule_key=request.rule_key,
        rule_type=spec.rule_type,
        ttl_s=ttl_s,
        why=grant.why,
    )
    draft.put_decision(record)
    if not by_operator:
        _count_opening(draft, record.targets)
    if grant.holder:
        spend(draft, grant.holder, record.targets)
    return _effect(draft, record, Change.OPENED)


def renew_decision(
    draft: Draft, record: DecisionRecord, request: RequestRecord, spec: PolicySpec, grant: Grant
) -> DecisionEffect | None:
    """Extend a decision in force; None when that would change nothing worth saying."""
    asked_s = spec.guardrails.ttl_seconds
    ttl_s, level, since_ms, rule = record.ttl_s, record.level, record.level_since_ms, parse(record.rule_data)
    if grant.why is Why.BUDGET:
        expires_ms = draft.time_ms + 1_000 * min(asked_s, ttl_s)
    else:
        if draft.time_ms >= since_ms + 1_000 * ttl_s:
            ttl_s, level, since_ms = _doubled(draft, ttl_s, asked_s), level + 1, draft.time_ms
            rule = _widened(draft, rule, level)
        ttl_s = max(ttl_s, asked_s)
        expires_ms = draft.time_ms + 1_000 * ttl_s
    expires_ms = max(expires_ms, record.expires_at_ms)
    is_same_case = grant.why is record.why and grant.holder == record.holder
    if is_same_case and ttl_s == record.ttl_s and expires_ms - record.expires_at_ms < NOTICEABLE_MS:
        return None
    renewed = replace(
        record,
        approvers=tuple(sorted({*record.approvers, *grant.approvers})),
        expires_at_ms=expires_ms,
        holder=grant.holder,
        hosts=len(rule.target.ips),
        is_operators=record.is_operators or grant.why is Why.APPROVED,
        level=level,
        level_since_ms=since_ms,
        networks=len(rule.target.cidrs),
        reporters=tuple(sorted({*record.reporters, *grant.reporters})),
        request_id=request.request_id,
        rule_data=_rule_data(rule, record.policy_id, ttl_s),
        ttl_s=ttl_s,
        why=grant.why,
    )
    draft.put_decision(renewed)
    if grant.holder:
        spend(draft, grant.holder, renewed.targets)
    return _effect(draft, renewed, Change.RENEWED)


def end_decision(draft: Draft, record: DecisionRecord, ending: Ending) -> DecisionEffect:
    """Take a rule out of force. Only one that ran its time is held against the offender."""
    ended = replace(record, ending=ending)
    draft.drop_decision(record.policy_id)
    if ending is Ending.EXPIRED:
        until_ms = draft.time_ms + 1_000 * record.ttl_s
        draft.put_offence(record.rule_key, OffenceRecord(level=record.level, ttl_s=record.ttl_s, until_ms=until_ms))
    elif record.rule_key in draft.offences:
        draft.offences.drop(record.rule_key)
    return _effect(draft, ended, Change.ENDED)


def spend(draft: Draft, producer: bytes, targets: int) -> None:
    """Write down that the producer's budget paid for ``targets`` targets now."""
    spent = (*recent_spending(draft, producer), *(draft.time_ms,) * targets)
    draft.spending.put(producer, SpendingRecord(spent_ms=spent))


def _count_opening(draft: Draft, targets: int) -> None:
    pairs = dict(recent_openings(draft.opened, draft.time_ms))
    second = draft.time_ms // 1_000
    pairs[second] = pairs.get(second, 0) + targets
    draft.opened = tuple(number for pair in sorted(pairs.items()) for number in pair)


def _doubled(draft: Draft, ttl_s: int, asked_s: int) -> int:
    return min(max(2 * ttl_s, asked_s), draft.genesis.limits.ttl_max_s)


def _widened(draft: Draft, spec: PolicySpec, level: int) -> PolicySpec:
    """Return the policy with its IPv6 hosts as /64 prefixes, if the level says so and no shield nor limit is in the way."""
    if level < WIDENING_LEVEL or draft.genesis.limits.prefix_min_v6 > _WIDE_V6:
        return spec
    wide = {
        IPv6Network((int(address) >> _WIDE_V6 << _WIDE_V6, _WIDE_V6))
        for address in spec.target.ips
        if isinstance(address, IPv6Address)
    }
    if not wide:
        return spec
    kept = tuple(address for address in spec.target.ips if not isinstance(address, IPv6Address))
    cidrs = {*spec.target.cidrs, *wide}
    prefixes = tuple(sorted(cidrs, key=lambda net: (net.version, int(net.network_address), net.prefixlen)))
    target = replace(spec.target, ips=kept, cidrs=prefixes)
    guardrails = replace(spec.guardrails, cidr_max_prefix_len=None)
    widened = replace(spec, target=target, guardrails=guardrails)
    allowlist = spec.guardrails.allowlist
    if allowlist.ips or allowlist.cidrs or shield_fault(draft, target_spans(widened)) is not None:
        return spec
    return widened


def _rule_data(spec: PolicySpec, policy_id: str, ttl_s: int) -> bytes:
    return replace(spec, policy_id=policy_id, guardrails=replace(spec.guardrails, ttl_seconds=ttl_s)).to_json()


def _effect(draft: Draft, record: DecisionRecord, change: Change) -> DecisionEffect:
    return DecisionEffect(
        action=record.action,
        approvers=record.approvers,
        change=change,
        decision_seq=draft.next_decision(record.rule_data),
        direction=record.direction,
        ending=record.ending,
        expires_at_ms=record.expires_at_ms,
        hosts=record.hosts,
        networks=record.networks,
        opened_at_ms=record.opened_at_ms,
        policy_id=record.policy_id,
        reporters=record.reporters,
        request_id=record.request_id,
        rule_hash=hashlib.sha256(record.rule_data).digest(),
        rule_type=record.rule_type,
        ttl_s=record.ttl_s,
        why=record.why,
    )
