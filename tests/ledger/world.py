"""A small deployment for ledger tests: named keys, a clock that tests move, and messages signed as the real ones are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from ipaddress import ip_network

from cybermesh import genesis as g
from cybermesh.envelope.nonces import Nonce
from cybermesh.envelope.signing import (
    AnomalyContent,
    EvidenceContent,
    OperatorContent,
    PolicyContent,
    Stamp,
    sign_anomaly,
    sign_evidence,
    sign_operator,
    sign_policy,
)
from cybermesh.keys import SigningKey
from cybermesh.ledger.receipts import Code, DecisionEffect, Receipt
from cybermesh.ledger.state import Applied, InvalidBlock, LedgerBlock, State
from cybermesh.messages import OperatorAction, SignedMessage, Transaction, TxKind
from cybermesh.wire import codec

START_MS = 1_700_000_000_000
ATTACKER = "203.0.113.7"


def key(name: str) -> SigningKey:
    return SigningKey(hashlib.sha256(name.encode()).digest())


def deployment(**changes: object) -> g.Genesis:
    """Two sites with two sensors at the first; "solo" has a budget; two operators; something of ours to protect."""
    producers = (
        g.Producer("north-1", key("north-1").public, "north", networks=(ip_network("0.0.0.0/0"),)),
        g.Producer("north-2", key("north-2").public, "north"),
        g.Producer("south-1", key("south-1").public, "south"),
        g.Producer(
            "solo", key("solo").public, "west", networks=(ip_network("203.0.113.0/24"), ip_network("192.0.2.0/24")),
            budget=g.Budget(max_active=3, max_per_minute=2, max_ttl_s=900),
        ),
    )  # fmt: skip
    genesis = g.Genesis(
        chain_name="ledger-tests",
        validators=tuple(g.Validator(f"v{i}", key(f"v{i}").public) for i in range(4)),
        producers=producers,
        operators=(g.Operator("alice", key("alice").public), g.Operator("bob", key("bob").public)),
        protected_networks=(ip_network("198.51.100.0/24"), ip_network("2001:db8:1::/48")),
        infrastructure_networks=(ip_network("10.9.0.0/24"),),
    )
    return dataclasses.replace(genesis, **changes)  # type: ignore[arg-type]


KINDS = {"Anomaly": TxKind.ANOMALY, "Evidence": TxKind.EVIDENCE, "Policy": TxKind.POLICY, "OperatorCommand": TxKind.OPERATOR}


def transaction(message: SignedMessage) -> bytes:
    return Transaction(KINDS[type(message).__name__], codec.encode(message)).encode()


def policy(*ips: str, ttl: int = 900, **more: object) -> dict[str, object]:
    """A policy against hosts, or against whatever ``more`` says."""
    return {
        "rule_type": "block",
        "action": "drop",
        "target": {"ips": list(ips)} if ips else {},
        "guardrails": {"ttl_seconds": ttl},
        **more,
    }


def rate_limit(victim: str, port: int, ttl: int = 900, *, packets: int = 100, window_s: int = 1) -> dict[str, object]:
    return {
        "rule_type": "rate_limit",
        "action": "rate_limit",
        "target": {"ips": [victim], "direction": "egress", "ports": [port], "protocols": ["tcp"]},
        "guardrails": {"ttl_seconds": ttl, "rate_limit": {"window_s": window_s, "max_actions": packets}},
    }


class World:
    """Signs messages and applies blocks; ``state`` is the newest, ``receipts`` all of them in the log's order."""

    def __init__(self, genesis: g.Genesis | None = None) -> None:
        self.genesis = deployment() if genesis is None else genesis
        self.state = State.at_genesis(self.genesis)
        self.height = 0
        self.now_ms = START_MS
        self.receipts: list[Receipt] = []
        self.rules: dict[int, bytes] = {}
        self._counters: dict[str, int] = {}

    def stamp(self, who: str, *, ts_ms: int | None = None, counter: int | None = None, instance: int = 1) -> Stamp:
        when = self.now_ms if ts_ms is None else ts_ms
        if counter is None:
            counter = self._counters[who] = self._counters.get(who, -1) + 1
        return Stamp(key(who), when // 1_000, Nonce(when, instance, counter).encode())

    def anomaly(
        self, who: str, name: str, entity: str = ATTACKER, *, severity: int = 9, confidence: float = 0.95,
        kind: str = "port_scan", details: Mapping[str, object] | None = None, stamp: Stamp | None = None,
    ) -> bytes:  # fmt: skip
        content = AnomalyContent(name, kind, "rules", entity, severity, confidence, "m1", details or {})
        return transaction(sign_anomaly(content, stamp or self.stamp(who)))

    def evidence(self, who: str, name: str) -> bytes:
        return transaction(sign_evidence(EvidenceContent(name, "flows", (), {}, ()), self.stamp(who)))

    def policy(
        self,
        who: str,
        name: str,
        body: Mapping[str, object],
        *,
        anomaly: str = "",
        evidence: str = "",
        stamp: Stamp | None = None,
    ) -> bytes:
        action = str(body["action"])
        content = PolicyContent(name, action, str(body["rule_type"]), anomaly or f"a-{name}", evidence or f"e-{name}", body)
        return transaction(sign_policy(content, stamp or self.stamp(who)))

    def case(
        self, who: str, name: str, body: Mapping[str, object] | None = None, entity: str = ATTACKER, **how: object
    ) -> list[bytes]:
        """An anomaly, its evidence and a policy, as a detector sends them."""
        return [
            self.anomaly(who, f"a-{name}", entity, **how),  # type: ignore[arg-type]
            self.evidence(who, f"e-{name}"),
            self.policy(who, name, policy(entity) if body is None else body),
        ]

    def command(self, who: str, action: str, stamp: Stamp | None = None, **arguments: object) -> bytes:
        used = stamp or self.stamp(who)
        name = f"{action}-{who}-{used.nonce.hex()[-8:]}"
        return transaction(sign_operator(OperatorContent(name, OperatorAction(action), arguments), used))

    def block(self, transactions: list[bytes] | tuple[bytes, ...] = ()) -> LedgerBlock:
        return LedgerBlock(self.height + 1, self.now_ms, tuple(transactions))

    def try_apply(self, *transactions: bytes) -> Applied | InvalidBlock:
        return self.state.apply(self.block(transactions))

    def apply(self, *transactions: bytes) -> tuple[Receipt, ...]:
        applied = self.try_apply(*transactions)
        assert isinstance(applied, Applied), applied
        self.height += 1
        self.state = applied.state
        self.receipts += applied.receipts
        self.rules.update(applied.rules)
        return applied.receipts

    def after(self, seconds: float) -> World:
        """Let block time pass; messages made afterwards carry the new time."""
        self.now_ms += round(1_000 * seconds)
        return self

    def wait(self, seconds: float) -> tuple[Receipt, ...]:
        """Let block time pass and apply an empty block then."""
        return self.after(seconds).apply()


def codes(receipts: tuple[Receipt, ...]) -> list[Code]:
    return [receipt.code for receipt in receipts]


def decisions(receipts: tuple[Receipt, ...]) -> list[DecisionEffect]:
    return [effect for receipt in receipts for effect in receipt.decisions]


def changes(receipts: tuple[Receipt, ...]) -> list[tuple[str, str, str]]:
    """(change, policy id, why or how it ended) of every decision effect."""
    return [(e.change.value, e.policy_id, (e.ending or e.why).value) for e in decisions(receipts)]
