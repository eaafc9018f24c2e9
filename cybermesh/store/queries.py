"""From rows to values and back: the values' fields are the tables' columns."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from sqlalchemy import Select, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")


def names_of(record: type) -> list[str]:
    """Return the names of a record's fields."""
    return [entry.name for entry in fields(record)]


def select_records(table: Table, record: type) -> Select[Any]:
    """Return a SELECT of the record's columns, in the order of its fields."""
    return select(*(table.c[name] for name in names_of(record)))


def values_of(records: Iterable[object]) -> list[dict[str, object]]:
    """Return records as parameters of an INSERT."""
    listed = list(records)
    if not listed:
        return []
    names = names_of(type(listed[0]))
    return [{name: getattr(record, name) for name in names} for record in listed]


async def insert_many(connection: AsyncConnection, table: Table, records: Sequence[object]) -> None:
    """Insert records whose values the driver takes as they are (integers, texts, bytes), as fast as the driver can.

    A block has thousands of these rows, and a dict and a pass over its types for each took longer than writing it.
    """
    if not records:
        return
    names = names_of(type(records[0]))
    compiled = insert(table).compile(dialect=connection.dialect, column_keys=names)
    assert [column.name for column in table.columns] == names
    values = operator.attrgetter(*names)
    await connection.exec_driver_sql(str(compiled), [values(record) for record in records])


async def fetch(connection: AsyncConnection, record: type[T], query: Select[Any]) -> Sequence[T]:
    """Run a query made by ``select_records``; return its rows as values."""
    return tuple(cast(Any, record)(*row) for row in await connection.execute(query))


async def fetch_one(connection: AsyncConnection, record: type[T], query: Select[Any]) -> T | None:
    """Run a query made by ``select_records``; return its first row, or None."""
    row = (await connection.execute(query.limit(1))).first()
    return None if row is None else cast(T, cast(Any, record)(*row))
