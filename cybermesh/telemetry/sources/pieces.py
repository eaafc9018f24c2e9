"""One file of a text input, plain or compressed: bytes from a place on, and how to know the file again.

A file is known by its inode and by a digest of its first bytes: logs are renamed, copied and compressed when they rotate, and
then only the digest tells which file holds the rest of what was being read. Two files that agree in their first ``HEAD_BYTES``
are taken for the same, so a log that begins with the same lines every day needs its inode to be told apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import orjson

from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.compression import decompressor
from cybermesh.telemetry.sources.stream import ByteStream

HEAD_BYTES = 4096  # of the digest
BEGIN_BYTES = 1 << 16  # of what a decoder sees to recognise a format; a header is shorter
READ_BYTES = 1 << 20
_STREAM_BYTES = 1 << 20
_ROTATED = r"[._-]\d.*"


class Shrunk(Exception):  # noqa: N818 - an observation, handled by the reader
    """The file is not any more the one that was being read: it was truncated, perhaps written anew."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on: ``offset`` in the uncompressed bytes of the file with this inode and this beginning.

    ``partial`` is true when the line before was handed on without its end, because the input ended there.
    """

    inode: int
    offset: int
    head_size: int
    head_digest: str
    partial: bool = False

    def to_json(self) -> dict[str, object]:
        """Return the place as plain values."""
        return {"inode": self.inode, "offset": self.offset, "head": [self.head_size, self.head_digest], "partial": self.partial}


def place_from(value: object) -> Place:
    """Return the place that ``Place.to_json`` gave.

    Raises:
        ValueError: It is not one.
    """
    try:
        assert isinstance(value, dict)
        size, digest = value["head"]
        place = Place(value["inode"], value["offset"], size, digest, value["partial"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError("not a position of a text input") from error
    numbers = (place.inode, place.offset, place.head_size)
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(place.head_digest, str):
        raise ValueError("not a position of a text input")
    return place


def fingerprint(head: bytes) -> str:
    """Return the digest by which a beginning is known again."""
    return hashlib.sha256(head).hexdigest()[:32]


class PlainPiece:
    """A file as it is on disk; may grow, may be renamed, may be truncated."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        status = os.fstat(self._file.fileno())
        self.identity = status.st_dev, status.st_ino
        self.modified_s: float | None = status.st_mtime
        self._at = offset
        self._head = os.pread(self._file.fileno(), min(HEAD_BYTES, offset), 0)

    @property
    def begin(self) -> bytes:
        """The file's first bytes, as far as they are written."""
        return os.pread(self._file.fileno(), BEGIN_BYTES, 0)

    def read(self) -> bytes:
        """Return the next bytes; checks afterwards that they were this file's."""
        descriptor = self._file.fileno()
        try:
            data = os.pread(descriptor, READ_BYTES, self._at)
            size = os.fstat(descriptor).st_size
            head = os.pread(descriptor, min(HEAD_BYTES, self._at + len(data)), 0)
        except OSError:  # a failing disk: what was read stands, and the place
            return b""
        if size < self._at + len(data) or not head.startswith(self._head):
            raise Shrunk
        self._head = head
        self._at += len(data)
        return data

    def place(self, offset: int, *, partial: bool) -> Place:
        """Return the place at an offset that was read."""
        head = self._head[:offset]
        return Place(self.identity[1], offset, len(head), fingerprint(head), partial)

    @property
    def modified_ns(self) -> int:
        """When it was last written to."""
        return os.fstat(self._file.fileno()).st_mtime_ns

    @property
    def damage(self) -> str:
        """Nothing: a plain file just ends."""
        return ""

    @property
    def progress(self) -> float | None:
        """Share of the file read so far."""
        size = os.fstat(self._file.fileno()).st_size
        return min(1.0, self._at / size) if size else None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StreamPiece:
    """A compressed file, or standard input: read once from front to back."""

    def __init__(self, where: str, offset: int = 0) -> None:
        self.path = Path(where)
        self._stream = ByteStream(where, _STREAM_BYTES, wanted="text")
        stream = self._stream
        self.modified_s: float | None = self.path.stat().st_mtime if where != "-" and self.path.is_file() else None
        self.modified_ns = self.path.stat().st_mtime_ns if self.modified_s is not None else 0
        if self.modified_s is not None:
            stream.need(BEGIN_BYTES)
        self.begin = stream.data[stream.start : min(stream.end, stream.start + BEGIN_BYTES)].tobytes()
        self._head = self.begin[:HEAD_BYTES]
        stream.skip(offset)

    def read(self) -> bytes:
        """Return the next bytes, waiting for a pipe that has none yet."""
        stream = self._stream
        if stream.start == stream.end and not stream.fill():
            return b""
        data: bytes = stream.data[stream.start : stream.end].tobytes()
        stream.start = stream.end
        return data

    def place(self, offset: int, *, partial: bool) -> Place:
        """Return the place at an offset that was read."""
        head = self._head[:offset]
        return Place(0, offset, len(head), fingerprint(head), partial)

    @property
    def damage(self) -> str:
        """Why the bytes ended, if not because the input did."""
        return self._stream.damage

    @property
    def progress(self) -> float | None:
        """Share of the file read so far, None for a pipe."""
        return self._stream.progress

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def open_piece(path: Path, offset: int = 0) -> PlainPiece | StreamPiece:
    """Open a file at an offset of its uncompressed bytes.

    Raises:
        SourceError: It cannot be opened or read.
    """
    try:
        if path.is_dir():
            raise SourceError(f"{path}: is a folder; give a file")
        if path.exists() and not path.is_file():
            return StreamPiece(str(path), offset)
        with path.open("rb", buffering=0) as file:
            head = file.read(16)
        return PlainPiece(path, offset) if decompressor(head) is None else StreamPiece(str(path), offset)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{path}: cannot be read: {reason}; check the path and its permissions") from error


def holds(path: Path, place: Place) -> bool:
    """Return whether a file begins as the place's file did and reaches as far as its offset."""
    try:
        piece = open_piece(path)
    except SourceError:
        return False
    try:
        if isinstance(piece, PlainPiece) and path.stat().st_size < place.offset:
            return False
        return place.head_size <= len(piece.begin) and fingerprint(piece.begin[: place.head_size]) == place.head_digest
    except OSError:  # it went away meanwhile
        return False
    finally:
        piece.close()


def rotations(path: Path) -> list[Path]:
    """Return the files beside ``path`` whose names are those of its earlier content, the oldest first."""
    name = re.compile(
        rf"{re.escape(path.name)}{_ROTATED}|{re.escape(path.stem)}{_ROTATED}{re.escape(path.suffix)}(\.\w+)?", re.ASCII
    )
    found: list[tuple[int, str, Path]] = []
    with contextlib.suppress(OSError):  # a folder that cannot be listed, or a file that went away
        found += [
            (entry.stat().st_mtime_ns, entry.name, Path(entry.path))
            for entry in os.scandir(path.parent)
            if name.fullmatch(entry.name) and entry.is_file()
        ]
    return [path for _, _, path in sorted(found)]


def position_text(value: dict[str, object]) -> str:
    """Return a position as the text that is kept."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def position_value(where: str, text: str) -> dict[str, object]:
    """Return the position that a text holds, empty for none.

    Raises:
        SourceError: It is not a position.
    """
    try:
        value = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"{where}: the kept position is not one of this input; forget it to read from the beginning")
    return value
