"""Who opened which connection, and what became of it: packets of one hop in, counts per connection out.

Rules:
1. A SYN without ACK names the initiator; a SYN+ACK seen first names its receiver. A connection that was under way when the
   capture began has an initiator by its ports (the side with the service's port answers), and counts as nothing opened.
2. UDP, ICMP and other conversations are opened by the first sender, unless it sends from a service port to a client port, or
   the packet is an answer by its type. They end by 120 s of silence.
3. A handshake is complete when the initiator acknowledges. A refused attempt is one whose first answer is RST or ICMP
   unreachable. Unanswered is what was opened and neither answered nor refused so far; nobody's timer is needed.
4. An attempt is counted once, however often its first packet is repeated; a SYN after the end opens anew.
5. Bounded: a full table forgets the least recently active quarter, connections without a completed handshake first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import packets
from cybermesh.telemetry.packets import ACK, FIN, RST, SYN
from cybermesh.telemetry.web_requests import Web
from cybermesh.telemetry.windows import COUNTS, Service
from cybermesh.telemetry.windows_columns import LOGIN_FAILED, Columns
from cybermesh.telemetry.windows_keys import Slots, as_bytes, group, grown

CAPACITY = 131_072
IDLE_HOPS = 120
SHORT_SESSION_US = 60_000_000
SHORT_SESSION_BYTES = 16_384
_HANDSHAKE_BONUS_HOPS = 600
_FIRST_CLIENT_PORT = 1024
_FIRST_EPHEMERAL_PORT = 32_768  # of Linux, the lowest in wide use
_NEVER = np.iinfo(np.int64).max
_AT = {name: index for index, name in enumerate(COUNTS)}

_PORT_SERVICE = np.zeros(65_536, np.uint8)
for _ports, _service in (
    ((22, 2222), Service.SSH),
    ((21, 990), Service.FTP),
    ((23, 2323), Service.TELNET),
    ((25, 465, 587), Service.SMTP),
    ((110, 995), Service.POP3),
    ((143, 993), Service.IMAP),
    ((3389,), Service.RDP),
    (tuple(range(5900, 5910)), Service.VNC),
):
    _PORT_SERVICE[list(_ports)] = _service


def service_of(ports: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Return the authentication services (``Service``) that usually listen on these TCP ports."""
    services: npt.NDArray[np.uint8] = _PORT_SERVICE[ports]
    return services


# A reply belongs to its request's conversation; the pairs are those of both versions of ICMP.
_REQUEST_OF = np.arange(256, dtype=np.uint8)
for _reply, _request in ((0, 8), (14, 13), (16, 15), (18, 17), (129, 128)):
    _REQUEST_OF[_reply] = _request

_STATE = np.dtype(
    [
        ("known", np.bool_),
        ("b_opened", np.bool_),  # the greater endpoint of the key is the initiator
        ("opened", np.bool_),
        ("answered", np.bool_),
        ("established", np.bool_),
        ("refused", np.bool_),
        ("ended", np.bool_),
        ("heard", np.bool_),  # the responder sent something
        ("asked", np.bool_),  # the initiator sent something
        ("stray", np.bool_),  # began with a bare ACK or FIN+ACK: an RST makes it a probe
        ("service", np.uint8),
        ("packets", np.int64),
        ("payload_out", np.int64),
        ("payload_in", np.int64),
        ("first_us", np.int64),
        ("last_hop", np.int64),
    ]
)

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rows:
    """What n connections did in one hop; ``counts`` is int64[n, len(COUNTS)], ``attempt`` 1 where one began in this hop."""

    initiator: npt.NDArray[np.uint8]  # [n, 16]
    responder: npt.NDArray[np.uint8]  # [n, 16]
    port: npt.NDArray[np.uint16]  # the responder's
    proto: npt.NDArray[np.uint8]
    service: npt.NDArray[np.uint8]
    established: Bools
    attempt: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    first_us: npt.NDArray[np.int64]
    last_us: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_us)


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Packets sorted by connection, in file order within each, and the reductions over it."""

    packets: Columns
    starts: npt.NDArray[np.intp]
    group_of: npt.NDArray[np.intp]
    from_b: Bools  # sent by the greater endpoint of the key

    def total(self, values: npt.NDArray[np.int64] | Bools) -> npt.NDArray[np.int64]:
        sums: npt.NDArray[np.int64] = np.add.reduceat(values.astype(np.int64), self.starts)
        return sums

    def first(self, where: Bools) -> npt.NDArray[np.int64]:
        """Position of each connection's first packet that is marked, ``_NEVER`` if none."""
        found: npt.NDArray[np.int64] = np.minimum.reduceat(np.where(where, np.arange(len(where)), _NEVER), self.starts)
        return found

    def last(self, where: Bools) -> npt.NDArray[np.int64]:
        """Position of each connection's last packet that is marked, -1 if none."""
        found: npt.NDArray[np.int64] = np.maximum.reduceat(np.where(where, np.arange(len(where)), -1), self.starts)
        return found

    def any(self, where: Bools) -> Bools:
        return self.first(where) < _NEVER


