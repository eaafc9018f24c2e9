"""Where telemetry comes from: one module an input format.

A source reads one input once. It never retries, never logs and never raises because of what it reads: what cannot be read is
counted by reason in ``counters``, and an end before the end of the input is explained in ``counters.ended``. Only an input
that is missing, unreadable, empty, or of another format altogether is an error, and that is raised when the source is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.dns import DnsBatch
from cybermesh.telemetry.events import EventBatch
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.packets import PacketBatch

DEFAULT_BLOCK = 16_384  # packets, flows or events in a batch

Batch: TypeAlias = PacketBatch | FlowBatch | EventBatch | DnsBatch
"""What a source yields: packets (captures, interfaces), flows (other meters), events (logs), DNS rows (Zeek, Suricata)."""


class SourceError(Exception):
    """An input cannot be read at all; the text says what, where, and what to do."""


class Source(Protocol):
    """A stream of packets, flows, events or DNS rows; one source may yield more than one sort.

    Contract: ``batches`` may be iterated once. After each batch ``counters`` are up to date, and ``position`` says where
    reading goes on; a source opened later on the same input with that position yields what followed, all of it and only once.
    ``position`` is opaque text for keeping. The payload bytes of packets are valid until the next batch is asked for. A source
    that follows its input never ends by itself: while there is nothing to read it yields empty batches, several a second, so
    that whoever iterates can stop.
    """

    @property
    def name(self) -> str:
        """The input, as shown to people."""
        ...

    @property
    def counters(self) -> Counters:
        """What was read and what was left out so far."""
        ...

    @property
    def position(self) -> str:
        """Where reading goes on after the batches yielded so far."""
        ...

    @property
    def progress(self) -> float | None:
        """Share of the input read so far, 0-1; None where its size is not known."""
        ...

    def batches(self) -> Iterator[Batch]:
        """Yield what is read in its order, in batches of at most the block size; empty batches are possible."""
        ...

    def close(self) -> None:
        """Close the input; may be called more than once."""
        ...


def times_us(batch: Batch) -> npt.NDArray[np.int64]:
    """Return the times by which a batch is ordered, microseconds since 1970: of packets, of flows' ends, of events."""
    return batch.end_us if isinstance(batch, FlowBatch) else batch.ts_us


def newest_us(batch: Batch) -> int | None:
    """Return the latest time in a batch, microseconds since 1970: of a packet, of a flow's end, of an event."""
    times = times_us(batch)
    return int(times.max()) if len(times) else None
