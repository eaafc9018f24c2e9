"""Bring one flow up to date with one packet: ``meter_update`` and ``meter_split`` without columns.

All numbers are integers, so the order of the additions cannot show.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import meter_state as layout
from cybermesh.telemetry.kernels import part
from cybermesh.telemetry.meter_state import BULK_PACKETS, IDLE_US, NOTHING, PAUSE_US, Flow, Side
from cybermesh.telemetry.packets import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG

I64 = npt.NDArray[np.int64]

_FORWARD, _BACKWARD = layout.FORWARD, layout.BACKWARD
_WIDTH = layout.WIDTH
_MINIMA = tuple(int(column) for column in layout.MINIMA)

_START, _SERIAL, _FORWARD_SIDE, _LATEST = (int(c) for c in (Flow.START, Flow.SERIAL, Flow.FORWARD_SIDE, Flow.LATEST))
_IAT_SQ, _IAT_MAX, _IAT_MIN = (int(c) for c in (Flow.IAT_SQ, Flow.IAT_MAX, Flow.IAT_MIN))
_FIN, _SYN, _RST, _ACK, _ECE, _CWR = (int(c) for c in (Flow.FIN, Flow.SYN, Flow.RST, Flow.ACK, Flow.ECE, Flow.CWR))
_FORWARD_FIN, _BACKWARD_FIN, _ENDED = (int(c) for c in (Flow.FORWARD_FIN, Flow.BACKWARD_FIN, Flow.ENDED))
_PAUSES, _ACTIVE_FROM, _ACTIVE_N, _IDLE_N = (int(c) for c in (Flow.PAUSES, Flow.ACTIVE_FROM, Flow.ACTIVE_N, Flow.IDLE_N))
_RUN_FORWARD, _RUN_N, _RUN_BYTES, _RUN_FIRST, _RUN_LAST = range(Flow.RUN_FORWARD, Flow.RUN_LAST + 1)

_N, _BYTES, _SQ_LOW, _SQ_HIGH, _LEN_MAX, _LEN_MIN = range(Side.N, Side.LEN_MIN + 1)
_FIRST, _LAST, _SIDE_IAT_SQ, _SIDE_IAT_MAX, _SIDE_IAT_MIN = range(Side.FIRST, Side.IAT_MIN + 1)
_PSH, _URG, _DATA, _HEADER, _HEADER_MIN, _WINDOW = range(Side.PSH, Side.WINDOW + 1)
_BULKS, _BULK_N, _BULK_BYTES, _BULK_US = range(Side.BULKS, Side.BULK_US + 1)

assert (Flow.ACTIVE_MIN, Flow.IDLE_MIN) == (Flow.ACTIVE_N + 4, Flow.IDLE_N + 4), "count, sum, squares, maximum, minimum"


@part
def begin_flow(rows: I64, row: np.uint32, ts_us: int, serial: int, forward_side: int) -> None:
    """Fill a row's state for a flow that begins now."""
    for column in range(_WIDTH):
        rows[row, column] = 0
    for column in _MINIMA:
        rows[row, column] = NOTHING
    rows[row, _START] = ts_us
    rows[row, _SERIAL] = serial
    rows[row, _FORWARD_SIDE] = forward_side


class Packet(NamedTuple):
    """What the state takes from a packet; ``side`` is the endpoint of the key that sent it."""

    ts_us: np.int64
    side: np.int64
    flags: np.int64
    payload: np.int64
    header: np.int64
    window: np.int64


@part
def add_packet(rows: I64, row: np.uint32, packet: Packet, fresh: bool) -> None:
    """Add a packet that belongs to the flow; ``fresh`` if it is its first."""
    flags, payload = packet.flags, packet.payload
    latest = rows[row, _LATEST]
    time = max(packet.ts_us - rows[row, _START], latest)
    gap = time - latest
    forward = np.int64(packet.side == rows[row, _FORWARD_SIDE])
    rows[row, _LATEST] = time
    if not fresh:
        rows[row, _IAT_SQ] += gap * gap
        rows[row, _IAT_MAX] = max(rows[row, _IAT_MAX], gap)
        rows[row, _IAT_MIN] = min(rows[row, _IAT_MIN], gap)
        if gap > PAUSE_US:
            _add_pause(rows, row, time, gap)
    base = _FORWARD if forward else _BACKWARD
    if flags:
        _add_flags(rows, row, flags, forward)
        rows[row, base + _PSH] += np.int64(flags & PSH != 0)
        rows[row, base + _URG] += np.int64(flags & URG != 0)
    _add_direction(rows, row, base, time, packet.header, packet.window)
    _add_size(rows, row, base, payload)
    if payload > 0:
        _add_data(rows, row, forward, time, payload)


