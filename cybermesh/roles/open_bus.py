"""Chooses the bus that the settings name."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager

from cybermesh.bus import Bus, BusError
from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.kafka_client import KafkaOptions, Sasl, TopicPlan, make_tls
from cybermesh.bus.local import LocalBus
from cybermesh.bus.memory import MemoryBus
from cybermesh.config import ConfigError, Kafka, Settings

# Longer than the longest life of a policy (a day) and one more day: an agent that was away finds whatever still holds.
CONTROL_RETENTION_S = 7 * 86_400


def open_bus(settings: Settings) -> AbstractAsyncContextManager[Bus]:
    """Return the bus; entering the local one opens its file, the Kafka one connects when it is first used.

    Raises:
        ConfigError: a certificate or password file cannot be used.
    """
    match settings.bus.kind:
        case "memory":
            return MemoryBus(_now_ms)
        case "local":
            settings.bus.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return LocalBus(settings.bus.path, _now_ms)
        case "kafka":
            return KafkaBus(kafka_options(settings))


def kafka_options(settings: Settings) -> KafkaOptions:
    """Return how to use the cluster that the settings name.

    Raises:
        ConfigError: a certificate or password file cannot be used.
    """
    kafka = settings.kafka
    try:
        return KafkaOptions(
            brokers=kafka.brokers,
            tls=make_tls(kafka.ca_file, kafka.cert_file, kafka.key_file) if kafka.tls_enabled else None,
            sasl=_sasl(kafka),
            compression=kafka.compression,
            is_idempotent=kafka.producer_idempotent,
            topics=_plan(settings) if kafka.create_topics else None,
            client_id="cybermesh" if settings.node.id is None else f"cybermesh-{settings.node.id}",
        )
    except BusError as error:
        raise ConfigError(str(error)) from error


def _plan(settings: Settings) -> TopicPlan:
    topics = settings.topics
    control = (topics.control_operator, topics.control_commits, topics.control_policy, topics.control_policy_ack)
    return TopicPlan(
        partitions=settings.kafka.partitions,
        replication_factor=settings.kafka.replication_factor,
        retention_s={topic: CONTROL_RETENTION_S for topic in control if topic},
    )


def _sasl(kafka: Kafka) -> Sasl | None:
    if not kafka.sasl_mechanism or not kafka.sasl_username:
        return None
    password = kafka.sasl_password.get_secret_value()
    if not password and kafka.sasl_password_file is not None:
        try:
            password = kafka.sasl_password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"kafka.sasl_password_file: {kafka.sasl_password_file}: {error}") from error
    return Sasl(kafka.sasl_mechanism, kafka.sasl_username, password)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
