"""The flow meter: packets in, finished flows with their 79 features out. This is the numpy reference.

Rules (section 7 of the feature definitions) and where they are kept:

- key and direction: ``meter_group`` and ``_begin``; cuts and new connections: ``meter_split``;
- everything a flow accumulates: ``meter_update``, integers only, so the block size never shows;
- a flow is emitted when its key opens another one, when no packet at most 10 s late can belong to it any more (the watermark
  of ``meter_clock`` is more than 120 s + 10 s past its start), when the table is over its hard cap (longest silent first,
  counted), or at ``flush``. Emitting early therefore changes nothing but for packets later than that.

A compiled meter has the same three methods, the same state columns and ``features_compute``; it replaces what ``_add_block``
does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.features_compute import compute_features
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.meter_clock import Watermark
from cybermesh.telemetry.meter_group import KEY_WORDS, U64, Groups, group_packets
from cybermesh.telemetry.meter_split import Carried, find_beginnings
from cybermesh.telemetry.meter_state import CUT_US, MINIMA, NOTHING, WIDTH, Flow
from cybermesh.telemetry.meter_table import FlowTable
from cybermesh.telemetry.meter_update import Stretches, update_flows
from cybermesh.telemetry.packets import ACK, SYN, PacketBatch

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DEFAULT_MAX_FLOWS = 131_072
SLACK_US = 10_000_000  # packets this late still find their flow
_CHUNK = 1024  # flows turned or computed at once; their states fit the processor's second-level cache
_PIECE = 32_768  # packets worked on at once; a longer batch is cut, so that memory stays bounded


class FlowMeter:
    """Meters packets given in file order.

    Attributes:
        evicted: Flows pushed out by the hard cap so far.
    """

    def __init__(self, *, max_flows: int = DEFAULT_MAX_FLOWS, retain: int = 0) -> None:
        """Begin with no flows.

        Args:
            max_flows: Open flows at most, the hard cap; about 1 kB of memory each.
            retain: Open flows below which none is emitted for its age alone: a file that has fewer is metered as if every flow
                were kept to its end, however far its packets are out of order. 0 for live traffic, where flows should come
                out as soon as they are complete.
        """
        assert max_flows >= 1
        self.evicted = 0
        self._max_flows = max_flows
        self._retain = retain
        self._table = FlowTable(max_flows + _PIECE)
        self._clock = Watermark()
        self._steps_back = 0
        self._serial = 0
        self._finished: list[tuple[I64, U64, npt.NDArray[np.uint8]]] = []  # states (a row each), keys, reasons

    def __len__(self) -> int:
        """Return the number of open flows."""
        return len(self._table)

    def add(self, batch: PacketBatch) -> FlowBatch:
        """Meter packets; return the flows that are finished, in order of their first packets."""
        for start in range(0, len(batch), _PIECE):
            self._add_block(batch if len(batch) <= _PIECE else batch.take(slice(start, start + _PIECE)))
            self._expire()
            self._evict()
        return self._collect()

    def flush(self) -> FlowBatch:
        """Return all open flows and forget them; the end of the input."""
        (flows,) = self.drain(max(len(self._table), 1))
        return flows

    def drain(self, limit: int) -> Iterator[FlowBatch]:
        """Do what ``flush`` does in batches of at most ``limit`` flows, at least one; take them all before the next ``add``."""
        table = self._table
        rows = table.live()
        rows = rows[np.argsort(table.state[rows, Flow.SERIAL])]
        late = table.deadline_us[rows] < (self._clock.now_us or 0)
        reasons = _reasons(table.state[rows, Flow.ENDED], np.where(late, EndReason.WATERMARK, EndReason.CAPTURE_END))
        table.release(rows)
        for start in range(0, max(len(rows), 1), limit):
            part = slice(start, start + limit)
            yield build_flows(table.state, table.words, rows[part], reasons[part])

    def _add_block(self, batch: PacketBatch) -> None:
        groups = group_packets(batch)
        table, order, marks = self._table, groups.order, self._clock.advance(batch.ts_us)
        rows = table.find(groups.words)
        ts_us, side, flags = batch.ts_us[order], groups.side[order], batch.flags[order]
        carried = self._carried(rows)
        begins = find_beginnings(groups.starts, ts_us, side, flags, carried)
        replaced = rows[carried.known & begins[groups.starts]]
        self._emit(table.state[replaced], table.words[replaced], EndReason.CUT)

        of_group = np.zeros(len(order), np.int64)
        of_group[groups.starts] = 1
        starts = np.flatnonzero(begins | (of_group == 1))
        group = np.cumsum(of_group)[starts] - 1
        is_new = begins[starts]
        state = np.zeros((WIDTH, len(starts)), np.int64)
        going_on = np.flatnonzero(~is_new)
        state[:, going_on] = _turned(table.state[rows[group[going_on]]])
        packets = Stretches(
            starts, ts_us, side, batch.payload[order], batch.header[order].astype(np.int64), flags, batch.window[order]
        )
        self._begin(state, np.flatnonzero(is_new), packets, groups.words[group], order)
        update_flows(state, packets)

        is_last = np.append(group[1:] != group[:-1], True)
        self._emit(_turned(state[:, ~is_last]), groups.words[group[~is_last]], EndReason.CUT)
        ends = np.append(starts[1:], len(order))
        last = np.flatnonzero(is_last)
        self._store(groups, rows, state[:, last], is_new[last], marks[order[starts[last]]], order[ends[last] - 1])
        self._serial += len(batch)

    def _carried(self, rows: I64) -> Carried:
        """Tell what the table knows of the keys at ``rows`` (-1: nothing)."""
        known = rows >= 0
        start, ended, fins = (np.zeros(len(rows), np.int64) for _ in range(3))
        if known.any():
            state = self._table.state
            found = rows[known]
            start[known] = state[found, Flow.START]
            ended[known] = state[found, Flow.ENDED]
            forward, backward = state[found, Flow.FORWARD_FIN], state[found, Flow.BACKWARD_FIN]
            turned = state[found, Flow.FORWARD_SIDE]  # 1: the forward endpoint is the key's higher one
            fins[known] = (forward << turned) | (backward << (1 - turned))
        return Carried(known, start, ended.astype(np.bool_), fins)

    def _begin(self, state: I64, new: I64, packets: Stretches, words: U64, order: npt.NDArray[np.intp]) -> None:
        """Fill the columns that a new flow has from its first packet."""
        first = packets.starts[new]
        state[Flow.START, new] = packets.ts_us[first]
        state[Flow.SERIAL, new] = self._serial + order[first]
        for column in MINIMA:
            state[column, new] = NOTHING
        # A SYN+ACK is an answer: its receiver is the forward side. With equal endpoints there is only one side.
        answers = packets.flags[first] & (SYN | ACK) == SYN | ACK
        words = words[new]
        ports = words[:, 4] >> np.uint64(32)
        equal = (words[:, 0:2] == words[:, 2:4]).all(axis=1) & (ports >> np.uint64(16) == ports & np.uint64(0xFFFF))
        state[Flow.FORWARD_SIDE, new] = packets.side[first] ^ (answers & ~equal)

    def _store(self, groups: Groups, rows: I64, state: I64, is_new: Bools, mark: I64, last: npt.NDArray[np.intp]) -> None:
        """Write each group's last flow to the table."""
        table = self._table
        unknown = rows < 0
        rows = rows.copy()
        rows[unknown] = table.claim(groups.words[unknown])
        table.state[rows] = _turned(state)
        table.seen[rows] = self._serial + last
        # A flow that was late when it began is as old as the watermark, or it would be gone at once.
        deadline = np.maximum(state[Flow.START], mark) + (CUT_US + SLACK_US)
        table.deadline_us[rows] = np.where(is_new, deadline, table.deadline_us[rows])

    def _expire(self) -> None:
        """Emit flows to which no packet can belong any more."""
        table, now = self._table, self._clock.now_us
        if now is None or len(table) <= self._retain:
            return
        live = table.live()
        if self._clock.steps_back != self._steps_back:  # deadlines of the time before may never come
            self._steps_back = self._clock.steps_back
            table.deadline_us[live] = np.minimum(table.deadline_us[live], now + CUT_US + SLACK_US)
        self._emit_rows(live[table.deadline_us[live] < now], EndReason.WATERMARK)

    def _evict(self) -> None:
        """Hold the hard cap: emit the flows that have been silent for longest."""
        excess = len(self._table) - self._max_flows
        if excess <= 0:
            return
        live = self._table.live()
        oldest = live[np.argpartition(self._table.seen[live], excess)[:excess]]
        self.evicted += excess
        self._emit_rows(oldest, EndReason.EVICTED)

    def _emit_rows(self, rows: I64, reason: EndReason) -> None:
        self._table.release(rows)
        self._emit(self._table.state[rows], self._table.words[rows], reason)

    def _emit(self, state: I64, words: U64, reason: EndReason) -> None:
        """Set flows aside for the next return."""
        if len(words):
            self._finished.append((state, words, _reasons(state[:, Flow.ENDED], reason)))

    def _collect(self) -> FlowBatch:
        """Return what was set aside, in order of first packets."""
        nothing = (np.empty((0, WIDTH), np.int64), np.empty((0, KEY_WORDS), np.uint64), np.empty(0, np.uint8))
        parts, self._finished = self._finished or [nothing], []
        state, words, reasons = (np.concatenate([part[n] for part in parts]) for n in range(3))
        order = np.argsort(state[:, Flow.SERIAL])
        return build_flows(state, words, order, reasons[order])


