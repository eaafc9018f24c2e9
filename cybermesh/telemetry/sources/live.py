"""A network interface as a source: packets as they come, out of the kernel's ring, without copying a frame.

A block of the ring is decoded into columns, yielded in batches, and given back to the kernel when the next one is asked for
after that: until then payload bytes can be read where they lie. What the kernel had to drop is in ``counters.lost``. The source
never ends by itself; while nothing comes it yields empty batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames, decode
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import DEFAULT_BLOCK
from cybermesh.telemetry.sources.live_ring import I64, PacketRing, RingOptions, scan_in_python

_WAIT_S = 0.1
_COLUMNS = 6

Scan = Callable[[np.ndarray, int, int, int, I64], tuple[int, int]]


class LiveSource:
    """The packets that an interface receives and sends (of the loopback interface, each once)."""

    def __init__(
        self,
        interface: str,
        *,
        block: int = DEFAULT_BLOCK,
        expression: str = "",
        compiled: bool = False,
        options: RingOptions | None = None,
    ) -> None:
        """Begin to capture.

        Args:
            interface: Its name.
            block: Most packets in a batch.
            expression: Filter as tcpdump takes it; empty for everything. A tag of a VLAN is not there yet when it is applied.
            compiled: Use the compiled kernels; ``compile_cache.load_kernels`` must have been called.
            options: Of the ring; then ``expression`` is taken from there.

        Raises:
            SourceError: Capturing there is not possible, or not allowed.
        """
        assert block >= 1
        self._scan: Scan = scan_in_python
        self._decode = decode
        if compiled:
            from cybermesh.telemetry.decode_compiled import decode_frames  # here: these need numba
            from cybermesh.telemetry.kernels.ring import scan_ring

            self._scan, self._decode = scan_ring, decode_frames
        self._ring = PacketRing(interface, options if options is not None else RingOptions(expression=expression))
        self._block = block
        self._closed = False
        self._counters = Counters()

    @property
    def name(self) -> str:
        """The interface."""
        return self._ring.interface

    @property
    def counters(self) -> Counters:
        """What was read, left out, and lost so far."""
        return self._counters

    @property
    def position(self) -> str:
        """Always empty: what has passed does not come again."""
        return ""

    @property
    def progress(self) -> None:
        """Not known."""
        return

    def batches(self) -> Iterator[PacketBatch]:
        """Yield packets as they come, until the source is closed or the interface goes away."""
        ring = self._ring
        nothing = np.zeros((_COLUMNS, 0), np.int64)
        while not self._closed:
            try:
                is_ours = ring.wait(_WAIT_S)
                ring.count_lost()
            except OSError as error:
                self._counters.ended = str(error.strerror)
                return
            self._counters.lost = ring.lost
            if not is_ours:
                yield self._packets(nothing)
                continue
            at, end, count = ring.block()
            while count > 0:
                frames = np.empty((_COLUMNS, min(self._block, count)), np.int64)
                found, at = self._scan(ring.data, at, end, count, frames)
                if found == 0:
                    break
                count -= found
                yield self._packets(frames[:, :found])
            ring.release()

    def close(self) -> None:
        """Stop capturing; a batch that was yielded stays valid, but for its payload bytes."""
        self._closed = True
        self._ring.close()

    def _packets(self, frames: I64) -> PacketBatch:
        self._ring.restore_tags(frames)
        at, captured, wire, ts_us = (np.ascontiguousarray(column) for column in frames[:4])
        link = np.full(len(at), self._ring.link, np.int32)
        return self._decode(Frames(self._ring.data, at, captured, wire, ts_us, link), self._counters)