class Connections:
    """The table of connections; ``step`` takes packets of one hop."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.evicted = 0
        self._slots = Slots(capacity)
        self._state = np.zeros(1024, _STATE)

    def __len__(self) -> int:
        return len(self._slots)

    def step(self, chunk: Columns) -> Rows:
        """Follow the packets (at least one, all of one hop, at most a quarter of the capacity) and return what they did."""
        keys, from_b = _keys(chunk)
        first, inverse = group(keys)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(first)))
        grouped = _Grouped(chunk.take(order), starts, inverse[order], from_b[order])
        hop = int(chunk.hop[0])
        slots = self._find(as_bytes(keys[first]), hop)
        state = self._state[slots]
        counts = np.zeros((len(first), len(COUNTS)), np.int64)
        _begin(state, grouped, hop)
        out = grouped.from_b == state["b_opened"][grouped.group_of]
        _volumes(state, grouped, out, counts)
        attempt = _tcp(state, grouped, out, counts)
        attempt |= _answers(state, grouped, out, counts)
        _greetings(state, grouped, out, counts)
        _web(grouped, out, counts)
        _sessions(state, grouped, counts)
        state["last_hop"] = hop
        self._state[slots] = state
        return _rows(state, grouped, attempt, counts)

    def _find(self, keys: list[bytes], hop: int) -> npt.NDArray[np.int64]:
        """Return the slots of the keys, new ones with an empty state."""
        slots = self._slots.find(keys)
        missing = np.nonzero(slots < 0)[0]
        if len(missing) == 0:
            return slots
        if len(missing) > self._slots.room:
            self._evict(slots[slots >= 0])
        new = self._slots.insert([keys[row] for row in missing.tolist()])
        self._state = grown(self._state, self._slots.allocated)
        self._state[new] = np.zeros(1, _STATE)
        self._state["last_hop"][new] = hop
        slots[missing] = new
        return slots

    def _evict(self, keep: npt.NDArray[np.int64]) -> None:
        """Forget a quarter of the table, none of ``keep``."""
        used = self._slots.allocated
        rank = self._state["last_hop"][:used] + _HANDSHAKE_BONUS_HOPS * self._state["established"][:used]
        rank[keep] = _NEVER
        rank[~self._state["known"][:used]] = _NEVER  # free already
        victims = np.argsort(rank, kind="stable")[: max(1, self._slots.capacity // 4)].astype(np.int64)
        victims = victims[rank[victims] < _NEVER]
        self._slots.remove(victims)
        self._state["known"][victims] = False
        self.evicted += len(victims)


def _keys(chunk: Columns) -> tuple[npt.NDArray[np.uint8], Bools]:
    """Return uint8[n, 40] keys that are equal in both directions, and which packets the greater endpoint sent."""
    ends = []
    for address, port in ((chunk.src, chunk.sport), (chunk.dst, chunk.dport)):
        end = np.empty((len(chunk), 18), np.uint8)
        end[:, :16] = address
        end[:, 16] = port >> np.uint16(8)
        end[:, 17] = port & np.uint16(0xFF)
        ends.append(end)
    sender, receiver = ends
    from_b = sender.view("S18").reshape(-1) > receiver.view("S18").reshape(-1)
    keys = np.zeros((len(chunk), 40), np.uint8)
    keys[:, :18] = np.where(from_b[:, None], receiver, sender)
    keys[:, 18:36] = np.where(from_b[:, None], sender, receiver)
    keys[:, 36] = chunk.klass
    keys[:, 37] = chunk.proto
    # Neighbour discovery and error messages between two hosts are no part of their pings.
    keys[:, 38] = np.where((chunk.klass == packets.ICMP) & ~chunk.unreachable, _REQUEST_OF[chunk.icmp_type], 0)
    return keys, from_b


def _begin(state: npt.NDArray[np.void], g: _Grouped, hop: int) -> None:
    """Name the initiator of connections that are new, or that begin again."""
    p, head = g.packets, g.starts
    tcp = p.klass[head] == packets.TCP
    syn_at = g.first((p.klass == packets.TCP) & (p.flags & (SYN | ACK) == SYN))
    has_syn = syn_at < _NEVER
    idle = ~tcp & (hop - state["last_hop"] > IDLE_HOPS)
    again = has_syn & (state["ended"] | state["refused"] | ~state["opened"])
    begins = ~state["known"] | idle | again
    if not begins.any():
        return
    state[begins] = np.zeros(1, _STATE)
    state["known"] = True
    lead = np.where(has_syn, np.minimum(syn_at, len(p) - 1), head)
    receiver_opened = ~has_syn & _is_answer(p, head)
    state["b_opened"] = np.where(begins, g.from_b[lead] != receiver_opened, state["b_opened"])
    state["first_us"] = np.where(begins, p.ts_us[lead], state["first_us"])
    bare = (p.payload[head] == 0) & np.isin(p.flags[head] & (FIN | SYN | RST | ACK), (ACK, FIN | ACK))
    # Servers on high ports keep alive and end what a rebooted client has forgotten: only a listener's port is probed.
    to_listener = p.dport[head] < _FIRST_EPHEMERAL_PORT
    state["stray"] |= begins & tcp & bare & to_listener & ~receiver_opened
    port = np.where(state["b_opened"] == g.from_b[head], p.dport[head], p.sport[head])
    state["service"] = np.where(begins, np.where(tcp, _PORT_SERVICE[port], 0), state["service"])


def _is_answer(p: Columns, at: npt.NDArray[np.intp]) -> Bools:
    """Whether the first packet seen of a conversation is an answer, so that its receiver opened it."""
    klass, flags, sport, dport = p.klass[at], p.flags[at], p.sport[at].astype(np.int64), p.dport[at].astype(np.int64)
    from_service = (sport < _FIRST_CLIENT_PORT) & (dport >= _FIRST_CLIENT_PORT)
    tcp = klass == packets.TCP
    # Both ports high: servers listen on the lower one more often than not. A packet without ACK and RST is a probe, no answer.
    lower = (sport >= _FIRST_CLIENT_PORT) & (sport < dport)
    answers_tcp = tcp & ((flags & (SYN | ACK) == SYN | ACK) | ((flags & (SYN | ACK | RST) != 0) & (from_service | lower)))
    answers_udp = (klass == packets.UDP) & from_service
    answers_icmp = (klass == packets.ICMP) & np.isin(p.icmp_type[at], (0, 14, 16, 18, 129))
    answer: Bools = answers_tcp | answers_udp | answers_icmp | p.unreachable[at]
    return answer


def _volumes(state: npt.NDArray[np.void], g: _Grouped, out: Bools, counts: npt.NDArray[np.int64]) -> None:
    p = g.packets
    for name, values in (
        ("packets_out", out),
        ("packets_in", ~out),
        ("bytes_out", p.wire * out),
        ("bytes_in", p.wire * ~out),
        ("payload_out", p.payload * out),
        ("payload_in", p.payload * ~out),
        ("udp_out", out & (p.klass == packets.UDP)),
        ("icmp_out", out & (p.klass == packets.ICMP)),
        ("unreachable", p.unreachable),
    ):
        counts[:, _AT[name]] = g.total(values)
    carries = (p.klass == packets.TCP) & (p.payload > 0)
    counts[:, _AT["data_out"]] = g.total(carries & out)
    counts[:, _AT["data_in"]] = g.total(carries & ~out)
    state["packets"] += counts[:, _AT["packets_out"]] + counts[:, _AT["packets_in"]]
    state["asked"] |= counts[:, _AT["packets_out"]] > 0
    answers = (p.klass == packets.UDP) & ~out & ~p.unreachable
    counts[:, _AT["unasked"]] = np.where(state["asked"], 0, g.total(answers))
    state["heard"] |= counts[:, _AT["packets_in"]] > 0
    state["payload_out"] += counts[:, _AT["payload_out"]]
    state["payload_in"] += counts[:, _AT["payload_in"]]


def _tcp(state: npt.NDArray[np.void], g: _Grouped, out: Bools, counts: npt.NDArray[np.int64]) -> Bools:
    """Follow handshakes; return where an attempt began."""
    p, head = g.packets, g.starts
    is_tcp = p.klass == packets.TCP
    tcp = is_tcp[head]
    bits = p.flags & (FIN | SYN | RST | ACK)
    syn = is_tcp & out & (bits & (SYN | ACK) == SYN)
    reset_in = is_tcp & ~out & (bits & RST != 0)
    synack_at = g.first(is_tcp & ~out & (bits & (SYN | ACK) == SYN | ACK))
    counts[:, _AT["syn"]] = g.total(syn)
    counts[:, _AT["rst_in"]] = g.total(reset_in)
    counts[:, _AT["rst_out"]] = g.total(is_tcp & out & (bits & RST != 0))

    new = state["packets"] == counts[:, _AT["packets_out"]] + counts[:, _AT["packets_in"]]
    opened = tcp & ~state["opened"] & (g.any(syn) | (synack_at < _NEVER))
    answered = tcp & (opened | state["opened"]) & ~state["answered"] & (synack_at < _NEVER)
    state["opened"] |= opened
    done_at = g.last(is_tcp & out & (bits & (SYN | RST | ACK) == ACK))
    # Where only the initiator's direction was captured, acknowledged data shows that there was an answer.
    unheard = state["opened"] & ~state["answered"] & ~answered & ~state["heard"] & (state["payload_out"] > 0)
    before = (state["answered"] & ~answered) | unheard
    completed = (before & (done_at >= 0)) | (answered & (done_at > synack_at))
    established = tcp & state["opened"] & ~state["established"] & completed
    answered |= established & unheard
    state["answered"] |= answered
    state["established"] |= established
    blind = tcp & new & ~state["opened"] & (p.flags[head] & (SYN | RST | ACK) == 0) & out[head]
    strayed = tcp & state["stray"] & ~state["opened"] & g.any(reset_in) & (state["packets"] <= 4)  # each may be captured twice
    state["stray"] &= ~strayed
    probes = blind | strayed
    state["opened"] |= probes
    counts[:, _AT["tcp_opened"]] = opened
    counts[:, _AT["tcp_answered"]] = answered
    counts[:, _AT["established"]] = established
    counts[:, _AT["probes"]] = probes
    attempt: Bools = opened | probes
    return attempt


def _answers(state: npt.NDArray[np.void], g: _Grouped, out: Bools, counts: npt.NDArray[np.int64]) -> Bools:
    """Follow refusals of every protocol, and UDP and echo conversations; return where one of these began."""
    p, head = g.packets, g.starts
    klass = p.klass[head]
    echo = (klass == packets.ICMP) & g.any(out & np.isin(p.icmp_type, (8, 128)) & ~p.unreachable)
    sent = counts[:, _AT["packets_out"]] > 0
    answered_now = counts[:, _AT["packets_in"]] > counts[:, _AT["unreachable"]]
    other = (klass == packets.OTHER) & sent
    begins = ~state["opened"] & (((klass == packets.UDP) & sent) | other | echo)
    state["opened"] |= begins
    loose = (klass == packets.UDP) | (klass == packets.ICMP)
    answered = loose & state["opened"] & ~state["answered"] & answered_now
    state["answered"] |= answered
    no = g.any(p.unreachable & ~out) | ((klass == packets.TCP) & (counts[:, _AT["rst_in"]] > 0))
    refused = state["opened"] & ~state["answered"] & ~state["refused"] & no
    state["refused"] |= refused
    counts[:, _AT["refused"]] = refused
    counts[:, _AT["udp_opened"]] = begins & (klass == packets.UDP)
    counts[:, _AT["echo_opened"]] = begins & echo
    counts[:, _AT["udp_answered"]] = answered & (klass == packets.UDP)
    counts[:, _AT["echo_answered"]] = answered & (klass == packets.ICMP)
    attempt: Bools = begins
    return attempt


def _greetings(state: npt.NDArray[np.void], g: _Grouped, out: Bools, counts: npt.NDArray[np.int64]) -> None:
    """Let the responder's greeting name the service, and count its refusals of logins."""
    mark = g.packets.mark
    if not mark.any():
        return
    failed = (mark & LOGIN_FAILED) != 0
    named = np.maximum.reduceat(np.where(failed | out, 0, mark), g.starts)
    mail = (named == Service.FTP) & (state["service"] == Service.SMTP)
    state["service"] = np.where((named > 0) & ~mail, named, state["service"])
    service = state["service"][g.group_of]
    counts[:, _AT["login_failures"]] = g.total(failed & ~out & ((mark & ~np.uint8(LOGIN_FAILED)) == service))


