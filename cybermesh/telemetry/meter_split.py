"""Find where new flows begin among the packets of one key: the 120 s cut, and a port pair used for a new connection.

Most keys of a block go on with one flow or have exactly one, and a few reductions show it. Only the others are walked packet by
packet, in the plainest code, because there each decision depends on the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.meter_state import CUT_US
from cybermesh.telemetry.packets import ACK, FIN, RST, SYN

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
U8 = npt.NDArray[np.uint8]

_OPENS = np.array([byte & (SYN | ACK) == SYN for byte in range(256)])  # may open a connection
_BOTH_FINS = 3


@dataclass(frozen=True, slots=True)
class Carried:
    """What the keys of a block bring along from earlier blocks, one row per key.

    Where ``known`` is false there is no flow yet and the other columns mean nothing. ``fins`` has bit 0 set after a FIN of the
    key's lower endpoint and bit 1 after one of the higher.
    """

    known: Bools
    start_us: I64
    ended: Bools
    fins: I64


def find_beginnings(starts: I64, ts_us: I64, side: Bools, flags: U8, carried: Carried) -> Bools:
    """Return for each packet whether it is the first of a new flow.

    Args:
        starts: Where each key's packets begin; the packets are sorted by key, each key's in file order.
        ts_us: Time of each packet.
        side: Which endpoint sent it.
        flags: TCP flags, 0 off TCP.
        carried: What is known of each key.
    """
    begins = np.zeros(len(ts_us), np.bool_)
    begins[starts] = ~carried.known
    origin = np.where(carried.known, carried.start_us, ts_us[starts])
    late = np.maximum.reduceat(ts_us, starts) - origin > CUT_US
    early = origin - np.minimum.reduceat(ts_us, starts) > CUT_US
    doubtful = np.flatnonzero(late | early | _may_reopen(starts, flags, begins, carried))
    ends = np.append(starts[1:], len(ts_us))
    for key in doubtful.tolist():
        rows = slice(int(starts[key]), int(ends[key]))
        begins[rows] = _walk(ts_us[rows].tolist(), side[rows].tolist(), flags[rows].tolist(), carried, key)
    return begins


def _may_reopen(starts: I64, flags: U8, begins: Bools, carried: Carried) -> Bools:
    """Return for each key whether an opening packet could come after the end of a connection in this block."""
    opens = _OPENS[flags] & ~begins
    if not opens.any():
        return np.zeros(len(starts), np.bool_)
    ends = np.logical_or.reduceat(flags & (RST | FIN) != 0, starts) | (carried.known & (carried.ended | (carried.fins != 0)))
    may: Bools = np.logical_or.reduceat(opens, starts) & ends
    return may


def _walk(ts_us: list[int], side: list[bool], flags: list[int], carried: Carried, key: int) -> list[bool]:
    """Apply the rules to one key's packets one after the other."""
    known, start = bool(carried.known[key]), int(carried.start_us[key])
    ended, fins = bool(carried.ended[key]), int(carried.fins[key])
    begins = []
    for time, sender, flag in zip(ts_us, side, flags, strict=True):
        begin = not known or abs(time - start) > CUT_US or (ended and flag & (SYN | ACK) == SYN)
        if begin:
            known, start, ended, fins = True, time, False, 0
        begins.append(begin)
        if flag & RST or (fins == _BOTH_FINS and flag & (ACK | FIN | SYN) == ACK):
            ended = True
        if flag & FIN:
            fins |= 2 if sender else 1
    return begins
