"""Typed settings: TOML files and the environment, strictly read; an error names the key's path and the nearest known name.

Precedence, highest first: the seeds' environment names (``NODE_ID``, ``KAFKA_BROKERS`` …), ``CYBERMESH_SECTION__KEY``,
``NAME.local.toml``, ``NAME.toml``, the defaults.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails

ENV_PREFIX = "CYBERMESH_"
ENV_DELIMITER = "__"
# Names under the prefix that are not settings.
ENV_RESERVED = frozenset({"CYBERMESH_REQUIRE", "CYBERMESH_CACHE_DIR"})

Tree = dict[str, dict[str, Any]]


class ConfigError(Exception):
    """The configuration is not usable; the text says where and what to do."""


class Environment(StrEnum):
    """How strict the node is: production and staging refuse to start without protection on the wire."""

    DEVELOPMENT = "development"
    STAGING = "staging"
    PRODUCTION = "production"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


class Section(BaseModel):
    """A table of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Node(Section):
    """Who this process is and where its state lies."""

    id: int | None = Field(
        default=None, ge=1, description="number of this node within its role, from 1; a validator among several needs it"
    )
    environment: Environment = Environment.DEVELOPMENT
    state_dir: Path = Field(default=Path("/var/lib/cybermesh"), description="directory of keys, databases and positions")
    genesis: Path = Field(default=Path("/etc/cybermesh/genesis.json"), description="the deployment's genesis file")


class Keys(Section):
    """Ed25519 key files, mode 0600, one for each role that runs here; default: STATE_DIR/ROLE.key."""

    ai: Path | None = None
    validator: Path | None = Field(default=None, description="the memory of the key, its safety file, lies beside it")
    agent: Path | None = None


class BusSettings(Section):
    """Which bus the roles meet on."""

    kind: Literal["memory", "local", "kafka"] = "memory"
    path: Path = Field(
        default=Path("/var/lib/cybermesh/bus.db"), description="file of the local bus, the same for all processes of the host"
    )


class Consensus(Section):
    """How a validator reaches the others."""

    peers: Path = Field(default=Path("/etc/cybermesh/peers.toml"), description="where each validator listens")
    listen: str = Field(default="", description="HOST:PORT to listen on; default: the own address in the peers file")


class Kafka(Section):
    """The Kafka client; TLS and SASL are required outside development."""

    brokers: Names = Field(default=("localhost:9092",), min_length=1, description="HOST:PORT of some brokers of the cluster")
    tls_enabled: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str = Field(default="", description="user at the brokers; empty: no SASL")
    sasl_password: SecretStr = SecretStr("")
    sasl_password_file: Path | None = None
    compression: Literal["none", "snappy", "zstd", "lz4", "gzip"] = "snappy"
    producer_idempotent: bool = True
    consumer_group_id: str = "cybermesh-consensus"
    create_topics: bool = Field(default=True, description="make topics that are missing")
    partitions: int = Field(default=8, ge=1, le=1_000, description="of a topic that is made")
    replication_factor: int = Field(
        default=-1, ge=-1, le=100, description="of a topic that is made; -1: as the brokers are set"
    )


class Topics(Section):
    """Topic names; an empty name switches an optional topic off."""

    telemetry_features: str = "telemetry.features.v1"
    ai_anomalies: str = Field(default="ai.anomalies.v1", min_length=1)
    ai_evidence: str = "ai.evidence.v1"
    ai_policy: str = "ai.policy.v1"
    control_operator: str = Field(default="control.operator.v1", min_length=1)
    control_commits: str = Field(default="control.commits.v1", min_length=1)
    control_policy: str = Field(default="control.policy.v1", min_length=1)
    control_policy_ack: str = "control.policy.ack.v1"
    ai_dlq: str = "ai.dlq.v1"


class Signing(Section):
    """Signing domains of the control topics, which must equal those of the genesis, and how the ai role signs."""

    control_domain: str | None = None
    control_policy_domain: str | None = None
    batches: bool = Field(default=False, description="the ai role signs the messages of a detection at once")


