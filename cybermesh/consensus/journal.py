"""The local safety file: what a key has signed, beside the key and nowhere else.

Rules:
* The record and the block that it concerns are written in one transaction, with an fsync at its end (WAL, synchronous=FULL).
* One process per key: an advisory lock on a neighbouring file is held as long as the journal is open.
* ``create`` is part of the key's ceremony. A journal that is missing later is lost memory, and so is one that is behind what
  the store has seen of this key: either makes the node an observer (``standing``) until it has a new key.
* Every opening adds one to the boot number, durable before anything is signed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from cybermesh.consensus.codec import decode_block, decode_record, encode_block, encode_record
from cybermesh.consensus.events import SafetyRecord
from cybermesh.consensus.types import Block, Height, MalformedError

_SCHEMA: Final = """
CREATE TABLE safety (
    one INTEGER PRIMARY KEY CHECK (one = 1), chain_id BLOB NOT NULL, public_key BLOB NOT NULL, record BLOB NOT NULL
);
CREATE TABLE journal (hash BLOB PRIMARY KEY, height INTEGER NOT NULL, block BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX journal_by_height ON journal (height);
PRAGMA user_version = 1;
"""
_VERSION: Final = 1


class JournalError(Exception):
    """The safety file cannot be used; the text says which file, why, and what to do."""


class KeyInUseError(JournalError):
    """Another process holds the safety file open: this one must not run at all with the same key."""


class Journal:
    """An open safety file. Its methods block for an fsync: call ``write`` from a worker thread, one at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int, record: SafetyRecord) -> None:
        self._path = path
        self._connection = connection
        self._lock = lock
        self._record = record
        self._prune_below = 0
        self._mutex = threading.Lock()

    @classmethod
    def create(cls, path: Path, *, chain_id: bytes, public_key: bytes, record: SafetyRecord) -> None:
        """Make the empty memory of a new key.

        Raises:
            JournalError: the file is there already, or cannot be written.
        """
        if path.exists():
            raise JournalError(f"{path}: there already; the memory of a key is never replaced")
        draft = path.with_name(path.name + ".new")
        try:
            draft.unlink(missing_ok=True)
            connection = sqlite3.connect(draft, isolation_level=None)
            try:
                draft.chmod(0o600)
                connection.executescript(_SCHEMA)
                row = (chain_id, public_key, encode_record(record))
                connection.execute("INSERT INTO safety VALUES (1, ?, ?, ?)", row)
            finally:
                connection.close()
            _sync(draft)
            draft.rename(path)
            _sync(path.parent)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{path}: cannot create the safety file: {error}") from error

    @classmethod
    def open(cls, path: Path, *, chain_id: bytes, public_key: bytes) -> Journal:
        """Lock and open the memory of this key and count the start.

        Raises:
            JournalError: missing, locked by another process, of another key or chain, or damaged.
        """
        if not path.exists():
            raise JournalError(f"{path}: the safety file is missing; this key may only observe, make a new key to vote")
        lock = _acquire(path)
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            record = _read(connection, path, chain_id, public_key)
            record = dataclasses.replace(record, boot=record.boot + 1)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            journal = cls(path, connection, lock, record)
            journal.write(record, ())
        except (sqlite3.Error, MalformedError) as error:
            _release(connection, lock)
            raise JournalError(f"{path}: damaged ({error}); this key may only observe, make a new key to vote") from error
        except JournalError:
            _release(connection, lock)
            raise
        return journal

    @property
    def boot(self) -> int:
        """The number of this start of the key, from 1."""
        return self._record.boot

    def load(self) -> SafetyRecord:
        """Return the newest record, with this start's boot number."""
        return self._record

    def blocks(self, above: Height) -> list[Block]:
        """Return the journaled blocks above a height, lowest first."""
        rows = self._connection.execute("SELECT block FROM journal WHERE height > ? ORDER BY height, hash", (above,))
        return [decode_block(row[0]) for row in rows.fetchall()]

    def write(self, record: SafetyRecord, blocks: Sequence[Block]) -> None:
        """Make the record and the blocks durable in one transaction; returns after the fsync.

        Raises:
            JournalError: the disk is full, gone or read-only; nothing was written and nothing may be sent.
        """
        rows = [(block.hash, block.height, encode_block(block)) for block in blocks]
        below = self._prune_below
        try:
            with self._mutex:
                self._commit(encode_record(record), rows, below)
        except sqlite3.Error as error:
            raise JournalError(f"{self._path}: cannot write: {error}") from error
        self._record = record
        if self._prune_below == below:
            self._prune_below = 0

    def _commit(self, record: bytes, rows: Sequence[tuple[bytes, int, bytes]], below: int) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.execute("UPDATE safety SET record = ?", (record,))
            self._connection.executemany("INSERT OR IGNORE INTO journal VALUES (?, ?, ?)", rows)
            if below:
                self._connection.execute("DELETE FROM journal WHERE height <= ?", (below,))
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def prune(self, height: Height) -> None:
        """Forget blocks up to this height, which the store now has; done with the next write."""
        self._prune_below = max(self._prune_below, height)

    def close(self) -> None:
        """Close the file and release the key, after a write that is under way in another thread."""
        with self._mutex:
            _release(self._connection, self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MemoryJournal:
    """The safety file of an observer: it signs nothing, so nothing need outlive the process."""

    def __init__(self, record: SafetyRecord) -> None:
        self._record = record

    def load(self) -> SafetyRecord:
        """Return the newest record."""
        return self._record

    def blocks(self, above: Height) -> list[Block]:
        """Return nothing: an observer fetches what it misses."""
        return []

    def write(self, record: SafetyRecord, blocks: Sequence[Block]) -> None:
        """Keep the record in memory."""
        self._record = record

    def prune(self, height: Height) -> None:
        """Do nothing: no block is kept."""


def standing(record: SafetyRecord, *, stored_boot: int, stored_voted_round: int, stored_epoch: int) -> str | None:
    """Return why this memory is older than what the store has seen of the key, None when the key may vote.

    The store is told the boot number at each start and the last voted round with each block; zeros when it knows nothing.
    """
    if record.boot <= stored_boot:
        return f"the safety file is at start {record.boot}, the store has seen start {stored_boot}: an old copy"
    if (record.epoch, record.last_voted_round) < (stored_epoch, stored_voted_round):
        return f"the safety file ends at round {record.last_voted_round}, the store has seen {stored_voted_round}: an old copy"
    return None


def _read(connection: sqlite3.Connection, path: Path, chain_id: bytes, public_key: bytes) -> SafetyRecord:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise JournalError(f"{path}: version {version} instead of {_VERSION}; not a safety file of this program")
    row = connection.execute("SELECT chain_id, public_key, record FROM safety").fetchone()
    if row is None or row[0] != chain_id or row[1] != public_key:
        raise JournalError(f"{path}: belongs to another chain or another key")
    return decode_record(row[2])


def _acquire(path: Path) -> int:
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise KeyInUseError(f"{path}: another process uses this key; stop it first") from error
    return lock


def _release(connection: sqlite3.Connection | None, lock: int) -> None:
    if connection is not None:
        connection.close()
    os.close(lock)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
