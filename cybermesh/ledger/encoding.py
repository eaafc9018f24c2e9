"""The one way the ledger turns values into bytes: JSON of integers, strings, booleans and lower-case hex, nothing else.

Rules: a dataclass becomes an object with its fields in the order of their names (the classes declare them so, which a test
checks), a tuple a list, bytes lower-case hex. No floats, no nulls, no spaces. ``restore`` is strict: it accepts exactly what
``encode`` writes, so equal bytes and equal values are the same thing.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping

import orjson

INTEGER_MAX = (1 << 64) - 1


class EncodingError(ValueError):
    """Bytes that are not the canonical form of the value they should be; the text names the place."""


def encode(value: object) -> bytes:
    """Return the canonical bytes of a dataclass, or of a list of plain values and dataclasses."""
    return orjson.dumps(value, default=_hex, option=orjson.OPT_SORT_KEYS)


def _hex(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"a {type(value).__name__} has no place in the ledger's bytes")


def load(data: bytes) -> object:
    """Return the JSON value in ``data``.

    Raises:
        EncodingError: it is not JSON.
    """
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise EncodingError(f"not JSON: {error}") from error
    return value


def restore(hint: object, value: object, path: str = "") -> object:
    """Return the JSON value as the type ``hint`` (dataclass, tuple[T, ...], union of dataclasses, str, int, bool, bytes).

    Raises:
        EncodingError: something else stands there.
    """
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise EncodingError(f"{path or 'value'}: must be a list")
        item = typing.get_args(hint)[0]
        return tuple(restore(item, entry, f"{path}[{index}]") for index, entry in enumerate(value))
    if isinstance(hint, types.UnionType):
        return _restore_union(hint, value, path)
    if hint is bytes:
        return _restore_bytes(value, path)
    assert isinstance(hint, type)
    if dataclasses.is_dataclass(hint):
        return _restore_table(hint, value, path)
    if issubclass(hint, enum.StrEnum):
        if not isinstance(value, str) or value not in list(hint):
            raise EncodingError(f"{path}: must be one of {', '.join(hint)}")
        return hint(value)
    if type(value) is not hint or (hint is int and not 0 <= typing.cast(int, value) <= INTEGER_MAX):
        raise EncodingError(f"{path or 'value'}: must be {'a whole number' if hint is int else hint.__name__}")
    return value


def _restore_union(hint: types.UnionType, value: object, path: str) -> object:
    """Pick the member whose ``effect`` tag stands in the object; every member of a union carries one."""
    tag = value.get("effect") if isinstance(value, Mapping) else None
    for member in typing.get_args(hint):
        if _fields(member)["effect"].default == tag:
            return restore(member, value, path)
    raise EncodingError(f"{path}: unknown effect")


def _restore_bytes(value: object, path: str) -> bytes:
    if not isinstance(value, str) or len(value) % 2 or not set(value) <= set("0123456789abcdef"):
        raise EncodingError(f"{path}: must be lower-case hex")
    return bytes.fromhex(value)


def _restore_table(cls: type, value: object, path: str) -> object:
    if not isinstance(value, dict):
        raise EncodingError(f"{path or 'value'}: must be an object")
    known = _fields(cls)
    if value.keys() != known.keys():
        odd = min(value.keys() ^ known.keys())
        raise EncodingError(f"{path}.{odd}: {'unknown' if odd in value else 'missing'}".lstrip("."))
    hints = _hints(cls)
    made: object = cls(**{name: restore(hints[name], value[name], f"{path}.{name}".lstrip(".")) for name in known})
    return made


@functools.cache
def _fields(cls: type) -> dict[str, dataclasses.Field[object]]:
    return {entry.name: entry for entry in dataclasses.fields(cls)}


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return dict(typing.get_type_hints(cls))