def _web(g: _Grouped, out: Bools, counts: npt.NDArray[np.int64]) -> None:
    """Count what is asked of a web server in clear text, and how it answers."""
    web = g.packets.web
    if not web.any():
        return
    for name, mark, sent in (
        ("web_requests", Web.REQUEST, out),
        ("web_logins", Web.LOGIN, out),
        ("web_exploits", Web.EXPLOIT, out),
        ("web_errors", Web.ERROR, ~out),
        ("web_refused", Web.REFUSED, ~out),
    ):
        counts[:, _AT[name]] = g.total(((web & mark) != 0) & sent)


def _sessions(state: npt.NDArray[np.void], g: _Grouped, counts: npt.NDArray[np.int64]) -> None:
    """Count established connections whose end (the first FIN, or RST) is in this hop, by their shape."""
    p = g.packets
    end_at = g.first((p.klass == packets.TCP) & (p.flags & (FIN | RST) != 0))
    ended = state["established"] & ~state["ended"] & (end_at < _NEVER)
    took_us = p.ts_us[np.minimum(end_at, len(p) - 1)] - state["first_us"]
    dialogue = (state["payload_out"] > 0) & (state["payload_in"] > 0)
    small = (state["payload_out"] <= SHORT_SESSION_BYTES) & (state["payload_in"] <= SHORT_SESSION_BYTES)
    counts[:, _AT["sessions"]] = ended
    counts[:, _AT["short_sessions"]] = ended & dialogue & small & (took_us <= SHORT_SESSION_US)
    counts[:, _AT["empty_sessions"]] = ended & (state["payload_out"] == 0) & (state["payload_in"] == 0)
    state["ended"] |= ended


def _rows(state: npt.NDArray[np.void], g: _Grouped, attempt: Bools, counts: npt.NDArray[np.int64]) -> Rows:
    p, head = g.packets, g.starts
    out = g.from_b[head] == state["b_opened"]
    return Rows(
        initiator=np.where(out[:, None], p.src[head], p.dst[head]),
        responder=np.where(out[:, None], p.dst[head], p.src[head]),
        port=np.where(out, p.dport[head], p.sport[head]),
        proto=p.proto[head],
        service=state["service"].copy(),
        established=state["established"].copy(),
        attempt=attempt.astype(np.int64),
        counts=counts,
        first_us=np.minimum.reduceat(p.ts_us, g.starts),
        last_us=np.maximum.reduceat(p.ts_us, g.starts),
    )
