"""Bring flows up to date with the packets of a block: all flows at once, column by column.

Packets come flow after flow, each flow's in file order, so that everything a flow needs is a reduction over a stretch of
neighbours (``reduceat``). What is rare (pauses, FINs, data runs' borders) is picked out first and worked on alone. The result
is that of adding one packet after the other, bit for bit, however a flow's packets are spread over blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.meter_state import BACKWARD, BULK_PACKETS, FORWARD, IDLE_US, NOTHING, PAUSE_US, WIDTH, Flow, Side
from cybermesh.telemetry.packets import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_PACKETS = 1 << 20  # in one update: three counts share a number below, 21 bits each
_COUNT = (1 << 21) - 1
_LIFT = 27  # bits that hold a flow's relative times (120 s)


def _packed(*flags: int) -> I64:
    """Return a table from a TCP flag byte to its flags as counts of 1, 21 bits apart."""
    table = [sum(bool(byte & flag) << 21 * place for place, flag in enumerate(flags)) for byte in range(256)]
    return np.array(table, np.int64)


_FIN_SYN_RST, _ACK_ECE_CWR, _PSH_URG = _packed(FIN, SYN, RST), _packed(ACK, ECE, CWR), _packed(PSH, URG)
_CLOSES = np.array([byte & (ACK | FIN | SYN) == ACK for byte in range(256)])  # the last ACK of a connection


@dataclass(frozen=True, slots=True)
class Stretches:
    """Packets of a block, flow after flow.

    ``starts`` (m flows) is where each flow's packets begin; the other columns are per packet. ``side`` is the sending endpoint.
    """

    starts: I64
    ts_us: I64
    side: Bools
    payload: I64
    header: I64
    flags: npt.NDArray[np.uint8]
    window: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class _Timed:
    """Per packet: its flow's number in the block, its corrected time in the flow, its direction."""

    flow: I64
    time: I64
    forward: Bools


def update_flows(state: I64, packets: Stretches) -> None:
    """Add packets to flows.

    Args:
        state: int64[WIDTH, m], changed in place. A new flow's column holds ``START``, ``SERIAL``, ``FORWARD_SIDE``, ``NOTHING``
            in its minima and 0 elsewhere.
        packets: At least one packet of each of the m flows, all of them inside the flow (no cut, no new connection).
    """
    assert state.shape == (WIDTH, len(packets.starts))
    assert len(packets.ts_us) <= MAX_PACKETS
    starts = packets.starts
    flow = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(packets.ts_us)))
    is_new = state[FORWARD + Side.N] + state[BACKWARD + Side.N] == 0
    time, gap = _correct_times(state, starts, flow, packets.ts_us)
    timed = _Timed(flow, time, packets.side == state[Flow.FORWARD_SIDE][flow].astype(np.bool_))
    _add_gaps(state, starts, gap, is_new)
    _add_pauses(state, timed, gap)
    if packets.flags.any():
        _add_flags(state, starts, timed, packets.flags)
    for base, rows in ((FORWARD, np.flatnonzero(timed.forward)), (BACKWARD, np.flatnonzero(~timed.forward))):
        if len(rows):
            _add_direction(state[base : base + len(Side)], rows, timed, packets)
    data = np.flatnonzero(packets.payload > 0)
    if len(data):
        _add_data(state, timed, packets.payload, data)


def _correct_times(state: I64, starts: I64, flow: I64, ts_us: I64) -> tuple[I64, I64]:
    """Return each packet's time in its flow, never running backwards, and the gap before it (0 for a flow's first packet)."""
    latest = state[Flow.LATEST]
    time = np.maximum(ts_us - state[Flow.START][flow], 0)
    time[starts] = np.maximum(time[starts], latest)
    lifted = time + (flow << _LIFT)  # one running maximum over the block cannot reach from one flow into the next
    time = np.maximum.accumulate(lifted) - (flow << _LIFT)
    before = np.empty_like(time)
    before[1:] = time[:-1]
    before[starts] = latest
    state[Flow.LATEST] = time[np.append(starts[1:], len(time)) - 1]
    return time, time - before


def _add_gaps(state: I64, starts: I64, gap: I64, is_new: Bools) -> None:
    state[Flow.IAT_SQ] += np.add.reduceat(gap * gap, starts)
    _raise(state, Flow.IAT_MAX, np.maximum.reduceat(gap, starts))
    counted = gap.copy()
    counted[starts[is_new]] = NOTHING
    _lower(state, Flow.IAT_MIN, np.minimum.reduceat(counted, starts))


