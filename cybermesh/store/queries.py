"""From rows to values and back: the values' fields are the tables' columns."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from sqlalchemy import Column, Dialect, Select, Table, bindparam, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cybermesh.store.database import insert_new_for

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
    """Insert records whose fields are the table's columns in their order, and which the driver takes as they are."""
    if records:
        names = names_of(type(records[0]))
        values = operator.attrgetter(*names)
        await insert_tuples(connection, table, names, [values(record) for record in records])


async def insert_tuples(
    connection: AsyncConnection,
    table: Table,
    names: Sequence[str],
    rows: Sequence[tuple[object, ...]],
    *,
    only_new: bool = False,
) -> None:
    """Insert rows of plain values (integers, booleans, texts, bytes), as fast as the driver can; ``names`` are their columns.

    A block has thousands of these rows, and a dict and a pass over its types for each took longer than writing it. With
    ``only_new``, rows that are there already are left alone.
    """
    if rows:
        await connection.exec_driver_sql(_insert_text(connection.dialect, table, tuple(names), only_new), list(rows))


async def delete_each(connection: AsyncConnection, column: Column[bytes], values: Sequence[bytes]) -> None:
    """Delete the rows of a table in which a column has one of these values; one short statement each beats long lists."""
    if values:
        await connection.exec_driver_sql(_delete_text(connection.dialect, column), [(value,) for value in values])


@functools.lru_cache(maxsize=64)
def _insert_text(dialect: Dialect, table: Table, names: tuple[str, ...], only_new: bool) -> str:
    # The driver counts parameters by their place, and the statement names columns in the order of the table.
    assert [column.name for column in table.columns if column.name in names] == list(names)
    statement = insert_new_for(dialect.name, table) if only_new else insert(table)
    return str(statement.inline().compile(dialect=dialect, column_keys=list(names)))


@functools.lru_cache(maxsize=16)
def _delete_text(dialect: Dialect, column: Column[bytes]) -> str:
    return str(delete(column.table).where(column == bindparam("value", type_=column.type)).compile(dialect=dialect))


async def fetch(connection: AsyncConnection, record: type[T], query: Select[Any]) -> Sequence[T]:
    """Run a query made by ``select_records``; return its rows as values."""
    return tuple(cast(Any, record)(*row) for row in await connection.execute(query))


async def fetch_one(connection: AsyncConnection, record: type[T], query: Select[Any]) -> T | None:
    """Run a query made by ``select_records``; return its first row, or None."""
    row = (await connection.execute(query.limit(1))).first()
    return None if row is None else cast(T, cast(Any, record)(*row))
