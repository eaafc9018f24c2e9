"""Sliding windows over packets: feed batches, get rows to score at every hop of packet time, and at the end.

The work is cut at hops and at every ``CHUNK`` packets of a hop, counted from its first packet, never at the reader's blocks:
the rows are the same for every block size, also where a bound makes a table forget. ``prompt`` is for live traffic: it works
off what is waiting and returns the entities that grew since they were last returned, so that nobody waits for a hop to end.

Windows of ``LONG_S`` seconds and more move little in one second: their rows are told every ``LONG_EVERY`` hops.

Memory is bounded whatever the traffic: at most ``CHUNK`` packets wait, and each table has bounds (``windows_table``). When
more than a quarter of a chunk are strangers, sources never seen before that sent a single packet and shook no hand, they are
counted at their destinations only: a flood with forged sources is visible there, and costs nobody else a place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.windows import COUNTS, DNS_SCOPES, Scope, WindowBatch
from cybermesh.telemetry.windows_columns import Columns, columns, joined
from cybermesh.telemetry.windows_connections import Connections, Rows
from cybermesh.telemetry.windows_keys import group
from cybermesh.telemetry.windows_rows import KINDS, window_rows
from cybermesh.telemetry.windows_table import Additions, Overflow, SlidingTable
from cybermesh.telemetry.windows_timeline import Timeline

CHUNK = 8192
LONG_S = 600
LONG_EVERY = 4
CAPACITY = 32_768  # entities per scope
ITEMS_MAX = 131_072  # per scope
LOG_MAX = 1_000_000  # remembered numbers per scope, about 30 bytes each
_PACKETS_OUT, _PACKETS_IN, _SYN, _UNASKED = (COUNTS.index(name) for name in ("packets_out", "packets_in", "syn", "unasked"))


class SlidingWindows:
    """Windows of the scopes and lengths (seconds) that somebody wants; nothing is kept for others.

    ``floors`` tells, per scope and length, how many packets a row must have for anybody to look at it; others are not told.
    """

    def __init__(
        self,
        wanted: Mapping[Scope, tuple[int, ...]],
        capacity: int = CAPACITY,
        items_max: int = ITEMS_MAX,
        log_max: int = LOG_MAX,
        floors: Mapping[tuple[Scope, int], int] | None = None,
    ) -> None:
        self._floors = floors if floors is not None else {}
        self._timeline = Timeline()
        self._chunk = max(1, min(CHUNK, capacity // 4))
        self._connections = Connections(capacity=4 * capacity)
        self._tables = {
            scope: SlidingTable(tuple(sorted(set(windows_s))), len(KINDS[scope]), capacity, items_max, log_max)
            for scope, windows_s in wanted.items()
            if windows_s and scope not in DNS_SCOPES
        }
        self._waiting: list[Columns] = []
        self._waiting_rows = 0
        self._hop: int | None = None
        self._newest_us = 0
        self.strangers = 0  # sources that were counted at their destinations only

    @property
    def overflow(self) -> Mapping[Scope, Overflow]:
        """What each scope's bounds made it forget."""
        return {scope: table.overflow for scope, table in self._tables.items()}

    @property
    def entities(self) -> int:
        """How many rows of any scope are kept."""
        return sum(len(table) for table in self._tables.values())

    @property
    def connections_evicted(self) -> int:
        """Connections forgotten because the table was full."""
        return self._connections.evicted

    @property
    def strays(self) -> int:
        """Packets whose time was far from their neighbours'."""
        return self._timeline.strays

    def update(self, batch: PacketBatch) -> list[WindowBatch]:
        """Count a batch; return the rows of every hop that ended with it, in order; those of one hop have one ``end_us``."""
        if len(batch) == 0:
            return []
        fresh = columns(batch, *self._timeline.place(batch.ts_us))
        ends = [*(np.nonzero(np.diff(fresh.hop))[0] + 1).tolist(), len(fresh)]
        out: list[WindowBatch] = []
        start = 0
        for end in ends:
            hop = int(fresh.hop[start])
            if self._hop is not None and hop != self._hop:
                out += self._end_hop(hop)
            self._enter(hop)
            while start < end:
                stop = min(end, start + self._chunk - self._waiting_rows)
                self._waiting.append(fresh.take(slice(start, stop)))
                self._waiting_rows += stop - start
                start = stop
                if self._waiting_rows == self._chunk:
                    self._work()
        return out

    def prompt(self) -> list[WindowBatch]:
        """Return the rows of entities that grew by a quarter since they were last returned, without waiting for the hop."""
        self._work()
        return self._emit({scope: table.take_grown() for scope, table in self._tables.items()}, 0, LONG_S)

    def finish(self) -> list[WindowBatch]:
        """End the current hop now; call it when the input has ended."""
        return self._end_hop(None) if self._hop is not None else []

    def _enter(self, hop: int) -> None:
        if hop != self._hop:
            self._hop = hop
            for table in self._tables.values():
                table.advance(hop)

    def _end_hop(self, following: int | None) -> list[WindowBatch]:
        """Return the current hop's rows; ``following`` is the next hop with packets, None at the end."""
        assert self._hop is not None
        self._work()
        found = self._emit({scope: table.take_touched() for scope, table in self._tables.items()}, 0, LONG_S)
        if following is None or following // LONG_EVERY != self._hop // LONG_EVERY:
            slots = {scope: table.take_touched_longer() for scope, table in self._tables.items()}
            found += self._emit(slots, LONG_S, math.inf)
        return found

    def _emit(self, slots: Mapping[Scope, npt.NDArray[np.int64]], least_s: float, below_s: float) -> list[WindowBatch]:
        """Return the rows of these slots for windows of ``least_s`` seconds and more, but less than ``below_s``."""
        found = []
        for scope, table in self._tables.items():
            for window, window_s in enumerate(table.windows_s):
                if not least_s <= window_s < below_s:
                    continue
                told = slots[scope]
                floor = self._floors.get((scope, window_s), 0)
                if floor > 1:
                    totals = table.totals[window]
                    told = told[totals[told, _PACKETS_OUT] + totals[told, _PACKETS_IN] >= floor]
                if len(told):
                    found.append(window_rows(table, scope, window, told, self._newest_us))
        return found

    def _work(self) -> None:
        """Follow the waiting packets and add what they did to every table."""
        if not self._waiting:
            return
        chunk = joined(self._waiting)
        self._waiting, self._waiting_rows = [], 0
        self._newest_us = int(chunk.ts_us.max())
        rows = self._connections.step(chunk)
        strange = self._strange(rows)
        self.strangers += int(strange.sum())
        every, familiar = np.arange(len(rows)), np.nonzero(~strange)[0]
        for scope, table in self._tables.items():
            chosen = every if scope is Scope.DESTINATION else familiar
            if scope is Scope.SERVICE:
                chosen = chosen[rows.established[chosen]]
            table.add(int(chunk.hop[0]), additions(scope, rows, chosen))

    def _strange(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Mark rows whose initiator is a stranger, if there are so many that they are a flood's."""
        none = np.zeros(len(rows), np.bool_)
        single = (rows.counts[:, _PACKETS_OUT] == 1) & ~rows.established
        if Scope.SOURCE not in self._tables or 4 * int(single.sum()) <= self._chunk:
            return none
        keys = _keys(Scope.SOURCE, rows, np.arange(len(rows)))
        first, inverse = group(keys)
        alone = (np.bincount(inverse) == 1) & single[first]
        alone[alone] = ~self._tables[Scope.SOURCE].knows(keys[first[alone]])
        return alone[inverse] if 4 * int(alone.sum()) > self._chunk else none


def _keys(scope: Scope, rows: Rows, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
    """Return uint8[n, 40]: source 0-15, destination 16-31, port 32-33, protocol 34, zero where not part of the scope's key."""
    keys = np.zeros((len(chosen), 40), np.uint8)
    if scope is not Scope.DESTINATION:
        keys[:, :16] = rows.initiator[chosen]
    if scope in (Scope.DESTINATION, Scope.PAIR, Scope.SERVICE):
        keys[:, 16:32] = rows.responder[chosen]
    if scope in (Scope.FANOUT, Scope.SERVICE):
        keys[:, 32] = rows.port[chosen] >> np.uint16(8)
        keys[:, 33] = rows.port[chosen] & np.uint16(0xFF)
        keys[:, 34] = rows.proto[chosen]
    return keys


def additions(scope: Scope, rows: Rows, chosen: npt.NDArray[np.intp]) -> Additions:
    """Return what one hop's chosen connections add to a scope's table."""
    ports = np.zeros((len(chosen), 16), np.uint8)
    ports[:, 0] = rows.port[chosen] >> np.uint16(8)
    ports[:, 1] = rows.port[chosen] & np.uint16(0xFF)
    ports[:, 2] = rows.proto[chosen]
    peers = (rows.initiator if scope is Scope.DESTINATION else rows.responder)[chosen]
    values = {"ports": ports, "peers": peers, "networks": _network(peers)}
    counts = rows.counts[chosen]
    return Additions(
        keys=_keys(scope, rows, chosen),
        items=tuple(values[kind] for kind in KINDS[scope]),
        attempts=np.maximum(rows.attempt[chosen], counts[:, _SYN] > 0),  # who sends its SYN again tries again
        packets=counts[:, _PACKETS_OUT] + counts[:, _UNASKED],
        counts=counts,
        service=rows.service[chosen],
        first_us=rows.first_us[chosen],
        last_us=rows.last_us[chosen],
    )


def _network(addresses: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the /24 of IPv4-mapped addresses, the /64 of others."""
    mapped = (addresses[:, :10] == 0).all(axis=1) & (addresses[:, 10:12] == 0xFF).all(axis=1)
    networks = addresses.copy()
    networks[mapped, 15] = 0
    networks[~mapped, 8:] = 0
    return networks
