"""The operator reducer: what people order, as carefully bounded as what detectors ask for.

Rules: one operator may approve, reject, revoke, add, allow, label, mute, and throw the kill switch. The key ring, the protected
networks and the validator set need m of n operators to sign the same change (genesis; two where there are two). A shield that
is raised ends the decisions it meets. The constants (loopback, multicast, …) cannot be lowered by anybody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cybermesh.addresses import AddressError, parse_network
from cybermesh.ledger.decisions import end_decision
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.encoding import encode
from cybermesh.ledger.governance import Grant, rule_key
from cybermesh.ledger.index import Span, spans_of
from cybermesh.ledger.keyring import KeyChange, apply_key_change, apply_member_change, read_key_change, read_member_change
from cybermesh.ledger.params import read_params
from cybermesh.ledger.receipts import Code, Ending, OperatorEffect, Why
from cybermesh.ledger.records import DecisionRecord, ProposalRecord, RequestRecord, ShieldRecord, Stage
from cybermesh.ledger.requests import DETAIL_CHARS_MAX, Verdict, carry_out, refuse_target
from cybermesh.messages import OperatorAction, OperatorCommand
from cybermesh.policy import Action, PolicyError, parse
from cybermesh.strictjson import JsonError, Reader, text_of

_NETWORKS_MAX: Final = 2_000
_ID_CHARS_MAX: Final = 128
_TIME_MS_MAX: Final = 1 << 53


def reduce_operator(draft: Draft, message: OperatorCommand) -> Verdict:
    """Treat an admitted operator command."""
    try:
        reader = Reader("", read_params(message.params))
        reader.get("id")
        reader.get("action")
        return _REDUCERS[OperatorAction(message.action)](draft, message, reader)
    except (JsonError, PolicyError) as fault:
        return Verdict(Code.BAD_COMMAND, fault.path[:DETAIL_CHARS_MAX])


def _effect(message: OperatorCommand, subject: str, detail: str = "", operators: tuple[bytes, ...] = ()) -> OperatorEffect:
    return OperatorEffect(action=message.action, detail=detail, operators=operators or (message.producer_id,), subject=subject)


def _policy_id(reader: Reader) -> str:
    name = reader.text("policy_id")
    reader.text("reason")
    reader.finish()
    if not name:
        reader.fail("policy_id", "is required")
    return name


def _approve(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    """Case (b) for a kept policy; the limits of detectors do not hold, those of operators do."""
    request = draft.requests.get(_policy_id(reader))
    if request is None or request.stage is Stage.WAITING:
        return Verdict(Code.UNKNOWN_POLICY)
    if draft.is_killed:
        return Verdict(Code.KILL_SWITCH)
    spec = parse(request.rule_data)
    refused = refuse_target(draft, spec)
    if refused is not None:
        return refused
    grant = Grant(Why.APPROVED, (request.producer,), (message.producer_id,))
    verdict = carry_out(draft, request, spec, grant)
    return replace(verdict, effects=(*verdict.effects, _effect(message, request.policy_id)))


def _reject(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    name = _policy_id(reader)
    if name not in draft.requests:
        return Verdict(Code.UNKNOWN_POLICY)
    draft.drop_request(name)
    return Verdict(Code.OK, "", (_effect(message, name),))


def _revoke(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    record = draft.decisions.get(_policy_id(reader))
    if record is None:
        return Verdict(Code.UNKNOWN_POLICY)
    ended = end_decision(draft, record, Ending.REVOKED)
    return Verdict(Code.OK, "", (ended, _effect(message, record.policy_id)))


def _add(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    """An operator's own policy: decided at once, within shields and limits."""
    raw = reader.get("policy")
    reader.text("reason")
    reader.finish()
    if not isinstance(raw, dict):
        reader.fail("policy", "is required")
    spec = parse(raw)
    if spec.action is Action.REMOVE:
        return Verdict(Code.NOT_PERMITTED, "policy.action")
    refused = refuse_target(draft, spec)
    if refused is not None:
        return refused
    if draft.is_killed:
        return Verdict(Code.KILL_SWITCH)
    key = rule_key(spec)
    active = draft.decision_on(key)
    held = draft.decisions.get(spec.policy_id) or draft.requests.get(spec.policy_id)
    # Also where the rule is in force under another id: what somebody else asked for under this one must not go for it.
    if held is not None and (active is None or held.rule_key != key):
        return Verdict(Code.POLICY_ID_TAKEN)
    request = RequestRecord(
        anomaly_id="", approvers=(), confidence_ppm=0, deadline_ms=0, entity="", evidence_id="", is_about_victim=False,
        is_corroborable=False, is_woken=False, policy_id=spec.policy_id, producer=message.producer_id, reporters=(),
        request_id=message.id, rule_data=spec.to_json(), rule_key=key, seq=0, severity=0, stage=Stage.PENDING, type="",
        victim="", why="",
    )  # fmt: skip
    return carry_out(draft, request, spec, Grant(Why.APPROVED, (), (message.producer_id,)))


