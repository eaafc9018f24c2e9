"""The local bus' records, cursors and members in one SQLite file: plain synchronous SQL.

Rules:

- SQLite runs in WAL mode with synchronous=FULL: what is committed survives the loss of power;
- every method that writes is called inside ``transaction``; what several processes must agree on (who owns a partition, where a
  group stands, whether there is room) is read and written in the same transaction;
- ``turn`` counts how often a partition changed hands within a group. Whoever finds a new turn starts again after the last
  acknowledged record, also when it is the owner again;
- only members own partitions, and a member belongs to a process: with the process gone, so are its members.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cybermesh.bus import BusError, Delivery, Published

SCHEMA_VERSION = 1
# A record's key in its table is its partition and its offset, so that a partition's records lie together and in order.
_OFFSET_BITS = 40
_BUSY_S = 30.0
_EXPIRE_MAX = 1_000
_JOURNAL_MAX_BYTES = 64 * 1024 * 1024
_SCHEMA = """
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    number INTEGER NOT NULL,
    base INTEGER NOT NULL DEFAULT 0,        -- offset of the oldest record that is still here
    next INTEGER NOT NULL DEFAULT 0,        -- offset of the next record
    size_bytes INTEGER NOT NULL DEFAULT 0,  -- keys and values
    is_blocked INTEGER NOT NULL DEFAULT 0,  -- a publisher waits for room
    UNIQUE (topic, number)
);
CREATE TABLE records (
    id INTEGER PRIMARY KEY,
    timestamp_ms INTEGER NOT NULL,
    key BLOB NOT NULL,
    value BLOB NOT NULL
);
CREATE TABLE cursors (
    grp TEXT NOT NULL,
    partition INTEGER NOT NULL REFERENCES partitions (id),
    acknowledged INTEGER NOT NULL,          -- the first offset that is not acknowledged
    owner TEXT,
    turn INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (grp, partition)
) WITHOUT ROWID;
CREATE INDEX cursors_of_partition ON cursors (partition);
CREATE TABLE members (
    member TEXT NOT NULL,
    topic TEXT NOT NULL,
    grp TEXT NOT NULL,
    process TEXT NOT NULL,
    PRIMARY KEY (member, topic)
) WITHOUT ROWID;
CREATE INDEX members_of_topic ON members (topic);
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one partition may hold; the oldest records leave it first.

    Args:
        records_max: Number of records.
        bytes_max: Bytes of keys and values; one record always fits.
        age_max_s: Older records leave, unless a running subscriber still needs them.
    """

    records_max: int = 100_000
    bytes_max: int = 64 * 1024 * 1024
    age_max_s: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Member:
    """One subscriber of a group; ``process`` is the name of its wake-up socket."""

    token: str
    process: str
    group: str
    topics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """A partition that a member owns, and where it and the group stand."""

    partition: int
    topic: str
    number: int
    base: int
    next: int
    acknowledged: int
    turn: int


class LocalStore:
    """One connection; used by one thread.

    Raises:
        BusError: the file was made by a newer version.
        sqlite3.Error: the file cannot be opened or is not a database.
    """

    def __init__(self, path: Path, partitions: int, bounds: Bounds) -> None:
        self._partitions = partitions
        self._bounds = bounds
        self._topics: dict[str, tuple[int, ...]] = {}
        path.touch(mode=0o600, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, cached_statements=64)
        try:
            self._set_up(path)
        except (sqlite3.Error, BusError):
            self._db.close()
            raise

    def _set_up(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA journal_size_limit = {_JOURNAL_MAX_BYTES}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise BusError(
                f"{path}: made by a newer version (schema {version}, this one knows {SCHEMA_VERSION}); upgrade this host"
            )
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Do what is inside durably, or not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:  # supervisor: whatever it was, nothing of the transaction may stay
            # SQLite has rolled back by itself after some errors, such as a full disk.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._topics.clear()  # a topic made in this transaction is gone again
            raise

    # Records

    def partition_of(self, topic: str, key: bytes) -> int:
        """Return the partition's id for a key; makes the topic when it is new."""
        partitions = self._partitions_of(topic)
        return partitions[zlib.crc32(key) % len(partitions)]

    def _partitions_of(self, topic: str) -> tuple[int, ...]:
        """Return the ids of a topic's partitions by number; a topic that is new is made."""
        known = self._topics.get(topic)
        if known is None:
            query = "SELECT id FROM partitions WHERE topic = ? ORDER BY number"
            if not self._db.execute(query, (topic,)).fetchall():
                rows = [(topic, number) for number in range(self._partitions)]
                self._db.executemany("INSERT INTO partitions (topic, number) VALUES (?, ?)", rows)
            known = tuple(partition for (partition,) in self._db.execute(query, (topic,)))
            self._topics[topic] = known
        return known

    def append(self, partition: int, key: bytes, value: bytes, now_ms: int) -> Published | None:
        """Append a record; None when the partition is full and a running subscriber still needs its oldest record.

        The partition is marked then: whoever makes room wakes every process.
        """
        size = len(key) + len(value)
        topic, number, base, end, held_bytes = self._db.execute(
            "SELECT topic, number, base, next, size_bytes FROM partitions WHERE id = ?", (partition,)
        ).fetchone()
        if end - base >= self._bounds.records_max or held_bytes + size > self._bounds.bytes_max:
            base, held_bytes = self._make_room(partition, (base, end), held_bytes, size)
            if end - base >= self._bounds.records_max or (end > base and held_bytes + size > self._bounds.bytes_max):
                self._db.execute("UPDATE partitions SET is_blocked = 1 WHERE id = ? AND is_blocked = 0", (partition,))
                return None
        self._db.execute(
            "INSERT INTO records (id, timestamp_ms, key, value) VALUES (?, ?, ?, ?)",
            (_record_id(partition, end), now_ms, key, value),
        )
        self._db.execute(
            "UPDATE partitions SET base = ?, next = ?, size_bytes = ? WHERE id = ?",
            (base, end + 1, held_bytes + size, partition),
        )
        return Published(topic, number, end)

    def _make_room(self, partition: int, span: tuple[int, int], held_bytes: int, size: int) -> tuple[int, int]:
        """Drop the oldest records that no running subscriber needs until ``size`` bytes fit; return the new base and bytes."""
        base, end = span
        needed = min(self._needed(partition), end)
        while base < needed and (end - base >= self._bounds.records_max or held_bytes + size > self._bounds.bytes_max):
            held_bytes -= self._drop(partition, base)
            base += 1
        self._db.execute("UPDATE partitions SET base = ?, size_bytes = ? WHERE id = ?", (base, held_bytes, partition))
        return base, held_bytes

    def _needed(self, partition: int) -> int:
        """Return the lowest offset that a running subscriber still needs; past the end when there is none."""
        (needed,) = self._db.execute(
            "SELECT min(acknowledged) FROM cursors WHERE partition = ? AND owner IS NOT NULL", (partition,)
        ).fetchone()
        return (1 << _OFFSET_BITS) if needed is None else int(needed)

    def _drop(self, partition: int, offset: int) -> int:
        """Delete one record; return its bytes."""
        (size,) = self._db.execute(
            "DELETE FROM records WHERE id = ? RETURNING length(key) + length(value)", (_record_id(partition, offset),)
        ).fetchone()
        return int(size)

    def expire(self, now_ms: int) -> None:
        """Drop records above the age bound that no running subscriber needs; a bounded number of them at a time."""
        oldest_ms = now_ms - int(self._bounds.age_max_s * 1000)
        for partition, base, held_bytes in self._db.execute(
            "SELECT p.id, p.base, p.size_bytes FROM partitions p JOIN records r ON r.id = (p.id << ?) + p.base"
            " WHERE r.timestamp_ms < ?",
            (_OFFSET_BITS, oldest_ms),
        ).fetchall():
            needed = min(self._needed(partition), base + _EXPIRE_MAX)
            first, last = _record_id(partition, base), _record_id(partition, needed)
            # Only a run of old records from the oldest on: a clock that was set back must not leave holes.
            (young,) = self._db.execute(
                "SELECT min(id) FROM records WHERE id >= ? AND id < ? AND timestamp_ms >= ?", (first, last, oldest_ms)
            ).fetchone()
            sizes = self._db.execute(
                "DELETE FROM records WHERE id >= ? AND id < ? RETURNING length(key) + length(value)",
                (first, last if young is None else young),
            ).fetchall()
            self._db.execute(
                "UPDATE partitions SET base = ?, size_bytes = ? WHERE id = ?",
                (base + len(sizes), held_bytes - sum(size for (size,) in sizes), partition),
            )

    def read(self, assigned: Assigned, position: int, records_max: int, bytes_max: int) -> list[Delivery]:
        """Return records from ``position`` on: at least one if there is one, then up to both bounds."""
        taken: list[Delivery] = []
        size = 0
        first = _record_id(assigned.partition, 0)
        rows = self._db.execute(
            "SELECT id, timestamp_ms, key, value FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
            (first + position, _record_id(assigned.partition + 1, 0), records_max),
        )
        with closing(rows):
            for row, timestamp_ms, key, value in rows:
                size += len(key) + len(value)
                if taken and size > bytes_max:
                    break
                taken.append(Delivery(assigned.topic, assigned.number, row - first, key, value, timestamp_ms))
        return taken

    # Groups

    def join(self, member: Member, *, from_start: bool) -> None:
        """Enter a member and spread its group's partitions anew."""
        for topic in member.topics:
            self._partitions_of(topic)
            self._db.execute(
                "INSERT OR IGNORE INTO cursors (grp, partition, acknowledged)"
                " SELECT ?, id, iif(?, base, next) FROM partitions WHERE topic = ?",
                (member.group, from_start, topic),
            )
            self._db.execute(
                "INSERT OR IGNORE INTO members (member, topic, grp, process) VALUES (?, ?, ?, ?)",
                (member.token, topic, member.group, member.process),
            )
        self._spread(member.group)

    def leave(self, tokens: Iterable[str]) -> None:
        """Remove members; the rest of their groups take their partitions over."""
        for token in tokens:
            groups = self._db.execute("SELECT DISTINCT grp FROM members WHERE member = ?", (token,)).fetchall()
            self._db.execute("DELETE FROM members WHERE member = ?", (token,))
            for (group,) in groups:
                self._spread(group)

    def members_of(self, processes: Iterable[str]) -> list[str]:
        """Return the members that belong to these processes."""
        return [
            token
            for process in processes
            for (token,) in self._db.execute("SELECT DISTINCT member FROM members WHERE process = ?", (process,))
        ]

    def _spread(self, group: str) -> None:
        """Give each partition of the group's topics to one of the members that read the topic."""
        readers: dict[str, list[str]] = {}
        for topic, token in self._db.execute("SELECT topic, member FROM members WHERE grp = ? ORDER BY member", (group,)):
            readers.setdefault(topic, []).append(token)
        owners: dict[str, dict[int, str | None]] = {}
        for topic, partition, owner in self._db.execute(
            "SELECT p.topic, p.id, c.owner FROM cursors c JOIN partitions p ON p.id = c.partition"
            " WHERE c.grp = ? ORDER BY p.id",
            (group,),
        ):
            owners.setdefault(topic, {})[partition] = owner
        for topic, owned in owners.items():
            chosen = share_out(list(owned.values()), readers.get(topic, []))
            for (partition, before), after in zip(owned.items(), chosen, strict=True):
                if after != before:
                    self._db.execute(
                        "UPDATE cursors SET owner = ?, turn = turn + 1 WHERE grp = ? AND partition = ?",
                        (after, group, partition),
                    )

    def acknowledge(self, member: Member, partition: int, offset: int) -> None:
        """Move the group's mark past ``offset``, if the member still owns the partition; never back."""
        self._db.execute(
            "UPDATE cursors SET acknowledged = ? WHERE grp = ? AND partition = ? AND owner = ? AND acknowledged < ?",
            (offset + 1, member.group, partition, member.token, offset + 1),
        )

    def assignments(self, member: Member) -> list[Assigned] | None:
        """Return what the member owns; None when it is no member any more, because it was taken for dead."""
        known = self._db.execute("SELECT 1 FROM members WHERE member = ? LIMIT 1", (member.token,)).fetchone()
        if known is None:
            return None
        return [
            Assigned(*row)
            for row in self._db.execute(
                "SELECT p.id, p.topic, p.number, p.base, p.next, c.acknowledged, c.turn"
                " FROM cursors c JOIN partitions p ON p.id = c.partition WHERE c.grp = ? AND c.owner = ?",
                (member.group, member.token),
            )
        ]

    # Who must be woken

    def processes(self, topics: Collection[str] | None = None) -> list[str]:
        """Return the processes that have members, of these topics or of any."""
        if topics is None:
            return [name for (name,) in self._db.execute("SELECT DISTINCT process FROM members")]
        places = ", ".join("?" * len(topics))
        query = f"SELECT DISTINCT process FROM members WHERE topic IN ({places})"  # noqa: S608 (only question marks)
        return [name for (name,) in self._db.execute(query, tuple(topics))]

    def unblock(self, partitions: Sequence[int]) -> bool:
        """Take the marks of waiting publishers off these partitions; return whether there was one."""
        found = False
        for partition in partitions:
            cursor = self._db.execute("UPDATE partitions SET is_blocked = 0 WHERE id = ? AND is_blocked = 1", (partition,))
            found = found or cursor.rowcount > 0
        return found


def share_out(owners: Sequence[str | None], readers: Sequence[str]) -> list[str | None]:
    """Return an owner for each partition: shares differ by at most one, and as few partitions as possible change hands.

    Args:
        owners: Of each partition now; some may be gone.
        readers: Who can own partitions, each once; with none, nobody owns anything.
    """
    if not readers:
        return [None] * len(owners)
    share, extra = divmod(len(owners), len(readers))
    counts = dict.fromkeys(readers, 0)
    chosen: list[str | None] = []
    for owner in owners:
        # Whoever has its share keeps one more as long as not everybody can have one more.
        if owner in counts and (counts[owner] < share or (counts[owner] == share and extra > 0)):
            extra -= counts[owner] == share
            counts[owner] += 1
            chosen.append(owner)
        else:
            chosen.append(None)
    for index, owner in enumerate(chosen):
        if owner is None:
            least = min(readers, key=lambda reader: counts[reader])
            counts[least] += 1
            chosen[index] = least
    return chosen


def _record_id(partition: int, offset: int) -> int:
    return (partition << _OFFSET_BITS) + offset
