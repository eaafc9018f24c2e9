"""DNS messages as columns: who asked which server for which name, and what the answer said.

One shape for three origins: packets on port 53 (``dns_packets``), Zeek's dns.log and Suricata's dns records. Packets and
Suricata tell of a question and of its answer in a row each, Zeek of both in one; ``asked`` and ``rcode`` tell which is which:

- questions: ``asked``, one row for each question that was seen, whatever the origin;
- answers: ``rcode >= 0``, one row for each answer that was seen; NXDOMAIN is ``rcode == NXDOMAIN``.

So counting questions over ``asked`` and error answers over ``rcode`` counts nothing twice. A capture that holds one direction
only has rows of one sort only; names stand in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PORT = 53
NO_ANSWER = -1  # of ``rcode``
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)
NAME_MAX = 255  # bytes on the wire (RFC 1035, 2.3.4)

# Record types by name, for logs that write names (IANA "DNS parameters"); others are written TYPE123 (RFC 3597) or 123.
TYPES = {"A": 1, "NS": 2, "MD": 3, "MF": 4, "CNAME": 5, "SOA": 6, "MB": 7, "MG": 8, "MR": 9, "NULL": 10, "WKS": 11, "PTR": 12}
TYPES |= {"HINFO": 13, "MINFO": 14, "MX": 15, "TXT": 16, "RP": 17, "AFSDB": 18, "SIG": 24, "KEY": 25, "AAAA": 28, "LOC": 29}
TYPES |= {"NXT": 30, "SRV": 33, "ATMA": 34, "NAPTR": 35, "KX": 36, "CERT": 37, "A6": 38, "DNAME": 39, "OPT": 41, "APL": 42}
TYPES |= {"DS": 43, "SSHFP": 44, "IPSECKEY": 45, "RRSIG": 46, "NSEC": 47, "DNSKEY": 48, "DHCID": 49, "NSEC3": 50, "TLSA": 52}
TYPES |= {"NSEC3PARAM": 51, "HIP": 55, "CDS": 59, "CDNSKEY": 60, "SVCB": 64, "HTTPS": 65, "SPF": 99, "TKEY": 249, "TSIG": 250}
TYPES |= {"IXFR": 251, "AXFR": 252, "MAILB": 253, "MAILA": 254, "ANY": 255, "URI": 256, "CAA": 257}
RCODES = {"NOERROR": 0, "FORMERR": 1, "SERVFAIL": 2, "NXDOMAIN": 3, "NOTIMP": 4, "REFUSED": 5, "YXDOMAIN": 6, "YXRRSET": 7}
RCODES |= {"NXRRSET": 8, "NOTAUTH": 9, "NOTZONE": 10, "BADVERS": 16, "BADSIG": 16, "BADKEY": 17, "BADTIME": 18}


@dataclass(frozen=True, slots=True)
class DnsBatch:
    r"""Columns of n rows in the order of the input; see the module for what a row is.

    Addresses as in ``PacketBatch``. ``client`` asked and ``server`` answers, whichever of them sent the message; ``port`` is
    the server's. ``name`` is the first question's, in lower case, labels joined by dots without one at the end, "." for the
    root and "" where the row has none; bytes other than printable ASCII are written ``\DDD`` (RFC 4343), so that it is safe
    to show, and ``name_length`` is its length without that. What the origin cannot tell is 0.
    """

    ts_us: npt.NDArray[np.int64]  # microseconds since 1970, of the message
    client: npt.NDArray[np.uint8]  # [n, 16]
    server: npt.NDArray[np.uint8]  # [n, 16]
    port: npt.NDArray[np.uint16]
    protocol: npt.NDArray[np.uint8]  # 17 UDP, 6 TCP
    asked: npt.NDArray[np.bool_]  # the row tells of a question
    rcode: npt.NDArray[np.int16]  # of the answer it tells of, ``NO_ANSWER`` if of none
    qtype: npt.NDArray[np.uint16]  # type asked for: 1 A, 16 TXT, 28 AAAA, …; 0 unknown
    answers: npt.NDArray[np.uint16]  # records in the answer section
    size: npt.NDArray[np.uint16]  # bytes of the DNS message; packets only
    name_length: npt.NDArray[np.uint16]  # bytes, 0-255
    name: npt.NDArray[np.object_]  # str

    def __len__(self) -> int:
        return len(self.ts_us)

    def take(self, rows: npt.NDArray[np.intp] | slice) -> DnsBatch:
        """Return the rows chosen by an index array or a slice."""
        return DnsBatch(*(getattr(self, field.name)[rows] for field in fields(self)))


class DnsRow(NamedTuple):
    """One row of a ``DnsBatch``; addresses are 16 bytes."""

    ts_us: int
    client: bytes
    server: bytes
    port: int
    protocol: int
    asked: bool
    rcode: int
    qtype: int
    answers: int
    size: int
    name_length: int
    name: str


def dns_batch(rows: Sequence[DnsRow]) -> DnsBatch:
    """Return the rows as columns."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(DnsRow._fields)
    ts_us, client, server, port, protocol, asked, rcode, qtype, answers, size, name_length, name = columns
    return DnsBatch(
        ts_us=np.array(ts_us, np.int64),
        client=np.frombuffer(b"".join(client), np.uint8).reshape(-1, 16),
        server=np.frombuffer(b"".join(server), np.uint8).reshape(-1, 16),
        port=np.array(port, np.uint16),
        protocol=np.array(protocol, np.uint8),
        asked=np.array(asked, np.bool_),
        rcode=np.array(rcode, np.int16),
        qtype=np.array(qtype, np.uint16),
        answers=np.array(answers, np.uint16),
        size=np.array(size, np.uint16),
        name_length=np.array(name_length, np.uint16),
        name=np.array(name, np.object_),
    )


def qtype_of(text: str) -> int:
    """Return the number of a record type that a log names, 0 if it is none."""
    number = text.upper().removeprefix("TYPE")
    if number.isascii() and number.isdecimal() and len(number) <= 5:
        return int(number) if int(number) < 1 << 16 else 0
    return TYPES.get(text.upper(), 0)


def rcode_of(text: str) -> int:
    """Return the number of an answer's code that a log names, ``NO_ANSWER`` if it is none."""
    if text.isascii() and text.isdecimal() and len(text) <= 4:
        return int(text)
    return RCODES.get(text.upper(), NO_ANSWER)


def logged_name(text: str) -> tuple[int, str]:
    """Return the length and the form of this module of a name as logs write it; one too long to be one is cut."""
    if text == ".":
        return 0, text
    text = text.removesuffix(".")
    name = text.lower()
    if not (name.isascii() and name.isprintable()):
        name = "".join(char if " " < char < "\x7f" else "".join(f"\\{byte:03d}" for byte in char.encode()) for char in name)
    return min(len(text.encode("utf-8", "surrogatepass")), NAME_MAX), name[: 4 * NAME_MAX]
