"""The agent's own database: decisions, tombstones, acks to send, and what the operator of this host has ordered.

It exists so that a restart forgets nothing and ``cybermesh enforce`` works with everything else down. The rules:

- One transaction per batch of decisions: decisions, tombstones and acks together, durable (WAL, synchronous FULL) on return.
- An ack stays until it is marked as published.
- The command line writes orders (mode, kill switch, exceptions) while an agent runs; ``changed_outside`` tells the agent.
- Every method blocks and may be called from any thread.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from cybermesh.addresses import Address, parse_address
from cybermesh.enforce.decisions import Decision, Mode, Tombstone

FILE_NAME: Final = "agent.sqlite"
PARKED_MAX: Final = 1_000
_VERSION: Final = 3
_BUSY_MS: Final = 5_000
_SCHEMA: Final = """
CREATE TABLE decisions (
    policy_id TEXT PRIMARY KEY, decision_seq INTEGER NOT NULL, rule_data BLOB NOT NULL, rule_hash BLOB NOT NULL,
    ends_at_ms INTEGER NOT NULL, height INTEGER NOT NULL, reference TEXT NOT NULL, requires_ack INTEGER NOT NULL,
    held TEXT NOT NULL, rules BLOB, rules_until_ms INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE tombstones (policy_id TEXT PRIMARY KEY, decision_seq INTEGER NOT NULL, until_ms INTEGER NOT NULL) STRICT;
CREATE TABLE acks (id INTEGER PRIMARY KEY AUTOINCREMENT, policy_id TEXT NOT NULL, body BLOB NOT NULL) STRICT;
CREATE TABLE parked (
    policy_id TEXT NOT NULL, decision_seq INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (policy_id, decision_seq)) STRICT;
CREATE TABLE exceptions (
    address TEXT PRIMARY KEY, until_ms INTEGER NOT NULL, reason TEXT NOT NULL, since_ms INTEGER NOT NULL) STRICT;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


_PUT_DECISION: Final = """
INSERT INTO decisions VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (policy_id) DO UPDATE SET
    decision_seq=excluded.decision_seq, rule_hash=excluded.rule_hash, ends_at_ms=excluded.ends_at_ms, height=excluded.height,
    reference=excluded.reference, requires_ack=excluded.requires_ack, held=excluded.held, rules=excluded.rules,
    rules_until_ms=excluded.rules_until_ms,
    rule_data=CASE WHEN length(excluded.rule_data) THEN excluded.rule_data ELSE rule_data END
"""


class StateError(Exception):
    """The agent's database cannot be used; the message says which file and what to do."""


@dataclass(frozen=True, slots=True)
class Exemption:
    """An operator of this host has lifted every ban of ``address`` until ``until_ms``."""

    address: Address
    until_ms: int
    reason: str
    since_ms: int


@dataclass(frozen=True, slots=True)
class Orders:
    """What the operator of this host wants; ``confirm_by_ms`` (0: none) is when enforcing ends unless confirmed."""

    mode: Mode
    kill_switch: bool = False
    confirm_by_ms: int = 0
    exemptions: tuple[Exemption, ...] = ()


@dataclass(frozen=True, slots=True)
class Pending:
    """A signed ack, encoded for the wire, that has not been published yet."""

    id: int
    policy_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Changes:
    """What one batch changes; a policy that ended has a tombstone and is deleted from the decisions.

    ``rules`` holds the packed rules of decisions by policy; those of a held one are of the decision before it, and
    ``rules_until`` has their end in milliseconds since 1970. A decision without ``rule_data`` keeps what is stored.
    """

    decisions: tuple[Decision, ...] = ()
    rules: Mapping[str, bytes] = field(default_factory=dict)
    rules_until: Mapping[str, int] = field(default_factory=dict)
    tombstones: tuple[Tombstone, ...] = ()
    acks: tuple[tuple[str, bytes], ...] = ()
    height: int = 0
    newest_block_ms: int = 0


_SELECT_LIGHT: Final = (
    "SELECT policy_id, decision_seq, rule_hash, ends_at_ms, height, reference, requires_ack, held FROM decisions"
)


def _light(row: tuple[Any, ...]) -> Decision:
    """Return a decision without its ``rule_data``, which is read when it is needed."""
    policy_id, decision_seq, rule_hash, ends_at_ms, height, reference, requires_ack, held = row
    # Decisions of one block share their reference.
    shared = sys.intern(reference)
    return Decision(policy_id, decision_seq, b"", rule_hash, ends_at_ms, height, shared, bool(requires_ack), held)


class State:
    """The open database."""

    def __init__(self, path: Path, default_mode: Mode = Mode.OBSERVE) -> None:
        """Open or make the database; ``default_mode`` holds until somebody orders another.

        Raises:
            StateError: It is not a database of ours, of a newer version, or cannot be opened.
        """
        self.path = path
        self._default_mode = default_mode
        self._lock = threading.RLock()
        self._seen_version = -1
        with self._translating():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except (sqlite3.Error, StateError):
                self._db.close()
                raise

    def _prepare(self) -> None:
        self._db.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(None, (part.strip() for part in _SCHEMA.split(";"))):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={_VERSION}")
            elif version in (1, 2):
                if version == 1:
                    self._db.execute("ALTER TABLE decisions ADD COLUMN rules BLOB")
                self._db.execute("ALTER TABLE decisions ADD COLUMN rules_until_ms INTEGER NOT NULL DEFAULT 0")
                self._db.execute(f"PRAGMA user_version={_VERSION}")
            elif version != _VERSION:
                raise StateError(f"{self.path}: version {version}, this program knows {_VERSION}; update cybermesh")

    def close(self) -> None:
        """Close the database; closing twice is fine."""
        with self._lock:
            self._db.close()

    def load(self) -> tuple[dict[str, Decision], dict[str, Tombstone]]:
        """Return all decisions, without their ``rule_data``, and all tombstones, by policy."""
        with self._translating():
            decisions = {made.policy_id: made for made in map(_light, self._db.execute(_SELECT_LIGHT))}
            tombstones = self._db.execute("SELECT * FROM tombstones").fetchall()
        return decisions, {row[0]: Tombstone(*row) for row in tombstones}

    def rules(self) -> list[tuple[str, bytes | None, int]]:
        """Return the packed rules of all decisions that have some, and their end where it is not the decision's, else 0.

        The rules are None where an earlier version has not stored them.
        """
        with self._translating():
            return self._db.execute(
                "SELECT policy_id, rules, rules_until_ms FROM decisions WHERE held='' OR rules IS NOT NULL"
            ).fetchall()

    def rule_data(self, policy_id: str) -> bytes:
        """Return the rule of a decision, b"" if there is none."""
        with self._translating():
            row = self._db.execute("SELECT rule_data FROM decisions WHERE policy_id=?", (policy_id,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def commit(self, changes: Changes) -> None:
        """Store one batch durably, all or nothing."""
        with self._transaction() as db:
            db.executemany(
                _PUT_DECISION,
                [
                    (
                        d.policy_id,
                        d.decision_seq,
                        d.rule_data,
                        d.rule_hash,
                        d.ends_at_ms,
                        d.height,
                        d.reference,
                        d.requires_ack,
                        d.held,
                        changes.rules.get(d.policy_id),
                        changes.rules_until.get(d.policy_id, 0),
                    )
                    for d in changes.decisions
                ],
            )
            db.executemany("DELETE FROM decisions WHERE policy_id=?", [(t.policy_id,) for t in changes.tombstones])
            db.executemany("DELETE FROM tombstones WHERE policy_id=?", [(d.policy_id,) for d in changes.decisions])
            db.executemany(
                "INSERT OR REPLACE INTO tombstones VALUES (?,?,?)",
                [(t.policy_id, t.decision_seq, t.until_ms) for t in changes.tombstones],
            )
            db.executemany("INSERT INTO acks (policy_id, body) VALUES (?,?)", changes.acks)
            for key, value in (("height", changes.height), ("newest_block_ms", changes.newest_block_ms)):
                if value > self.number(key):
                    self._set(key, str(value))

    def forget_tombstones(self, now_ms: int) -> None:
        """Drop tombstones whose time is up."""
        with self._transaction() as db:
            db.execute("DELETE FROM tombstones WHERE until_ms<=?", (now_ms,))

    def pending_acks(self, count_max: int) -> list[Pending]:
        """Return the oldest acks that are not published."""
        with self._translating():
            rows = self._db.execute("SELECT id, policy_id, body FROM acks ORDER BY id LIMIT ?", (count_max,)).fetchall()
        return [Pending(*row) for row in rows]

    def acks_waiting(self) -> int:
        """Return how many acks are not published."""
        with self._translating():
            return int(self._db.execute("SELECT count(*) FROM acks").fetchone()[0])

    def mark_published(self, ids: Iterable[int]) -> None:
        """Forget acks that the bus has."""
        with self._transaction() as db:
            db.executemany("DELETE FROM acks WHERE id=?", [(item,) for item in ids])

    def park(self, policy_id: str, decision_seq: int, body: bytes) -> bool:
        """Keep an event whose epoch is not known yet; return False when there is no room for another."""
        with self._transaction() as db:
            (count,) = db.execute("SELECT count(*) FROM parked").fetchone()
            if count >= PARKED_MAX:
                return False
            db.execute("INSERT OR REPLACE INTO parked VALUES (?,?,?)", (policy_id, decision_seq, body))
            return True

    def take_parked(self) -> list[bytes]:
        """Remove and return the parked events, lowest sequence first."""
        with self._transaction() as db:
            rows = db.execute("SELECT body FROM parked ORDER BY decision_seq").fetchall()
            db.execute("DELETE FROM parked")
        return [row[0] for row in rows]

    def epochs(self) -> list[bytes]:
        """Return the kept changes of the committee, in their order."""
        return [bytes.fromhex(step) for step in self.text("epochs").split()]

    def keep_epochs(self, steps: Iterable[bytes]) -> None:
        """Keep the changes of the committee, all of them: after a restart no proof of an older one may count again."""
        with self._transaction():
            self._set("epochs", " ".join(step.hex() for step in steps))

    def orders(self) -> Orders:
        """Return what the operator of this host wants."""
        with self._translating():
            rows = self._db.execute("SELECT * FROM exceptions ORDER BY address").fetchall()
            return Orders(
                mode=Mode(self.text("mode") or self._default_mode),
                kill_switch=self.text("kill_switch") == "1",
                confirm_by_ms=self.number("confirm_by_ms"),
                exemptions=tuple(Exemption(parse_address(row[0]), row[1], row[2], row[3]) for row in rows),
            )

    def order_mode(self, mode: Mode, confirm_by_ms: int = 0) -> None:
        """Set the mode; with ``confirm_by_ms`` it reverts to observe unless confirmed by then."""
        with self._transaction():
            self._set("mode", mode)
            self._set("confirm_by_ms", str(confirm_by_ms))

    def confirm(self) -> None:
        """Make the mode permanent."""
        with self._transaction():
            self._set("confirm_by_ms", "0")

    def order_kill_switch(self, on: bool) -> None:
        """Stop new rules, or allow them again."""
        with self._transaction():
            self._set("kill_switch", "1" if on else "0")

    def exempt(self, exemption: Exemption) -> None:
        """Lift the bans of an address for a while."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO exceptions VALUES (?,?,?,?)",
                (str(exemption.address), exemption.until_ms, exemption.reason, exemption.since_ms),
            )

    def forget_exemptions(self, now_ms: int) -> None:
        """Drop exceptions whose time is up."""
        with self._transaction() as db:
            db.execute("DELETE FROM exceptions WHERE until_ms<=?", (now_ms,))

    def changed_outside(self) -> bool:
        """Say whether another process has written since the last call (true on the first)."""
        with self._translating():
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
        changed = version != self._seen_version
        self._seen_version = version
        return bool(changed)

    def set_report(self, report: dict[str, object], drift_total: int) -> None:
        """Keep the last reconciliation's figures for ``cybermesh enforce status``."""
        with self._transaction():
            self._set("drift_total", str(drift_total))
            self._set("report", orjson.dumps(report, option=orjson.OPT_SORT_KEYS).decode())

    def report(self) -> dict[str, object]:
        """Return the last reconciliation's figures, nothing if there was none."""
        loaded = orjson.loads(self.text("report") or b"{}")
        return loaded if isinstance(loaded, dict) else {}

    def text(self, key: str) -> str:
        """Return a kept value, "" if there is none."""
        with self._translating():
            row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return "" if row is None else str(row[0])

    def number(self, key: str) -> int:
        """Return a kept number, 0 if there is none."""
        return int(self.text(key) or 0)

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (key, value))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._translating():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                # Whatever stopped it, a failed commit included, must not leave the transaction to the next caller.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as fault:
                raise StateError(f"{self.path}: {fault}; check the file, its owner and the disk") from fault
