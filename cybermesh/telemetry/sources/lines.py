"""Whole lines of a text input, each handed on once, while the input grows, rotates or is truncated.

Rules:
1. A line counts when its end is there. The last line of an input that is not followed counts without; should the file grow
   later, the rest of that line is passed over.
2. Rotation by renaming: the old file is read until it has been silent for ``SETTLE_S`` after the new one appeared, then its
   later rotations, then the new one. Rotation by copying and truncating: the rest is looked for in the copy.
3. After a restart the file is known again by inode and first bytes, under whatever name, also compressed. If it is gone,
   that is counted, and reading begins with the oldest line of the present file.
4. A line longer than ``longest`` is left out and counted; it is never held in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.pieces import (
    Place,
    PlainPiece,
    Shrunk,
    StreamPiece,
    holds,
    open_piece,
    place_from,
    rotations,
)

LONGEST = 1 << 20  # bytes in a line
SETTLE_S = 1.0  # a writer that is told of the rotation later than that loses lines in any case
POLL_S = 0.2

OVERLONG = "line too long"
GONE = "file was rotated away before it was read to its end"
_STDIN = "-"


@dataclass(frozen=True, slots=True)
class Pace:
    """Time for who follows a file: a clock in seconds, and how to wait."""

    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Reading:
    """How an input is read: with ``follow`` never to its end, but going on with what is written later."""

    follow: bool = False
    longest: int = LONGEST
    pace: Pace = Pace()


class Lines:
    """The lines of a file, of the files it was before, or of standard input (``-``)."""

    def __init__(self, where: str, counters: Counters, reading: Reading, position: object = None) -> None:
        """Open the input.

        Args:
            where: Path, or ``-``.
            counters: Where lines are counted that are not handed on.
            reading: See there.
            position: What ``place`` gave, as plain values; None for the beginning.

        Raises:
            SourceError: It is missing, unreadable, empty and not followed, or the position is not one.
        """
        self.name = "standard input" if where == _STDIN else where
        self.pieces_begun = 1  # a decoder that sees it grow begins anew, with ``begin``
        self._path = Path(where)
        self._counters = counters
        self._reading = reading
        self._ready: list[bytes] = []
        self._carry = b""
        self._offset = 0
        self._passing = False  # over the rest of a line that is too long or was handed on already
        self._partial = False
        self._ended = False
        self._rotated_at: float | None = None
        try:
            place = place_from(position) if position is not None else None
        except ValueError as error:
            raise SourceError(f"{self.name}: {error}; forget it to read from the beginning") from error
        self._piece = self._open(place)

    @property
    def begin(self) -> bytes:
        """The first bytes of the present file."""
        return self._piece.begin

    @property
    def modified_s(self) -> float | None:
        """When the file being read was last written to (seconds since 1970); None where it may still be, or is a pipe."""
        return None if self._reading.follow and self._is_present() else self._piece.modified_s

    @property
    def progress(self) -> float | None:
        """Share of the file being read that was read."""
        return None if self._ended else self._piece.progress

    @property
    def damage(self) -> str:
        """Why the bytes ended, if not because the input did."""
        return self._piece.damage

    @property
    def place(self) -> Place:
        """Where reading goes on after the lines handed on so far."""
        return self._piece.place(self._offset, partial=self._partial or self._passing)

    def read(self, limit: int) -> list[bytes] | None:
        """Return up to ``limit`` lines of one file without their ends.

        Returns:
            None at the end. While an input is followed, an empty list says that there is nothing now, after a short wait.
        """
        while not self._ended or self._ready:
            if self._ready:
                return self._hand_on(limit)
            try:
                data = self._piece.read()
            except Shrunk:
                self._find_the_rest()
                continue
            if data:
                self._split(data)
            elif self._is_present():
                self._rotated_at = None
                if self._reading.follow and isinstance(self._piece, PlainPiece):
                    return self._nothing()
                self._finish_line()
                self._ended = True
            elif not self._is_settled():
                return self._nothing()
            elif not self._finish_line() and not self._go_on():
                if self._reading.follow:
                    return self._nothing()
                self._ended = True
        return None

    def close(self) -> None:
        """Close what is open."""
        self._ended = True
        self._ready = []
        self._piece.close()

    def _open(self, place: Place | None) -> PlainPiece | StreamPiece:
        if self.name == "standard input":
            self._offset = place.offset if place is not None else 0
            self._partial = self._passing = place is not None and place.partial
            return StreamPiece(_STDIN, self._offset)
        if place is not None and (place.inode or place.offset):
            return self._open_again(place)
        first = open_piece(self._path)
        if not first.begin and not self._reading.follow:
            first.close()
            raise SourceError(f"{self.name}: is empty; give a file with lines of text")
        return first

    def _open_again(self, place: Place) -> PlainPiece | StreamPiece:
        """Open the file that holds the place, whatever it is called now."""
        same = [path for path in (self._path, *reversed(rotations(self._path))) if holds(path, place)]
        known = [path for path in same if place.inode and _inode(path) == place.inode]
        found = next(iter(known or (same if place.offset else same[:1])), None)
        if found is None:
            self._counters.packets += 1
            self._counters.skip(GONE)
            return open_piece(self._path)
        self._offset = place.offset
        self._partial = self._passing = place.partial
        return open_piece(found, place.offset)

    def _is_present(self) -> bool:
        """Return whether the file being read is the one that has the input's name now."""
        if isinstance(self._piece, StreamPiece):
            return self._piece.path == self._path
        try:
            status = self._path.stat()
        except OSError:  # between renaming and creating, or gone for good
            return False
        return (status.st_dev, status.st_ino) == self._piece.identity

    def _is_settled(self) -> bool:
        """Return whether a file that lost its name has been silent for so long, or is so old, that nobody writes to it."""
        if not self._reading.follow or isinstance(self._piece, StreamPiece) or self._later():
            return True
        if self._rotated_at is None:
            self._rotated_at = self._reading.pace.clock()
        return self._reading.pace.clock() - self._rotated_at >= SETTLE_S

    def _nothing(self) -> list[bytes]:
        self._reading.pace.pause(POLL_S)
        return []

    def _go_on(self) -> bool:
        """Open what was rotated after the file being read, or the present one; return whether there is one."""
        following = next(_opened([*self._later(), self._path]), None)
        if following is None:
            return False
        self._piece.close()
        self._piece = following
        self.pieces_begun += 1
        self._offset, self._carry = 0, b""
        self._partial = self._passing = False
        self._rotated_at = None
        return True

    def _later(self) -> list[Path]:
        """Return the rotations that came after the file being read, the oldest first."""
        older, piece = rotations(self._path), self._piece
        mine = [index for index, path in enumerate(older) if _is_same(piece, path)]
        if mine:
            return older[mine[-1] + 1 :]
        return [path for path in older if _modified_ns(path) > piece.modified_ns]  # it was compressed while it was read

    def _split(self, data: bytes) -> None:
        """Cut bytes into lines and keep the incomplete last one."""
        lines = data.split(b"\n")
        lines[0] = self._carry + lines[0]
        self._carry = lines.pop()
        if self._passing and lines:
            self._passing = self._partial = False
            self._offset += len(lines.pop(0)) + 1
        if self._passing or len(self._carry) > self._reading.longest:
            if not self._passing:
                self._overlong()
            self._passing = True
            if not lines:
                self._offset += len(self._carry)
                self._carry = b""
        self._ready = lines

    def _hand_on(self, limit: int) -> list[bytes]:
        lines, self._ready = self._ready[:limit], self._ready[limit:]
        self._offset += sum(map(len, lines)) + len(lines)
        if self._passing and not self._ready:
            self._offset += len(self._carry)
            self._carry = b""
        longest = self._reading.longest
        if any(len(line) > longest for line in lines):
            kept = [line for line in lines if len(line) <= longest]
            for _ in range(len(lines) - len(kept)):
                self._overlong()
            return kept
        return lines

    def _overlong(self) -> None:
        self._counters.packets += 1
        self._counters.skip(OVERLONG)

    def _finish_line(self) -> bool:
        """Make a line of what has no end; return whether there was anything."""
        if not self._carry:
            return False
        self._ready, self._carry = [self._carry], b""
        self._offset -= 1  # the end that is not there
        self._partial = True
        return True

    def _find_the_rest(self) -> None:
        """The file was truncated: go on in the copy that was made of it, if there is one, else at its new beginning."""
        place = self.place
        copies = [path for path in rotations(self._path) if place.offset and holds(path, place)]
        rest = next(_opened(copies[-1:], place.offset), None)
        if rest is None:
            self._offset, self._partial, self._passing = 0, False, False
        present = next(_opened([self._path]), None) if rest is None else rest
        self._carry = b""
        self.pieces_begun += 1
        if present is None:
            self._counters.ended = "the file went away while it was read"
            self._ended = True
        else:
            self._piece.close()
            self._piece = present


def _opened(paths: Sequence[Path], offset: int = 0) -> Iterator[PlainPiece | StreamPiece]:
    """Open those of the files that can be opened, each when it is wanted; names change while logs rotate."""
    for path in paths:
        try:
            piece = open_piece(path, offset)
        except SourceError:
            continue
        yield piece


def _is_same(piece: PlainPiece | StreamPiece, path: Path) -> bool:
    if isinstance(piece, StreamPiece):
        return piece.path == path
    return _inode(path) == piece.identity[1]


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
