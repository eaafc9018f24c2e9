"""The compiled meter beside the reader: while one thread meters a batch, the caller reads and decodes the next one.

That is the division of work that pays for one capture. Reading and decoding cost about as much as metering, each is a chain in
which every packet depends on the one before, and both leave the interpreter's lock alone nearly all the time. Shards by key
give the same flows, but each of them has to hash every packet and the flows must be merged by copying them; they are what
further threads are used for.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future

from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.meter_compiled import CompiledMeter, joined
from cybermesh.telemetry.meter_shard import Finished
from cybermesh.telemetry.packets import PacketBatch


class AheadMeter:
    """Meters packets given in file order; ``add`` returns the flows that the batch before finished.

    A batch's columns are read after ``add`` has returned, until the next call: they are the batch's own, so its source may go
    on. One caller at a time.
    """

    def __init__(self, meter: CompiledMeter, thread: Executor) -> None:
        """Begin with a meter that nobody else uses, and where to run it."""
        self._meter = meter
        self._thread = thread
        self._ahead: Future[list[Finished]] | None = None

    def __len__(self) -> int:
        """Return the number of open flows."""
        self._wait()
        return len(self._meter)

    @property
    def evicted(self) -> int:
        """Flows pushed out by the hard cap so far."""
        self._wait()
        return self._meter.evicted

    def add(self, batch: PacketBatch) -> FlowBatch:
        """Begin to meter packets; return the flows that the batch before finished, in order of their first packets."""
        finished = self._take()
        self._ahead = self._thread.submit(self._meter.add_parts, batch)
        return joined(finished)

    def flush(self) -> FlowBatch:
        """Return the flows of the last batch and all open ones, and forget them; the end of the input."""
        finished = self._take()
        return joined([*finished, *self._meter.flush_parts()])

    def drain(self, limit: int) -> Iterator[FlowBatch]:
        """Do what ``flush`` does in batches of at most ``limit`` flows, at least one batch."""
        last = joined(self._take())
        for start in range(0, len(last), limit):
            yield last.take(slice(start, start + limit))
        yield from self._meter.drain(limit)

    def _wait(self) -> None:
        if self._ahead is not None:
            self._ahead.result()

    def _take(self) -> list[Finished]:
        """Return what the batch before finished."""
        ahead, self._ahead = self._ahead, None
        return self._meter.no_parts() if ahead is None else ahead.result()
