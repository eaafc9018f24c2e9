"""Bytes of a capture through one reused, bounded buffer, decompressed on the way.

A reader looks at ``data[start:end]``, takes what is whole, and calls ``fill`` for more; the incomplete rest is carried to the
front. Memory is therefore the buffer's size whatever the size of the input, and a long file costs no page faults.
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.compression import Damaged, Readable, Rejoined, decompressor

BUFFER_BYTES = 4 << 20  # stays in the last cache between reading and decoding; full-size frames make batches of 2,700
_HEAD_BYTES = 16  # enough to tell formats and compressions apart
_BEGINNING_BYTES = 256  # by which a file is known to be written anew: times of first packets differ
_READ_BYTES = 1 << 20
_PAUSE_S = 0.05  # a live pipe that is silent for this long hands over what there is


class ByteStream:
    """The uncompressed bytes of a file or of standard input, seen through a window ``data[start:end]``.

    ``start`` is moved forward by the reader; ``damage`` says why the bytes ended, if not because the input did.
    """

    def __init__(self, where: str, size: int = BUFFER_BYTES, *, wanted: str = "a capture (pcap or pcapng)") -> None:
        """Open ``where``, a path or ``-`` for standard input; ``wanted`` is what to give instead of an empty input.

        Raises:
            SourceError: It is missing, not a file, not readable, or empty.
        """
        self.name = "standard input" if where == "-" else where
        self.data: npt.NDArray[np.uint8] = np.empty(size, np.uint8)
        self.start = self.end = 0
        self.damage = ""
        self._before = 0
        self._ended = False
        self._is_input = where == "-"
        self._raw: io.BufferedIOBase | io.RawIOBase = _standard_input() if self._is_input else _open(where)
        self._size = _size(self._raw)
        self._bytes = self._uncompressed()
        self.need(_HEAD_BYTES)
        self._beginning = self.data[: min(self.end, _BEGINNING_BYTES)].tobytes()
        if self.end == 0:
            self.close()
            raise SourceError(f"{self.name}: {self.damage or 'is empty'}; give {wanted}")

    def _uncompressed(self) -> Readable:
        head = b""
        try:
            while len(head) < _HEAD_BYTES and (more := self._raw.read(_HEAD_BYTES - len(head))):
                head += more
        except OSError as error:
            raise SourceError(f"{self.name}: cannot be read: {error.strerror}; check the file") from error
        whole = Rejoined(head, _AsItComes(self._raw) if isinstance(self._raw, io.BufferedIOBase) else self._raw)
        unpack = decompressor(head)
        self.is_compressed = unpack is not None
        return whole if unpack is None else unpack(whole)

    @property
    def offset(self) -> int:
        """Position of ``data[start]`` in the uncompressed input."""
        return self._before + self.start

    @property
    def progress(self) -> float | None:
        """Share of the file (as it is on disk) that was read, or None if the input is not a file."""
        return min(1.0, self._raw.tell() / self._size) if self._size else None

    @property
    def status(self) -> os.stat_result:
        """The open file's present size, inode and times."""
        return os.fstat(self._raw.fileno())

    @property
    def is_written_anew(self) -> bool:
        """Whether the open file does not begin any more as it did, or has become shorter than what was read of it."""
        descriptor = self._raw.fileno()
        return os.fstat(descriptor).st_size < self.offset or os.pread(descriptor, len(self._beginning), 0) != self._beginning

    def go_on(self) -> None:
        """Look again for bytes behind the end: a file may have grown."""
        self._ended = False

    def need(self, count: int) -> bool:
        """Make ``count`` unread bytes visible if the input has them; ``count`` may not exceed the buffer."""
        assert count <= len(self.data)
        while self.end - self.start < count:
            if not self.fill():
                return False
        return True

    def skip(self, count: int) -> bool:
        """Move ``count`` bytes forward, however many; return whether the input has them."""
        while count > self.end - self.start:
            count -= self.end - self.start
            self.start = self.end
            if not self.fill():
                return False
        self.start += count
        return True

    def fill(self) -> bool:
        """Carry the unread bytes to the front and read behind them until the buffer is full or the input pauses or ends.

        Returns:
            Whether there are more unread bytes than before. False means that the input has ended (or the buffer was full).
        """
        unread = self.end - self.start
        if self.start:
            self.data[:unread] = self.data[self.start : self.end].copy()
            self._before += self.start
            self.start, self.end = 0, unread
        while not self._ended and self.end < len(self.data):
            count = self._read(self.data.data[self.end : self.end + _READ_BYTES])
            self._ended = count == 0
            self.end += count
            if not self._has_more_soon():
                break
        return self.end > unread

    def _read(self, into: memoryview) -> int:
        try:
            return self._bytes.readinto(into) or 0
        except Damaged as error:
            self.damage = f"the compressed data is damaged: {error}"
        except OSError as error:  # a failing disk: what was read so far stands, as with a truncated file
            self.damage = f"cannot be read further: {error.strerror}"
        return 0

    def _has_more_soon(self) -> bool:
        """Return whether more bytes can be had without a long wait: always from a file, from a pipe if it has some."""
        if self._size or self._ended:
            return True
        try:
            return bool(select.select([self._raw], [], [], _PAUSE_S)[0])
        except (OSError, ValueError):  # not a descriptor one can wait for
            return True

    def close(self) -> None:
        """Close the input, unless it is standard input, which is not ours."""
        if not self._is_input:
            self._raw.close()


class _AsItComes:
    """A buffered stream read as it comes in, at most one system call at a time."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream

    def readinto(self, buffer: memoryview, /) -> int:
        return self._stream.readinto1(buffer)


def _open(where: str) -> io.BufferedIOBase | io.RawIOBase:
    path = Path(where)
    try:
        if path.is_dir():
            raise SourceError(f"{where}: is a folder; give the files in it")
        return path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise SourceError(f"{where}: no such file; check the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{where}: cannot be opened: {reason}; check the path and its permissions") from error


def _standard_input() -> io.BufferedIOBase:
    stream = sys.stdin.buffer
    assert isinstance(stream, io.BufferedIOBase), "standard input is buffered bytes"
    return stream


def _size(raw: io.IOBase) -> int:
    """Return the length of a regular file, 0 for anything else."""
    try:
        status = os.fstat(raw.fileno())
    except (OSError, ValueError):  # no descriptor behind it
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
