"""The policy reducer: from a signed PolicyEvent to a decision, a refusal, or a place where it waits.

The way of a request: read strictly → shields and limits → its references are there, or WAITING → ``consider``: floors, who
grants it (two sites, or the producer's budget), or PENDING for somebody to agree → room, or DEFERRED → a decision. ``consider``
is asked again whenever what a request waits for has happened, and always judges from the beginning: shields and keys may have
changed meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from cybermesh.ledger.decisions import open_decision, renew_decision
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.governance import (
    BudgetAnswer,
    Grant,
    budget_answer,
    corroboration,
    is_about,
    is_about_victim,
    is_above_floors,
    is_wide,
    limit_fault,
    room_for_targets,
    rule_key,
    shield_fault,
    target_count,
    target_spans,
)
from cybermesh.ledger.params import read_params
from cybermesh.ledger.receipts import Code, Effect, Why
from cybermesh.ledger.records import RequestRecord, Stage
from cybermesh.messages import Policy
from cybermesh.policy import Action, PolicyError, PolicySpec, parse
from cybermesh.strictjson import JsonError

DETAIL_CHARS_MAX: Final = 128
_OWN_KEYS: Final = frozenset({"id", "rule", "anomaly_id", "evidence_id"})
_ID_CHARS_MAX: Final = 128
_ALIAS: Final = "~"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a receipt will say."""

    code: Code
    detail: str = ""
    effects: tuple[Effect, ...] = ()


def reduce_policy(draft: Draft, message: Policy) -> Verdict:
    """Treat an admitted PolicyEvent."""
    try:
        content = read_params(message.params)
        spec = parse(_policy_of(content, message))
        anomaly_id, evidence_id = _reference(content, "anomaly_id"), _reference(content, "evidence_id")
    except (PolicyError, JsonError) as fault:
        return Verdict(Code.BAD_POLICY, fault.path[:DETAIL_CHARS_MAX])
    if spec.action is Action.REMOVE or _ALIAS in spec.policy_id:
        return Verdict(Code.NOT_PERMITTED, "action" if spec.action is Action.REMOVE else "policy_id")
    refused = refuse_target(draft, spec)
    if refused is not None:
        return refused
    key = rule_key(spec)
    policy_id = _own_id(draft, spec.policy_id, message.producer_id, key)
    if policy_id is None:
        return Verdict(Code.POLICY_ID_TAKEN)
    needs_evidence = draft.genesis.governance.evidence_required
    if not anomaly_id or (needs_evidence and not evidence_id):
        return Verdict(Code.UNKNOWN_REFERENCE, "evidence_id" if anomaly_id else "anomaly_id")
    request = RequestRecord(
        anomaly_id=anomaly_id,
        approvers=(),
        confidence_ppm=0,
        deadline_ms=draft.time_ms + draft.genesis.governance.waiting_ms,
        entity="",
        evidence_id=evidence_id if needs_evidence else "",
        is_about_victim=False,
        is_corroborable=False,
        is_woken=False,
        policy_id=policy_id,
        producer=message.producer_id,
        reporters=(),
        request_id=message.id,
        rule_data=spec.to_json(),
        rule_key=key,
        seq=draft.next_admission(),
        severity=0,
        stage=Stage.WAITING,
        type="",
        victim="",
        why="",
    )
    joined = with_references(draft, request)
    if joined is None:
        return _keep(draft, request, "waiting", draft.genesis.limits.waiting_per_producer, Code.WAITING)
    return _judge(draft, joined, spec)


def _policy_of(content: dict[str, object], message: Policy) -> dict[str, object]:
    """Return the policy inside the params: their other keys, with the id and the rule type where they are not repeated."""
    policy = {key: value for key, value in content.items() if key not in _OWN_KEYS}
    if policy.setdefault("policy_id", message.id) != message.id:
        raise PolicyError("policy_id", "is not the message's id")
    policy.setdefault("rule_type", message.rule)
    return policy


def _reference(content: dict[str, object], name: str) -> str:
    value = content.get(name, "")
    if not isinstance(value, str) or len(value.encode()) > _ID_CHARS_MAX:
        raise PolicyError(name, "is not an id")
    return value


