"""Sources of text: lines in, batches of flows and events out, with a position that holds between any two batches.

A decoder turns some lines into batches; it may make several of them, of different sorts. The position in the middle of these
names the place before the lines, how many lines they were, and how many batches are done: read again, they give the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.event_rows import no_events
from cybermesh.telemetry.sources import DEFAULT_BLOCK, Batch, SourceError
from cybermesh.telemetry.sources.lines import Lines, Reading
from cybermesh.telemetry.sources.pieces import Place, position_text, position_value


class Decoder(Protocol):
    """Knows one text format."""

    def begin(self, name: str, beginning: bytes, modified_s: float | None) -> None:
        """Take note of a file's name, first bytes and last change before its lines come.

        Raises:
            SourceError: It is not of the format; the text says what it should be.
        """
        ...

    def decode(self, lines: Sequence[bytes], counters: Counters) -> list[Batch]:
        """Return what the lines say, counting what cannot be read; at most one flow or event for each line."""
        ...


class LineSource:
    """A text input read by a decoder."""

    def __init__(
        self,
        where: str,
        decoder: Decoder,
        *,
        unit: str,
        block: int = DEFAULT_BLOCK,
        position: str = "",
        reading: Reading | None = None,
    ) -> None:
        """Open the input and recognise its format.

        Raises:
            SourceError: The input is missing, unreadable, empty, or of another format.
        """
        assert block >= 1
        value = position_value(where, position)
        self._counters = Counters(unit=unit)
        self._decoder = decoder
        self._block = block
        self._again, self._done = _half_done(where, value)
        self._lines = Lines(where, self._counters, reading if reading is not None else Reading(), value.get("place"))
        self._position = position
        self._begun = 0
        try:
            if self._lines.begin:  # a followed file may still be empty
                self._begin()
        except SourceError:
            self._lines.close()
            raise

    @property
    def name(self) -> str:
        """The path, or ``standard input``."""
        return self._lines.name

    @property
    def counters(self) -> Counters:
        """What was read and what was left out so far."""
        return self._counters

    @property
    def position(self) -> str:
        """Where reading goes on after the batches so far."""
        return self._position

    @property
    def progress(self) -> float | None:
        """Share of the file read so far, None for a pipe."""
        return self._lines.progress

    def batches(self) -> Iterator[Batch]:
        """Yield what the lines say, in their order."""
        while True:
            before = self._lines.place
            lines = self._read()
            if lines is None or not self._has_begun(lines):
                break
            batches = self._decoder.decode(lines, self._counters) if lines else []
            done, self._done = self._done, 0
            for number, batch in enumerate(batches[done:], start=done + 1):
                last = number == len(batches)
                self._position = _text(self._lines.place) if last else _text(before, len(lines), number)
                yield batch
            if not batches:
                self._position = _text(self._lines.place)
                if not lines:
                    yield no_events()
        self._counters.ended = self._counters.ended or self._lines.damage

    def close(self) -> None:
        """Close the input."""
        self._lines.close()

    def _read(self) -> list[bytes] | None:
        """Return the next lines; the first time those that were half done, no more and no fewer."""
        if not self._again:
            return self._lines.read(self._block)
        lines: list[bytes] = []
        while len(lines) < self._again and (more := self._lines.read(self._again - len(lines))):
            lines += more
        self._again = 0
        return lines

    def _has_begun(self, lines: Sequence[bytes]) -> bool:
        """Tell the decoder of a new file; return whether it is of the format."""
        if lines and self._lines.pieces_begun != self._begun:
            try:
                self._begin()
            except SourceError as error:
                self._counters.ended = str(error)
                return False
        return True

    def _begin(self) -> None:
        self._begun = self._lines.pieces_begun
        self._decoder.begin(self._lines.name, self._lines.begin, self._lines.modified_s)


def _text(place: Place, lines: int = 0, done: int = 0) -> str:
    value: dict[str, object] = {"place": place.to_json()}
    if lines:
        value |= {"lines": lines, "done": done}
    return position_text(value)


def _half_done(where: str, value: dict[str, object]) -> tuple[int, int]:
    """Return how many lines to read again and how many of their batches are done."""
    lines, done = value.get("lines", 0), value.get("done", 0)
    if not (isinstance(lines, int) and isinstance(done, int) and 0 <= done <= lines):
        raise SourceError(f"{where}: the kept position is not one of this input; forget it to read from the beginning")
    return lines, done
