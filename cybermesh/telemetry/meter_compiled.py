"""The compiled flow meter: the methods and the flows of ``FlowMeter``, several times as fast.

What differs is only how long a finished flow may wait. Flows that are too old are looked for when packet time has moved on by
a second, and a full table is brought some way below the hard cap, so that short blocks (live traffic) do not pay for a search
through the whole table each. Neither changes a flow.

With several shards each key belongs to one of them, chosen by its hash; ``run`` may then work on them side by side, since
kernels do not hold the interpreter's lock. Time is shared, so the flows are the same for any number of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.kernels import clock as clock_kernel
from cybermesh.telemetry.kernels.keys import SECRET_WORDS
from cybermesh.telemetry.kernels.packets import Columns
from cybermesh.telemetry.meter import DEFAULT_MAX_FLOWS
from cybermesh.telemetry.meter_shard import Finished, Shard
from cybermesh.telemetry.packets import PacketBatch

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

Run = Callable[[Callable[[Shard], Finished], Sequence[Shard]], Iterable[Finished]]

_PIECE = 65_536  # packets worked on at once; a longer batch is cut, so that memory stays bounded


class CompiledMeter:
    """Meters packets given in file order."""

    def __init__(
        self, *, max_flows: int = DEFAULT_MAX_FLOWS, retain: int = 0, shards: int = 1, run: Run = map, key: bytes = b""
    ) -> None:
        """Begin with no flows.

        Args:
            max_flows: Open flows at most, the hard cap; about 0.7 kB of memory each.
            retain: As of ``FlowMeter``.
            shards: Parts of the table, each with its share of ``max_flows`` and ``retain``.
            run: Applies a function to every shard; the ``map`` of a thread pool lets them work side by side.
            key: What the hash of flow keys depends on, besides a secret of the process.
        """
        assert max_flows >= shards >= 1
        secret = _secret(key)
        self._shards = [
            Shard(number, shards, max_flows // shards, retain // shards, _PIECE, secret) for number in range(shards)
        ]
        self._clock = np.zeros(clock_kernel.CLOCK_WIDTH, np.int64)
        self._serial = 0
        self._run = run

    def __len__(self) -> int:
        """Return the number of open flows."""
        return sum(len(shard) for shard in self._shards)

    @property
    def evicted(self) -> int:
        """Flows pushed out by the hard cap so far."""
        return sum(shard.evicted for shard in self._shards)

    def add(self, batch: PacketBatch) -> FlowBatch:
        """Meter packets; return the flows that are finished, in order of their first packets."""
        return joined(self.add_parts(batch))

    def add_parts(self, batch: PacketBatch) -> list[Finished]:
        """Do what ``add`` does; the flows are still in parts, at least one, for ``joined``."""
        finished: list[Finished] = []
        for start in range(0, len(batch), _PIECE):
            finished += self._add_piece(batch if len(batch) <= _PIECE else batch.take(slice(start, start + _PIECE)))
        return finished or self.no_parts()

    def no_parts(self) -> list[Finished]:
        """Return a part without flows."""
        return [self._shards[0].collect()]

    def flush(self) -> FlowBatch:
        """Return all open flows and forget them; the end of the input."""
        return joined(self.flush_parts())

    def flush_parts(self) -> list[Finished]:
        """Do what ``flush`` does; the flows are still in parts."""
        now = int(self._clock[clock_kernel.NOW])
        return list(self._run(lambda shard: shard.flush(now), self._shards))

    def drain(self, limit: int) -> Iterator[FlowBatch]:
        """Do what ``flush`` does in batches of at most ``limit`` flows, at least one batch."""
        now = int(self._clock[clock_kernel.NOW])
        batches = (finished.flows for shard in self._shards for finished in shard.drain(now, limit))
        yield next(batches, None) or self._shards[0].collect().flows
        yield from batches

    def _add_piece(self, piece: PacketBatch) -> list[Finished]:
        columns = _columns(piece)
        marks = np.empty(len(piece), np.int64)
        clock_kernel.advance(self._clock, columns.ts_us, marks)
        now, steps_back = int(self._clock[clock_kernel.NOW]), int(self._clock[clock_kernel.STEPS_BACK])
        serial = self._serial
        self._serial += len(piece)
        return list(self._run(lambda shard: shard.add(columns, marks, serial, now, steps_back), self._shards))


def _secret(key: bytes) -> U64:
    """Return the hash's key: 32 bits in each word, from the secret with which the process hashes bytes."""
    return np.array([hash(b"flow key %d %s" % (index, key)) & 0xFFFF_FFFF for index in range(SECRET_WORDS)], np.uint64)


def _columns(batch: PacketBatch) -> Columns:
    """Return the columns that the kernel reads, each in the one layout it is compiled for."""
    columns = {name: np.require(getattr(batch, name), requirements=("C", "W")) for name in Columns._fields}
    columns["src"], columns["dst"] = columns["src"].view(np.uint64), columns["dst"].view(np.uint64)
    return Columns(**columns)


def joined(parts: list[Finished]) -> FlowBatch:
    """Return the flows of several pieces and shards as one batch, in order of their first packets."""
    filled = [part for part in parts if len(part.serial)] or parts[:1]
    if len(filled) == 1:
        return filled[0].flows
    order = np.argsort(np.concatenate([part.serial for part in filled]), kind="stable")
    columns: dict[str, Any] = {
        f.name: np.concatenate([getattr(part.flows, f.name) for part in filled])[order]
        for f in fields(FlowBatch)
        if f.name != "known"
    }
    return FlowBatch(**columns, known=filled[0].flows.known)