def refuse_target(draft: Draft, spec: PolicySpec) -> Verdict | None:
    """Return why nobody may have this policy: its targets are shielded or it breaks a limit."""
    shielded = shield_fault(draft, target_spans(spec))
    if shielded is not None:
        return Verdict(shielded)
    limit = limit_fault(draft, spec)
    return None if limit is None else Verdict(Code.OUT_OF_LIMITS, limit)


def _own_id(draft: Draft, wanted: str, producer: bytes, key: bytes) -> str | None:
    """Return the id the ledger knows the request by, None when the producer uses it for another rule.

    An id that somebody else has taken does not stop the request: else one producer could stop another's policies by racing it.
    """
    for policy_id in (wanted, f"{wanted[: _ID_CHARS_MAX - 17]}{_ALIAS}{producer[:8].hex()}"):
        decision, request = draft.decisions.get(policy_id), draft.requests.get(policy_id)
        held = decision or request
        if held is None or (held.producer == producer and held.rule_key == key):
            return policy_id
        if held.producer == producer:
            return None
    return None


def with_references(draft: Draft, request: RequestRecord) -> RequestRecord | None:
    """Return the request with what its anomaly says, None while one of its references is missing."""
    anomaly = draft.anomalies.get(request.producer + request.anomaly_id.encode())
    if anomaly is None or (request.evidence_id and request.producer + request.evidence_id.encode() not in draft.evidence):
        return None
    return replace(
        request,
        confidence_ppm=anomaly.confidence_ppm,
        entity=anomaly.entity,
        severity=anomaly.severity,
        type=anomaly.type,
        victim=anomaly.victim,
    )


def consider(draft: Draft, request: RequestRecord) -> Verdict:
    """Decide a request whose references are known; afterwards it is kept only if the code says so."""
    if request.producer not in draft.producers:
        return _drop(draft, request, Code.UNKNOWN_PRODUCER)
    spec = parse(request.rule_data)
    refused = refuse_target(draft, spec)
    if refused is not None:
        return _drop(draft, request, refused.code, refused.detail)
    return _judge(draft, request, spec)


def _judge(draft: Draft, request: RequestRecord, spec: PolicySpec) -> Verdict:
    """Find who grants the request; its producer and its targets have just been looked at."""
    about_victim = is_about_victim(request, spec)
    if about_victim != request.is_about_victim:
        request = replace(request, is_about_victim=about_victim)
    if draft.is_killed:
        return _stop(draft, request)
    if not is_above_floors(draft, request.confidence_ppm, request.severity):
        return _drop(draft, request, Code.BELOW_FLOOR)
    wide = is_wide(draft, spec)
    grant = None if wide else corroboration(draft, request, spec)
    if grant is not None:
        return carry_out(draft, request, spec, grant)
    active = draft.decision_on(request.rule_key)
    if active is not None and not wide and active.holder != request.producer:
        return _drop(draft, request, Code.ALREADY_ACTIVE, active.policy_id)
    answer = budget_answer(draft, request, spec)
    if answer is BudgetAnswer.FITS:
        return carry_out(draft, request, spec, Grant(Why.BUDGET, (request.producer,), (), request.producer))
    if answer is BudgetAnswer.SPENT:
        return _drop(draft, request, Code.OVER_BUDGET)
    return _await_agreement(draft, request, spec, wide=wide)


def _stop(draft: Draft, request: RequestRecord) -> Verdict:
    """The kill switch is on: nothing new is decided, what is pending stays so."""
    if request.stage is not Stage.PENDING:
        return _drop(draft, request, Code.KILL_SWITCH)
    draft.put_request(replace(request, is_woken=False))
    return Verdict(Code.PENDING)


def _await_agreement(draft: Draft, request: RequestRecord, spec: PolicySpec, *, wide: bool) -> Verdict:
    if request.stage is Stage.PENDING:
        draft.put_request(replace(request, is_woken=False))
        return Verdict(Code.PENDING)
    # A producer that repeats itself keeps one place, not many: the newest request stands for all with its rule.
    for other in draft.pending_with(request.rule_key):
        held = draft.requests.get(other)
        if held is None or held.producer != request.producer:
            continue
        # What an operator has been shown under an id must not change under it.
        if other == request.policy_id and held.rule_data != request.rule_data:
            return Verdict(Code.POLICY_ID_TAKEN)
        draft.drop_request(other)
    limit, ttl_s = draft.genesis.limits.pending_per_producer, draft.genesis.governance.approval_ttl_s
    pending = replace(
        request,
        deadline_ms=draft.time_ms + 1_000 * ttl_s,
        is_corroborable=not wide and is_about(request.entity, request.victim, spec, target_spans(spec)),
        is_woken=False,
        stage=Stage.PENDING,
    )
    return _keep(draft, pending, "pending", limit, Code.PENDING)