@part
def _count(rows: I64, row: np.uint32, column: int, value: int) -> None:
    """Add a value to a count, sum, sum of squares, maximum and minimum that lie side by side."""
    rows[row, column] += 1
    rows[row, column + 1] += value
    rows[row, column + 2] += value * value
    rows[row, column + 3] = max(rows[row, column + 3], value)
    rows[row, column + 4] = min(rows[row, column + 4], value)


@part
def _add_pause(rows: I64, row: np.uint32, time: int, gap: int) -> None:
    rows[row, _PAUSES] += 1
    if gap > IDLE_US:
        _count(rows, row, _IDLE_N, gap)
        active = time - gap - rows[row, _ACTIVE_FROM]
        if active > 0:
            _count(rows, row, _ACTIVE_N, active)
        rows[row, _ACTIVE_FROM] = time


@part
def _add_flags(rows: I64, row: np.uint32, flags: int, forward: int) -> None:
    fins = rows[row, _FORWARD_FIN] & rows[row, _BACKWARD_FIN]
    if flags & RST or (fins and flags & (ACK | FIN | SYN) == ACK):
        rows[row, _ENDED] = 1
    if flags & FIN:
        rows[row, _FIN] += 1
        rows[row, _FORWARD_FIN if forward else _BACKWARD_FIN] = 1
    rows[row, _SYN] += np.int64(flags & SYN != 0)
    rows[row, _RST] += np.int64(flags & RST != 0)
    rows[row, _ACK] += np.int64(flags & ACK != 0)
    if flags & (ECE | CWR):
        rows[row, _ECE] += np.int64(flags & ECE != 0)
        rows[row, _CWR] += np.int64(flags & CWR != 0)


@part
def _add_direction(rows: I64, row: np.uint32, base: int, time: int, header: int, window: int) -> None:
    if rows[row, base + _N] == 0:
        rows[row, base + _FIRST] = time
        rows[row, base + _WINDOW] = window
    else:
        gap = time - rows[row, base + _LAST]
        rows[row, base + _SIDE_IAT_SQ] += gap * gap
        rows[row, base + _SIDE_IAT_MAX] = max(rows[row, base + _SIDE_IAT_MAX], gap)
        rows[row, base + _SIDE_IAT_MIN] = min(rows[row, base + _SIDE_IAT_MIN], gap)
    rows[row, base + _LAST] = time
    rows[row, base + _N] += 1
    rows[row, base + _HEADER] += header
    rows[row, base + _HEADER_MIN] = min(rows[row, base + _HEADER_MIN], header)


@part
def _add_size(rows: I64, row: np.uint32, base: int, payload: int) -> None:
    square = np.uint64(payload) * np.uint64(payload)
    rows[row, base + _BYTES] += payload
    rows[row, base + _SQ_LOW] += np.int64(square & np.uint64(0xFFFF_FFFF))
    rows[row, base + _SQ_HIGH] += np.int64(square >> np.uint64(32))
    rows[row, base + _LEN_MAX] = max(rows[row, base + _LEN_MAX], payload)
    rows[row, base + _LEN_MIN] = min(rows[row, base + _LEN_MIN], payload)
    rows[row, base + _DATA] += np.int64(payload > 0)


@part
def _add_data(rows: I64, row: np.uint32, forward: int, time: int, payload: int) -> None:
    """Follow the runs of data packets; a run of four or more is a bulk once it is over."""
    number = rows[row, _RUN_N]
    if number > 0 and rows[row, _RUN_FORWARD] == forward and time - rows[row, _RUN_LAST] <= PAUSE_US:
        rows[row, _RUN_N] = number + 1
        rows[row, _RUN_BYTES] += payload
    else:
        if number >= BULK_PACKETS:
            base = _FORWARD if rows[row, _RUN_FORWARD] else _BACKWARD
            rows[row, base + _BULKS] += 1
            rows[row, base + _BULK_N] += number
            rows[row, base + _BULK_BYTES] += rows[row, _RUN_BYTES]
            rows[row, base + _BULK_US] += rows[row, _RUN_LAST] - rows[row, _RUN_FIRST]
        rows[row, _RUN_FORWARD] = forward
        rows[row, _RUN_N] = 1
        rows[row, _RUN_BYTES] = payload
        rows[row, _RUN_FIRST] = time
    rows[row, _RUN_LAST] = time
