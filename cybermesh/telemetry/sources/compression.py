"""Gzip and Zstandard input as plain raw streams, recognised by their first bytes.

Both give what can be decompressed before any damage, then end with ``Damaged``; neither makes more than one buffer of output at
a time, however strongly the input is compressed.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import IO, Protocol, cast

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd -22` uses; more would break the memory bound
_CHUNK_BYTES = 1 << 16
_GZIP_FORMAT = 31  # zlib's number for "gzip header and trailer"


class Damaged(Exception):  # noqa: N818 - it ends a stream, it is not raised past the source
    """The compressed data ends too early or is not what it claims to be."""


class Readable(Protocol):
    """A stream of bytes that fills a buffer."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill ``buffer`` from the front and return how many bytes; 0 at the end."""
        ...


class Rejoined(io.RawIOBase):
    """A stream of which the first bytes were already taken, whole again."""

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        """Return True: this is an input."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Give the first bytes, then those of the rest."""
        if not self._head:
            return self._rest.readinto(buffer) or 0
        count = min(len(buffer), len(self._head))
        memoryview(buffer)[:count] = self._head[:count]
        self._head = self._head[count:]
        return count


class _Gunzip:
    """Concatenated gzip members as one stream; zero bytes behind a member are padding."""

    def __init__(self, source: io.RawIOBase) -> None:
        self._source = source
        self._member: zlib._Decompress | None = None
        self._waiting = b""
        self._damage = ""

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._damage:
            if not self._waiting:
                self._waiting = self._source.read(_CHUNK_BYTES) or b""
            if not self._waiting:
                if self._member is None:
                    return 0
                self._damage = "it ends inside the compressed data"
            elif output := self._inflate(len(buffer)):
                buffer[: len(output)] = output
                return len(output)
        raise Damaged(self._damage)

    def _inflate(self, limit: int) -> bytes:
        """Decompress up to ``limit`` bytes of what is waiting."""
        if self._member is None:
            self._waiting = self._waiting.lstrip(b"\0")
            if not self._waiting:
                return b""
            self._member = zlib.decompressobj(_GZIP_FORMAT)
        member, before = self._member, self._member.copy()
        try:
            output = member.decompress(self._waiting, limit)
        except zlib.error as error:
            self._damage = str(error)
            return _sound_part(before, self._waiting, limit)
        if member.eof:
            self._member, self._waiting = None, member.unused_data
        else:
            self._waiting = member.unconsumed_tail
        return output


def _sound_part(member: zlib._Decompress, data: bytes, limit: int) -> bytes:
    """Return the output of ``data`` up to the byte that is damaged."""
    output = b""
    try:
        for index in range(len(data)):
            output += member.decompress(data[index : index + 1], limit - len(output) or 1)
    except zlib.error:
        pass
    return output[:limit]


class _Unzstd:
    """Concatenated Zstandard frames as one stream."""

    def __init__(self, source: io.RawIOBase) -> None:
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._reader = unpacker.stream_reader(cast("IO[bytes]", source), read_size=_CHUNK_BYTES, read_across_frames=True)
        self._error: type[Exception] = zstandard.ZstdError

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return int(self._reader.readinto(buffer))
        except self._error as error:
            raise Damaged(str(error)) from error


def decompressor(head: bytes) -> Callable[[io.RawIOBase], Readable] | None:
    """Return what unpacks a stream that begins with ``head``, or None if it is not compressed."""
    if head.startswith(_GZIP):
        return _Gunzip
    if head.startswith(_ZSTD):
        return _Unzstd
    return None