def _add_pauses(state: I64, timed: _Timed, gap: I64) -> None:
    """Count gaps above 1 s, and close active periods at gaps above 5 s."""
    paused = np.flatnonzero(gap > PAUSE_US)
    if not len(paused):
        return
    np.add.at(state[Flow.PAUSES], timed.flow[paused], 1)
    idle = paused[gap[paused] > IDLE_US]
    if not len(idle):
        return
    flow, value = timed.flow[idle], gap[idle]
    _count(state, "IDLE", flow, value)
    begin = np.empty_like(value)
    begin[1:] = timed.time[idle[:-1]]
    first = np.flatnonzero(np.diff(flow, prepend=-1))
    begin[first] = state[Flow.ACTIVE_FROM][flow[first]]
    active = timed.time[idle] - value - begin
    lasted = active > 0
    _count(state, "ACTIVE", flow[lasted], active[lasted])
    last = np.append(first[1:], len(flow)) - 1
    state[Flow.ACTIVE_FROM, flow[last]] = timed.time[idle[last]]


def _count(state: I64, name: str, flow: I64, value: I64) -> None:
    """Add values to the count, sum, sum of squares, maximum and minimum of their flows."""
    np.add.at(state[Flow[f"{name}_N"]], flow, 1)
    np.add.at(state[Flow[f"{name}_SUM"]], flow, value)
    np.add.at(state[Flow[f"{name}_SQ"]], flow, value * value)
    np.maximum.at(state[Flow[f"{name}_MAX"]], flow, value)
    np.minimum.at(state[Flow[f"{name}_MIN"]], flow, value)


def _add_flags(state: I64, starts: I64, timed: _Timed, flags: npt.NDArray[np.uint8]) -> None:
    for table, columns in ((_FIN_SYN_RST, (Flow.FIN, Flow.SYN, Flow.RST)), (_ACK_ECE_CWR, (Flow.ACK, Flow.ECE, Flow.CWR))):
        counts = np.add.reduceat(table[flags], starts)
        for place, column in enumerate(columns):
            state[column] += counts >> 21 * place & _COUNT
    _end_connections(state, timed, flags)


def _end_connections(state: I64, timed: _Timed, flags: npt.NDArray[np.uint8]) -> None:
    """Mark flows as ended by a RST, or by the first plain ACK after both sides' FINs."""
    state[Flow.ENDED] |= state[Flow.RST] > 0
    fin = np.flatnonzero(flags & FIN)
    if not len(fin) and not (state[Flow.FORWARD_FIN] & state[Flow.BACKWARD_FIN] & ~state[Flow.ENDED]).any():
        return
    paired_at = np.full(state.shape[1], -1)  # where in the block the second side's first FIN is; -1: before it
    for column, rows in ((Flow.FORWARD_FIN, fin[timed.forward[fin]]), (Flow.BACKWARD_FIN, fin[~timed.forward[fin]])):
        seen_at = np.where(state[column] == 1, -1, NOTHING)
        np.minimum.at(seen_at, timed.flow[rows], rows)
        paired_at = np.maximum(paired_at, seen_at)
        state[column, timed.flow[rows]] = 1
    last_ack = np.flatnonzero(_CLOSES[flags])
    flow = timed.flow[last_ack]
    state[Flow.ENDED, flow[last_ack > paired_at[flow]]] = 1


def _add_direction(side: I64, rows: I64, timed: _Timed, packets: Stretches) -> None:
    """Add the packets ``rows``, all of one direction, to the columns ``side`` of their flows."""
    flow, time = timed.flow[rows], timed.time[rows]
    starts = np.flatnonzero(np.diff(flow, prepend=-1))
    flows = flow[starts]
    present = side[:, flows]
    is_first = present[Side.N] == 0
    ends = np.append(starts[1:], len(rows))
    _add_side_times(present, starts, ends, time, is_first)
    present[Side.N] += ends - starts
    _add_sizes(present, starts, packets.payload[rows], packets.header[rows])
    flags = packets.flags[rows]
    if flags.any():
        counts = np.add.reduceat(_PSH_URG[flags], starts)
        present[Side.PSH] += counts & _COUNT
        present[Side.URG] += counts >> 21
    present[Side.WINDOW] = np.where(is_first, packets.window[rows[starts]], present[Side.WINDOW])
    side[:, flows] = present


