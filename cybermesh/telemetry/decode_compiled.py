"""The compiled decoder: the packets and counters of ``decode``, many times as fast on usual frames.

The kernel decodes what is usual and lists the rest; ``decode`` does that, and its rows take their places in between.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from cybermesh.telemetry import counters as reasons
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames, decode
from cybermesh.telemetry.decode_link import ETHERNET, I64, RAW, RAW_BSD, RAW_OPENBSD, SLL, SLL2
from cybermesh.telemetry.kernels.headers import BROKEN, NOT_IP, ODD, SHORT, SOUND, decode_usual
from cybermesh.telemetry.packets import PacketBatch

# Link types that the kernel knows: where the EtherType is (-1: there is none), and the header's length.
_LINKS = {ETHERNET: (12, 14), SLL: (14, 16), SLL2: (0, 20), RAW: (-1, 0), RAW_BSD: (-1, 0), RAW_OPENBSD: (-1, 0)}

_FROM_REFERENCE = [f.name for f in fields(PacketBatch) if f.name not in ("data", "ts_us")]


def decode_frames(frames: Frames, counters: Counters) -> PacketBatch:
    """Do what ``decode`` does."""
    total = len(frames)
    link = int(frames.link[0]) if total else ETHERNET
    if link not in _LINKS or (frames.link != link).any():
        return decode(frames, counters)
    data = np.require(frames.data, requirements="W")  # the one layout that the kernel is compiled for
    ends, wire = np.empty((2, total, 2), np.uint64), np.empty(total, np.uint32)
    small, middle = np.empty((6, total), np.uint8), np.empty((3, total), np.uint16)
    wide, sizes = np.empty((3, total), np.int64), np.empty((2, total), np.int32)
    counts, odd = np.empty(5, np.int64), np.empty((2, total), np.int64)
    places = (frames.at, frames.captured, frames.wire, frames.ts_us)
    decode_usual(data, *places, *_LINKS[link], counts, odd, ends, small, middle, wide, sizes, wire)
    used, few = int(counts[SOUND] + counts[ODD]), int(counts[ODD])
    family, proto, klass, icmp_type, icmp_code, flags = small[:, :used]
    sport, dport, window = middle[:, :used]
    ts_us, payload, payload_at = wide[:, :used]
    header, payload_captured = sizes[:, :used]
    batch = PacketBatch(
        ts_us=ts_us,
        src=ends[0, :used].view(np.uint8),
        dst=ends[1, :used].view(np.uint8),
        family=family,
        sport=sport,
        dport=dport,
        proto=proto,
        klass=klass,
        icmp_type=icmp_type,
        icmp_code=icmp_code,
        flags=flags,
        payload=payload,
        header=header,
        window=window,
        wire=wire[:used],
        payload_at=payload_at,
        payload_captured=payload_captured,
        data=frames.data,
    )
    counters.packets += total - few
    counters.metered += int(counts[SOUND])
    for reason, outcome in ((reasons.NOT_IP, NOT_IP), (reasons.SHORT_FRAME, SHORT), (reasons.BROKEN_IP, BROKEN)):
        counters.skip(reason, int(counts[outcome]))
    return _put_odd(batch, frames, odd[:, :few], counters) if few else batch


def _put_odd(batch: PacketBatch, frames: Frames, odd: I64, counters: Counters) -> PacketBatch:
    """Let the reference decode the frames ``odd[0]`` and put what it finds into the rows ``odd[1]``."""
    chosen = odd[0]
    # It does not tell which frames its packets came from, so each frame's number travels in the place of its time.
    others = decode(
        Frames(
            data=frames.data,
            at=frames.at[chosen],
            captured=frames.captured[chosen],
            wire=frames.wire[chosen],
            ts_us=np.arange(len(chosen)),
            link=frames.link[chosen],
        ),
        counters,
    )
    rows = odd[1, others.ts_us]
    for name in _FROM_REFERENCE:
        getattr(batch, name)[rows] = getattr(others, name)
    if len(rows) == len(chosen):
        return batch
    kept = np.ones(len(batch), np.bool_)
    kept[odd[1]] = False
    kept[rows] = True
    return batch.take(np.flatnonzero(kept))
