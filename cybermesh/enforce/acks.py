"""Answers: what became of a decision on this host, and the ack that says so. Pure; the role signs it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cybermesh.enforce.decisions import Decision
from cybermesh.enforce.guard import Limits
from cybermesh.messages import Ack

_REASON_CHARS_MAX = 200


class Result(enum.StrEnum):
    """What became of a decision; only the first two are answered with an ack."""

    APPLIED = "applied"
    FAILED = "failed"
    DUPLICATE = "duplicate"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one decision; ``code`` is empty when all is well."""

    policy_id: str
    decision_seq: int
    result: Result
    code: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Who answers: names for acks, and this host's limits."""

    scope: str
    instance: str
    tenant: str = ""
    region: str = ""
    limits: Limits = field(default_factory=Limits)


def draft(outcome: Outcome, decision: Decision, place: Place, now_ms: int) -> Ack | None:
    """Return the ack for ``outcome`` without producer, nonce and signature, or None where nobody is to be told."""
    if outcome.result not in (Result.APPLIED, Result.FAILED):
        return None
    if outcome.result is Result.APPLIED and not decision.requires_ack:
        return None
    return Ack(
        policy_id=outcome.policy_id,
        scope_identifier=place.scope,
        tenant=place.tenant,
        region=place.region,
        result=outcome.result.value,
        reason=outcome.detail[:_REASON_CHARS_MAX],
        error_code=outcome.code,
        applied_at=now_ms // 1_000,
        acked_at=now_ms // 1_000,
        qc_reference=decision.reference,
        controller_instance=place.instance,
        fast_path=False,
        rule_hash=decision.rule_hash,
        producer_id=b"",
        applied_at_ms=now_ms,
        acked_at_ms=now_ms,
        height=decision.height,
        decision_seq=outcome.decision_seq,
    )
