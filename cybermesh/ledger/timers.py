"""What time alone causes: the part of a block after its transactions, and before nothing else.

At most so many system receipts per block (genesis), the oldest first, the rest in the next blocks. They are treated and logged
in the order (kind, id): ended decisions make room first, deferred policies take it, then requests that were woken or ran out
of time. Forgetting what can no longer matter gives no receipt and is bounded too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from cybermesh.ledger.decisions import end_decision
from cybermesh.ledger.draft import (
    DUE_DECISION,
    DUE_DEFERRED,
    DUE_PROPOSAL,
    DUE_REQUEST,
    FORGET_ANOMALY,
    FORGET_EVIDENCE,
    SEQ_BYTES,
    Draft,
)
from cybermesh.ledger.governance import room_again_ms, room_for_targets, target_count
from cybermesh.ledger.receipts import Code, Ending, Kind, Receipt
from cybermesh.ledger.records import RequestRecord, Stage
from cybermesh.ledger.requests import Verdict, consider, release_deferred, with_references
from cybermesh.ledger.schedule import Due
from cybermesh.policy import parse

FORGOTTEN_MAX: Final = 8_000
"""Records one block forgets at most: more than one block can add, so the backlog never grows."""

_KINDS: Final = {
    DUE_DECISION: Kind.SYSTEM_DECISION,
    DUE_DEFERRED: Kind.SYSTEM_DEFERRED,
    DUE_PROPOSAL: Kind.SYSTEM_PROPOSAL,
    DUE_REQUEST: Kind.SYSTEM_REQUEST,
}


def run_timers(draft: Draft) -> list[Receipt]:
    """Do what is due at the block's time and return the system receipts in their order."""
    _forget(draft)
    due = _take_due(draft)
    receipts = [_receipt(draft, item, _end(draft, item)) for item in due if item.kind == DUE_DECISION]
    leaving = {item.key.decode(): Code.DEFERRED_EXPIRED for item in due if item.kind == DUE_DEFERRED}
    receipts += _treat_deferred(draft, leaving, draft.genesis.block_limits.system_receipts - len(due))
    receipts += [_receipt(draft, item, _lapse(draft, item)) for item in due if item.kind == DUE_PROPOSAL]
    for item in due:
        verdict = _look_at(draft, item) if item.kind == DUE_REQUEST else None
        if verdict is not None:
            receipts.append(_receipt(draft, item, verdict))
    return receipts


def _take_due(draft: Draft) -> list[Due]:
    """Take the live entries that are due off the queue, as many as a block may treat, and return them by (kind, key)."""
    taken: dict[tuple[int, bytes], Due] = {}
    while len(taken) < draft.genesis.block_limits.system_receipts:
        draft.prune_due()
        first = draft.due.first()
        if first is None or first.due_ms > draft.time_ms:
            break
        draft.due = draft.due.without_first()
        taken[first.kind, first.key] = first
    return [taken[place] for place in sorted(taken)]


def _receipt(draft: Draft, due: Due, verdict: Verdict) -> Receipt:
    name = due.key.hex() if due.kind == DUE_PROPOSAL else due.key.decode()
    return _system_receipt(draft, _KINDS[due.kind], name, verdict)


def _system_receipt(draft: Draft, kind: Kind, name: str, verdict: Verdict) -> Receipt:
    return Receipt(code=verdict.code, detail=verdict.detail, effects=verdict.effects, height=draft.height, id=name, kind=kind)


def _end(draft: Draft, due: Due) -> Verdict:
    record = draft.decisions.get(due.key.decode())
    assert record is not None
    return Verdict(Code.OK, "", (end_decision(draft, record, record.ending or Ending.EXPIRED),))


def _lapse(draft: Draft, due: Due) -> Verdict:
    draft.proposals.drop(due.key)
    return Verdict(Code.LAPSED)