def _add_side_times(present: I64, starts: I64, ends: I64, time: I64, is_first: Bools) -> None:
    present[Side.FIRST] = np.where(is_first, time[starts], present[Side.FIRST])
    gap = np.empty_like(time)
    gap[1:] = time[1:] - time[:-1]
    gap[starts] = np.where(is_first, 0, time[starts] - present[Side.LAST])
    present[Side.LAST] = time[ends - 1]
    present[Side.IAT_SQ] += np.add.reduceat(gap * gap, starts)
    _raise(present, Side.IAT_MAX, np.maximum.reduceat(gap, starts))
    gap[starts[is_first]] = NOTHING
    _lower(present, Side.IAT_MIN, np.minimum.reduceat(gap, starts))


def _add_sizes(present: I64, starts: I64, payload: I64, header: I64) -> None:
    present[Side.BYTES] += np.add.reduceat(payload, starts)
    high = np.maximum.reduceat(payload, starts)
    _raise(present, Side.LEN_MAX, high)
    _lower(present, Side.LEN_MIN, np.minimum.reduceat(payload, starts))
    if high.max() < 1 << 16:
        present[Side.SQ_LOW] += np.add.reduceat(payload * payload, starts)
    else:
        square = payload.astype(np.uint64) ** 2
        present[Side.SQ_LOW] += np.add.reduceat((square & np.uint64(0xFFFF_FFFF)).astype(np.int64), starts)
        present[Side.SQ_HIGH] += np.add.reduceat((square >> np.uint64(32)).astype(np.int64), starts)
    present[Side.DATA] += np.add.reduceat((payload > 0).astype(np.int64), starts)
    present[Side.HEADER] += np.add.reduceat(header, starts)
    _lower(present, Side.HEADER_MIN, np.minimum.reduceat(header, starts))


def _add_data(state: I64, timed: _Timed, payload: I64, rows: I64) -> None:
    """Follow the runs of data packets ``rows``; a run of four or more is a bulk once it is over."""
    flow, time, forward, size = timed.flow[rows], timed.time[rows], timed.forward[rows], payload[rows]
    breaks = np.ones(len(rows), np.bool_)
    breaks[1:] = (flow[1:] != flow[:-1]) | (forward[1:] != forward[:-1]) | (time[1:] - time[:-1] > PAUSE_US)
    starts = np.flatnonzero(breaks)
    ends = np.append(starts[1:], len(rows))
    run = np.stack([forward[starts], ends - starts, np.add.reduceat(size, starts), time[starts], time[ends - 1]]).astype(
        np.int64
    )
    run_flow = flow[starts]

    # The first run in the block of each flow may go on with the one that is open; otherwise that one is over.
    first = np.flatnonzero(np.diff(run_flow, prepend=-1))
    old = state[Flow.RUN_FORWARD : Flow.RUN_LAST + 1, run_flow[first]]
    joins = (old[1] > 0) & (old[0] == run[0, first]) & (run[3, first] - old[4] <= PAUSE_US)
    _close(state, run_flow[first[~joins]], old[:, ~joins])
    run[1:3, first] += np.where(joins, old[1:3], 0)
    run[3, first] = np.where(joins, old[3], run[3, first])

    last = np.append(first[1:], len(run_flow)) - 1
    over = np.ones(len(run_flow), np.bool_)
    over[last] = False
    _close(state, run_flow[over], run[:, over])
    state[Flow.RUN_FORWARD : Flow.RUN_LAST + 1, run_flow[last]] = run[:, last]


def _close(state: I64, flow: I64, run: I64) -> None:
    """Count those of the runs that are bulks; ``run`` is in the order of the state's columns from ``RUN_FORWARD`` on."""
    long = run[1] >= BULK_PACKETS
    if not long.any():
        return
    flow, run = flow[long], run[:, long]
    base = np.where(run[0] == 1, FORWARD, BACKWARD)
    np.add.at(state, (base + Side.BULKS, flow), 1)
    np.add.at(state, (base + Side.BULK_N, flow), run[1])
    np.add.at(state, (base + Side.BULK_BYTES, flow), run[2])
    np.add.at(state, (base + Side.BULK_US, flow), run[4] - run[3])


def _raise(columns: I64, column: int, values: I64) -> None:
    np.maximum(columns[column], values, out=columns[column])


def _lower(columns: I64, column: int, values: I64) -> None:
    np.minimum(columns[column], values, out=columns[column])