def carry_out(draft: Draft, request: RequestRecord, spec: PolicySpec, grant: Grant) -> Verdict:
    """Turn a granted request into a decision or a renewal, or defer it when detectors have filled their limits."""
    by_operator = grant.why is Why.APPROVED
    active = draft.decision_on(request.rule_key)
    if active is not None:
        _settle(draft, request)
        effect = renew_decision(draft, active, request, spec, grant)
        wake_same_rule(draft, request.rule_key)
        if effect is None:
            return Verdict(Code.ALREADY_ACTIVE, active.policy_id)
        return Verdict(Code.OK, "", (effect,))
    targets = target_count(spec)
    if by_operator:
        total = draft.targets_detectors + draft.targets_operators
        if total + targets > draft.genesis.limits.targets_active_operators:
            return Verdict(Code.OUT_OF_LIMITS, "targets_active_operators")
    elif targets > room_for_targets(draft):
        return _defer(draft, request, spec, grant)
    _settle(draft, request)
    effect = open_decision(draft, request, spec, grant, by_operator=by_operator)
    wake_same_rule(draft, request.rule_key)
    return Verdict(Code.OK, "", (effect,))


def _defer(draft: Draft, request: RequestRecord, spec: PolicySpec, grant: Grant) -> Verdict:
    deferred = replace(
        request,
        approvers=grant.approvers,
        deadline_ms=draft.time_ms + 1_000 * spec.guardrails.ttl_seconds,
        is_woken=False,
        reporters=grant.reporters,
        stage=Stage.DEFERRED,
        why=grant.why,
    )
    return _keep(draft, deferred, "deferred", draft.genesis.limits.deferred_per_producer, Code.DEFERRED)


def release_deferred(draft: Draft, request: RequestRecord) -> Verdict:
    """Carry out what was granted before and had to wait for room; the caller has taken it out and made sure of the room."""
    if request.deadline_ms <= draft.time_ms:
        return Verdict(Code.DEFERRED_EXPIRED)
    spec = parse(request.rule_data)
    refused = refuse_target(draft, spec)
    if refused is not None:
        return _drop(draft, request, refused.code, refused.detail)
    if request.producer not in draft.producers:
        return _drop(draft, request, Code.UNKNOWN_PRODUCER)
    holder = request.producer if request.why == Why.BUDGET else b""
    if holder and budget_answer(draft, request, spec) is not BudgetAnswer.FITS:
        return _drop(draft, request, Code.OVER_BUDGET)
    return carry_out(draft, request, spec, Grant(Why(request.why), request.reporters, request.approvers, holder))


def wake_request(draft: Draft, policy_id: str) -> None:
    """Have a kept policy looked at in this block's system part."""
    request = draft.requests.get(policy_id)
    if request is not None and not request.is_woken:
        draft.put_request(replace(request, is_woken=True))


def wake_same_rule(draft: Draft, key: bytes) -> None:
    """Have other policies with the rule looked at: what they wait for has been decided."""
    for policy_id in draft.pending_with(key):
        wake_request(draft, policy_id)


def _keep(draft: Draft, request: RequestRecord, name: str, limit: int, code: Code) -> Verdict:
    known = draft.requests.get(request.policy_id)
    has_place = known is not None and known.stage is request.stage
    if not has_place and getattr(draft.tally(request.producer), name) >= limit:
        return _drop(draft, request, Code.QUEUE_FULL, name)
    draft.put_request(request)
    return Verdict(code)


def _drop(draft: Draft, request: RequestRecord, code: Code, detail: str = "") -> Verdict:
    _settle(draft, request)
    return Verdict(code, detail)


def _settle(draft: Draft, request: RequestRecord) -> None:
    """Take a request out of what is kept, if it is there; one of somebody else with its id stays and gets its own receipt."""
    kept = draft.requests.get(request.policy_id)
    if kept is not None and kept.producer == request.producer:
        draft.drop_request(request.policy_id)
