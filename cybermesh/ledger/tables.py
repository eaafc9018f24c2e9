"""The state's tables: persistent maps from a key to a record, what each is called in the digest, and a table being changed.

A block works on ``Table`` values, which remember what each touched key held before. So the digest costs two expansions per
changed key, however often the block touched it, and nothing for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import immutables

from cybermesh.ledger import encoding
from cybermesh.ledger.records import (
    AnomalyRecord,
    DecisionRecord,
    EvidenceRecord,
    MemberRecord,
    OffenceRecord,
    OperatorRecord,
    ProducerRecord,
    ProposalRecord,
    RegistersRecord,
    RequestRecord,
    ShieldRecord,
    SpendingRecord,
    WindowRecord,
)

K = TypeVar("K", bound=bytes | str)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Tables:
    """All that the state's digest covers. Keys: public keys, a public key followed by an id or instance, ids, networks."""

    producers: immutables.Map[bytes, ProducerRecord] = field(default_factory=immutables.Map)
    operators: immutables.Map[bytes, OperatorRecord] = field(default_factory=immutables.Map)
    committee: immutables.Map[bytes, MemberRecord] = field(default_factory=immutables.Map)
    windows: immutables.Map[bytes, WindowRecord] = field(default_factory=immutables.Map)
    anomalies: immutables.Map[bytes, AnomalyRecord] = field(default_factory=immutables.Map)
    evidence: immutables.Map[bytes, EvidenceRecord] = field(default_factory=immutables.Map)
    requests: immutables.Map[str, RequestRecord] = field(default_factory=immutables.Map)
    decisions: immutables.Map[str, DecisionRecord] = field(default_factory=immutables.Map)
    offences: immutables.Map[bytes, OffenceRecord] = field(default_factory=immutables.Map)
    protected: immutables.Map[str, ShieldRecord] = field(default_factory=immutables.Map)
    allowed: immutables.Map[str, ShieldRecord] = field(default_factory=immutables.Map)
    proposals: immutables.Map[bytes, ProposalRecord] = field(default_factory=immutables.Map)
    spending: immutables.Map[bytes, SpendingRecord] = field(default_factory=immutables.Map)
    registers: immutables.Map[str, RegistersRecord] = field(default_factory=immutables.Map)


REGISTERS = "registers"
"""The one key of the table of single values."""


def encode_entry(table: str, key: bytes | str, record: object) -> bytes:
    """Return the bytes by which an entry counts in the state's digest and stands in a snapshot."""
    return encoding.encode([table, key, record])


class Table(Generic[K, V]):
    """One table while a block changes it; the map it came from stays as it is."""

    __slots__ = ("_before", "_map", "_source", "name")

    def __init__(self, name: str, source: immutables.Map[K, V]) -> None:
        self.name = name
        self._source: immutables.Map[K, V] = source
        self._map: immutables.MapMutation[K, V] = source.mutate()
        self._before: dict[K, V | None] = {}

    def get(self, key: K) -> V | None:
        """Return the record under ``key``, None when there is none."""
        return self._map.get(key)

    def __contains__(self, key: K) -> bool:
        return key in self._map

    def __len__(self) -> int:
        return len(self._map)

    def keys(self) -> list[K]:
        """Return all keys in ascending order; costs the size of the table."""
        found: set[K] = {*self._source, *self._before}
        return sorted((key for key in found if key in self._map), key=_in_bytes)

    def put(self, key: K, record: V) -> None:
        """Set the record under ``key``."""
        if key not in self._before:
            self._before[key] = self._map.get(key)
        self._map[key] = record

    def drop(self, key: K) -> None:
        """Remove the record under ``key``, which must be there."""
        if key not in self._before:
            self._before[key] = self._map.get(key)
        del self._map[key]

    def finish(self) -> immutables.Map[K, V]:
        """Return the table as it is now."""
        return self._map.finish()

    def removed(self) -> Iterator[bytes]:
        """Yield the entries that stood in the table before and do not any more."""
        for key, before in self._before.items():
            if before is not None and before != self._map.get(key):
                yield encode_entry(self.name, key, before)

    def added(self) -> Iterator[bytes]:
        """Yield the entries that stand in the table now and did not before."""
        for key, before in self._before.items():
            now = self._map.get(key)
            if now is not None and now != before:
                yield encode_entry(self.name, key, now)


def _in_bytes(key: bytes | str) -> bytes:
    return key if isinstance(key, bytes) else key.encode()