class Telemetry(Section):
    """What the ai role reads."""

    inputs: Names = Field(default=(), description="KIND:WHERE or a path, as on the command line")
    batch_size: int = Field(default=1000, ge=1, le=1_000_000, description="flows, log lines or other rows in a batch")
    follow: bool = Field(default=True, description="go on with what is appended to logs and tables, also where they rotate")
    follow_captures: bool = Field(default=False, description="go on with what is appended to captures")
    block_packets: int = Field(default=16_384, ge=1, le=1_048_576, description="packets decoded at a time")


class Detection(Section):
    """The engines and what becomes a policy candidate."""

    rules_dir: Path | None = Field(default=None, description="directory of rule files; default: those shipped")
    model_dir: Path | None = Field(default=None, description="directory of a trained model; default: the one shipped")
    site_key: str = Field(
        default="",
        pattern="^([0-9a-fA-F]{64})?$",
        description="public key (64 hex digits) that signed the model in model_dir; only the shipped model needs none",
    )
    severity_min: int = Field(default=8, ge=1, le=10, description="lowest severity that proposes a policy")
    confidence_min: float = Field(default=0.9, ge=0, le=1, description="lowest confidence that proposes a policy")
    policy_ttl_s: int = Field(default=900, ge=1, le=86_400, description="time to live of a first policy")


class Store(Section):
    """The validator's database."""

    url: str = Field(default="", description="SQLAlchemy URL; default: SQLite in STATE_DIR")


class Enforce(Section):
    """The agent's firewall."""

    backend: Literal["noop", "nftables", "iptables", "kubernetes"] = "noop"
    namespaces: Names = Field(default=("default",), min_length=1, description="of Kubernetes, whose pods are protected")
    mode: Literal["observe", "enforce"] = "observe"
    protected_networks: Names = Field(default=(), description="never blocked on this host, whatever is decided")
    scope: str = Field(default="", description="name of this enforcement point in acks; default: the host name")


class Http(Section):
    """Health and metrics."""

    host: str = "127.0.0.1"
    port: int = Field(default=8440, ge=0, le=65_535)


class Log(Section):
    """Logging."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json_lines: bool = False


# The seeds' environment names, and the ones in their manner, with the key each of them sets.
ENVIRONMENT_NAMES: Mapping[str, str] = {
    "NODE_ID": "node.id",
    "ENVIRONMENT": "node.environment",
    "KAFKA_BROKERS": "kafka.brokers",
    "KAFKA_TLS_ENABLED": "kafka.tls_enabled",
    "KAFKA_SASL_MECHANISM": "kafka.sasl_mechanism",
    "KAFKA_SASL_USERNAME": "kafka.sasl_username",
    "KAFKA_SASL_PASSWORD": "kafka.sasl_password",
    "KAFKA_SASL_PASSWORD_FILE": "kafka.sasl_password_file",
    "KAFKA_COMPRESSION": "kafka.compression",
    "KAFKA_PRODUCER_IDEMPOTENT": "kafka.producer_idempotent",
    "KAFKA_CONSUMER_GROUP_ID": "kafka.consumer_group_id",
    "TELEMETRY_BATCH_SIZE": "telemetry.batch_size",
    "CONTROL_SIGNING_DOMAIN": "signing.control_domain",
    "CONTROL_POLICY_SIGNING_DOMAIN": "signing.control_policy_domain",
    **{f"TOPIC_{name.upper()}": f"topics.{name}" for name in Topics.model_fields},
}


class Settings(Section):
    """Everything a process can be told; one schema for all roles, so that one host can share a file."""

    node: Node = Node()
    keys: Keys = Keys()
    bus: BusSettings = BusSettings()
    consensus: Consensus = Consensus()
    kafka: Kafka = Kafka()
    topics: Topics = Topics()
    signing: Signing = Signing()
    telemetry: Telemetry = Telemetry()
    detection: Detection = Detection()
    store: Store = Store()
    enforce: Enforce = Enforce()
    http: Http = Http()
    log: Log = Log()

    @model_validator(mode="after")
    def _kafka_is_usable_and_protected(self) -> Self:
        if self.bus.kind == "kafka":
            self._check_credentials()
            if self.node.environment is not Environment.DEVELOPMENT:
                self._check_protection()
        return self

    def _check_credentials(self) -> None:
        kafka = self.kafka
        if kafka.sasl_mechanism and kafka.sasl_username:
            if kafka.sasl_mechanism == "PLAIN" and not kafka.tls_enabled:
                raise ValueError(
                    "kafka.sasl_mechanism: PLAIN sends the password as it is; set kafka.tls_enabled, or use SCRAM-SHA-512"
                )
            if not kafka.sasl_password.get_secret_value() and kafka.sasl_password_file is None:
                raise ValueError(
                    "kafka.sasl_password: kafka.sasl_username is set; set kafka.sasl_password_file or this one too"
                )
        if kafka.key_file is not None and kafka.cert_file is None:
            raise ValueError("kafka.key_file: set kafka.cert_file too, which it belongs to")

    def _check_protection(self) -> None:
        if not self.kafka.tls_enabled:
            raise ValueError(f"kafka.tls_enabled: {self.node.environment} requires TLS to the brokers; set it to true")
        if not (self.kafka.sasl_mechanism and self.kafka.sasl_username) and self.kafka.cert_file is None:
            raise ValueError(
                f"kafka.sasl_username: {self.node.environment} requires SASL; set it with its password,"
                " or kafka.cert_file for mutual TLS"
            )


KEY_PATHS = tuple(
    f"{section}.{key}" for section, info in Settings.model_fields.items() for key in type(info.default).model_fields
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for each key path that is set somewhere the name of the source that holds."""

    settings: Settings
    origins: Mapping[str, str]


