"""DNS messages out of packets on port 53, UDP and TCP.

Only the header and the first question are read: that is all the windows need, and it bounds the work for each packet. A TCP
message is read where a segment begins with it (or with the two bytes of its length, sent alone); streams are not reassembled,
so the rest of a long answer is counted and passed over. Hostile bytes are counted by reason and never raise.
"""

from __future__ import annotations

import functools
import struct
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.dns import NAME_MAX, NO_ANSWER, PORT, DnsBatch, DnsRow, dns_batch
from cybermesh.telemetry.packets import PacketBatch

SHORT = "message not captured whole"
BROKEN_NAME = "name cannot be read"
OTHER_OPERATION = "not a query (zone transfer notice, update, …)"
NOT_DNS = "not DNS, or the rest of a message in an earlier segment"

_HEADER = struct.Struct(">HHHHHH")
_PREFIX = struct.Struct(">H")
_PENDING_MAX = 4096
_RESPONSE, _OPCODE, _RCODE = 0x8000, 0x7800, 0x000F
_UDP = 17


class _Packet(NamedTuple):
    """What is needed of a packet; ``size`` is of its payload on the wire, of which ``raw`` was captured."""

    ts_us: int
    src: bytes
    dst: bytes
    sport: int
    dport: int
    protocol: int
    size: int
    raw: bytes


class DnsReader:
    """Reads DNS messages of packets; keeps a few bytes of TCP connections between batches."""

    def __init__(self) -> None:
        self.counters = Counters(unit="DNS messages")
        self._pending: OrderedDict[tuple[bytes, bytes, int, int], bytes] = OrderedDict()

    def read(self, batch: PacketBatch) -> DnsBatch:
        """Return the messages in a batch of packets, in their order; call it while the batch's payload is valid."""
        found: list[DnsRow] = []
        for packet in _packets(batch):
            if packet.protocol == _UDP:
                self._message(found, packet, packet.raw, packet.size)
            else:
                self._segment(found, packet)
        return dns_batch(found)

    def _segment(self, found: list[DnsRow], packet: _Packet) -> None:
        """Read the messages that begin in a TCP segment."""
        key = packet.src, packet.dst, packet.sport, packet.dport
        before = self._pending.pop(key, b"")
        raw = before + packet.raw
        if len(before) + packet.size == _PREFIX.size:
            self._pending[key] = raw
            if len(self._pending) > _PENDING_MAX:
                self._pending.popitem(last=False)
            return
        while len(raw) >= _PREFIX.size:
            length = _PREFIX.unpack_from(raw)[0]
            if not self._message(found, packet, raw[2 : 2 + length], length):
                return
            raw = raw[2 + length :]

    def _message(self, found: list[DnsRow], packet: _Packet, raw: bytes, size: int) -> bool:
        """Read one message of ``size`` bytes, of which ``raw`` was captured; return whether it was one."""
        counters = self.counters
        counters.packets += 1
        row = _row(packet, raw, size)
        if isinstance(row, str):
            counters.skip(row)
            return row not in {NOT_DNS, SHORT}
        counters.metered += 1
        found.append(row)
        return True


def _packets(batch: PacketBatch) -> Iterator[_Packet]:
    """Yield the packets with payload to or from port 53."""
    chosen = ((batch.sport == PORT) | (batch.dport == PORT)) & (batch.payload > 0) & (batch.payload_at >= 0)
    rows = np.nonzero(chosen)[0]
    if not len(rows):
        return
    data, src, dst = batch.data.data, batch.src[rows].tobytes(), batch.dst[rows].tobytes()
    columns = (batch.ts_us, batch.sport, batch.dport, batch.proto, batch.payload, batch.payload_at, batch.payload_captured)
    listed = zip(*(column[rows].tolist() for column in columns), strict=True)
    for place, (ts_us, sport, dport, proto, size, at, captured) in zip(range(0, 16 * len(rows), 16), listed, strict=True):
        ends = src[place : place + 16], dst[place : place + 16]
        yield _Packet(ts_us, *ends, sport, dport, proto, size, bytes(data[at : at + captured]))


def _row(packet: _Packet, raw: bytes, size: int) -> DnsRow | str:
    """Return the row of a message, or why there is none."""
    if len(raw) < _HEADER.size:
        return NOT_DNS if size < _HEADER.size else SHORT
    _, flags, questions, answers, _, _ = _HEADER.unpack_from(raw)
    is_answer = bool(flags & _RESPONSE)
    if is_answer:
        server, client, port = packet.src, packet.dst, packet.sport
    else:
        server, client, port = packet.dst, packet.src, packet.dport
    if port != PORT or questions > 1 or not (questions or is_answer):  # nobody ever implemented two questions in a message
        return NOT_DNS
    if flags & _OPCODE:
        return OTHER_OPERATION
    length, name, qtype = 0, "", 0
    if questions:
        end = _name_end(raw)
        if end < 0 or end + 4 > len(raw):
            return SHORT if len(raw) < size else BROKEN_NAME
        length, name = _name(raw[_HEADER.size : end])
        qtype = _PREFIX.unpack_from(raw, end)[0]
    rcode = flags & _RCODE if is_answer else NO_ANSWER
    answers, size = answers if is_answer else 0, min(size, 0xFFFF)
    return DnsRow(packet.ts_us, client, server, port, packet.protocol, not is_answer, rcode, qtype, answers, size, length, name)


def _name_end(raw: bytes) -> int:
    """Return the offset behind the first question's name, -1 if it is none: nothing is before it that it could point to."""
    at, last = _HEADER.size, min(len(raw), _HEADER.size + NAME_MAX)
    while at < last:
        size = raw[at]
        if size == 0:
            return at + 1
        if size > 63:
            return -1
        at += 1 + size
    return -1


@functools.lru_cache(maxsize=16_384)
def _name(wire: bytes) -> tuple[int, str]:
    """Return the length and text of a name that ``_name_end`` found whole."""
    labels, at = [], 0
    while size := wire[at]:
        labels.append(wire[at + 1 : at + 1 + size].lower())
        at += 1 + size
    if not labels:
        return 0, "."
    return len(wire) - 2, ".".join(map(_label, labels))


def _label(label: bytes) -> str:
    """Return a label as text; a byte that is not printable, or a dot or backslash inside it, is escaped."""
    text = label.decode("latin-1")
    if text.isascii() and text.isprintable() and not {".", "\\", " "} & set(text):
        return text
    return "".join(chr(byte) if 0x20 < byte < 0x7F and byte not in b".\\" else f"\\{byte:03d}" for byte in label)
