"""The message that tells agents of a decision: every field of it follows from what was proven, so that agents can compare."""

from __future__ import annotations

from typing import Final

from cybermesh.consensus.types import Header
from cybermesh.ledger.receipts import Change, DecisionEffect
from cybermesh.messages import PolicyAction, PolicyUpdate

_ACTIONS: Final = {
    Change.OPENED: PolicyAction.ADD,
    Change.RENEWED: PolicyAction.UPDATE,
    Change.ENDED: PolicyAction.REMOVE,
}


def update_of(header: Header, effect: DecisionEffect, rule_data: bytes, proof: bytes) -> PolicyUpdate:
    """Return the unsigned update that tells agents of a proven decision; every field follows from the proof."""
    return PolicyUpdate(
        policy_id=effect.policy_id,
        action=_ACTIONS[effect.change],
        rule_type=effect.rule_type,
        rule_data=rule_data,
        rule_hash=effect.rule_hash,
        requires_ack=True,
        rollback_policy_id="",
        timestamp=header.time_ms // 1_000,
        effective_height=header.height,
        expiration_height=0,
        producer_id=b"",
        signature=b"",
        pubkey=b"",
        proof=proof,
        decision_seq=effect.decision_seq,
        expires_at_ms=effect.expires_at_ms,
        epoch=header.epoch,
    )
