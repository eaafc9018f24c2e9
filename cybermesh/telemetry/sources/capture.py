"""Captures as a source: recognised by content, read by the format's reader, decoded into packet batches.

A capture that is still written can be followed: an incomplete record at its end is then no fault but not there yet. When
another file gets its name, or it is truncated, reading goes on with the new one from its beginning. A kept position names the
file by its inode; if that file is gone, this is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames, decode
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import DEFAULT_BLOCK, SourceError
from cybermesh.telemetry.sources.lines import GONE, POLL_S, Pace
from cybermesh.telemetry.sources.pcap import TRUNCATED, PcapReader, is_pcap
from cybermesh.telemetry.sources.pcapng import PcapngReader, is_pcapng
from cybermesh.telemetry.sources.stream import BUFFER_BYTES, ByteStream

_HEADER_BYTES = 28  # of the longer of the two formats' headers


class _Reader(Protocol):
    def read(self, limit: int) -> Frames | None: ...


class CaptureSource:
    """A pcap or pcapng file, perhaps compressed, or one on standard input (``-``)."""

    # What ``capture_compiled`` replaces by compiled parts.
    _pcap: type[PcapReader] = PcapReader
    _pcapng: type[PcapngReader] = PcapngReader
    _decode = staticmethod(decode)

    def __init__(
        self,
        where: str,
        *,
        block: int = DEFAULT_BLOCK,
        position: str = "",
        buffer_bytes: int = BUFFER_BYTES,
        follow: Pace | None = None,
    ) -> None:
        """Open the capture and read its header.

        Args:
            where: Path, or ``-``.
            block: Most packets in a batch, at least 1; large frames make smaller batches (``buffer_bytes``).
            position: Where to go on, as an earlier source told; empty for the beginning.
            buffer_bytes: Size of the buffer, at least 1 MiB; bounds memory and a batch's bytes.
            follow: Never end, but go on with what is appended to the file, unless it is compressed; how to wait for it.

        Raises:
            SourceError: The input is missing, unreadable, empty, or not a capture, or the position is none.
        """
        assert block >= 1
        assert buffer_bytes >= 1 << 20
        self._counters = Counters()
        self._block, self._buffer_bytes, self._follow = block, buffer_bytes, follow
        inode, _, offset = position.rpartition(":")
        if position and not (offset.isascii() and offset.isdecimal() and (not inode or inode.isdecimal())):
            raise SourceError(f"{where}: the kept position is not one of a capture; forget it to read from the beginning")
        self._where = where
        self._stream = ByteStream(where, buffer_bytes)
        if self._stream.is_compressed:
            self._follow = None
        try:
            self._reader = self._recognise(self._offset_in(int(inode or 0), int(offset or 0)))
        except SourceError:
            self._stream.close()
            raise
        self._position = position or "0"

    def _offset_in(self, inode: int, offset: int) -> int:
        """Return where to go on in the file that has the name now: at its beginning if it is not the one of the position."""
        if self._follow is None or not offset:
            return offset
        status = self._stream.status
        if inode in {0, status.st_ino} and status.st_size >= offset:
            return offset
        self._counters.packets += 1
        self._counters.skip(GONE)
        return 0

    def _recognise(self, resume_at: int) -> _Reader:
        stream = self._stream
        head = stream.data[stream.start : min(stream.start + 16, stream.end)].tobytes()
        if is_pcap(head):
            return self._pcap(stream, self._counters, resume_at)
        if is_pcapng(head):
            return self._pcapng(stream, self._counters, resume_at)
        raise SourceError(
            f"{stream.name}: {stream.damage or 'is neither pcap nor pcapng'}; give a capture, it may be .gz or .zst"
        )

    @property
    def name(self) -> str:
        """The path, or ``standard input``."""
        return self._stream.name

    @property
    def counters(self) -> Counters:
        """What was read and what was left out so far."""
        return self._counters

    @property
    def position(self) -> str:
        """Offset in the uncompressed bytes behind the last batch."""
        return self._position

    @property
    def progress(self) -> float | None:
        """Share of the file read so far, None for a pipe."""
        return self._stream.progress

    def batches(self) -> Iterator[PacketBatch]:
        """Yield the capture's packets in file order, up to the block size at a time."""
        while True:
            frames = self._reader.read(self._block)
            if frames is not None:
                batch = self._decode(frames, self._counters)
                offset = str(self._stream.offset)
                self._position = offset if self._follow is None else f"{self._stream.status.st_ino}:{offset}"
                yield batch
            elif self._goes_on():
                yield self._decode(_no_frames(self._stream), self._counters)
            else:
                return

    def _goes_on(self) -> bool:
        """Wait a moment for a file that is followed; return False for one that cannot grow on."""
        counters, stream = self._counters, self._stream
        if self._follow is None or stream.damage or (counters.ended and not counters.ended.startswith(TRUNCATED)):
            return False
        counters.ended = ""
        self._follow.pause(POLL_S)
        try:
            present = Path(self._where).stat()
        except OSError:  # renamed away, and the new one is not there yet
            return True
        if present.st_size < _HEADER_BYTES:  # begun, but not so far that it shows what it is
            return True
        if present.st_ino != stream.status.st_ino or stream.is_written_anew:
            self._begin_anew()
        else:
            stream.go_on()
        return True

    def _begin_anew(self) -> None:
        """Read the file that has the name now, if it has begun."""
        try:
            following = ByteStream(self._where, self._buffer_bytes)
        except SourceError:  # still empty
            return
        before, self._stream = self._stream, following
        try:
            self._reader = self._recognise(0)
        except SourceError as error:
            self._stream = before
            following.close()
            self._counters.ended = str(error)
        else:
            before.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _no_frames(stream: ByteStream) -> Frames:
    nothing = np.zeros(0, np.int64)
    return Frames(stream.data, nothing, nothing, nothing, nothing, np.zeros(0, np.int32))