def _look_at(draft: Draft, due: Due) -> Verdict | None:
    """Treat a woken or overdue request; None when it just goes on waiting, which is worth no receipt."""
    request = draft.requests.get(due.key.decode())
    # An earlier request of this block may have taken its place.
    if request is None or request.stage is Stage.DEFERRED:
        return None
    if request.stage is Stage.WAITING:
        return _look_at_waiting(draft, request)
    verdict = consider(draft, request)
    if verdict.code is not Code.PENDING:
        return verdict
    if draft.time_ms < request.deadline_ms:
        return None
    draft.drop_request(request.policy_id)
    return Verdict(Code.PENDING_EXPIRED)


def _look_at_waiting(draft: Draft, request: RequestRecord) -> Verdict | None:
    joined = with_references(draft, request)
    if joined is not None:
        draft.drop_request(request.policy_id)
        return consider(draft, joined)
    if draft.time_ms >= request.deadline_ms:
        draft.drop_request(request.policy_id)
        return Verdict(Code.UNKNOWN_REFERENCE)
    draft.put_request(replace(request, is_woken=False))
    return None


def _treat_deferred(draft: Draft, expired: dict[str, Code], count_max: int) -> list[Receipt]:
    """Drop deferred policies that ran out of time and release others while there is room, in the order of their ids."""
    verdicts = {name: Verdict(code) for name, code in expired.items()}
    for name in expired:
        draft.drop_request(name)
    released = {request.policy_id: request for request in _take_releasable(draft, count_max)}
    receipts = []
    for name in sorted({*verdicts, *released}, key=str.encode):
        verdict = verdicts[name] if name in verdicts else release_deferred(draft, released[name])
        receipts.append(_system_receipt(draft, Kind.SYSTEM_DEFERRED, name, verdict))
    return receipts


def _take_releasable(draft: Draft, count_max: int) -> list[RequestRecord]:
    """Take the deferred policies that find room: the most severe first, then each producer in turn, then the oldest."""
    taken: list[RequestRecord] = []
    room = 0 if draft.is_killed else room_for_targets(draft)
    while len(taken) < count_max and room > 0:
        request = _next_deferred(draft)
        if request is None or _targets(request) > room:
            break
        room -= _targets(request)
        place = request.severity - 1
        draft.served = (*draft.served[:place], request.producer, *draft.served[place + 1 :])
        draft.drop_request(request.policy_id)
        taken.append(request)
    return taken


def _targets(request: RequestRecord) -> int:
    return target_count(parse(request.rule_data))


def _next_deferred(draft: Draft) -> RequestRecord | None:
    """Return the policy whose turn it is: of the highest severity, the first producer after the one served last."""
    queues = draft.deferred_queues()
    for severity in sorted({severity for severity, _ in queues}, reverse=True):
        last = draft.served[severity - 1]
        producers = [producer for level, producer in queues if level == severity]
        for producer in [p for p in producers if p > last] + [p for p in producers if p <= last]:
            request = draft.first_deferred((severity, producer))
            if request is not None:
                return request
    return None


def release_due_ms(draft: Draft) -> int | None:
    """Return the block time at which the next deferred policy finds room, None when only something else can make it."""
    request = None if draft.is_killed else _next_deferred(draft)
    return None if request is None else room_again_ms(draft, _targets(request))


def _forget(draft: Draft) -> None:
    """Drop references and offences that are too old to matter."""
    for _ in range(FORGOTTEN_MAX):
        first = draft.forget.first()
        if first is None or first.due_ms > draft.time_ms:
            return
        draft.forget = draft.forget.without_first()
        if first.kind == FORGET_ANOMALY:
            draft.drop_anomaly(first.key[SEQ_BYTES:])
        elif first.kind == FORGET_EVIDENCE:
            draft.drop_evidence(first.key)
        else:
            offence = draft.offences.get(first.key)
            if offence is not None and offence.until_ms == first.due_ms:
                draft.offences.drop(first.key)
