"""Decisions as an agent keeps them: what was proven, what is held back and why, and what may not come back. Pure.

The order of handling is fixed (``enforcer`` walks it): proof, fields, parse, time, order, duplicate, guard, plan, apply,
read back, persist, ack. This module has the steps that are mere comparisons, so that each of them can be read and tested alone.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Final

from cybermesh.messages import PolicyAction, PolicyUpdate
from cybermesh.policy import Action, PolicyError, PolicySpec, parse

CLOCK_TOLERANCE_MS: Final = 60_000
TOMBSTONE_MS: Final = 600_000


class Mode(enum.StrEnum):
    """What the agent does with decisions: everything but the kernel, everything, or nothing in the kernel until told so."""

    OBSERVE = "observe"
    ENFORCE = "enforce"
    OFF = "off"


class RefusedError(Exception):
    """A decision is not enforced; ``code`` goes into the ack. The guard's and the backends' codes come on top of these."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class ProofError(RefusedError):
    """The quorum proof is missing, malformed, of something else, or does not verify; ``code`` is the verifier's."""


class EpochUnknownError(ProofError):
    """The proof names a later epoch than is known here: the decision is parked until the committee change arrives."""


@dataclass(frozen=True, slots=True)
class Proven:
    """What a quorum is proven to have decided; times in milliseconds since 1970, ``reference`` names the certificate."""

    policy_id: str
    action: PolicyAction
    rule_hash: bytes
    expires_at_ms: int
    decision_seq: int
    epoch: int
    height: int
    block_time_ms: int
    reference: str


@dataclass(frozen=True, slots=True)
class Decision:
    """An active decision on this host; ``ends_at_ms`` is never later than proven, ``held`` is why it is not installed."""

    policy_id: str
    decision_seq: int
    rule_data: bytes
    rule_hash: bytes
    ends_at_ms: int
    height: int
    reference: str
    requires_ack: bool = True
    held: str = ""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A policy that ended or was refused here: nothing up to ``decision_seq`` counts until ``until_ms``."""

    policy_id: str
    decision_seq: int
    until_ms: int


class Order(enum.Enum):
    """How a decision stands to what is known of its policy."""

    NEW = "new"
    DUPLICATE = "duplicate"
    REPLAYED = "replayed"


def check_fields(update: PolicyUpdate, proven: Proven) -> None:
    """Compare every field of the event with what was proven; nothing that the proof does not cover is believed.

    Raises:
        RefusedError: PROOF_MISMATCH, naming the field.
    """
    digest = hashlib.sha256(update.rule_data).digest()
    pairs = {
        "policy_id": (update.policy_id, proven.policy_id),
        "action": (update.action, proven.action),
        "rule_data": (digest, proven.rule_hash),
        "rule_hash": (update.rule_hash, proven.rule_hash),
        "expires_at_ms": (update.expires_at_ms, proven.expires_at_ms),
        "decision_seq": (update.decision_seq, proven.decision_seq),
        "epoch": (update.epoch, proven.epoch),
    }
    for name, (claimed, decided) in pairs.items():
        if claimed != decided:
            raise RefusedError("PROOF_MISMATCH", f"{name} is not what was decided")


def read_policy(update: PolicyUpdate) -> PolicySpec:
    """Parse the rule of a decision to install.

    Raises:
        RefusedError: BAD_POLICY with the path, or PROOF_MISMATCH when the rule is another policy's.
    """
    try:
        spec = parse(update.rule_data)
    except PolicyError as fault:
        raise RefusedError("BAD_POLICY", str(fault)) from fault
    if spec.policy_id != update.policy_id or spec.rule_type != update.rule_type:
        raise RefusedError("PROOF_MISMATCH", "policy_id or rule_type differ from those of the rule")
    if spec.action is Action.REMOVE:
        raise RefusedError("BAD_POLICY", "action: a rule to install cannot be remove")
    return spec


def end_of(spec: PolicySpec, expires_at_ms: int, now_ms: int) -> int:
    """Return when the rules end: what is decided, and never more than the policy's own TTL from now.

    Raises:
        RefusedError: EXPIRED.
    """
    ends_at_ms = min(expires_at_ms, now_ms + 1_000 * spec.guardrails.ttl_seconds)
    if ends_at_ms <= now_ms:
        raise RefusedError("EXPIRED", f"ended {now_ms - ends_at_ms} ms ago")
    return ends_at_ms


def is_clock_behind(newest_block_ms: int, now_ms: int) -> bool:
    """Say whether block time runs so far ahead that this clock cannot be trusted to end a ban in time."""
    return newest_block_ms - now_ms > CLOCK_TOLERANCE_MS


def order(decision_seq: int, known_seq: int | None) -> Order:
    """Place a decision against the last one known of its policy, standing or ended."""
    if known_seq is None or decision_seq > known_seq:
        return Order.NEW
    return Order.DUPLICATE if decision_seq == known_seq else Order.REPLAYED
