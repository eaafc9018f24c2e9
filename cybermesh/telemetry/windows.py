"""What the windows tell the engines: one row per entity with its counts over the last ``window_s`` seconds of packet time.

Some attacks are visible only across flows, so besides flows the engines score windows. A batch holds one scope, one window
length and one evaluation time. Counts are told from the side of the one who *opened* the connection (``out`` is initiator to
responder), never from the side of the one who happened to send a packet: a server that answers is not a scanner of its clients.

Values a source cannot know are 0 and marked in ``known``; a rule that needs one of them abstains.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class Scope(enum.StrEnum):
    """Whose counts a row holds; the name is the one rules use in ``over``."""

    SOURCE = "source"  # one initiator, everything it opened
    DESTINATION = "destination"  # one responder, everything opened towards it
    PAIR = "pair"  # one initiator towards one responder
    FANOUT = "fanout"  # one initiator on one destination port and protocol, towards everybody
    DOMAIN = "domain"  # one client and one parent domain it asks for names in
    RESOLVER = "resolver"  # one client and one DNS server
    SERVICE = "service"  # one initiator on one port of one responder, established connections only


DNS_SCOPES = frozenset({Scope.DOMAIN, Scope.RESOLVER})  # of DNS messages; the others are of packets and what stands for them

# Integer counts, kept per entity. The comments give unit and meaning; "out" is initiator to responder.
COUNTS = (
    "packets_out",
    "packets_in",
    "bytes_out",  # bytes on the wire
    "bytes_in",
    "payload_out",  # bytes of L4 payload
    "payload_in",
    "tcp_opened",  # TCP connections begun with a SYN (or whose SYN+ACK was the first thing seen)
    "tcp_answered",  # of these, answered by SYN+ACK
    "established",  # of these, completed by the initiator's ACK
    "refused",  # attempts answered by RST or by an ICMP unreachable
    "probes",  # TCP packets that begin nothing: FIN, NULL, Xmas, and bare ACK or FIN+ACK answered by RST
    "syn",  # packets with SYN and without ACK
    "rst_in",
    "rst_out",
    "udp_opened",  # UDP conversations, first packet seen from the initiator
    "udp_answered",
    "udp_out",  # packets
    "echo_opened",  # ICMP echo conversations, one per responder
    "echo_answered",
    "icmp_out",  # packets
    "unreachable",  # ICMP unreachable answers of any kind, refused attempts or not
    "sessions",  # established connections that ended
    "short_sessions",  # of these: a dialogue in both directions, at most 60 s and 16 kB either way (an authentication attempt)
    "empty_sessions",  # of these: nothing said by either side (a connect scan's or a health check's shape)
    "login_failures",  # refusals in clear text: FTP 530, POP3 -ERR, SMTP 535; or failed logins by a service's log
    "login_successes",
    "web_requests",
    "web_errors",  # of these, answered by a status of 400 or more
    "web_refused",  # of these, answered by 401 or 403
    "web_logins",  # requests that send something to a path named like a login form
    "web_exploits",  # requests that carry a known attack pattern (telemetry.web_requests)
    "data_out",  # TCP packets with payload
    "data_in",
    "dns_questions",
    "dns_answers",
    "dns_nxdomain",
    "dns_odd",  # questions for types that carry data and little else: NULL, KEY, private ones
    "dns_data_types",  # questions for these, TXT, CNAME, MX and SRV
    "dns_long",  # questions whose name has 52 bytes or more
    "dns_name_bytes",  # of all names asked for
    "dns_name_bits",  # entropy of their characters below the parent domain, summed
    "dns_answer_bytes",  # of the answers, packets only
    "unasked",  # UDP packets to somebody who sent none in that conversation: answers to a question nobody asked
)

EVENT_COUNTS = frozenset({"login_successes"})  # no packet tells it
DNS_NAMES = frozenset(name for name in COUNTS if name.startswith("dns_")) | {
    "names",
    "nx_domains",
    "name_entropy",
    "name_share",
}

# Derived when a row is emitted.
DERIVED = (
    "attempts",  # tcp_opened + udp_opened + echo_opened + probes
    "unanswered",  # attempts without any answer so far
    "half_open",  # answered by SYN+ACK, never completed
    "failed",  # unanswered + refused
    "ports",  # distinct destination ports attempted
    "peers",  # distinct counterparts attempted or pinged
    "networks",  # distinct /24 (IPv4) or /64 (IPv6) of these
    "port_entropy",  # bits, over packets per destination port
    "peer_entropy",  # bits, over packets per counterpart
    "port_share",  # share of the packets that go to the most used port, 0-1
    "peer_share",  # share of the packets of the most active counterpart, 0-1
    "span_s",  # seconds between the first and the last packet in the window
    "names",  # distinct DNS names
    "nx_domains",  # distinct parent domains answered by NXDOMAIN (RESOLVER only)
    "name_entropy",  # bits, over messages per name
    "name_share",  # share of the messages that are about the most frequent name, 0-1
    "open",  # connections established in the window and not ended in it
    "protocols",  # distinct IP protocols attempted besides TCP, UDP and ICMP
    "company",  # other sources that try about as many ports of the same destination, mostly in vain (PAIR only): decoys
)

NAMES = COUNTS + DERIVED
# Values that take as many packets as they say, at least.
COUNTED = frozenset(name for name in COUNTS if not name.startswith(("bytes_", "payload_", "dns_")))
COUNTED |= {"attempts", "unanswered", "half_open", "failed", "ports", "peers", "networks", "open", "protocols"}
COLUMN = {name: index for index, name in enumerate(NAMES)}


class Service(enum.IntEnum):
    """Authentication service behind a port, from its banner or else from its well-known port, or the one that keeps a log."""

    UNKNOWN = 0
    SSH = 1
    FTP = 2
    TELNET = 3
    SMTP = 4
    POP3 = 5
    IMAP = 6
    RDP = 7
    VNC = 8
    POSTGRESQL = 9
    MYSQL = 10
    HTTP = 11
    SUDO = 12


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Rows of n entities of one scope, evaluated at ``end_us`` over the ``window_s`` seconds before.

    Of the DNS scopes ``source`` is the client; ``peer`` (DOMAIN) or ``destination`` (RESOLVER) the server it asked.

    ``source`` is zero for scope DESTINATION, ``destination`` for SOURCE and FANOUT. ``port`` and ``protocol`` are part of the
    key for FANOUT and SERVICE, else those of most packets (0: none). ``peer`` is the counterpart with the most attempts (the
    victim for SOURCE and FANOUT, the top attacker for DESTINATION, zero for PAIR and SERVICE). ``last_us`` is the time of the
    newest packet counted: the decisive one when this row crosses a threshold. ``values`` is float64[n, len(NAMES)], finite.
    """

    scope: Scope
    window_s: int
    end_us: int
    source: npt.NDArray[np.uint8]  # [n, 16]
    destination: npt.NDArray[np.uint8]  # [n, 16]
    port: npt.NDArray[np.uint16]
    protocol: npt.NDArray[np.uint8]
    service: npt.NDArray[np.uint8]  # Service
    peer: npt.NDArray[np.uint8]  # [n, 16]
    first_us: npt.NDArray[np.int64]
    last_us: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    known: npt.NDArray[np.bool_]  # [len(NAMES)]
    domain: npt.NDArray[np.object_] | None = None  # str, of scope DOMAIN

    def __len__(self) -> int:
        return len(self.first_us)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Values of one name of ``NAMES``, float64[n]."""
        column: npt.NDArray[np.float64] = self.values[:, COLUMN[name]]
        return column
