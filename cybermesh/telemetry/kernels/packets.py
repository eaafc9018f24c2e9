"""The main loop of the meter: packets of a block into the flows of a table.

Work goes on in strips of a few hundred packets, in three steps: keys and hashes, then rows, then the flows' states. Each step
asks for the memory that the next one needs, so that the waits for a table much larger than the caches overlap. Packets need not
be sorted by flow for that, and the strip's own arrays stay in the nearest cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba.core import types

from cybermesh.telemetry.flows import EndReason
from cybermesh.telemetry.kernels import kernel, part, prefetch, record
from cybermesh.telemetry.kernels.keys import KEY_WORDS, hash_key, small_word
from cybermesh.telemetry.kernels.table import FREE, ROW_WIDTH, TABLE, Table, find_or_claim, finish, first_place, take_row
from cybermesh.telemetry.kernels.update import Packet, add_packet, begin_flow
from cybermesh.telemetry.meter_state import CUT_US, WIDTH, Flow
from cybermesh.telemetry.packets import ACK, SYN

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

STRIP_PACKETS = 256
_SHARD_BITS = np.uint64(0x7FFF_FFFF)  # of the hash: those that do not choose a place

_START, _ENDED = int(Flow.START), int(Flow.ENDED)
_CUT = int(EndReason.CUT)
_LINE = np.int64(8)  # words of a cache line


class Columns(NamedTuple):
    """Columns of a ``PacketBatch``; addresses as two words each."""

    ts_us: I64
    src: U64
    dst: U64
    family: U8
    sport: U16
    dport: U16
    proto: U8
    klass: U8
    icmp_type: U8
    icmp_code: U8
    flags: U8
    payload: I64
    header: npt.NDArray[np.int32]
    window: U16


class Share(NamedTuple):
    """What a call is about.

    ``serial`` is the number of the block's first packet, ``late_us`` the time from a flow's start to its deadline; only keys of
    ``shard`` among ``shards`` are taken.
    """

    serial: int
    late_us: int
    shard: int
    shards: int


class Strip(NamedTuple):
    """Working memory, for each packet of a strip: its number in the block, its sending side, its row, hash and key."""

    chosen: I64
    side: I64
    row: U32
    hashed: U64
    words: U64


_BYTES, _PORTS, _WIDE, _PAIRS = types.uint8[::1], types.uint16[::1], types.int64[::1], types.uint64[:, ::1]
COLUMNS = record(Columns, _WIDE, _PAIRS, _PAIRS, _BYTES, _PORTS, _PORTS, *[_BYTES] * 5, _WIDE, types.int32[::1], _PORTS)
SHARE = record(Share, *[types.int64] * len(Share._fields))
STRIP = record(Strip, _WIDE, _WIDE, types.uint32[::1], types.uint64[::1], _PAIRS)


def new_strip() -> Strip:
    """Return working memory for ``add_packets``."""
    return Strip(
        chosen=np.empty(STRIP_PACKETS, np.int64),
        side=np.empty(STRIP_PACKETS, np.int64),
        row=np.empty(STRIP_PACKETS, np.uint32),
        hashed=np.empty(STRIP_PACKETS, np.uint64),
        words=np.empty((STRIP_PACKETS, KEY_WORDS), np.uint64),
    )


@part
def _choose(table: Table, packets: Columns, share: Share, strip: Strip, begin: int, end: int) -> int:
    """Fill the strip with the share's packets and their keys; return how many there are."""
    words = strip.words
    count = 0
    for i in range(begin, end):
        s0, s1, d0, d1 = packets.src[i, 0], packets.src[i, 1], packets.dst[i, 0], packets.dst[i, 1]
        source, target = np.int64(packets.sport[i]), np.int64(packets.dport[i])
        turned = (s0 > d0) | ((s0 == d0) & ((s1 > d1) | ((s1 == d1) & (source > target))))
        words[count, 0], words[count, 2] = (d0, s0) if turned else (s0, d0)
        words[count, 1], words[count, 3] = (d1, s1) if turned else (s1, d1)
        words[count, 4] = small_word(
            target if turned else source,
            source if turned else target,
            (np.int64(packets.proto[i]), np.int64(packets.klass[i]), np.int64(packets.family[i])),
            np.int64(packets.icmp_type[i]),
            np.int64(packets.icmp_code[i]),
        )
        hashed = hash_key(words[count, 0], words[count, 1], words[count, 2], words[count, 3], words[count, 4], table.secret)
        strip.hashed[count], strip.side[count], strip.chosen[count] = hashed, turned, i
        prefetch(table.places, first_place(table, hashed))
        count += share.shards == 1 or np.int64(hashed & _SHARD_BITS) % share.shards == share.shard
    return count


