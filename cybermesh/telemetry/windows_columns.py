"""The part of a packet batch that the windows keep, and what they read in payloads: quoted headers and greetings.

A source's buffer is valid only until its next batch, so everything read from payload bytes is read here at once. Two things
are: the packet quoted by an ICMP unreachable (whose answer it is), and the first four bytes of TCP payload, which name an
authentication service on any port (RFC 4253 4.2, 959, 5321, 1939, 9051, 6143) and a refused login in clear text.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import packets
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.web_requests import web_marks
from cybermesh.telemetry.windows import Service

_Quoted: TypeAlias = tuple[
    npt.NDArray[np.intp], npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.int64]
]

LOGIN_FAILED = 0x80  # in ``mark`` beside the service

_MAPPED = np.array([0] * 10 + [0xFF, 0xFF], np.uint8)
_GREETINGS = {
    b"SSH-": Service.SSH,
    b"220 ": Service.FTP,  # SMTP says the same; the tracker prefers the port's own service
    b"220-": Service.FTP,
    b"+OK ": Service.POP3,
    b"* OK": Service.IMAP,
    b"RFB ": Service.VNC,
    b"530 ": Service.FTP | LOGIN_FAILED,
    b"535 ": Service.SMTP | LOGIN_FAILED,
    b"535-": Service.SMTP | LOGIN_FAILED,
    b"-ERR": Service.POP3 | LOGIN_FAILED,
}
_IAC, _NEGOTIATE = 0xFF, 0xFB  # RFC 854: IAC followed by WILL, WONT, DO or DONT


@dataclass(frozen=True, slots=True)
class Columns:
    """Packets as the windows need them, rows in file order; ``mark`` is Service | LOGIN_FAILED or 0.

    An ICMP unreachable that quotes a packet has become an answer to that packet: addresses, ports, protocol and class are the
    quoted packet's, reversed, and ``unreachable`` is true.
    """

    ts_us: npt.NDArray[np.int64]
    hop: npt.NDArray[np.int64]
    src: npt.NDArray[np.uint8]  # [n, 16]
    dst: npt.NDArray[np.uint8]  # [n, 16]
    sport: npt.NDArray[np.uint16]
    dport: npt.NDArray[np.uint16]
    proto: npt.NDArray[np.uint8]
    klass: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    icmp_type: npt.NDArray[np.uint8]
    wire: npt.NDArray[np.int64]
    payload: npt.NDArray[np.int64]
    mark: npt.NDArray[np.uint8]
    web: npt.NDArray[np.uint8]  # web_requests.Web
    unreachable: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ts_us)

    def take(self, rows: slice | npt.NDArray[np.intp]) -> Columns:
        """Return the chosen rows."""
        return Columns(*(getattr(self, field.name)[rows] for field in fields(self)))


def joined(parts: list[Columns]) -> Columns:
    """Return the rows of all parts in order; ``parts`` is not empty."""
    if len(parts) == 1:
        return parts[0]
    return Columns(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Columns)))


def columns(batch: PacketBatch, hop: npt.NDArray[np.int64], ts_us: npt.NDArray[np.int64]) -> Columns:
    """Copy what the windows need of a batch whose times are ``ts_us``, and read its payloads."""
    src, dst = batch.src.copy(), batch.dst.copy()
    sport, dport = batch.sport.copy(), batch.dport.copy()
    proto, klass, flags = batch.proto.copy(), batch.klass.copy(), batch.flags.copy()
    is_v4 = batch.family == 4
    error = (batch.klass == packets.ICMP) & (batch.icmp_type == np.where(is_v4, 3, 1))
    at = np.nonzero(error & (batch.payload_at >= 0))[0]
    if len(at):
        for rows, quoted in ((at[is_v4[at]], _quoted_v4), (at[~is_v4[at]], _quoted_v6)):
            kept, q_src, q_dst, q_proto, ports_at = quoted(batch, rows)
            src[kept], dst[kept], proto[kept] = q_dst, q_src, q_proto
            klass[kept] = np.select([q_proto == 6, q_proto == 17, (q_proto == 1) | (q_proto == 58)], [1, 2, 3], 0)
            with_ports = (q_proto == 6) | (q_proto == 17)
            sport[kept] = np.where(with_ports, _be16(batch, ports_at + 2), 0)
            dport[kept] = np.where(with_ports, _be16(batch, ports_at), 0)
            flags[kept] = 0
    return Columns(
        ts_us=ts_us.copy(),
        hop=hop,
        src=src,
        dst=dst,
        sport=sport,
        dport=dport,
        proto=proto,
        klass=klass,
        flags=flags,
        icmp_type=batch.icmp_type.copy(),
        wire=batch.wire.astype(np.int64),
        payload=batch.payload.copy(),
        mark=_marks(batch),
        web=web_marks(batch),
        unreachable=error,
    )


def _be16(batch: PacketBatch, at: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    return (batch.data[at].astype(np.uint16) << np.uint16(8)) | batch.data[at + 1]


def _quoted_v4(batch: PacketBatch, rows: npt.NDArray[np.intp]) -> _Quoted:
    """Read the quoted IPv4 headers: rows that hold one and 4 bytes more, source, destination, protocol, L4 offset."""
    rows = rows[batch.payload_captured[rows] >= 24]
    at = batch.payload_at[rows]
    first = batch.data[at]
    length = (first & 0x0F).astype(np.int64) * 4
    whole = (first >> 4 == 4) & (length >= 20) & (batch.payload_captured[rows] >= length + 4)
    rows, at, length = rows[whole], at[whole], length[whole]
    mapped = np.tile(_MAPPED, (len(rows), 1))
    src = np.hstack([mapped, batch.data[at[:, None] + np.arange(12, 16)]])
    dst = np.hstack([mapped, batch.data[at[:, None] + np.arange(16, 20)]])
    return rows, src, dst, batch.data[at + 9], at + length


def _quoted_v6(batch: PacketBatch, rows: npt.NDArray[np.intp]) -> _Quoted:
    """Read the quoted IPv6 headers; one with extension headers has no ports to read and stays an ICMP packet."""
    rows = rows[batch.payload_captured[rows] >= 44]
    at = batch.payload_at[rows]
    proto = batch.data[at + 6]
    whole = (batch.data[at] >> 4 == 6) & np.isin(proto, (6, 17, 58))
    rows, at = rows[whole], at[whole]
    src, dst = (batch.data[at[:, None] + np.arange(start, start + 16)] for start in (8, 24))
    return rows, src, dst, batch.data[at + 6], at + 40


def _marks(batch: PacketBatch) -> npt.NDArray[np.uint8]:
    """Return Service | LOGIN_FAILED of the greeting or refusal each TCP payload begins with, else 0."""
    marks = np.zeros(len(batch), np.uint8)
    rows = np.nonzero((batch.klass == packets.TCP) & (batch.payload_captured >= 4) & (batch.payload_at >= 0))[0]
    if len(rows) == 0:
        return marks
    head = batch.data[batch.payload_at[rows][:, None] + np.arange(4)]
    words = np.ascontiguousarray(head).view(">u4").reshape(-1)
    found = np.zeros(len(rows), np.uint8)
    for greeting, mark in _GREETINGS.items():
        found[words == int.from_bytes(greeting)] = int(mark)
    found[(head[:, 0] == _IAC) & (head[:, 1] >= _NEGOTIATE) & (head[:, 1] < _IAC)] = int(Service.TELNET)
    marks[rows] = found
    return marks
