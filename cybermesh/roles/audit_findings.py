"""What an audit reports: the first row that is not what it must be, and how rows are compared to find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cybermesh.store.rows import CHAIN, difference, key_of


@dataclass(frozen=True, slots=True)
class Finding:
    """The first row that is not what it must be: ``change`` is changed, added or removed."""

    table: str
    row: dict[str, object]
    change: str
    height: int
    reason: str

    def __str__(self) -> str:
        named = ", ".join(f"{name} {value.hex() if isinstance(value, bytes) else value}" for name, value in self.row.items())
        return f"{self.table} row ({named}) was {self.change}: {self.reason}"


class FoundError(Exception):
    """Carries the finding out of the check that made it; the audit catches it."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


def found(table: str, row: dict[str, object], change: str, height: int, reason: str) -> NoReturn:
    """End the audit with this finding."""
    raise FoundError(Finding(table, row, change, height, reason))


def compare(stored: Sequence[Any], expected: Sequence[Any], height: int, ignored: Sequence[str] = ()) -> None:
    """Name the first row in which a table differs from what the block gives; both are in order of their key."""
    if not ignored and list(stored) == list(expected):
        return
    have = {tuple(key_of(row).values()): row for row in stored}
    want = {tuple(key_of(row).values()): row for row in expected}
    for key in sorted({*have, *want}):
        row = have.get(key, want.get(key))
        table = CHAIN[type(row)][0].name
        if key not in have:
            found(table, key_of(want[key]), "removed", height, "the block gives it")
        if key not in want:
            found(table, key_of(have[key]), "added", height, "the block does not give it")
        column = difference(have[key], want[key], ignored)
        if column is not None:
            found(table, key_of(have[key]), "changed", height, f"column {column}")
