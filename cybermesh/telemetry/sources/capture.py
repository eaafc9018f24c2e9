"""Captures as a source: recognised by content, read by the format's reader, decoded into packet batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames, decode
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import DEFAULT_BLOCK, SourceError
from cybermesh.telemetry.sources.pcap import PcapReader, is_pcap
from cybermesh.telemetry.sources.pcapng import PcapngReader, is_pcapng
from cybermesh.telemetry.sources.stream import BUFFER_BYTES, ByteStream


class _Reader(Protocol):
    def read(self, limit: int) -> Frames | None: ...


class CaptureSource:
    """A pcap or pcapng file, perhaps compressed, or one on standard input (``-``)."""

    # What ``capture_compiled`` replaces by compiled parts.
    _pcap: type[PcapReader] = PcapReader
    _pcapng: type[PcapngReader] = PcapngReader
    _decode = staticmethod(decode)

    def __init__(self, where: str, *, block: int = DEFAULT_BLOCK, position: str = "", buffer_bytes: int = BUFFER_BYTES) -> None:
        """Open the capture and read its header.

        Args:
            where: Path, or ``-``.
            block: Most packets in a batch, at least 1; large frames make smaller batches (``buffer_bytes``).
            position: Where to go on, as an earlier source told; empty for the beginning.
            buffer_bytes: Size of the buffer, at least 1 MiB; bounds memory and a batch's bytes.

        Raises:
            SourceError: The input is missing, unreadable, empty, or not a capture, or the position is none.
        """
        assert block >= 1
        assert buffer_bytes >= 1 << 20
        self._counters = Counters()
        self._block = block
        if position and not (position.isascii() and position.isdecimal()):
            raise SourceError(f"{where}: the kept position is not one of a capture; forget it to read from the beginning")
        self._stream = ByteStream(where, buffer_bytes)
        try:
            self._reader = self._recognise(int(position or 0))
        except SourceError:
            self._stream.close()
            raise
        self._position = position or "0"

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
        while (frames := self._reader.read(self._block)) is not None:
            batch = self._decode(frames, self._counters)
            self._position = str(self._stream.offset)
            yield batch

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
