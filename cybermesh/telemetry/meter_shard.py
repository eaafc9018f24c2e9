"""One shard of the compiled meter: a table of open flows and what its kernels do not decide.

The table is as large as it may ever become, but the system lends memory only for rows that were used, and freed rows are used
again first. Until a block's finished flows are handed out, they need their rows, so there are as many more rows as a block has
packets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.features_compute import compute_features
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.kernels.emission import emit, new_emitted
from cybermesh.telemetry.kernels.packets import Columns, Share, add_packets, new_strip
from cybermesh.telemetry.kernels.table import COUNTS, FINISHED, FREE, OPEN, ROW_WIDTH, UNUSED, Table, remove
from cybermesh.telemetry.meter import SLACK_US
from cybermesh.telemetry.meter_state import CUT_US, WIDTH, Flow

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

_LATE_US = CUT_US + SLACK_US
_LOOK_EVERY_US = 1_000_000
_EVICT_SHARE = 16  # of the hard cap: so much more than necessary is evicted at once
_LINE_BYTES = 64


class Finished(NamedTuple):
    """Flows to hand out, and the number of each one's first packet."""

    flows: FlowBatch
    serial: I64


class Shard:
    """The open flows whose keys belong to one shard.

    Attributes:
        evicted: Flows pushed out by the hard cap so far.
    """

    def __init__(self, number: int, shards: int, max_flows: int, retain: int, piece: int, secret: U64) -> None:
        """Begin with no flows.

        Args:
            number: Which shard this is ...
            shards: ... of how many.
            max_flows: The hard cap.
            retain: Open flows below which none is finished for its age alone.
            piece: Most packets in a call of ``add``.
            secret: The hash's key.
        """
        capacity = max_flows + piece
        self.evicted = 0
        self._number, self._shards = number, shards
        self._max_flows, self._retain = max_flows, retain
        self._looked_us: int | None = None
        self._steps_back = 0
        self._table = Table(
            rows=_aligned_rows(capacity),
            deadline_us=np.full(capacity, FREE, np.int64),
            seen=np.zeros(capacity, np.int64),
            places=np.zeros(1 << (2 * capacity - 1).bit_length(), np.uint64),
            free=np.arange(capacity - 1, -1, -1, dtype=np.uint32),
            finished=np.empty(capacity, np.uint32),
            reasons=np.empty(capacity, np.uint8),
            counts=np.zeros(COUNTS, np.int64),
            secret=secret,
        )
        self._table.counts[UNUSED] = capacity
        self._strip = new_strip()

    def __len__(self) -> int:
        return int(self._table.counts[OPEN])

    def add(self, columns: Columns, marks: I64, serial: int, now: int, steps_back: int) -> Finished:
        """Take in this shard's packets of a block; return the flows that are finished.

        Args:
            columns: The block.
            marks: The watermark after each packet.
            serial: Number of the first packet.
            now: The watermark after the block.
            steps_back: How often the watermark has stepped back so far.
        """
        share = Share(serial, _LATE_US, self._number, self._shards)
        add_packets(self._table, marks, columns, share, self._strip)
        self._expire(now, steps_back)
        self._evict()
        return self.collect()

    def flush(self, now: int) -> Finished:
        """Return all open flows and forget them."""
        rows = self._live()
        self._remove(rows, self._last_reasons(rows, now))
        return self.collect()

    def drain(self, now: int, limit: int) -> Iterator[Finished]:
        """Do the same in batches of at most ``limit`` flows, in order of first packets."""
        rows = self._live()
        rows = rows[np.argsort(self._table.rows[rows, Flow.SERIAL])]
        for start in range(0, len(rows), limit):
            chosen = rows[start : start + limit]
            self._remove(chosen, self._last_reasons(chosen, now))
            yield self.collect()

    def _last_reasons(self, rows: U32, now: int) -> U8:
        late = self._table.deadline_us[rows] < now
        return np.where(late, EndReason.WATERMARK, EndReason.CAPTURE_END).astype(np.uint8)

    def _live(self) -> U32:
        return np.flatnonzero(self._table.deadline_us != FREE).astype(np.uint32)

    def _remove(self, rows: U32, reasons: U8) -> None:
        remove(self._table, rows, reasons)

    def _expire(self, now: int, steps_back: int) -> None:
        """Finish flows to which no packet can belong any more."""
        stepped = steps_back != self._steps_back
        looked = self._looked_us
        if len(self) <= self._retain or (looked is not None and not stepped and now - looked < _LOOK_EVERY_US):
            return
        self._looked_us = now
        deadline_us = self._table.deadline_us
        if stepped:  # deadlines of the time before may never come
            self._steps_back = steps_back
            live = self._live()
            deadline_us[live] = np.minimum(deadline_us[live], now + _LATE_US)
        rows = np.flatnonzero(deadline_us < now).astype(np.uint32)
        self._remove(rows, np.full(len(rows), EndReason.WATERMARK, np.uint8))

    def _evict(self) -> None:
        """Hold the hard cap: finish the flows that have been silent for longest."""
        excess = len(self) - self._max_flows
        if excess <= 0:
            return
        excess += self._max_flows // _EVICT_SHARE
        live = self._live()
        oldest = live[np.argpartition(self._table.seen[live], excess)[:excess]]
        self.evicted += len(oldest)
        self._remove(oldest, np.full(len(oldest), EndReason.EVICTED, np.uint8))

    def collect(self) -> Finished:
        """Return what was set aside, in order of first packets, and free its rows."""
        table = self._table
        count = int(table.counts[FINISHED])
        rows, reasons = table.finished[:count], table.reasons[:count]
        serial = table.rows[rows, Flow.SERIAL]
        order = np.argsort(serial, kind="stable")
        rows, reasons = rows[order], reasons[order]
        flows = _build_flows(table.rows, rows, reasons)
        unused = int(table.counts[UNUSED])
        table.free[unused : unused + count] = rows
        table.counts[UNUSED], table.counts[FINISHED] = unused + count, 0
        return Finished(flows, serial[order])


def _aligned_rows(capacity: int) -> I64:
    """Return an array of rows that begin where cache lines do."""
    words = np.empty(capacity * ROW_WIDTH + _LINE_BYTES // 8, np.int64)
    skipped = -words.ctypes.data % _LINE_BYTES // 8
    return words[skipped : skipped + capacity * ROW_WIDTH].reshape(capacity, ROW_WIDTH)


def _build_flows(rows: I64, chosen: U32, reasons: U8) -> FlowBatch:
    """Make a batch of the flows in ``chosen`` rows."""
    count = len(chosen)
    out = new_emitted(count)
    family, proto, klass, icmp_type, icmp_code = out.small
    features, ports = out.features, out.ports
    others = out.huge[: emit(rows, chosen, out)]
    if len(others):
        state = np.ascontiguousarray(rows[chosen[others], :WIDTH].T)
        features[others] = compute_features(state, ports[0, others], ports[1, others], klass[others])
    reasons = np.where(rows[chosen, Flow.ENDED] == 1, EndReason.TCP_END, reasons).astype(np.uint8)
    return FlowBatch(
        start_us=out.start_us,
        end_us=out.end_us,
        src=out.src.view(np.uint8),
        dst=out.dst.view(np.uint8),
        family=family,
        sport=ports[0],
        dport=ports[1],
        proto=proto,
        klass=klass,
        icmp_type=icmp_type,
        icmp_code=icmp_code,
        end_reason=reasons,
        features=features,
        known=np.ones(len(NAMES), np.bool_),
    )
