"""Windows over what others report: flows of other meters, and events of logs. The same rows as from packets, with a mask.

``FlowWindows`` reads a flow as one connection that its first sender opened; what became of it follows from its packets: none
back is unanswered, one or two without payload is refused, anything more was established. The time is the flow's end, since
that is when it is reported. ``EventWindows`` counts logins and web requests per source, and logins per source, service and
the host that keeps the log.

Values that reports cannot tell are 0 and masked, so rules that need them abstain. Memory is bounded as that of ``windows``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import packets
from cybermesh.telemetry.events import EventBatch, EventKind, Outcome
from cybermesh.telemetry.features import COLUMN as FEATURE
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.web_requests import Web, request_mark
from cybermesh.telemetry.windows import COLUMN, COUNTS, DNS_NAMES, DNS_SCOPES, EVENT_COUNTS, NAMES, Scope, WindowBatch
from cybermesh.telemetry.windows_connections import SHORT_SESSION_BYTES, SHORT_SESSION_US, Rows, service_of
from cybermesh.telemetry.windows_rows import KINDS, window_rows
from cybermesh.telemetry.windows_sliding import CAPACITY, ITEMS_MAX, LOG_MAX, additions
from cybermesh.telemetry.windows_table import Additions, Overflow, SlidingTable
from cybermesh.telemetry.windows_timeline import Timeline

_I64 = npt.NDArray[np.int64]
_AT = {name: index for index, name in enumerate(COUNTS)}
_REFUSED_PACKETS = 2  # SYN and RST, each way at most once more
_HOST = slice(35, 40)  # of a key: digest of the host that keeps a log, which has no address

_FLOW_COUNTS: tuple[str, ...] = ("packets_out", "packets_in", "tcp_opened", "tcp_answered", "established", "refused")
_FLOW_COUNTS += ("udp_opened", "udp_answered", "udp_out", "icmp_out", "echo_opened", "echo_answered")
_FLOW_BYTES = ("payload_out", "payload_in", "sessions", "short_sessions", "empty_sessions")
_FLOW_DERIVED: tuple[str, ...] = ("attempts", "unanswered", "half_open", "failed", "ports", "peers", "networks", "span_s")
_FLOW_DERIVED += ("port_entropy", "peer_entropy", "port_share", "peer_share", "company")
_EVENT_KNOWN: tuple[str, ...] = (
    "login_failures",
    "login_successes",
    "web_requests",
    "web_errors",
    "web_refused",
    "web_logins",
    "web_exploits",
)
_EVENT_KNOWN += ("established", "span_s")
_NOT_OF_ITEMS = frozenset(_EVENT_KNOWN)
_ECHO_TYPES = (8, 128)  # requests of ICMP and ICMPv6


class Tables:
    """Sliding tables of several scopes, fed in order of time, with the mask of what is known in them."""

    def __init__(self, wanted: Mapping[Scope, tuple[int, ...]], known: frozenset[str], capacity: int) -> None:
        self._own = np.isin(NAMES, sorted(known & (DNS_NAMES | EVENT_COUNTS | _NOT_OF_ITEMS)))
        self._timeline = Timeline()
        self._part_max = max(1, capacity // 4)  # so that a table has room for what is new in a part
        self.tables = {
            scope: SlidingTable(tuple(sorted(set(windows_s))), len(KINDS[scope]), capacity, ITEMS_MAX, LOG_MAX)
            for scope, windows_s in wanted.items()
            if windows_s
        }
        self.known = np.array([name in known for name in NAMES])
        self._hop: int | None = None
        self._newest_us = 0

    def hops(self, times_us: _I64) -> tuple[list[tuple[int, slice]], _I64]:
        """Return the hops of times in order, each in one part or more, and the times as far as they are believed."""
        hops, believed = self._timeline.place(times_us)
        ends = [*(np.nonzero(np.diff(hops))[0] + 1).tolist(), len(hops)]
        parts = [
            (int(hops[at]), slice(at, min(end, at + self._part_max)))
            for start, end in zip([0, *ends], ends, strict=False)
            for at in range(start, end, self._part_max)
        ]
        return parts, believed

    def enter(self, hop: int, newest_us: int) -> list[WindowBatch]:
        """Begin a hop; return the rows of the one that ended with it."""
        rows = self.end() if self._hop is not None and hop != self._hop else []
        if hop != self._hop:
            for table in self.tables.values():
                table.advance(hop)
        self._hop, self._newest_us = hop, newest_us
        return rows

    def end(self) -> list[WindowBatch]:
        """Return the rows of what was added since the last call."""
        return self._emit({scope: table.take_touched() for scope, table in self.tables.items()})

    def prompt(self) -> list[WindowBatch]:
        """Return the rows of entities that grew by a quarter since they were last returned."""
        return self._emit({scope: table.take_grown() for scope, table in self.tables.items()})

    def _emit(self, slots: Mapping[Scope, _I64]) -> list[WindowBatch]:
        found = []
        for scope, table in self.tables.items():
            for window in range(len(table.windows_s)):
                if len(slots[scope]):
                    rows = window_rows(table, scope, window, slots[scope], self._newest_us)
                    known = self.known & (rows.known | self._own)
                    found.append(replace(rows, known=known, values=np.where(known, rows.values, 0.0)))
        return found


class FlowWindows:
    """Windows over flows that other meters report; the mask is that of the first batch, and shrinks with later ones'."""

    def __init__(self, wanted: Mapping[Scope, tuple[int, ...]], capacity: int = CAPACITY) -> None:
        wanted = {scope: lengths for scope, lengths in wanted.items() if scope not in DNS_SCOPES}
        self._tables = Tables(wanted, frozenset({*_FLOW_COUNTS, *_FLOW_BYTES, *_FLOW_DERIVED}), capacity)

    @property
    def overflow(self) -> Mapping[Scope, Overflow]:
        """What each scope's bounds made it forget."""
        return {scope: table.overflow for scope, table in self._tables.tables.items()}

    def update(self, flows: FlowBatch) -> list[WindowBatch]:
        """Count a batch; return the rows of every second that ended with it. Flows without addresses are left out."""
        flows = flows.take(np.nonzero(flows.src.any(axis=1) & flows.dst.any(axis=1))[0])
        if len(flows) == 0 or not (flows.known[FEATURE["tot_fwd_pkts"]] and flows.known[FEATURE["tot_bwd_pkts"]]):
            return []
        if not all(flows.known[FEATURE[name]] for name in ("flow_duration", "totlen_fwd_pkts", "totlen_bwd_pkts")):
            self._tables.known[[COLUMN[name] for name in _FLOW_BYTES]] = False
        found: list[WindowBatch] = []
        parts, end_us = self._tables.hops(flows.end_us)
        flows = replace(flows, end_us=end_us, start_us=np.minimum(flows.start_us, end_us))
        for hop, part in parts:
            chosen = flows.take(part)
            found += self._tables.enter(hop, int(chosen.end_us.max()))
            rows = _connections(chosen)
            for scope, table in self._tables.tables.items():
                of_scope = np.nonzero(rows.established)[0] if scope is Scope.SERVICE else np.arange(len(rows))
                table.add(hop, additions(scope, rows, of_scope))
        return found

    def prompt(self) -> list[WindowBatch]:
        """Return the rows of entities that grew, without waiting for the second to end."""
        return self._tables.prompt()

    def finish(self) -> list[WindowBatch]:
        """End the current second; call it when the input has ended."""
        return self._tables.end()


