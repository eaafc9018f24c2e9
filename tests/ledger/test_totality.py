"""Signed nonsense: whatever JSON a key holder puts into a message gives a receipt, never an exception."""

from __future__ import annotations

import hashlib

import orjson
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.envelope.signing import sign
from cybermesh.ledger.execution import is_valid
from cybermesh.ledger.receipts import Code, decode
from cybermesh.ledger.state import Applied
from cybermesh.messages import Anomaly, OperatorAction, OperatorCommand, Policy
from tests.ledger.world import ATTACKER, World, policy, transaction

TEXT = st.text(max_size=5) | st.sampled_from(
    ["203.0.113.7", "::1", "10.0.0.0/8", "drop", "block", "p1", "~", "0" * 64, "a" * 300]
)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
POLICY_KEYS = [
    "policy_id",
    "rule_type",
    "target",
    "guardrails",
    "criteria",
    "audit",
    "tenant",
    "anomaly_id",
    "evidence_id",
    "zzz",
]
TARGET_KEYS = ["ips", "cidrs", "ports", "protocols", "direction", "scope", "selectors", "namespace"]
COMMAND_KEYS = [
    "policy_id",
    "policy",
    "add",
    "remove",
    "add_operators",
    "remove_operators",
    "on",
    "entity",
    "until_ms",
    "label",
    "reason",
]


def applied(world: World, raw: bytes) -> Code:
    """Apply a signed transaction that passes the intrinsic checks and return its code."""
    assert is_valid(world.genesis, raw)
    outcome = world.try_apply(*world.case("south-1", "p1", entity=ATTACKER)[:2], raw)
    assert isinstance(outcome, Applied)
    for receipt in outcome.receipts:
        assert decode(receipt.encode()) == receipt
    return outcome.receipts[2].code


def signed_policy(world: World, content: dict[str, object]) -> bytes:
    params = orjson.dumps(content)
    blank = Policy(
        id="p1", action="drop", rule="block", params=params, ts=0, content_hash=hashlib.sha256(params).digest(),
        producer_id=b"", nonce=b"", signature=b"", pubkey=b"",
    )  # fmt: skip
    return transaction(sign(blank, world.stamp("solo")))


@given(
    st.dictionaries(st.sampled_from(POLICY_KEYS), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(TARGET_KEYS), VALUES, max_size=3),
)
def test_any_policy_gives_a_receipt(changes: dict[str, object], target: dict[str, object]) -> None:
    world = World()
    content = policy(ATTACKER) | {"id": "p1", "rule": "block", "anomaly_id": "a-p1", "evidence_id": "e-p1"}
    content["target"] = {"ips": [ATTACKER]} | target
    assert applied(world, signed_policy(world, content | changes)) in Code


@given(st.sampled_from(list(OperatorAction)), st.dictionaries(st.sampled_from(COMMAND_KEYS), VALUES, max_size=4))
def test_any_command_gives_a_receipt(action: OperatorAction, changes: dict[str, object]) -> None:
    world = World()
    params = orjson.dumps({"id": "c1", "action": action.value} | changes)
    blank = OperatorCommand(
        id="c1", action=action.value, params=params, ts=0, content_hash=hashlib.sha256(params).digest(),
        producer_id=b"", nonce=b"", signature=b"", pubkey=b"",
    )  # fmt: skip
    assert applied(world, transaction(sign(blank, world.stamp("alice")))) in Code


@given(st.dictionaries(st.sampled_from(["entity", "victim", "other"]), VALUES, max_size=3))
def test_any_anomaly_gives_a_receipt(changes: dict[str, object]) -> None:
    world = World()
    bound = {"id": "x", "type": "dos", "source": "s", "severity": 9, "confidence": 1.0, "model_version": ""}
    payload = orjson.dumps(bound | changes)
    blank = Anomaly(
        id="x", type="dos", source="s", severity=9, confidence=1.0, ts=0, content_hash=hashlib.sha256(payload).digest(),
        payload=payload, model_version="", producer_id=b"", nonce=b"", signature=b"", pubkey=b"",
    )  # fmt: skip
    assert applied(world, transaction(sign(blank, world.stamp("solo")))) is Code.OK


def test_the_last_time_that_a_header_can_carry_gives_receipts() -> None:
    """Consensus hands over times below 2^63: what falls due then still fits the 64 bits of the ledger's numbers."""
    world = World()
    world.apply(*world.case("solo", "p1"), world.command("alice", "key_ring", remove=["00" * 32]))
    world.now_ms = 2**63 - 1
    assert applied(world, world.anomaly("solo", "x", stamp=world.stamp("solo", ts_ms=0))) is Code.STALE
