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
from cybermesh.telemetry.kernels.headers import BROKEN, NOT_IP, ODD, SHORT, SOUND, Link, Places, decode_usual, new_decoded
from cybermesh.telemetry.packets import PacketBatch

# The link types that the kernel knows.
_LINKS = {ETHERNET: Link(12, 14), SLL: Link(14, 16), SLL2: Link(0, 20)}
_LINKS |= dict.fromkeys((RAW, RAW_BSD, RAW_OPENBSD), Link(-1, 0))

_FROM_REFERENCE = [f.name for f in fields(PacketBatch) if f.name not in ("data", "ts_us")]


def decode_frames(frames: Frames, counters: Counters) -> PacketBatch:
    """Do what ``decode`` does."""
    total = len(frames)
    link = int(frames.link[0]) if total else ETHERNET
    if link not in _LINKS or (frames.link != link).any():
        return decode(frames, counters)
    data = np.require(frames.data, requirements="W")  # the one layout that the kernel is compiled for
    found = new_decoded(total)
    decode_usual(data, Places(frames.at, frames.captured, frames.wire, frames.ts_us), _LINKS[link], found)
    counts, few = found.counts, int(found.counts[ODD])
    used = int(counts[SOUND]) + few
    family, proto, klass, icmp_type, icmp_code, flags = found.small[:, :used]
    sport, dport, window = found.middle[:, :used]
    ts_us, payload, payload_at = found.wide[:, :used]
    header, payload_captured = found.sizes[:, :used]
    batch = PacketBatch(
        ts_us=ts_us,
        src=found.ends[0, :used].view(np.uint8),
        dst=found.ends[1, :used].view(np.uint8),
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
        wire=found.wire[:used],
        payload_at=payload_at,
        payload_captured=payload_captured,
        data=frames.data,
    )
    counters.packets += total - few
    counters.metered += int(counts[SOUND])
    for reason, outcome in ((reasons.NOT_IP, NOT_IP), (reasons.SHORT_FRAME, SHORT), (reasons.BROKEN_IP, BROKEN)):
        counters.skip(reason, int(counts[outcome]))
    return _put_odd(batch, frames, found.odd[:, :few], counters) if few else batch


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
