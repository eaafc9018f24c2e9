"""Settings: precedence, every environment name of the seeds, and errors that name the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh import config
from cybermesh.bus.topics import Topics
from cybermesh.config import ConfigError, load


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_safe_ones() -> None:
    settings = load(environ={}).settings
    assert settings.enforce.mode == "observe"
    assert settings.enforce.backend == "noop"
    assert settings.http.host == "127.0.0.1"
    assert settings.kafka.producer_idempotent
    assert settings.telemetry.batch_size == 1000


def test_local_file_is_over_the_file_and_the_environment_over_both(tmp_path: Path) -> None:
    path = _write(tmp_path / "ai.toml", "[telemetry]\nbatch_size = 1\nblock_packets = 10\n[log]\nlevel = 'debug'\n")
    _write(tmp_path / "ai.local.toml", "[telemetry]\nbatch_size = 2\nblock_packets = 20\n")
    loaded = load(path, environ={"TELEMETRY_BATCH_SIZE": "3"})
    assert (loaded.settings.telemetry.batch_size, loaded.settings.telemetry.block_packets) == (3, 20)
    assert loaded.origins == {
        "telemetry.batch_size": "environment",
        "telemetry.block_packets": str(tmp_path / "ai.local.toml"),
        "log.level": str(path),
    }


SEED_VALUES = {
    "NODE_ID": ("3", 3),
    "ENVIRONMENT": ("staging", "staging"),
    "KAFKA_BROKERS": ("a:1, b:2", ("a:1", "b:2")),
    "KAFKA_TLS_ENABLED": ("true", True),
    "KAFKA_SASL_MECHANISM": ("PLAIN", "PLAIN"),
    "KAFKA_SASL_USERNAME": ("u", "u"),
    "KAFKA_SASL_PASSWORD_FILE": ("/run/secret", Path("/run/secret")),
    "KAFKA_COMPRESSION": ("lz4", "lz4"),
    "KAFKA_PRODUCER_IDEMPOTENT": ("false", False),
    "KAFKA_CONSUMER_GROUP_ID": ("other", "other"),
    "TELEMETRY_BATCH_SIZE": ("5", 5),
    "CONTROL_SIGNING_DOMAIN": ("d1", "d1"),
    "CONTROL_POLICY_SIGNING_DOMAIN": ("d2", "d2"),
    **{name: ("renamed.v9", "renamed.v9") for name in config.ENVIRONMENT_NAMES if name.startswith("TOPIC_")},
}


# Word by word, so that none can go missing: users' units and manifests hold them.
PROMISED_NAMES = [
    "NODE_ID",
    "ENVIRONMENT",
    "KAFKA_BROKERS",
    "KAFKA_CONSUMER_GROUP_ID",
    "KAFKA_TLS_ENABLED",
    "KAFKA_PRODUCER_IDEMPOTENT",
    "KAFKA_COMPRESSION",
    "KAFKA_SASL_MECHANISM",
    "KAFKA_SASL_USERNAME",
    "KAFKA_SASL_PASSWORD",
    "KAFKA_SASL_PASSWORD_FILE",
    "TELEMETRY_BATCH_SIZE",
    "CONTROL_SIGNING_DOMAIN",
    "CONTROL_POLICY_SIGNING_DOMAIN",
    "TOPIC_TELEMETRY_FEATURES",
    "TOPIC_AI_ANOMALIES",
    "TOPIC_AI_EVIDENCE",
    "TOPIC_AI_POLICY",
    "TOPIC_CONTROL_OPERATOR",
    "TOPIC_CONTROL_COMMITS",
    "TOPIC_CONTROL_POLICY",
    "TOPIC_CONTROL_POLICY_ACK",
    "TOPIC_AI_DLQ",
]


def test_the_promised_environment_names_are_those_there_are() -> None:
    assert sorted(config.ENVIRONMENT_NAMES) == sorted(PROMISED_NAMES)


@pytest.mark.parametrize(
    "name", ["TOPIC_TELEMETRY_FEATURES", "TOPIC_AI_EVIDENCE", "TOPIC_AI_POLICY", "TOPIC_CONTROL_POLICY_ACK", "TOPIC_AI_DLQ"]
)
def test_an_empty_name_switches_an_optional_topic_off(name: str) -> None:
    _, key = config.ENVIRONMENT_NAMES[name].split(".")
    assert getattr(Topics(**load(environ={name: ""}).settings.topics.model_dump()), key) == ""


@pytest.mark.parametrize(
    "name", ["TOPIC_AI_ANOMALIES", "TOPIC_CONTROL_OPERATOR", "TOPIC_CONTROL_COMMITS", "TOPIC_CONTROL_POLICY"]
)
def test_the_other_topics_cannot_be_switched_off(name: str) -> None:
    with pytest.raises(ConfigError, match=config.ENVIRONMENT_NAMES[name]):
        load(environ={name: ""})


@pytest.mark.parametrize("name", sorted(set(config.ENVIRONMENT_NAMES) - {"KAFKA_SASL_PASSWORD"}))
def test_every_environment_name_of_the_seeds_sets_its_key(name: str) -> None:
    text, expected = SEED_VALUES[name]
    section, key = config.ENVIRONMENT_NAMES[name].split(".")
    assert getattr(getattr(load(environ={name: text}).settings, section), key) == expected


def test_a_password_is_never_shown() -> None:
    settings = load(environ={"KAFKA_SASL_PASSWORD": "hunter2"}).settings
    assert settings.kafka.sasl_password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(config.masked(settings))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[telemetry]\nbatch_sise = 4\n", ["telemetry.batch_sise", "unknown key", "telemetry.batch_size"]),
        ("[telemetri]\nbatch_size = 4\n", ["telemetri", "unknown key", "nearest known: telemetry"]),
        ("batch_size = 4\n", ["batch_size", "unknown key", "[section]"]),
        ("[telemetry]\nbatch_size = 0\n", ["telemetry.batch_size", "greater than or equal to 1"]),
        ("[telemetry]\nbatch_size = 'many'\n", ["telemetry.batch_size", "valid integer"]),
        ("[topics]\nai_anomalies = ''\n", ["topics.ai_anomalies", "at least 1 character"]),
        ("[enforce]\nbackend = 'ipfw'\n", ["enforce.backend", "noop"]),
        ("[telemetry\n", ["not TOML", "line 1"]),
        ("[bus]\nkind = 'kafka'\n[node]\nenvironment = 'production'\n", ["kafka.tls_enabled", "requires TLS"]),
    ],
)
def test_an_error_names_the_file_the_key_and_the_reason(tmp_path: Path, text: str, words: list[str]) -> None:
    path = _write(tmp_path / "validator.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unreadable_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml", environ={})
    (tmp_path / "latin.toml").write_bytes(b"[node]\n# \xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "latin.toml", environ={})


def test_an_unknown_name_under_our_prefix_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"CYBERMESH_NODE__IDD.*node\.id"):
        load(environ={"CYBERMESH_NODE__IDD": "1"})
    assert load(environ={"CYBERMESH_NODE__ID": "1"}).settings.node.id == 1
