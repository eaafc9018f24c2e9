"""Zeek's conn and dns logs, as tab separated values or JSON: flows, and DNS questions with their answers.

A connection's packets, payload bytes and duration are known, nothing else of the 79 features. Zeek leaves duration and bytes
out of a connection with a single packet: it lasted no time, and its payload follows from its length with the IP header (without
options; a lone TCP segment is taken for one without payload). Elsewhere what is unset is unknown, and masked.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import orjson

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.dns import NO_ANSWER, DnsRow, dns_batch, logged_name
from cybermesh.telemetry.event_rows import packed
from cybermesh.telemetry.flow_rows import Counted, Ends, counted_flows
from cybermesh.telemetry.sources import Batch, SourceError

NOT_JSON = "not a JSON object"
WRONG_WIDTH = "wrong number of columns"
OTHER_LOG = "record of another log"
BROKEN = "address, port or time cannot be read"

PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmp6": 58, "ipv6-icmp": 58, "sctp": 132, "gre": 47, "esp": 50, "ah": 51}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_NEEDED = frozenset({"ts", "id.orig_h", "id.orig_p", "id.resp_h", "id.resp_p", "proto"})
_KINDS = {"conn": frozenset({"conn_state", "missed_bytes"}), "dns": frozenset({"query", "rejected"})}  # only they have these
_FIRST_LINES = 16
_HEADERS = {4: 20 + 8, 6: 40 + 8}  # bytes of IP and of UDP or ICMP
_PORTS = 1 << 16
_MAPPED = bytes(10) + b"\xff\xff"  # how packed IPv4 addresses begin
_RCODES = 1 << 12  # with the bits of EDNS (RFC 6891)

Record = Mapping[str, object]


class ZeekDecoder:
    """Lines of conn.log or dns.log to flows or DNS rows; a log that changes its columns in the middle says so itself."""

    def __init__(self) -> None:
        self._separator = b"\t"
        self._unset = {b"-", b"(empty)"}
        self._fields: list[str] = []
        self._path = ""
        self._kind = ""

    def begin(self, name: str, beginning: bytes, modified_s: float | None) -> None:
        """Recognise the format by its first lines.

        Raises:
            SourceError: It is not a conn or dns log of Zeek.
        """
        del modified_s
        self._separator, self._fields, self._path = b"\t", [], ""
        for line in beginning.split(b"\n"):
            if not line.startswith(b"#"):
                break
            self._directive(line.rstrip(b"\r"))
        kind = self._path or _first_kind(beginning)
        if kind not in _KINDS or (self._path and not set(self._fields) >= _NEEDED):
            what = f"is Zeek's {kind}.log" if kind and kind not in _KINDS else "is not a log of Zeek"
            raise SourceError(f"{name}: {what}; give its conn.log or dns.log, as TSV or JSON")
        self._kind = kind

    def decode(self, lines: Sequence[bytes], counters: Counters) -> list[Batch]:
        """Return the records as batches: the flows, cut where their masks differ, then the DNS rows."""
        flows: list[tuple[Ends, Counted]] = []
        asked: list[DnsRow] = []
        for line in lines:
            line = line.rstrip(b"\r")
            if not line:
                continue
            if line.startswith(b"#"):
                self._directive(line)
                continue
            counters.packets += 1
            found = self._read(line)
            if isinstance(found, str):
                counters.skip(found)
            elif isinstance(found, DnsRow):
                asked.append(found)
            else:
                flows.append(found)
        counters.metered += len(flows) + len(asked)
        return [*flow_batches(flows), *([dns_batch(asked)] if asked else [])]

    def _directive(self, line: bytes) -> None:
        """Take note of a header line."""
        key, _, value = line.partition(b" ") if line.startswith(b"#separator") else line.partition(self._separator)
        if key == b"#separator":
            text = value.decode("ascii", "replace").removeprefix("\\x")
            self._separator = bytes([int(text, 16)]) if len(text) == 2 and _is_hex(text) else b"\t"
        elif key == b"#path":
            self._path = value.decode("utf-8", "replace")
        elif key == b"#fields":
            self._fields = value.decode("utf-8", "replace").split(self._separator.decode("latin-1"))
        elif key in {b"#unset_field", b"#empty_field"}:
            self._unset.add(value)

    def _read(self, line: bytes) -> tuple[Ends, Counted] | DnsRow | str:
        if line[:1] == b"{":
            record = _object(line)
            return NOT_JSON if record is None else _record(record, _kind(record) or self._kind)
        if not self._fields:
            return NOT_JSON
        cells = line.split(self._separator)
        if len(cells) != len(self._fields):
            return WRONG_WIDTH
        values: dict[str, object] = {
            name: cell.decode("utf-8", "replace")
            for name, cell in zip(self._fields, cells, strict=True)
            if cell not in self._unset
        }
        return _record(values, self._path)


def flow_batches(flows: Sequence[tuple[Ends, Counted]]) -> list[Batch]:
    """Return flows as batches, in their order: one mask each."""
    runs = itertools.groupby(flows, key=lambda flow: flow[1].lacking)
    return [counted_flows(*zip(*run, strict=True)) for _, run in runs]


def integer(value: object) -> int | None:
    """Return a whole number of JSON or text, None for anything else."""
    if isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdecimal():
        return int(value)
    return value if type(value) is int else None


def sound(ends: Ends | None, counted: Counted | None) -> tuple[Ends, Counted] | None:
    """Return both if they can be a flow's."""
    if ends is None or counted is None or not counted.is_sound:
        return None
    return ends, counted


