"""The schema. A change here needs a migration beside it; a test compares the two.

Rules: times are integer milliseconds, hashes are raw bytes, lists of names are JSON text; portable types only, so that one
schema serves SQLite, PostgreSQL and CockroachDB. Names of constraints are fixed, because migrations refer to them.
"""

from __future__ import annotations

import orjson
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
# SQLite numbers rows by itself only in a column of type INTEGER.
Serial = BigInteger().with_variant(Integer, "sqlite")


def names_text(names: tuple[str, ...]) -> str:
    """Return a list of names as a column of ``Names`` holds it."""
    return orjson.dumps(names).decode()


class Names(TypeDecorator[tuple[str, ...]]):
    """A short list of texts as JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> str | None:
        """Return the JSON text."""
        return None if value is None else names_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[str, ...] | None:
        """Return the texts."""
        return None if value is None else tuple(orjson.loads(value))


def _key(name: str) -> Column[int]:
    return Column(name, BigInteger, primary_key=True, autoincrement=False)


blocks = Table(
    "blocks",
    metadata,
    _key("height"),
    Column("hash", LargeBinary, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("author", Integer, nullable=False),
    Column("header", LargeBinary, nullable=False),
    Column("frame", LargeBinary, nullable=False),
    Column("state_root", LargeBinary, nullable=False),
    Column("decision_seq", BigInteger, nullable=False),
    Column("transaction_count", Integer, nullable=False),
    Column("first_leaf", BigInteger, nullable=False),
    Column("receipt_count", Integer, nullable=False),
    Column("last_voted_round", BigInteger, nullable=False),
    Column("committed_ms", BigInteger, nullable=False),
    UniqueConstraint("hash"),
)

certificates = Table(
    "certificates",
    metadata,
    _key("height"),
    Column("body", LargeBinary, nullable=False),
)

transactions = Table(
    "transactions",
    metadata,
    _key("height"),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("digest", LargeBinary, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index(None, "digest"),
)

receipts = Table(
    "receipts",
    metadata,
    _key("leaf"),
    Column("height", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("code", String(32), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index(None, "height"),
    Index(None, "subject"),
)

decisions = Table(
    "decisions",
    metadata,
    _key("decision_seq"),
    Column("height", BigInteger, nullable=False),
    Column("leaf", BigInteger, nullable=False),
    Column("policy_id", String(128), nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("change", String(16), nullable=False),
    Column("action", String(32), nullable=False),
    Column("rule_type", String(32), nullable=False),
    Column("rule_data", LargeBinary, nullable=False),
    Column("rule_hash", LargeBinary, nullable=False),
    Column("opened_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Column("why", String(32), nullable=False),
    Column("ending", String(32), nullable=False),
    Column("reporters", Names, nullable=False),
    Column("approvers", Names, nullable=False),
    # True for the newest decision of a policy that has not ended; kept here so that listing them does not read history.
    Column("is_active", Boolean, nullable=False),
    Index(None, "policy_id", "decision_seq"),
    Index(None, "is_active", "decision_seq"),
    Index(None, "height"),
)

evidence = Table(
    "evidence",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("evidence_id", String(128), nullable=False),
    Column("producer", LargeBinary, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index(None, "evidence_id"),
    Index(None, "height"),
)

epochs = Table(
    "epochs",
    metadata,
    _key("epoch"),
    Column("first_height", BigInteger, nullable=False),
    Column("committee", LargeBinary, nullable=False),
    Column("change", LargeBinary, nullable=False),
    # What a later epoch's proofs carry of this change; absent for the first epoch.
    Column("step", LargeBinary),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("height", BigInteger, nullable=False),
    Column("event", String(32), nullable=False),
    Column("subject", BigInteger, nullable=False),
    Column("topic", String(256), nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("published_ms", BigInteger),
    Column("partition", Integer),
    Column("offset", BigInteger),
    # False where a verified copy of another validator was read instead.
    Column("is_own", Boolean),
    UniqueConstraint("event", "subject"),
    Index(None, "published_ms", "id"),
    sqlite_autoincrement=True,
)

mempool = Table(
    "mempool",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("received_ms", BigInteger, nullable=False),
    UniqueConstraint("digest"),
)

acks = Table(
    "acks",
    metadata,
    Column("policy_id", String(128), primary_key=True),
    Column("decision_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("agent", LargeBinary, primary_key=True),
    Column("result", String(16), nullable=False),
    Column("error_code", String(256), nullable=False),
    Column("reason", String(256), nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("applied_at_ms", BigInteger, nullable=False),
    Column("acked_at_ms", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index(None, "agent", "height"),
)

labels = Table(
    "labels",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("anomaly_id", String(128), nullable=False),
    Column("label", String(64), nullable=False),
    Column("operator", LargeBinary, nullable=False),
    Column("note", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Index(None, "anomaly_id"),
)

lifecycle = Table(
    "lifecycle",
    metadata,
    Column("subject", String(128), primary_key=True),
    Column("stage", String(32), primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("detail", Text, nullable=False),
    Index(None, "at_ms"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("detail", LargeBinary, nullable=False),
    Index(None, "at_ms"),
)

snapshots = Table(
    "snapshots",
    metadata,
    _key("height"),
    Column("block_hash", LargeBinary, nullable=False),
    Column("state_root", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

boots = Table(
    "boots",
    metadata,
    _key("boot"),
    Column("started_ms", BigInteger, nullable=False),
)
