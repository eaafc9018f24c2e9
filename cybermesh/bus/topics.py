"""Which topics there are, what travels on each, and which group reads it.

Rules:

- names come from the settings (the environment names ``TOPIC_…`` work there); an empty name switches an optional topic off;
- every validator reads every partition, so each has a group of its own; agents have one group per host; the ai roles of a
  deployment share one for telemetry and have one per instance for control topics.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from cybermesh.messages import TxKind

CONSUMER_GROUP = "cybermesh-consensus"
_OPTIONAL = frozenset({"telemetry_features", "ai_evidence", "ai_policy", "control_policy_ack", "ai_dlq"})


@dataclass(frozen=True, slots=True)
class Topics:
    """Topic names; the optional ones may be empty, which switches them off.

    Raises:
        ValueError: a topic that cannot be switched off is empty, or two have the same name.
    """

    telemetry_features: str = "telemetry.features.v1"
    ai_anomalies: str = "ai.anomalies.v1"
    ai_evidence: str = "ai.evidence.v1"
    ai_policy: str = "ai.policy.v1"
    control_operator: str = "control.operator.v1"
    control_commits: str = "control.commits.v1"
    control_policy: str = "control.policy.v1"
    control_policy_ack: str = "control.policy.ack.v1"
    ai_dlq: str = "ai.dlq.v1"

    def __post_init__(self) -> None:
        used: dict[str, str] = {}
        for entry in fields(self):
            name = getattr(self, entry.name)
            if not name:
                if entry.name not in _OPTIONAL:
                    raise ValueError(f"topics.{entry.name} cannot be switched off; give it a name")
                continue
            if name in used:
                raise ValueError(f"topics.{entry.name} and topics.{used[name]} are both {name!r}; give each its own name")
            used[name] = entry.name

    def of_transactions(self) -> dict[str, TxKind]:
        """Return the topics whose messages become transactions, with the kind of each; those switched off are left out."""
        kinds = {
            self.ai_anomalies: TxKind.ANOMALY,
            self.ai_evidence: TxKind.EVIDENCE,
            self.ai_policy: TxKind.POLICY,
            self.control_operator: TxKind.OPERATOR,
        }
        return {name: kind for name, kind in kinds.items() if name}

    def of_kind(self, kind: TxKind) -> str:
        """Return the topic on which messages of this kind travel; empty when it is switched off."""
        match kind:
            case TxKind.ANOMALY:
                return self.ai_anomalies
            case TxKind.EVIDENCE:
                return self.ai_evidence
            case TxKind.POLICY:
                return self.ai_policy
            case TxKind.OPERATOR:
                return self.control_operator


def validator_group(node_id: str | None, committee_size: int, group: str = CONSUMER_GROUP) -> str:
    """Return a validator's consumer group.

    Raises:
        ValueError: several validators and no node id: they would share the partitions and starve each other.
    """
    if node_id:
        return f"{group}-node-{node_id}"
    if committee_size > 1:
        raise ValueError(f"NODE_ID is not set and the committee has {committee_size} validators; give each its own NODE_ID")
    return group


def agent_group(host: str) -> str:
    """Return an agent's consumer group: every host sees every policy."""
    return f"cybermesh-agent-{host}"


def telemetry_group(deployment: str) -> str:
    """Return the group in which the ai roles of a deployment share the telemetry."""
    return f"cybermesh-ai-{deployment}"


def ai_control_group(deployment: str, instance: str) -> str:
    """Return the group in which one ai instance reads the control topics, all of them."""
    return f"cybermesh-ai-{deployment}-{instance}"