def _label(_draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    """A judgement about an anomaly; recorded for the detectors, no rule depends on it."""
    anomaly_id, label = reader.text("anomaly_id", _ID_CHARS_MAX), reader.text("label", _ID_CHARS_MAX)
    reader.text("reason")
    reader.finish()
    if not anomaly_id or not label:
        reader.fail("label" if anomaly_id else "anomaly_id", "is required")
    return Verdict(Code.OK, "", (_effect(message, anomaly_id, label),))


def _mute(_draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    """Alerts about an entity that nobody wants to see until a time; recorded, no rule depends on it."""
    entity, kind = reader.text("entity"), reader.text("type")
    until_ms = reader.integer("until_ms", 0, _TIME_MS_MAX)
    reader.text("reason")
    reader.finish()
    if not entity or until_ms is None:
        reader.fail("until_ms" if entity else "entity", "is required")
    digest = hashlib.sha256(b"cm/mute/1" + message.signature + entity.encode()).hexdigest()
    return Verdict(Code.OK, "", (_effect(message, digest, f"{kind}:{until_ms}"),))


def _kill_switch(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    """Stop or allow new rules; what is in force runs out as it would."""
    if not reader.has("on"):
        reader.fail("on", "is required")
    is_on = reader.boolean("on")
    reader.text("reason")
    reader.finish()
    draft.is_killed = is_on
    return Verdict(Code.OK, "", (_effect(message, "kill_switch", "on" if is_on else "off"),))


def _network(value: object, path: str) -> str:
    try:
        return str(parse_network(text_of(value, path)))
    except AddressError as fault:
        raise JsonError(path, str(fault)) from fault


def _network_change(reader: Reader) -> tuple[list[str], list[str]]:
    added = sorted(set(reader.items("add", _NETWORKS_MAX, _network)))
    removed = sorted(set(reader.items("remove", _NETWORKS_MAX, _network)))
    reader.text("reason")
    reader.finish()
    if not added and not removed:
        reader.fail("add", "or remove must name a network")
    return added, removed


def _allow_list(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    added, removed = _network_change(reader)
    draft.change_allowed(dict.fromkeys(added, ShieldRecord(origin=message.producer_id.hex())), removed)
    _end_shielded(draft, spans_of(added), Ending.ALLOWED)
    return Verdict(Code.OK, "", (_effect(message, "allow_list", f"+{len(added)} -{len(removed)}"),))


def _protected_networks(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    added, removed = _network_change(reader)
    operators = _signatures(draft, message, f"{added} {removed}")
    if isinstance(operators, Verdict):
        return operators
    draft.change_protected(dict.fromkeys(added, ShieldRecord(origin="operators")), removed)
    _end_shielded(draft, spans_of(added), Ending.PROTECTED)
    return Verdict(Code.OK, "", (_effect(message, "protected_networks", f"+{len(added)} -{len(removed)}", operators),))


def _end_shielded(draft: Draft, shields: tuple[Span, ...], ending: Ending) -> None:
    """Have the decisions that meet a new shield ended in this block's system part."""
    for record in draft.decisions_meeting(shields):
        _end_soon(draft, record, ending)


def _end_soon(draft: Draft, record: DecisionRecord, ending: Ending) -> None:
    draft.put_decision(replace(record, ending=ending))


def _key_ring(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    change = read_key_change(reader)
    fault = change.fault(draft)
    if fault is not None:
        return Verdict(Code.BAD_COMMAND, fault)
    operators = _signatures(draft, message, encode(change).decode())
    if isinstance(operators, Verdict):
        return operators
    apply_key_change(draft, change)
    for producer in change.removed:
        for name in draft.held_by(producer):
            record = draft.decisions.get(name)
            assert record is not None
            _end_soon(draft, record, Ending.KEY_REVOKED)
    return Verdict(Code.OK, "", (_effect(message, "key_ring", _summary(change), operators),))


def _summary(change: KeyChange) -> str:
    added, removed = len(change.added) + len(change.added_operators), len(change.removed) + len(change.removed_operators)
    return f"+{added} -{removed}"


def _validator_set(draft: Draft, message: OperatorCommand, reader: Reader) -> Verdict:
    """A new committee: its new members must have shown that they run, and a block has one change at most."""
    change = read_member_change(reader)
    fault = change.fault(draft)
    if fault is not None:
        return Verdict(Code.BAD_COMMAND, fault)
    unready = "block" if draft.next_committee is not None else change.unready(draft)
    if unready is not None:
        return Verdict(Code.NOT_READY, unready[:DETAIL_CHARS_MAX])
    operators = _signatures(draft, message, change.plain())
    if isinstance(operators, Verdict):
        return operators
    effect = apply_member_change(draft, change)
    summary = f"+{len(change.added)} -{len(change.removed)}"
    return Verdict(Code.OK, "", (effect, _effect(message, "validator_set", summary, operators)))


def _signatures(draft: Draft, message: OperatorCommand, change: str) -> tuple[bytes, ...] | Verdict:
    """Count this operator's signature under a change; return all signers when they are enough, else what to answer."""
    key = hashlib.sha256(b"cm/proposal/1" + message.action.encode() + b"|" + change.encode()).digest()
    known = draft.proposals.get(key)
    before = () if known is None else tuple(signer for signer in known.operators if signer in draft.operators)
    operators = tuple(sorted({*before, message.producer_id}))
    needed = min(draft.genesis.governance.operators_needed, max(1, len(draft.operators)))
    if len(operators) >= needed:
        if known is not None:
            draft.proposals.drop(key)
        return operators
    deadline_ms = draft.time_ms + 1_000 * draft.genesis.governance.approval_ttl_s if known is None else known.deadline_ms
    draft.put_proposal(key, ProposalRecord(action=message.action, deadline_ms=deadline_ms, operators=operators))
    return Verdict(Code.AWAITING_OPERATORS, f"{len(operators)} of {needed}", (_effect(message, key.hex(), "", operators),))


_REDUCERS: Final[dict[OperatorAction, Callable[[Draft, OperatorCommand, Reader], Verdict]]] = {
    OperatorAction.APPROVE: _approve,
    OperatorAction.REJECT: _reject,
    OperatorAction.REVOKE: _revoke,
    OperatorAction.ADD: _add,
    OperatorAction.LABEL: _label,
    OperatorAction.MUTE: _mute,
    OperatorAction.ALLOW_LIST: _allow_list,
    OperatorAction.KEY_RING: _key_ring,
    OperatorAction.VALIDATOR_SET: _validator_set,
    OperatorAction.PROTECTED_NETWORKS: _protected_networks,
    OperatorAction.KILL_SWITCH: _kill_switch,
}
