"""Events as columns: what logs and other sensors report, where no packet was seen.

An event is one line's claim: somebody logged in or failed to, asked a web server for something, or set off another sensor's
signature. What a log cannot know is zero: an address without a source, a host that only has a name. What was asked of name
servers has columns of its own (``dns``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt


class EventKind(enum.IntEnum):
    """What an event is about."""

    LOGIN = 1  # ``text`` is the user's name, ``outcome`` whether it worked
    WEB = 2  # ``text`` is the request line, ``status`` the answer
    ALERT = 3  # ``text`` is another sensor's signature, ``status`` its severity, 1 the gravest


class Outcome(enum.IntEnum):
    """How it ended."""

    UNKNOWN = 0
    SUCCESS = 1
    FAILURE = 2


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Columns of n events in the order of the input.

    Addresses as in ``PacketBatch``, all zero where unknown. ``destination``, ``port`` and ``protocol`` name the service; of a
    log, the port is the usual one of the pattern's service, and the address the one that the line tells of its server, or the
    writer's where a line has that in place of its name. ``host`` is the name of the machine that wrote the line. ``service`` is
    ``windows.Service``. ``count`` is how many times it happened ("message repeated 5 times").
    """

    ts_us: npt.NDArray[np.int64]  # microseconds since 1970
    kind: npt.NDArray[np.uint8]  # EventKind
    outcome: npt.NDArray[np.uint8]  # Outcome
    source: npt.NDArray[np.uint8]  # [n, 16]
    destination: npt.NDArray[np.uint8]  # [n, 16]
    port: npt.NDArray[np.uint16]
    protocol: npt.NDArray[np.uint8]
    service: npt.NDArray[np.uint8]
    status: npt.NDArray[np.uint16]
    count: npt.NDArray[np.int64]
    host: npt.NDArray[np.object_]  # str
    text: npt.NDArray[np.object_]  # str

    def __len__(self) -> int:
        return len(self.ts_us)

    def take(self, rows: npt.NDArray[np.intp] | slice) -> EventBatch:
        """Return the events chosen by an index array or a slice."""
        return EventBatch(*(getattr(self, field.name)[rows] for field in fields(self)))