def load(path: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Read the settings from ``path``, its ``.local.toml`` neighbour and the environment.

    Raises:
        ConfigError: A file cannot be read, a key is unknown, or a value is not usable.
    """
    sources: list[tuple[str, Tree]] = []
    if path is not None:
        sources.append((str(path), _read_toml(path)))
        local = path.with_suffix(".local.toml")
        if local.exists():
            sources.append((str(local), _read_toml(local)))
    sources.append(("environment", _from_environment(environ)))

    merged: Tree = {}
    origins: dict[str, str] = {}
    for name, tree in sources:
        for section, table in tree.items():
            merged.setdefault(section, {}).update(table)
            origins.update({f"{section}.{key}": name for key in table})
    try:
        return Loaded(Settings.model_validate(merged), origins)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(fault, origins) for fault in error.errors(include_url=False))) from error


def masked(settings: Settings) -> Tree:
    """Return the settings as plain values with the secrets masked, for ``config show``."""
    tree: Tree = settings.model_dump(mode="json")
    return tree


def _read_toml(path: Path) -> Tree:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable file with -c") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for section, table in tree.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section}: unknown key{_nearest(section)}; every key belongs to a [section]")
    return tree


def _from_environment(environ: Mapping[str, str]) -> Tree:
    tree: Tree = {}
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and name not in ENV_RESERVED:
            path = name.removeprefix(ENV_PREFIX).lower().replace(ENV_DELIMITER, ".")
            if path not in KEY_PATHS:
                raise ConfigError(f"environment: {name}: unknown key {path}{_nearest(path)}")
            _put(tree, path, value)
    for name, path in ENVIRONMENT_NAMES.items():
        if name in environ:
            _put(tree, path, environ[name])
    return tree


def _put(tree: Tree, path: str, value: object) -> None:
    section, key = path.split(".")
    tree.setdefault(section, {})[key] = value


def _explain(fault: ErrorDetails, origins: Mapping[str, str]) -> str:
    """Return one line: where, which key, what is wrong with it."""
    path = ".".join(str(part) for part in fault["loc"][:2])
    place = next((name for key, name in origins.items() if key == path or key.startswith(f"{path}.")), "")
    prefix = f"{place}: " if place else ""
    if fault["type"] == "extra_forbidden":
        return f"{prefix}{path}: unknown key{_nearest(path)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{prefix}{path}: {message}" if path else message


def _nearest(path: str) -> str:
    known = [*KEY_PATHS, *Settings.model_fields]
    found = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f" (nearest known: {found[0]})" if found else ""
