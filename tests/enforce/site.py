"""Ways for a packet past one host: to the host, through it, and to a container behind its DNAT; probes that say what arrives.

A probe never waits for what must not come: a bystander's packet, sent afterwards on the same way, tells that it did not.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.enforce.namespaces import ATTACKER, BYSTANDER, CONTAINER, HARMLESS, HOST, Lab, command, inside, lab

WAYS = ("to the host", "through it", "behind DNAT")
# A port that policies name and one that they do not; behind DNAT each is 500 higher.
NAMED_PORT, OTHER_PORT = 9_000, 9_001
SOURCES = {"attacker": ATTACKER, "bystander": BYSTANDER, "neighbour": {4: HARMLESS}}
_SILENCE_S = 0.08
_DNAT = "".join(
    f"""
table {family} nat {{
    chain pre {{
        type nat hook prerouting priority dstnat;
        {family} daddr {HOST[version]} meta l4proto {{ tcp, udp }} th dport {{ 9500, 9501 }} dnat to {CONTAINER[version]}
    }}
}}
"""
    for family, version in (("ip", 4), ("ip6", 6))
)


@dataclass
class Site:
    """The namespaces with sockets that are opened when they are first needed."""

    names: Lab
    _sockets: dict[tuple[object, ...], socket.socket] = field(default_factory=dict)

    def close(self) -> None:
        for opened in self._sockets.values():
            opened.close()

    def udp(self, way: str, who: str, *, version: int = 4, port: int = NAMED_PORT, count: int = 1) -> int:
        """Send ``count`` datagrams; return how many arrive."""
        port, to = self._to(way, version, port)
        there = self._listener(way, version, port, socket.SOCK_DGRAM)
        sender, last = self._sender(who, version), self._sender("bystander", version)
        for _ in range(count):
            sender.sendto(b"x", to)
        last.sendto(b"end", to)
        arrived = 0
        while there.recv(16) != b"end":
            arrived += 1
        return arrived

    def udp_back(self, way: str, who: str, *, version: int = 4) -> int:
        """Have the far end send one datagram to ``who``; return how many arrive."""
        port, to = self._to(way, version, NAMED_PORT)
        there = self._listener(way, version, port, socket.SOCK_DGRAM)
        for name in (who, "bystander"):
            # Behind DNAT only an answer gets out.
            self._sender(name, version).sendto(b"hello", to)
            _, address = there.recvfrom(16)
            with contextlib.suppress(PermissionError):
                there.sendto(b"back", address)
        last, receiver = self._sender("bystander", version), self._sender(who, version)
        assert last.recv(16) == b"back"
        if who == "bystander":
            return 1
        receiver.setblocking(False)
        try:
            return min(1, len(receiver.recv(16)))
        except BlockingIOError:
            return 0
        finally:
            receiver.settimeout(5)

    def tcp(self, way: str, who: str, *, version: int = 4, port: int = NAMED_PORT) -> str:
        """Try to connect; return ``open``, ``refused`` or ``silent``: no answer though a bystander had one a moment ago."""
        port, to = self._to(way, version, port)
        self._listener(way, version, port, socket.SOCK_STREAM)
        with contextlib.ExitStack() as stack:
            caller = stack.enter_context(self._caller(who, version))
            caller.connect_ex(to)
            if who != "bystander" and not _is_answered(caller, 0):
                other = stack.enter_context(self._caller("bystander", version))
                other.connect_ex(to)
                assert _is_answered(other, 5)
                if not _is_answered(caller, _SILENCE_S):
                    return "silent"
            assert _is_answered(caller, 5)
            return "open" if caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 else "refused"

    def _caller(self, who: str, version: int) -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        made = inside(self._namespace(who), lambda: socket.socket(family, socket.SOCK_STREAM))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.bind((SOURCES[who][version], 0))
        made.setblocking(False)
        return made

    def ping(self, way: str, who: str) -> int:
        """Send an echo request; return how many answers come."""
        target = HOST[4] if way == "to the host" else CONTAINER[4]
        asked = b"\x08\x00\x00\x00\x00\x01\x00\x01cybermesh"
        mine, last = (self._pinger(name) for name in (who, "bystander"))
        mine.sendto(asked, (target, 0))
        last.sendto(asked, (target, 0))
        last.recv(64)
        if who == "bystander":
            return min(1, len(last.recv(64)))
        return min(1, len(mine.recv(64))) if select.select([mine], [], [], 0)[0] else 0

    def _to(self, way: str, version: int, port: int) -> tuple[int, tuple[str, int]]:
        if way == "behind DNAT":
            port = port + 500
        return port, (CONTAINER[version] if way == "through it" else HOST[version], port)

    def _namespace(self, who: str) -> str:
        return self.names.bystander if who == "bystander" else self.names.attacker

    def _listener(self, way: str, version: int, port: int, kind: int) -> socket.socket:
        namespace = self.names.host if way == "to the host" else self.names.container
        key = (namespace, version, port, kind)
        if key not in self._sockets:
            family, anywhere = (socket.AF_INET, "0.0.0.0") if version == 4 else (socket.AF_INET6, "::")
            opened = inside(namespace, lambda: socket.socket(family, kind))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if version == 6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.settimeout(5)
            opened.bind((anywhere, port))
            if kind == socket.SOCK_STREAM:
                opened.listen(1_024)
            self._sockets[key] = opened
        return self._sockets[key]

    def _sender(self, who: str, version: int) -> socket.socket:
        key = (who, version)
        if key not in self._sockets:
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            opened = inside(self._namespace(who), lambda: socket.socket(family, socket.SOCK_DGRAM))
            opened.settimeout(5)
            opened.bind((SOURCES[who][version], 0))
            self._sockets[key] = opened
        return self._sockets[key]

    def _pinger(self, who: str) -> socket.socket:
        key = (who, "ping")
        if key not in self._sockets:
            opened = inside(self._namespace(who), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP))
            opened.settimeout(5)
            opened.bind((SOURCES[who][4], 0))
            self._sockets[key] = opened
        return self._sockets[key]


def _is_answered(caller: socket.socket, within_s: float) -> bool:
    return bool(select.select([], [caller], [], within_s)[1])


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """Make the namespaces with forwarding, DNAT and the sockets; remove all of it whatever happens."""
    with lab() as names:
        for name in (names.attacker, names.bystander):
            command("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
        words = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        command("ip", "netns", "exec", names.host, "sysctl", "-qw", *words)
        command("ip", "netns", "exec", names.host, "nft", "-f", "-", text=_DNAT)
        made = Site(names)
        try:
            yield made
        finally:
            made.close()
