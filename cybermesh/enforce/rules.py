"""Rules: what a policy means for one host's packets, in values that no firewall's language has coloured.

A policy becomes *elements*: one packet match, what happens to it, and the absolute time at which that ends. Backends install
elements and nothing else, so every effect ends by itself. The rules:

- A match is a key: two policies that hit the same packets in the same way share one element (``reconcile`` picks its end).
- Matches are grouped in *lanes* (effect, direction, address family, shape). Within a lane a backend needs one set for *points*
  (one address, at most one port) and one for *areas* (prefixes, port ranges), which must not overlap.
- Expiry is absolute and comes from the decision; nothing here knows what time it is.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from cybermesh.addresses import Address, Network, host, is_host
from cybermesh.policy import Action, Direction, PolicySpec, PortRange, RateLimit

PROTOCOL_NUMBERS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "sctp": 132}
_FAMILY_OF_PROTOCOL: Final = {"icmp": 4, "icmpv6": 6}
_RATE_UNITS_S: Final = (1, 60, 3_600, 86_400)


class Effect(enum.StrEnum):
    """What happens to a packet that matches; ``allow`` (an operator's exception) goes before all others."""

    ALLOW = "allow"
    DROP = "drop"
    REJECT = "reject"
    LIMIT = "limit"


class Shape(enum.StrEnum):
    """Which fields a match looks at."""

    ADDRESS = "address"
    PROTOCOL = "protocol"
    PORT = "port"


class Lane(NamedTuple):
    """A group of matches that one pair of sets can hold."""

    effect: Effect
    direction: Direction
    version: int
    shape: Shape


class Match(NamedTuple):
    """Which packets: the address is the source for ingress and the destination for egress, ports are destination ports.

    Integers rather than network objects, because a host may hold 100,000 of them: ``base``/``length`` is the prefix,
    ``protocol`` an IP protocol number (0: any), ``first`` to ``last`` the ports (0: any). ``area`` is true for prefixes
    and port ranges and stays true for whatever they are cut into, so that a piece never changes its set.
    """

    effect: Effect
    direction: Direction
    version: int
    base: int
    length: int
    protocol: int = 0
    first: int = 0
    last: int = 0
    area: bool = False

    @property
    def bits(self) -> int:
        """Length of an address: 32 or 128."""
        return 32 if self.version == 4 else 128

    @property
    def shape(self) -> Shape:
        """Which fields this match looks at."""
        if self.first:
            return Shape.PORT
        return Shape.PROTOCOL if self.protocol else Shape.ADDRESS

    @property
    def lane(self) -> Lane:
        """The group this match belongs to."""
        return Lane(self.effect, self.direction, self.version, self.shape)

    @property
    def network(self) -> Network:
        """The prefix as a network."""
        if self.version == 4:
            return ipaddress.IPv4Network((self.base, self.length))
        return ipaddress.IPv6Network((self.base, self.length))

    def __str__(self) -> str:
        network = self.network
        address = str(network.network_address) if self.length == self.bits else str(network)
        protocol = next((name for name, number in PROTOCOL_NUMBERS.items() if number == self.protocol), str(self.protocol))
        ports = f"/{self.first}" + (f"-{self.last}" if self.last != self.first else "") if self.first else ""
        side = "from" if self.direction is Direction.INGRESS else "to"
        return f"{self.effect} {side} {address}" + (f" {protocol}{ports}" if self.protocol else "")


class Rate(NamedTuple):
    """Packets that may pass: ``packets`` per ``unit_s`` (1, 60, 3,600 or 86,400 seconds) after a burst of ``burst``."""

    packets: int
    unit_s: int
    burst: int

    @property
    def strictness(self) -> tuple[float, int]:
        """Greater is stricter."""
        return -self.packets / self.unit_s, -self.burst


class Element(NamedTuple):
    """One thing to install: a match, its rate (only for ``limit``), and when it ends in milliseconds since 1970."""

    match: Match
    expires_at_ms: int
    rate: Rate | None = None


class Rule(NamedTuple):
    """An element and the policy that wants it; ``rule_id`` is the same on every host and after every restart."""

    policy_id: str
    element: Element

    @property
    def rule_id(self) -> str:
        """A digest of the policy and the match."""
        named = "|".join((self.policy_id, *(str(part) for part in self.element.match)))
        return hashlib.sha256(b"cm/rule/1" + named.encode()).hexdigest()[:16]


_EFFECTS: Final = {Action.DROP: Effect.DROP, Action.REJECT: Effect.REJECT, Action.RATE_LIMIT: Effect.LIMIT}


def make(spec: PolicySpec, networks: Iterable[Network], expires_at_ms: int) -> tuple[Rule, ...]:
    """Return the rules of ``spec`` for the networks that the guard let through (``spec.networks()`` or less).

    ``spec.action`` must not be ``remove``. The order is deterministic and no match appears twice.
    """
    effect = _EFFECTS[spec.action]
    limit = spec.packet_limit()
    rate = None if limit is None else rate_of(limit)
    services = tuple(_services(spec))
    return tuple(
        Rule(spec.policy_id, Element(_match(effect, spec.target.direction, network, protocol, ports), expires_at_ms, rate))
        for network in networks
        for name, protocol, ports in services
        if _FAMILY_OF_PROTOCOL.get(name, network.version) == network.version
    )


def count(spec: PolicySpec) -> int:
    """Return an upper bound for the number of rules of ``spec`` before any splitting of prefixes."""
    return (len(spec.target.ips) + len(spec.target.cidrs)) * sum(1 for _ in _services(spec))


def exception(address: Address, expires_at_ms: int) -> tuple[Rule, ...]:
    """Return the rules that lift every ban of ``address`` on this host, both ways, until ``expires_at_ms``."""
    return tuple(
        Rule(exception_id(address), Element(_match(Effect.ALLOW, direction, host(address), 0, None), expires_at_ms))
        for direction in Direction
    )


def exception_id(address: Address) -> str:
    """Return the name under which an exception's rules are kept; no policy can have it, because it holds a space."""
    return f"exception {address}"


def rate_of(limit: RateLimit) -> Rate:
    """Return the rate as firewalls count, per second, minute, hour or day: exact where a unit is, else rounded down.

    One packet a day is the least, since ``max_actions`` is at least 1 and the window at most a day.
    """
    for unit_s in _RATE_UNITS_S:
        packets, rest = divmod(limit.max_actions * unit_s, limit.window_s)
        if rest == 0 and packets:
            return Rate(packets, unit_s, limit.max_actions)
    return Rate(limit.max_actions * _RATE_UNITS_S[-1] // limit.window_s, _RATE_UNITS_S[-1], limit.max_actions)


def _services(spec: PolicySpec) -> Iterator[tuple[str, int, PortRange | None]]:
    target = spec.target
    # Ports without a protocol mean the two protocols that operators think of.
    names = target.protocols or (("tcp", "udp") if target.ports else ("",))
    for name in names:
        for ports in target.ports or (None,):
            yield name, PROTOCOL_NUMBERS.get(name, 0), ports


def _match(effect: Effect, direction: Direction, network: Network, protocol: int, ports: PortRange | None) -> Match:
    first, last = (0, 0) if ports is None else (ports.first, ports.last)
    area = first != last or not is_host(network)
    return Match(
        effect, direction, network.version, int(network.network_address), network.prefixlen, protocol, first, last, area
    )