class EventWindows:
    """Windows over the logins and web requests that logs report, for scopes SOURCE and SERVICE."""

    def __init__(self, wanted: Mapping[Scope, tuple[int, ...]], capacity: int = CAPACITY) -> None:
        self.without_source = 0  # events that name no address, as those of sudo
        chosen: dict[Scope, tuple[int, ...]] = {
            scope: lengths for scope, lengths in wanted.items() if scope in (Scope.SOURCE, Scope.SERVICE)
        }
        self._tables = Tables(chosen, frozenset(_EVENT_KNOWN), capacity)

    def update(self, events: EventBatch) -> list[WindowBatch]:
        """Count a batch; return the rows of every second that ended with it."""
        counted = np.isin(events.kind, (EventKind.LOGIN, EventKind.WEB))
        named = events.source.any(axis=1)
        self.without_source += int((counted & ~named).sum())
        events = events.take(np.nonzero(counted & named)[0])
        if len(events) == 0:
            return []
        found: list[WindowBatch] = []
        parts, ts_us = self._tables.hops(events.ts_us)
        events = replace(events, ts_us=ts_us)
        for hop, part in parts:
            chosen = events.take(part)
            found += self._tables.enter(hop, int(chosen.ts_us.max()))
            for scope, table in self._tables.tables.items():
                table.add(hop, _event_additions(scope, chosen))
        return found

    def prompt(self) -> list[WindowBatch]:
        """Return the rows of entities that grew, without waiting for the second to end."""
        return self._tables.prompt()

    def finish(self) -> list[WindowBatch]:
        """End the current second; call it when the input has ended."""
        return self._tables.end()


