"""Large captures for ``cybermesh bench``, made from the small one that the package ships.

A template of whole flows is copied again and again, each copy two seconds after the one before and between other addresses,
so that copies overlap and tens of thousands of flows are open at any time, as on a real link. Packets keep their bytes but for
the addresses (checksums are left as they are; no meter looks at them).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.decode import Frames, decode
from cybermesh.telemetry.meter_group import group_packets
from cybermesh.telemetry.packets import FIN, RST, SYN, PacketBatch
from cybermesh.telemetry.sources.pcap import PcapReader
from cybermesh.telemetry.sources.stream import ByteStream

I64 = npt.NDArray[np.int64]

USUAL_PACKETS = 10  # in a flow of the usual capture, on average
_LONG_PACKETS = 20  # flows with at least so many are taken for the long ones ...
_LONG_US = 8_000_000  # ... if they last no longer than this, because
_REPEATS = 12  # the packets between their beginning and their end are repeated so often
_REPEAT_US = 9_000_000  # at this distance, together less than the 120 s at which flows are cut
_STEP_US = 2_000_000  # from one copy to the next
_WRITTEN_AT_ONCE = 131_072  # packets
_START_US = 1_700_000_000_000_000
_RECORD = np.dtype([("seconds", "<u4"), ("micros", "<u4"), ("captured", "<u4"), ("wire", "<u4")])
_FILE_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262_144, 1)


@dataclass(frozen=True, slots=True)
class Template:
    """Packets of whole flows in order of time: where their frames are in ``data``, and when they come.

    ``address`` is where in the frame the two addresses are that a copy changes a part of.
    """

    data: npt.NDArray[np.uint8]
    at: I64
    size: I64
    wire: I64
    time_us: I64
    address: npt.NDArray[np.int64]  # [n, 2]


def demo_capture() -> Path:
    """Return the path of the capture that the package ships."""
    return Path(str(resources.files("cybermesh") / "data" / "demo.pcap"))


def usual(source: Path) -> Template:
    """Return flows of ``USUAL_PACKETS`` on average: the longer ones, and as many short ones as that leaves room for."""
    frames, packets, flow, count = _flows(source)
    longer = count >= USUAL_PACKETS // 2 - 1
    short = np.flatnonzero(~longer)
    room = (count[longer].sum() - USUAL_PACKETS * np.count_nonzero(longer)) / (USUAL_PACKETS - count[short].mean())
    longer[short[: max(int(room), 0)]] = True
    rows = np.flatnonzero(longer[flow])
    return _template(frames, packets, rows, np.zeros(len(rows), np.int64))


def long_flows(source: Path) -> Template:
    """Return the flows of many packets, each several times as long as it was."""
    frames, packets, flow, count = _flows(source)
    first, last = np.full(len(count), np.iinfo(np.int64).max), np.zeros(len(count), np.int64)
    np.minimum.at(first, flow, packets.ts_us)
    np.maximum.at(last, flow, packets.ts_us)
    chosen = (count >= _LONG_PACKETS) & (last - first <= _LONG_US)
    whole = np.flatnonzero(chosen[flow])
    middle = whole[packets.flags[whole] & (SYN | FIN | RST) == 0]
    rows = [whole, *[middle] * (_REPEATS - 1)]
    shift = np.repeat(np.arange(_REPEATS) * _REPEAT_US, [len(part) for part in rows])
    return _template(frames, packets, np.concatenate(rows), shift)


def write(template: Template, path: Path, packets: int) -> int:
    """Write a capture of at least ``packets`` packets, whole copies only; return how many there are."""
    size = len(template.at)
    copies = -(-packets // size)
    copy = np.repeat(np.arange(copies, dtype=np.int64), size)
    row = np.tile(np.arange(size, dtype=np.int64), copies)
    time_us = template.time_us[row] + copy * _STEP_US
    order = np.argsort(time_us, kind="stable")
    with path.open("wb") as out:
        out.write(_FILE_HEADER)
        for start in range(0, len(order), _WRITTEN_AT_ONCE):
            chosen = order[start : start + _WRITTEN_AT_ONCE]
            out.write(_records(template, row[chosen], copy[chosen], time_us[chosen]))
    return len(order)


def _flows(source: Path) -> tuple[Frames, PacketBatch, I64, I64]:
    """Return the frames, their packets, the number of each packet's key, and the number of packets of each key."""
    stream = ByteStream(str(source))
    frames = PcapReader(stream, Counters()).read(1 << 20)
    stream.close()
    assert frames is not None
    # Frames that are not metered are left out; each packet's frame is found by its number, sent in the place of its time.
    numbered = Frames(frames.data, frames.at, frames.captured, frames.wire, np.arange(len(frames)), frames.link)
    rows = decode(numbered, Counters()).ts_us
    at, captured, wire, ts_us = (column[rows] for column in (frames.at, frames.captured, frames.wire, frames.ts_us))
    frames = Frames(frames.data, at, captured, wire, ts_us, frames.link[rows])
    packets = decode(frames, Counters())
    groups = group_packets(packets)
    flow = np.empty(len(packets), np.int64)
    count = np.diff(groups.starts, append=len(packets))
    flow[groups.order] = np.repeat(np.arange(len(count)), count)
    return frames, packets, flow, count


def _template(frames: Frames, packets: PacketBatch, rows: I64, shift_us: I64) -> Template:
    order = np.argsort(packets.ts_us[rows] + shift_us, kind="stable")
    rows, shift_us = rows[order], shift_us[order]
    first = packets.ts_us.min()
    family = packets.family[rows]
    source = np.where(family == 4, 27, 30)  # behind an Ethernet header: the second byte of one, the ninth of the other
    return Template(
        data=frames.data.copy(),
        at=frames.at[rows],
        size=frames.captured[rows],
        wire=frames.wire[rows],
        time_us=_START_US + packets.ts_us[rows] - first + shift_us,
        address=np.stack([source, np.where(family == 4, 31, 46)], axis=1),
    )


def _records(template: Template, row: I64, copy: I64, time_us: I64) -> bytes:
    """Return the bytes of records: headers, and frames with the copy's number added to their addresses."""
    size = template.size[row]
    begin = np.cumsum(size + _RECORD.itemsize) - size
    header = np.empty(len(row), _RECORD)
    header["seconds"], header["micros"] = time_us // 1_000_000, time_us % 1_000_000
    header["captured"], header["wire"] = size, template.wire[row]
    out = np.empty(begin[-1] + size[-1], np.uint8)
    out[(begin - _RECORD.itemsize)[:, None] + np.arange(_RECORD.itemsize)] = header.view(np.uint8).reshape(len(row), -1)
    inside = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    out[np.repeat(begin, size) + inside] = template.data[np.repeat(template.at[row], size) + inside]
    for place in template.address[row].T:
        out[begin + place] += (copy & 255).astype(np.uint8)
        out[begin + place + 1] += (copy >> 8).astype(np.uint8)
    return out.tobytes()
