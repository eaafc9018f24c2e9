"""The classic capture format (draft-ietf-opsawg-pcap): microseconds or nanoseconds, either byte order.

A record names its own length, so borders are found one record after the other; everything else is read in columns. A record
that is not whole, or that claims more bytes than any capture holds, ends the file: behind it there are no borders to trust.
"""

from __future__ import annotations

import struct

import numpy as np

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames
from cybermesh.telemetry.decode_link import gather
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.stream import ByteStream

TRUNCATED = "truncated"  # how the reason begins when the input ends inside a record
MAX_CAPTURED = 262_144  # bytes; more is a damaged record (section 7 of the feature definitions)

_MAGICS = {  # first four bytes: byte order and fractions of a second in a microsecond
    b"\xd4\xc3\xb2\xa1": ("<", 1),
    b"\xa1\xb2\xc3\xd4": (">", 1),
    b"\x4d\x3c\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\x3c\x4d": (">", 1000),
}
_FILE_HEADER, _RECORD_HEADER = 24, 16


def is_pcap(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is a pcap file."""
    return head[:4] in _MAGICS


class PcapReader:
    """Finds and describes the records of one pcap file."""

    def __init__(self, stream: ByteStream, counters: Counters, resume_at: int = 0) -> None:
        """Read the file header and go to ``resume_at``, the offset of a record (0: the first).

        Raises:
            SourceError: The file header is not whole, or the file ends before ``resume_at``.
        """
        if not stream.need(_FILE_HEADER):
            raise SourceError(f"{stream.name}: ends inside the pcap file header; copy the capture again")
        head = stream.data[:_FILE_HEADER].tobytes()
        self._order, self._per_us = _MAGICS[head[:4]]
        # The upper bits tell of checksums behind the frames, which the length fields exclude anyway.
        self._link = struct.unpack(f"{self._order}I", head[20:])[0] & 0x03FF_FFFF
        fields = ("seconds", "fraction", "captured", "wire")
        self._record = np.dtype([(name, f"{self._order}u4") for name in fields])
        self._captured = struct.Struct(f"{self._order}8xI").unpack_from
        self._stream = stream
        self._counters = counters
        if not stream.skip(max(resume_at, _FILE_HEADER)):
            raise SourceError(f"{stream.name}: is shorter than the kept position {resume_at}; start from its beginning")

    def read(self, limit: int) -> Frames | None:
        """Return the next ``limit`` frames, or as many as the buffer holds; None at the end of what can be read."""
        stream = self._stream
        while not (found := self._scan(limit)):
            if self._counters.ended or not stream.fill():
                self._explain_end()
                return None
        at = np.array(found, np.int64)
        record = gather(stream.data, at, self._record)
        captured = record["captured"].astype(np.int64)
        return Frames(
            data=stream.data,
            at=at + _RECORD_HEADER,
            captured=captured,
            wire=np.maximum(record["wire"].astype(np.int64), captured),
            ts_us=record["seconds"].astype(np.int64) * 1_000_000 + record["fraction"].astype(np.int64) // self._per_us,
            link=np.full(len(at), self._link, np.int32),
        )

    def _scan(self, limit: int) -> list[int]:
        """Return the offsets in the buffer of the next whole records, and move the stream behind them."""
        stream = self._stream
        view, start, end = stream.data.data, stream.start, stream.end - _RECORD_HEADER
        unpack, found = self._captured, []
        for _ in range(limit):
            if start > end:
                break
            captured = unpack(view, start)[0]
            if captured > MAX_CAPTURED:
                where = stream.offset + start - stream.start
                self._counters.ended = f"record at byte {where} claims {captured} captured bytes; the rest cannot be read"
                break
            following = start + _RECORD_HEADER + captured
            if following > stream.end:
                break
            found.append(start)
            start = following
        stream.start = start
        return found

    def _explain_end(self) -> None:
        stream = self._stream
        if not self._counters.ended and stream.end > stream.start:
            self._counters.ended = f"{TRUNCATED}: the record at byte {stream.offset} is not whole"
        if stream.damage:
            self._counters.ended = stream.damage