def port(value: object) -> int | None:
    """Return a port (or an ICMP number in its place), None for anything else."""
    number = integer(value)
    return number if number is not None and 0 <= number < _PORTS else None


def _record(record: Record, kind: str) -> tuple[Ends, Counted] | DnsRow | str:
    reader = _READERS.get(kind)
    if reader is None:
        return OTHER_LOG
    found = reader(record)
    return BROKEN if found is None else found


def _kind(record: Record) -> str:
    """Return which log a JSON record is of, empty if it does not tell."""
    path = record.get("_path")
    if isinstance(path, str):
        return path
    return next((kind for kind, keys in _KINDS.items() if not keys.isdisjoint(record)), "")


def _first_kind(beginning: bytes) -> str:
    """Return which log a file of JSON records is of; some of its first lines may be damaged or tell nothing."""
    records = map(_object, beginning.split(b"\n", _FIRST_LINES)[:_FIRST_LINES])
    kinds = [_kind(record) for record in records if record is not None]
    return next((kind for kind in kinds if kind in _KINDS), next(filter(None, kinds), ""))


def _conn(record: Record) -> tuple[Ends, Counted] | None:
    ends, start_us = _ends(record), _microseconds(record.get("ts"))
    if ends is None or start_us is None:
        return None
    packets = integer(record.get("orig_pkts")), integer(record.get("resp_pkts"))
    single = None not in packets and sum(number or 0 for number in packets) <= 1
    duration = _microseconds(record.get("duration", 0.0 if single else None))
    sizes = (_payload(record, side, ends, single=single) for side in ("orig", "resp"))
    return sound(ends, Counted(start_us, duration, *packets, *sizes))


def _payload(record: Record, side: str, ends: Ends, *, single: bool) -> int | None:
    """Return the payload bytes of one side, None where they are not known."""
    if f"{side}_bytes" in record or not single:
        return integer(record.get(f"{side}_bytes"))
    if ends.proto == PROTOCOLS["tcp"] or not integer(record.get(f"{side}_pkts")):
        return 0
    whole = integer(record.get(f"{side}_ip_bytes"))
    if whole is None or ends.proto not in {PROTOCOLS["udp"], PROTOCOLS["icmp"], PROTOCOLS["icmp6"]}:
        return None
    return max(0, whole - _HEADERS[4 if ends.src[:12] == _MAPPED else 6])


def _dns(record: Record) -> DnsRow | None:
    """Read a question with its answer, if there was one."""
    ends, ts_us = _ends(record), _microseconds(record.get("ts"))
    query, rcode, kind = record.get("query", ""), integer(record.get("rcode")), integer(record.get("qtype"))
    if ends is None or ts_us is None or not isinstance(query, str):
        return None
    answers = record.get("answers", ())
    count = answers.count(",") + 1 if isinstance(answers, str) else len(answers) if isinstance(answers, Sequence) else 0
    return DnsRow(
        ts_us,
        ends.src,
        ends.dst,
        ends.dport,
        ends.proto,
        asked=True,
        rcode=rcode if rcode is not None and 0 <= rcode < _RCODES else NO_ANSWER,
        qtype=kind if kind is not None and 0 <= kind < _PORTS else 0,
        answers=min(count, _PORTS - 1),
        size=0,
        name_length=logged_name(query)[0],
        name=logged_name(query)[1],
    )


def _ends(record: Record) -> Ends | None:
    addresses = [record.get(name) for name in ("id.orig_h", "id.resp_h")]
    src, dst = (packed(address) if isinstance(address, str) else None for address in addresses)
    sport, dport = port(record.get("id.orig_p")), port(record.get("id.resp_p"))
    name = record.get("proto")
    if src is None or dst is None or sport is None or dport is None or not isinstance(name, str):
        return None
    proto = PROTOCOLS.get(name, 0)
    if name == "icmp" and src[:12] != _MAPPED:  # Zeek calls both versions icmp
        proto = PROTOCOLS["icmp6"]
    if proto in {PROTOCOLS["icmp"], PROTOCOLS["icmp6"]}:
        return Ends(src, dst, 0, 0, proto, sport & 0xFF, dport & 0xFF)
    return Ends(src, dst, sport, dport, proto)


def _microseconds(value: object) -> int | None:
    """Return seconds, as a number or text, or an ISO time, in microseconds; None for anything else."""
    try:
        if isinstance(value, str) and "T" in value:
            moment = datetime.datetime.fromisoformat(value)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
            return (moment - _EPOCH) // _MICROSECOND
        seconds = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return round(seconds * 1e6) if abs(seconds) < 1e11 else None


def _object(line: bytes) -> Record | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _is_hex(text: str) -> bool:
    return all(digit in "0123456789abcdefABCDEF" for digit in text)


_READERS: Mapping[str, Callable[[Record], tuple[Ends, Counted] | DnsRow | None]] = {"conn": _conn, "dns": _dns}
