"""JSON objects from outside, read key by key so that a fault has a path and nothing unread slips through.

It exists because a decision must mean the same to everybody who reads it: two equal keys, a NaN, ``true`` in the place of 1
or a misspelt key are read differently by different parsers, so all of them are faults here. ``Reader`` remembers which keys
were asked for; ``finish`` refuses the rest.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Mapping
from typing import Final, NoReturn, TypeVar

TEXT_CHARS_MAX: Final = 256
_SHOWN_CHARS_MAX: Final = 64
# By code points and not by ``str.isprintable``, whose answer changes with the Unicode tables of the interpreter: two validators
# must not disagree about a policy because one of them knows a newer alphabet.
_UNPRINTABLE: Final = re.compile(
    r"[\x00-\x1f\x7f-\xa0\xad\u061c\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000"
    r"\ud800-\uf8ff\ufeff\ufff0-\uffff\U000e0000-\U0010ffff]"
)

T = TypeVar("T")
E = TypeVar("E", bound=enum.StrEnum)


class JsonError(Exception):
    """An object is not what it should be: ``path`` names the place (as ``a.b[2]``, "" the whole), ``reason`` the fault."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path or 'object'}: {reason}")
        self.path = path
        self.reason = reason


def load(data: bytes, bytes_max: int) -> dict[str, object]:
    """Decode one UTF-8 JSON object of at most ``bytes_max`` bytes, without duplicate keys, NaN or infinities.

    Raises:
        JsonError: It is something else.
    """
    if len(data) > bytes_max:
        raise JsonError("", f"{len(data)} bytes, more than {bytes_max}")
    try:
        loaded = json.loads(data.decode("utf-8"), object_pairs_hook=_object_of, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as fault:
        raise JsonError("", f"not JSON: {str(fault)[:80]}") from None
    if not isinstance(loaded, dict):
        raise JsonError("", f"expected an object, got {_kind(loaded)}")
    return loaded


class Reader:
    """One JSON object: a getter checks the kind and the bounds of its key, ``finish`` refuses the keys nobody asked for.

    ``ignore`` matches keys that are allowed to be there unread; their paths gather in ``ignored``, which children share.
    """

    def __init__(self, path: str, raw: object, ignore: re.Pattern[str] | None = None, ignored: list[str] | None = None) -> None:
        if not isinstance(raw, Mapping):
            raise JsonError(path, f"expected an object, got {_kind(raw)}")
        self.path = path
        self.ignored: list[str] = [] if ignored is None else ignored
        self._raw: Mapping[object, object] = raw
        self._ignore = ignore
        self._read: set[object] = set()

    def at(self, key: str) -> str:
        """Return the path of ``key``."""
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, reason: str) -> NoReturn:
        """Raise the fault of ``key``."""
        raise JsonError(self.at(key), reason)

    def has(self, key: str) -> bool:
        """Say whether ``key`` is there."""
        return key in self._raw

    def get(self, key: str) -> object:
        """Return the raw value of ``key`` (None when absent), which counts as read."""
        self._read.add(key)
        return self._raw.get(key)

    def child(self, key: str) -> Reader:
        """Return the object under ``key``; an absent one reads as empty."""
        return Reader(self.at(key), self.get(key) if self.has(key) else {}, self._ignore, self.ignored)

    def text(self, key: str, chars_max: int = TEXT_CHARS_MAX) -> str:
        """Return printable text of at most ``chars_max`` characters, "" when absent."""
        return text_of(self.get(key), self.at(key), chars_max) if self.has(key) else ""

    def integer(self, key: str, low: int, high: int) -> int | None:
        """Return an integer of ``low`` to ``high``, None when absent."""
        return integer_of(self.get(key), self.at(key), low, high) if self.has(key) else None

    def boolean(self, key: str) -> bool:
        """Return a boolean, False when absent."""
        value = self.get(key) if self.has(key) else False
        if not isinstance(value, bool):
            self.fail(key, f"expected true or false, got {_kind(value)}")
        return value

    def choice(self, key: str, choices: type[E], default: E | None = None) -> E:
        """Return a member of ``choices`` by its value; without a default the key is required."""
        if not self.has(key):
            if default is None:
                self.fail(key, "is required")
            return default
        value = self.get(key)
        if not isinstance(value, str) or value not in list(choices):
            self.fail(key, f"expected one of {', '.join(choices)}, got {show(value)}")
        return choices(value)

    def items(self, key: str, count_max: int, read: Callable[[object, str], T]) -> tuple[T, ...]:
        """Return the list under ``key`` (absent: empty), each item read with its own path."""
        if not self.has(key):
            return ()
        value = self.get(key)
        if not isinstance(value, list | tuple):
            self.fail(key, f"expected a list, got {_kind(value)}")
        if len(value) > count_max:
            self.fail(key, f"{len(value)} items, more than {count_max}")
        return tuple(read(item, f"{self.at(key)}[{index}]") for index, item in enumerate(value))

    def texts(self, count_max: int) -> tuple[tuple[str, str], ...]:
        """Return all of an object with free keys as sorted pairs of text."""
        if len(self._raw) > count_max:
            raise JsonError(self.path, f"{len(self._raw)} keys, more than {count_max}")
        self._read.update(self._raw)
        return tuple(sorted((text_of(key, self.path), text_of(value, self.path)) for key, value in self._raw.items()))

    def finish(self) -> None:
        """Refuse what nobody read."""
        for key in self._raw:
            if key in self._read:
                continue
            if not isinstance(key, str):
                raise JsonError(self.path, f"key {show(key)} is not text")
            if self._ignore is None or not self._ignore.fullmatch(key):
                self.fail(key[:_SHOWN_CHARS_MAX], "unknown key")
            self.ignored.append(self.at(key))


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError("", f"key {twice[:_SHOWN_CHARS_MAX]!r} appears twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError("", f"{name} is not JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def show(value: object) -> str:
    """Return ``value`` as an error message may show it: text shortened, anything else by its kind."""
    return repr(value[:_SHOWN_CHARS_MAX]) if isinstance(value, str) else _kind(value)


def is_printable(text: str) -> bool:
    """Return whether the text has no control, invisible or private character: the same answer on every interpreter."""
    return _UNPRINTABLE.search(text) is None


def text_of(value: object, path: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """Return ``value`` if it is printable text of at most ``chars_max`` characters, else raise ``JsonError``."""
    if not isinstance(value, str):
        raise JsonError(path, f"expected text, got {_kind(value)}")
    if len(value) > chars_max:
        raise JsonError(path, f"{len(value)} characters, more than {chars_max}")
    if not is_printable(value):
        raise JsonError(path, "has characters that cannot be printed")
    return value


def integer_of(value: object, path: str, low: int, high: int) -> int:
    """Return ``value`` if it is an integer (no boolean) of ``low`` to ``high``, else raise ``JsonError``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise JsonError(path, f"expected an integer, got {_kind(value)}")
    if not low <= value <= high:
        raise JsonError(path, f"expected {low} to {high}")
    return value
