"""Suricata's eve.json: flow records to flows, dns records to DNS rows, alerts to events; everything else in it is passed over.

Suricata counts a flow's bytes on the wire, not its payload, so of the 79 features only packets and times are known.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence

import orjson

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.dns import NO_ANSWER, DnsRow, dns_batch, logged_name, qtype_of, rcode_of
from cybermesh.telemetry.dns import PORT as DNS_PORT
from cybermesh.telemetry.event_rows import EventRow, event_batch, packed
from cybermesh.telemetry.events import EventKind, Outcome
from cybermesh.telemetry.flow_rows import Counted, Ends
from cybermesh.telemetry.sources import Batch, SourceError
from cybermesh.telemetry.sources.zeek import BROKEN, NOT_JSON, PROTOCOLS, flow_batches, integer, port, sound

OTHER_EVENT = "record of another type"

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_FIRST_LINES, _FIRST_BYTES = 16, 1024
_ICMP = frozenset({PROTOCOLS["icmp"], PROTOCOLS["icmp6"]})

Record = Mapping[str, object]


class EveDecoder:
    """Lines of eve.json to flows, DNS rows and events."""

    def begin(self, name: str, beginning: bytes, modified_s: float | None) -> None:
        """Recognise the format by its first lines, of which some may be damaged.

        Raises:
            SourceError: It is not eve.json.
        """
        del modified_s
        records = map(_object, beginning.split(b"\n", _FIRST_LINES)[:_FIRST_LINES])
        cut = (
            beginning.startswith(b'{"timestamp":"') and b'"event_type":"' in beginning[:_FIRST_BYTES]
        )  # a record of statistics
        if not cut and not any(record is not None and isinstance(record.get("event_type"), str) for record in records):
            raise SourceError(f"{name}: is not Suricata's eve.json; give a file with one JSON object on each line")

    def decode(self, lines: Sequence[bytes], counters: Counters) -> list[Batch]:
        """Return the records as batches: flows, then DNS rows, then events."""
        flows: list[tuple[Ends, Counted]] = []
        events: list[EventRow] = []
        asked: list[DnsRow] = []
        for line in lines:
            line = line.strip()
            if not line:
                continue
            counters.packets += 1
            found = _read(line)
            if isinstance(found, str):
                counters.skip(found)
            elif isinstance(found, EventRow):
                events.append(found)
            elif isinstance(found, DnsRow):
                asked.append(found)
            else:
                flows.append(found)
        counters.metered += len(flows) + len(asked) + len(events)
        return [
            *flow_batches(flows),
            *([dns_batch(asked)] if asked else []),
            *([event_batch(events)] if events else []),
        ]


def _read(line: bytes) -> tuple[Ends, Counted] | EventRow | DnsRow | str:
    record = _object(line)
    if record is None:
        return NOT_JSON
    kind = record.get("event_type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        return OTHER_EVENT
    found = reader(record)
    return BROKEN if found is None else found


def _flow(record: Record) -> tuple[Ends, Counted] | None:
    flow = _inner(record, "flow")
    start, end = _microseconds(flow.get("start")), _microseconds(flow.get("end"))
    if start is None:
        return None
    duration = max(0, end - start) if end is not None else None
    packets = (integer(flow.get(name)) for name in ("pkts_toserver", "pkts_toclient"))
    return sound(_ends(record), Counted(start, duration, *packets))


def _dns(record: Record) -> DnsRow | None:
    """Read a question or an answer of any version of the format."""
    ends, ts_us, dns = _ends(record), _microseconds(record.get("timestamp")), _inner(record, "dns")
    if ends is None or ts_us is None:
        return None
    queries = dns.get("queries") or dns.get("query")
    first = queries[0] if isinstance(queries, list) and queries else dns
    query = first if isinstance(first, dict) and "rrname" in first else dns
    name, kind, answers = query.get("rrname", ""), query.get("rrtype", ""), dns.get("answers")
    is_answer = dns.get("type") in {"answer", "response"}
    if ends.sport == DNS_PORT != ends.dport:  # an answer told from the server's side
        ends = ends._replace(src=ends.dst, dst=ends.src, sport=ends.dport, dport=ends.sport)
    length, text = logged_name(name if isinstance(name, str) else "")
    return DnsRow(
        ts_us,
        ends.src,
        ends.dst,
        ends.dport,
        ends.proto,
        asked=not is_answer,
        rcode=rcode_of(str(dns.get("rcode"))) if is_answer else NO_ANSWER,
        qtype=qtype_of(kind) if isinstance(kind, str) else 0,
        answers=min(len(answers), 0xFFFF) if isinstance(answers, list) else 0,
        size=0,
        name_length=length,
        name=text,
    )


def _alert(record: Record) -> EventRow | None:
    ends, ts_us, alert = _ends(record), _microseconds(record.get("timestamp")), _inner(record, "alert")
    signature, severity = alert.get("signature"), integer(alert.get("severity"))
    if ends is None or ts_us is None or not isinstance(signature, str):
        return None
    return EventRow(
        ts_us,
        EventKind.ALERT,
        Outcome.UNKNOWN,
        ends.src,
        ends.dst,
        ends.dport,
        ends.proto,
        status=severity if severity is not None and 0 <= severity < 256 else 0,
        host=_host(record),
        text=signature,
    )


def _ends(record: Record) -> Ends | None:
    addresses = [record.get(name) for name in ("src_ip", "dest_ip")]
    src, dst = (packed(address) if isinstance(address, str) else None for address in addresses)
    sport, dport = port(record.get("src_port", 0)), port(record.get("dest_port", 0))
    name = record.get("proto")
    if src is None or dst is None or sport is None or dport is None or not isinstance(name, str):
        return None
    proto = PROTOCOLS.get(name.lower(), 0)
    if proto in _ICMP:
        kind, code = port(record.get("icmp_type", 0)) or 0, port(record.get("icmp_code", 0)) or 0
        return Ends(src, dst, 0, 0, proto, kind & 0xFF, code & 0xFF)
    return Ends(src, dst, sport, dport, proto)


def _inner(record: Record, name: str) -> Record:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _host(record: Record) -> str:
    host = record.get("host", "")
    return host if isinstance(host, str) else ""


def _microseconds(value: object) -> int | None:
    try:
        moment = datetime.datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    if moment is None:
        return None
    return ((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)) - _EPOCH) // _MICROSECOND


def _object(line: bytes) -> Record | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


_READERS: Mapping[str, Callable[[Record], tuple[Ends, Counted] | EventRow | DnsRow | None]] = {
    "flow": _flow,
    "dns": _dns,
    "alert": _alert,
}
