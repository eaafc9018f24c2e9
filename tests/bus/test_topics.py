"""Names of topics and groups: users' brokers and access lists hold them, so they are fixed here word by word."""

from __future__ import annotations

import pytest

from cybermesh.bus.topics import Topics, agent_group, ai_control_group, telemetry_group, validator_group
from cybermesh.messages import TxKind

DEFAULTS = {
    "telemetry_features": "telemetry.features.v1",
    "ai_anomalies": "ai.anomalies.v1",
    "ai_evidence": "ai.evidence.v1",
    "ai_policy": "ai.policy.v1",
    "control_operator": "control.operator.v1",
    "control_commits": "control.commits.v1",
    "control_policy": "control.policy.v1",
    "control_policy_ack": "control.policy.ack.v1",
    "ai_dlq": "ai.dlq.v1",
}


@pytest.mark.parametrize(("field", "name"), DEFAULTS.items())
def test_default_topic_names(field: str, name: str) -> None:
    assert getattr(Topics(), field) == name


@pytest.mark.parametrize("field", ["ai_evidence", "ai_policy", "control_policy_ack", "ai_dlq"])
def test_optional_topics_can_be_switched_off(field: str) -> None:
    assert getattr(Topics(**{field: ""}), field) == ""


@pytest.mark.parametrize("field", ["ai_anomalies", "control_operator", "control_commits", "control_policy"])
def test_the_other_topics_cannot_be_switched_off(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Topics(**{field: ""})


def test_two_topics_need_two_names() -> None:
    with pytest.raises(ValueError, match="own name"):
        Topics(ai_policy="ai.anomalies.v1")


def test_transaction_topics_follow_what_is_switched_on() -> None:
    assert Topics(ai_evidence="", ai_anomalies="site-a.anomalies").of_transactions() == {
        "site-a.anomalies": TxKind.ANOMALY,
        "ai.policy.v1": TxKind.POLICY,
        "control.operator.v1": TxKind.OPERATOR,
    }
    assert [Topics().of_kind(kind) for kind in TxKind] == list(Topics().of_transactions())


def test_groups_of_the_roles() -> None:
    assert validator_group("3", 4) == "cybermesh-consensus-node-3"
    assert validator_group("3", 4, "acme") == "acme-node-3"
    assert validator_group(None, 1) == "cybermesh-consensus"
    assert len({agent_group("h"), telemetry_group("h"), ai_control_group("h", "1"), ai_control_group("h", "2")}) == 4


@pytest.mark.parametrize("node_id", [None, ""])
def test_a_validator_among_several_needs_a_node_id(node_id: str | None) -> None:
    with pytest.raises(ValueError, match="NODE_ID"):
        validator_group(node_id, 4)