def _connections(flows: FlowBatch) -> Rows:
    """Return flows as connections with what became of them."""

    def feature(name: str) -> _I64:
        return flows.features[:, FEATURE[name]].astype(np.int64)

    out, back = feature("tot_fwd_pkts"), feature("tot_bwd_pkts")
    sent, received = feature("totlen_fwd_pkts"), feature("totlen_bwd_pkts")
    tcp, udp = flows.klass == packets.TCP, flows.klass == packets.UDP
    echo = (flows.klass == packets.ICMP) & np.isin(flows.icmp_type, _ECHO_TYPES)
    answered = back > 0
    refused = tcp & answered & (out <= _REFUSED_PACKETS) & (back <= _REFUSED_PACKETS) & (sent + received == 0)
    established = tcp & answered & ~refused
    dialogue = established & (sent > 0) & (received > 0)
    short = dialogue & (feature("flow_duration") <= SHORT_SESSION_US)
    short &= (sent <= SHORT_SESSION_BYTES) & (received <= SHORT_SESSION_BYTES)
    counts = np.zeros((len(flows), len(COUNTS)), np.int64)
    for name, values in (
        ("packets_out", out),
        ("packets_in", back),
        ("payload_out", sent),
        ("payload_in", received),
        ("tcp_opened", tcp),
        ("tcp_answered", established),
        ("established", established),
        ("refused", refused),
        ("udp_opened", udp),
        ("udp_answered", udp & answered),
        ("udp_out", np.where(udp, out, 0)),
        ("icmp_out", np.where(flows.klass == packets.ICMP, out, 0)),
        ("echo_opened", echo),
        ("echo_answered", echo & answered),
        ("sessions", established),
        ("short_sessions", short),
        ("empty_sessions", established & (sent == 0) & (received == 0)),
    ):
        counts[:, _AT[name]] = values
    return Rows(
        initiator=flows.src,
        responder=flows.dst,
        port=flows.dport,
        proto=flows.proto,
        service=np.where(tcp, service_of(flows.dport), 0).astype(np.uint8),
        established=established,
        attempt=(tcp | udp | echo).astype(np.int64),
        counts=counts,
        first_us=flows.start_us,
        last_us=flows.end_us,
    )


def _event_additions(scope: Scope, events: EventBatch) -> Additions:
    """Return what one second's events add to a scope's table. Their number stands in for packets, which the table wants."""
    if scope is Scope.SERVICE:
        events = events.take(np.nonzero(events.kind == EventKind.LOGIN)[0])
    keys = np.zeros((len(events), 40), np.uint8)
    keys[:, :16] = events.source
    if scope is Scope.SERVICE:
        keys[:, 16:32] = events.destination
        keys[:, 32], keys[:, 33] = events.port >> np.uint16(8), events.port & np.uint16(0xFF)
        keys[:, 34] = events.protocol
        if len(events):
            keys[:, _HOST] = np.stack([np.frombuffer(_host_digest(host), np.uint8) for host in events.host.tolist()])
    login, web = events.kind == EventKind.LOGIN, events.kind == EventKind.WEB
    asked = np.array([request_mark(text.encode()) if is_web else 0 for text, is_web in zip(events.text, web, strict=True)], int)
    counts = np.zeros((len(events), len(COUNTS)), np.int64)
    for name, chosen in (
        ("packets_out", login | web),
        ("established", login | web),  # who is in a service's log has shaken hands with it
        ("login_failures", login & (events.outcome == Outcome.FAILURE)),
        ("login_successes", login & (events.outcome == Outcome.SUCCESS)),
        ("web_requests", web),
        ("web_errors", web & (events.status >= 400)),
        ("web_refused", web & np.isin(events.status, (401, 403))),
        ("web_logins", web & ((asked & Web.LOGIN) != 0)),
        ("web_exploits", web & ((asked & Web.EXPLOIT) != 0)),
    ):
        counts[:, _AT[name]] = np.where(chosen, events.count, 0)
    nothing = np.zeros((len(events), 16), np.uint8)
    return Additions(
        keys=keys,
        items=tuple(nothing for _ in KINDS[scope]),
        attempts=np.zeros(len(events), np.int64),
        packets=np.zeros(len(events), np.int64),
        counts=counts,
        service=events.service,
        first_us=events.ts_us,
        last_us=events.ts_us,
    )


@functools.lru_cache(maxsize=4096)
def _host_digest(host: str) -> bytes:
    return hashlib.blake2b(host.encode("utf-8", "replace"), digest_size=5).digest()
