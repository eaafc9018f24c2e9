"""Where telemetry comes from: one module an input format.

A source reads one input once. It never retries, never logs and never raises because of what it reads: what cannot be read is
counted by reason in ``counters``, and an end before the end of the input is explained in ``counters.ended``. Only an input
that is missing, unreadable, empty, or of another format altogether is an error, and that is raised when the source is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.packets import PacketBatch

DEFAULT_BLOCK = 16_384  # packets in a batch


class SourceError(Exception):
    """An input cannot be read at all; the text says what, where, and what to do."""


class Source(Protocol):
    """A stream of packets.

    Contract: ``batches`` may be iterated once. After each batch ``counters`` are up to date, and ``position`` says where
    reading goes on; a source opened later on the same input with that position yields what followed, all of it and only once.
    ``position`` is opaque text for keeping. The payload bytes of a batch are valid until the next one is asked for.
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

    def batches(self) -> Iterator[PacketBatch]:
        """Yield the packets in file order, in batches of at most the block size; empty batches are possible."""
        ...

    def close(self) -> None:
        """Close the input; may be called more than once."""
        ...
