"""The bus that the settings name, and settings that name none which may be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.local import LocalBus
from cybermesh.bus.memory import MemoryBus
from cybermesh.config import ConfigError, Settings, load
from cybermesh.roles.open_bus import kafka_options, open_bus
from tools.kafka_broker import Broker
from tools.kafka_certificates import make_certificates


def settings(**names: str) -> Settings:
    return load(environ={"CYBERMESH_BUS__KIND": "kafka", **names}).settings


@pytest.mark.parametrize(("kind", "made"), [("memory", MemoryBus), ("local", LocalBus), ("kafka", KafkaBus)])
def test_every_kind_is_there(tmp_path: Path, kind: str, made: type) -> None:
    path = tmp_path / "state" / "bus.db"
    assert isinstance(open_bus(settings(CYBERMESH_BUS__KIND=kind, CYBERMESH_BUS__PATH=str(path))), made)


def test_a_development_cluster_needs_no_protection() -> None:
    options = kafka_options(settings(KAFKA_BROKERS="a:9092, b:9092", KAFKA_COMPRESSION="zstd", NODE_ID="3"))
    assert (options.brokers, options.tls, options.sasl, options.client_id) == (("a:9092", "b:9092"), None, None, "cybermesh-3")
    assert (options.compression, options.is_idempotent) == ("zstd", True)


def test_control_topics_outlive_every_policy_by_a_day() -> None:
    plan = kafka_options(settings(TOPIC_CONTROL_POLICY="my.policies", TOPIC_CONTROL_POLICY_ACK="")).topics
    assert plan is not None
    assert set(plan.retention_s) == {"control.operator.v1", "control.commits.v1", "my.policies"}
    assert min(plan.retention_s.values()) >= 2 * 86_400


def test_topics_may_be_left_to_somebody_else() -> None:
    assert kafka_options(settings(CYBERMESH_KAFKA__CREATE_TOPICS="false")).topics is None


def test_the_password_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hush\n")
    options = kafka_options(settings(KAFKA_SASL_USERNAME="u", KAFKA_SASL_PASSWORD_FILE=str(file)))
    assert options.sasl is not None
    assert (options.sasl.mechanism, options.sasl.password) == ("SCRAM-SHA-512", "hush")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ({"KAFKA_SASL_USERNAME": "u", "KAFKA_SASL_PASSWORD_FILE": "/nowhere"}, "kafka.sasl_password_file"),
        ({"KAFKA_TLS_ENABLED": "true", "CYBERMESH_KAFKA__CA_FILE": "/nowhere"}, "kafka.ca_file"),
        ({"KAFKA_TLS_ENABLED": "true", "CYBERMESH_KAFKA__CERT_FILE": "/nowhere"}, "kafka.cert_file"),
        ({"CYBERMESH_KAFKA__KEY_FILE": "/nowhere"}, "key_file"),
        ({"KAFKA_SASL_USERNAME": "u"}, "sasl_password"),
        ({"KAFKA_SASL_USERNAME": "u", "KAFKA_SASL_PASSWORD": "p", "KAFKA_SASL_MECHANISM": "PLAIN"}, "sasl_mechanism"),
        ({"KAFKA_BROKERS": ""}, "kafka.brokers"),
        ({"ENVIRONMENT": "production"}, "kafka.tls_enabled"),
        ({"ENVIRONMENT": "staging", "KAFKA_SASL_USERNAME": "u", "KAFKA_SASL_PASSWORD": "p"}, "kafka.tls_enabled"),
        ({"ENVIRONMENT": "production", "KAFKA_TLS_ENABLED": "true"}, "kafka.sasl_username"),
        ({"ENVIRONMENT": "staging", "KAFKA_TLS_ENABLED": "true", "KAFKA_SASL_MECHANISM": ""}, "kafka.sasl_username"),
    ],
)
def test_settings_that_cannot_work_or_are_not_protected_are_named(names: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        kafka_options(settings(**names))


async def test_production_meets_on_a_protected_cluster(kafka_broker: Broker) -> None:
    access = kafka_broker.access
    protected = {"ENVIRONMENT": "production", "KAFKA_TLS_ENABLED": "true", "CYBERMESH_KAFKA__CA_FILE": access.ca_file}
    user = {"KAFKA_BROKERS": access.sasl, "KAFKA_SASL_USERNAME": access.username, "KAFKA_SASL_PASSWORD": access.password}
    certificate = {
        "KAFKA_BROKERS": access.mtls,
        "CYBERMESH_KAFKA__CERT_FILE": access.cert_file,
        "CYBERMESH_KAFKA__KEY_FILE": access.key_file,
    }
    for way in (user, certificate):
        async with open_bus(settings(**protected, **way)) as bus:
            assert (await bus.publish("production", b"k", b"v")).topic == "production"


def test_certificates_of_the_development_broker_are_readable_by_the_client(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    files = {
        f"CYBERMESH_KAFKA__{name}": str(tmp_path / file)
        for name, file in (("CA_FILE", "ca.pem"), ("CERT_FILE", "client.pem"), ("KEY_FILE", "client.key"))
    }
    assert kafka_options(settings(KAFKA_TLS_ENABLED="true", **files)).tls is not None
