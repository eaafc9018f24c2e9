"""What a validator keeps: blocks, receipts, decisions and the outbox, in SQLite, PostgreSQL or CockroachDB.

Nothing here decides anything: a restored or empty store only catches up, and a vote never depends on it. Values go in and come
out as plain bytes, integers and texts, so the store knows neither consensus nor the ledger.
"""

from __future__ import annotations


class StoreError(Exception):
    """The store refuses: its content contradicts what it is given, or its schema is not this version's."""


class StoreUnavailable(StoreError):  # noqa: N818 - the spec's word for a state that passes by itself
    """The database is full, locked, lost or slow; the same call may succeed later. Nothing was changed."""


class BlockConflict(StoreError):  # noqa: N818 - names a fact about the chain, which must stop the node
    """Another block is stored at this height; the node must stop, and a person must look at both hashes."""

    def __init__(self, height: int, stored: bytes, given: bytes) -> None:
        super().__init__(
            f"height {height}: block {stored.hex()} is stored and block {given.hex()} was committed; "
            "stop this node, keep both for the operators, and run `cybermesh ledger audit`"
        )
        self.height = height
        self.stored = stored
        self.given = given
