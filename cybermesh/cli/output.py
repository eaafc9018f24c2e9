"""What every command shares: where output goes, in which form, and how a command fails."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


class Color(StrEnum):
    """When to colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Format(StrEnum):
    """How objects are printed: for people, as one JSON document, or one JSON object a line."""

    HUMAN = "human"
    JSON = "json"
    NDJSON = "ndjson"


FormatOption = Annotated[
    Format, typer.Option("--output", "-o", help="human, json (one document) or ndjson (one object a line).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Short for -o json.")]


class CommandError(Exception):
    """A command failed for a reason worth one line: what, where, and what to do next."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _State:
    color = Color.AUTO
    debug = False


def configure(*, color: Color, debug: bool) -> None:
    """Set what the global options say; called once, before the command."""
    _State.color = color
    _State.debug = debug


def is_debug() -> bool:
    """Return whether ``--debug`` was given."""
    return _State.debug


def console(*, stderr: bool = False) -> Console:
    """Return a rich console on stdout or stderr that obeys ``--color``."""
    from rich.console import Console  # here, because it costs 60 ms that a pipe of CSV need not pay

    force = True if _State.color is Color.ALWAYS else None
    return Console(stderr=stderr, force_terminal=force, no_color=_State.color is Color.NEVER, highlight=False)


def complain(message: str) -> None:
    """Print an error as one line on stderr."""
    sys.stderr.write(f"cybermesh: {message}\n")


def note(message: str) -> None:
    """Print a remark as one line on stderr."""
    sys.stderr.write(f"{message}\n")


def note_skipped(what: object, skipped: Mapping[str, int]) -> None:
    """Say on stderr which rows of a file were left out, if any."""
    if skipped:
        note(f"{what}: left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())))


def emit(objects: Iterable[object], form: Format) -> None:
    """Print objects as one JSON array or as JSON lines.

    Values that JSON does not know (paths, addresses, times) are printed as their text.
    """
    import orjson

    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    if form is Format.NDJSON:
        for item in objects:
            sys.stdout.write(orjson.dumps(item, default=str, option=options).decode() + "\n")
    else:
        sys.stdout.write(orjson.dumps(list(objects), default=str, option=options | orjson.OPT_INDENT_2).decode() + "\n")


def emit_one(item: object, form: Format = Format.JSON) -> None:
    """Print one object as one JSON document, or as one line."""
    import orjson

    indent = 0 if form is Format.NDJSON else orjson.OPT_INDENT_2
    sys.stdout.write(orjson.dumps(item, default=str, option=orjson.OPT_SORT_KEYS | indent).decode() + "\n")
