"""Captures read and decoded by compiled kernels: the batches of ``CaptureSource``, faster.

Only finding the records and decoding the usual frames is compiled; file formats, positions, damage and all that is rare are
handled by what this builds on.
"""

from __future__ import annotations

import numpy as np

from cybermesh.telemetry.decode import Frames
from cybermesh.telemetry.decode_compiled import decode_frames
from cybermesh.telemetry.kernels.records import TOO_LONG, scan_enhanced, scan_pcap
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.telemetry.sources.pcap import MAX_CAPTURED, PcapReader
from cybermesh.telemetry.sources.pcapng import PcapngReader, _Found


class _CompiledPcapReader(PcapReader):
    def read(self, limit: int) -> Frames | None:
        """Return the next ``limit`` frames, or as many as the buffer holds; None at the end of what can be read."""
        stream = self._stream
        frames = np.empty((4, limit), np.int64)
        while True:
            count, following, ended = scan_pcap(
                stream.data, (stream.start, stream.end), self._order == ">", self._per_us, MAX_CAPTURED, frames
            )
            stream.start = following
            if count:
                break
            if ended == TOO_LONG:
                super().read(1)  # which knows how to say so
            if self._counters.ended or not stream.fill():
                self._explain_end()
                return None
        at, captured, wire, ts_us = frames[:, :count]
        return Frames(stream.data, at, captured, wire, ts_us, np.full(count, self._link, np.int32))


class _CompiledPcapngReader(PcapngReader):
    def _scan(self, found: _Found, limit: int) -> bool:
        """Collect whole packet blocks of the buffer and move the stream behind them; return whether it moved."""
        stream, before = self._stream, self._stream.start
        places = np.empty(limit, np.int64)
        while len(found.at) < limit:
            if stream.offset >= self._resume_at:
                count, stream.start = scan_enhanced(
                    stream.data, stream.start, stream.end, self._order == ">", places[: limit - len(found.at)]
                )
                found.at += places[:count].tolist()
            # Whatever stopped the kernel, one block at most goes the usual way.
            if len(found.at) < limit and not super()._scan(found, len(found.at) + 1):
                break
        return stream.start != before


class CompiledCaptureSource(CaptureSource):
    """A pcap or pcapng file, perhaps compressed, or one on standard input (``-``)."""

    _pcap = _CompiledPcapReader
    _pcapng = _CompiledPcapngReader
    _decode = staticmethod(decode_frames)
