"""Regular expressions whose time is linear in the text, whatever the text (RE2).

Python's own ``re`` backtracks: a line that somebody else wrote could stall a sensor for hours. The package's public objects
build a match object for each call; this module asks the compiled expression for the spans alone, which costs a third.
Expressions see bytes, so that no invalid UTF-8 in a name hides a line: a character class is about single bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import re2

_MEMORY_BYTES = 8 << 20


class PatternError(ValueError):
    """A regular expression cannot be compiled; the text says why."""


class LinearPattern:
    """A compiled expression over bytes, matched against whole texts.

    ``spans(text)`` gives the span of the match and of each group, (-1, -1) where there is none.
    """

    def __init__(self, expression: str) -> None:
        """Compile ``expression``.

        Raises:
            PatternError: It is not one that can be matched in linear time (no look-around, no back references), or too large.
        """
        options = re2.Options()
        options.max_mem = _MEMORY_BYTES
        options.log_errors = False
        options.encoding = re2.Options.Encoding.LATIN1
        try:
            compiled = re2.compile(expression.encode(), options)
        except (re2.error, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise PatternError(reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)) from error
        self.groups: Mapping[str, int] = {_text(name): number for name, number in compiled.groupindex.items()}
        match = compiled._regexp.Match  # noqa: SLF001 - see above
        both = re2._re2.RE2.Anchor.ANCHOR_BOTH  # noqa: SLF001
        self.spans: Callable[[bytes], list[tuple[int, int]]] = lambda text: match(both, text, 0, len(text))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