def build_flows(states: I64, keys: U64, rows: I64, reasons: npt.NDArray[np.uint8]) -> FlowBatch:
    """Make a batch of the flows ``rows``.

    Args:
        states: int64[…, WIDTH], a row for each flow.
        keys: uint64[…, KEY_WORDS], likewise.
        rows: Which of them, in the batch's order.
        reasons: Why each of these was emitted.
    """
    words = keys[rows]
    start_us, latest = states[rows, Flow.START], states[rows, Flow.LATEST]
    turned = states[rows, Flow.FORWARD_SIDE] == 1
    low, high = words[:, 0:2], words[:, 2:4]
    packed = words[:, 4]
    what: npt.NDArray[np.uint8] = (packed >> np.uint64(16)).astype(np.uint8)
    ports = (packed >> np.uint64(48)).astype(np.uint16), (packed >> np.uint64(32)).astype(np.uint16)
    sport, dport = np.where(turned, ports[1], ports[0]), np.where(turned, ports[0], ports[1])
    klass = what >> np.uint8(4)
    features = np.empty((len(rows), len(NAMES)))
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        features[part] = compute_features(_turned(states[rows[part]]), sport[part], dport[part], klass[part])
    return FlowBatch(
        start_us=start_us,
        end_us=start_us + latest,
        src=_address(np.where(turned[:, None], high, low)),
        dst=_address(np.where(turned[:, None], low, high)),
        family=what & np.uint8(15),
        sport=sport,
        dport=dport,
        proto=(packed >> np.uint64(24)).astype(np.uint8),
        klass=klass,
        icmp_type=(packed >> np.uint64(8)).astype(np.uint8),
        icmp_code=packed.astype(np.uint8),
        end_reason=reasons,
        features=features,
        known=np.ones(len(NAMES), np.bool_),
    )


def _turned(table: I64) -> I64:
    """Return a transposed copy, made in pieces that stay in the processor's cache."""
    result = np.empty((table.shape[1], table.shape[0]), np.int64)
    if table.shape[0] > table.shape[1]:
        for start in range(0, table.shape[0], _CHUNK):
            result[:, start : start + _CHUNK] = table[start : start + _CHUNK].T
    else:
        for start in range(0, table.shape[1], _CHUNK):
            result[start : start + _CHUNK] = table[:, start : start + _CHUNK].T
    return result


def _reasons(ended: I64, reason: EndReason | I64) -> npt.NDArray[np.uint8]:
    """Return the end reasons: a connection that had ended says so whatever made it leave."""
    return np.where(ended == 1, EndReason.TCP_END, reason).astype(np.uint8)


def _address(words: U64) -> npt.NDArray[np.uint8]:
    """Return uint8[n, 16] from uint64[n, 2] of the most significant half first."""
    return np.ascontiguousarray(words).astype(">u8").view(np.uint8).reshape(-1, 16)