@part
def _find_rows(table: Table, strip: Strip, count: int) -> None:
    """Find or make the row of each packet of the strip."""
    for k in range(count):
        row = find_or_claim(table, strip.hashed[k], strip.words, k)
        strip.row[k] = row
        state = table.rows[row]
        for line in range(0, ROW_WIDTH, _LINE):
            prefetch(state, line)


@part
def _renew(table: Table, row: np.uint32) -> None:
    """Set the flow in ``row`` aside, in a row of its own, because its key opens another one."""
    old = take_row(table)
    for column in range(ROW_WIDTH):
        table.rows[old, column] = table.rows[row, column]
    finish(table, old, _CUT)


@part
def _opens(rows: I64, row: np.uint32, ts_us: int, flags: int) -> bool:
    """Return whether a packet of the key opens a new flow."""
    if abs(ts_us - rows[row, _START]) > CUT_US:
        return True
    return rows[row, _ENDED] != 0 and flags & (SYN | ACK) == SYN


@part
def _forward_side(rows: I64, row: np.uint32, side: int, flags: int) -> int:
    """Return which endpoint of the key is the forward one, for a flow that begins with this packet."""
    if flags & (SYN | ACK) != SYN | ACK:
        return side
    ports = rows[row, WIDTH + 4] >> 32 & 0xFFFF_FFFF
    equal = rows[row, WIDTH] == rows[row, WIDTH + 2] and rows[row, WIDTH + 1] == rows[row, WIDTH + 3]
    return side if equal and ports >> 16 == ports & 0xFFFF else 1 - side


@kernel(types.void(TABLE, types.int64[::1], COLUMNS, SHARE, STRIP))
def add_packets(table: Table, marks: I64, packets: Columns, share: Share, strip: Strip) -> None:
    """Add the packets of a block to their flows.

    Args:
        table: Has a free row for each packet.
        marks: The watermark after each packet.
        packets: The block.
        share: Which of the packets are taken, and what is the same for all of them.
        strip: Working memory.
    """
    rows = table.rows
    for begin in range(0, len(packets.ts_us), STRIP_PACKETS):
        count = _choose(table, packets, share, strip, begin, min(begin + STRIP_PACKETS, len(packets.ts_us)))
        _find_rows(table, strip, count)
        for k in range(count):
            i, row, side = strip.chosen[k], strip.row[k], strip.side[k]
            ts_us, flags = packets.ts_us[i], np.int64(packets.flags[i])
            packet = Packet(ts_us, side, flags, packets.payload[i], np.int64(packets.header[i]), np.int64(packets.window[i]))
            fresh = table.deadline_us[row] == FREE
            if not fresh and _opens(rows, row, ts_us, flags):
                _renew(table, row)
                fresh = True
            if fresh:
                begin_flow(rows, row, ts_us, share.serial + i, _forward_side(rows, row, side, flags))
                # A flow that was late when it began is as old as the watermark, or it would be gone at once.
                table.deadline_us[row] = max(ts_us, marks[i]) + share.late_us
            table.seen[row] = share.serial + i
            add_packet(rows, row, packet, fresh)
