"""Ways into the tables that execution needs for speed.

Nothing here is state: every value follows from the tables' entries, is kept up to date by ``Draft`` alone, is no part of the
digest, and is made anew when a snapshot is read. Sets are unordered on purpose; whoever walks one sorts it first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import immutables
import orjson

from cybermesh.addresses import UNBLOCKABLE, Network, parse_network
from cybermesh.ledger.records import AnomalyRecord
from cybermesh.ledger.schedule import Schedule

ENTITY = "entity"
VICTIM = "victim"

Subject = tuple[str, str, str]
"""Type, ``ENTITY`` or ``VICTIM``, and who that is: what two sites must agree on. Two sites that see one flood with forged
sources accuse different innocents, but name the same victim."""


class Span(NamedTuple):
    """A network as the integers from its first to its last address: two spans meet by comparing integers."""

    version: int
    first: int
    last: int

    def meets(self, other: Span) -> bool:
        """Return whether the two share an address."""
        return self.version == other.version and self.first <= other.last and other.first <= self.last

    def holds(self, other: Span) -> bool:
        """Return whether every address of ``other`` is in this one."""
        return self.version == other.version and self.first <= other.first and other.last <= self.last


def span_of(network: Network) -> Span:
    """Return the span of a normalised network."""
    return Span(network.version, int(network.network_address), int(network.broadcast_address))


# A prefix that is normalised lies in the IPv4-mapped range never, around it perhaps: then it holds every IPv4 address.
UNBLOCKABLE_SPANS = (*(span_of(network) for _, network in UNBLOCKABLE), Span(6, 0xFFFF << 32, (0xFFFF << 32) + 0xFFFFFFFF))


def spans_of(networks: list[str]) -> tuple[Span, ...]:
    """Return the spans of networks in the texts the tables hold (they were parsed before they got there)."""
    return tuple(span_of(parse_network(text)) for text in networks)


def spans_of_rule(rule_data: bytes) -> tuple[Span, ...]:
    """Return the targets of a rule in the ledger's own canonical form."""
    target = orjson.loads(rule_data)["target"]
    return spans_of([*target.get("ips", ()), *target.get("cidrs", ())])


class Tally(NamedTuple):
    """How much of what is limited one producer holds."""

    references: int = 0
    waiting: int = 0
    pending: int = 0
    deferred: int = 0
    budget_targets: int = 0

    def plus(self, name: str, count: int) -> Tally:
        """Return the tally with ``count`` more (or fewer) of one thing."""
        return self._replace(**{name: getattr(self, name) + count})


@dataclass(frozen=True, slots=True)
class Index:
    """All derived maps. ``due`` holds what gives a receipt when its time comes, ``forget`` what goes without one.

    ``release_ms`` is the block time at which the next deferred policy finds room, None when there is none or only an ending
    can make room.
    """

    instances: immutables.Map[bytes, frozenset[bytes]] = field(default_factory=immutables.Map)
    tallies: immutables.Map[bytes, Tally] = field(default_factory=immutables.Map)
    reports: immutables.Map[Subject, immutables.Map[bytes, AnomalyRecord]] = field(default_factory=immutables.Map)
    missing: immutables.Map[bytes, frozenset[str]] = field(default_factory=immutables.Map)
    pending_on: immutables.Map[Subject, frozenset[str]] = field(default_factory=immutables.Map)
    pending_rules: immutables.Map[bytes, frozenset[str]] = field(default_factory=immutables.Map)
    rules: immutables.Map[bytes, str] = field(default_factory=immutables.Map)
    targets: immutables.Map[str, tuple[Span, ...]] = field(default_factory=immutables.Map)
    deferred: immutables.Map[tuple[int, bytes], Schedule] = field(default_factory=immutables.Map)
    held: immutables.Map[bytes, frozenset[str]] = field(default_factory=immutables.Map)
    protected: tuple[Span, ...] = UNBLOCKABLE_SPANS
    allowed: tuple[Span, ...] = ()
    targets_detectors: int = 0
    targets_operators: int = 0
    release_ms: int | None = None
    due: Schedule = field(default_factory=Schedule)
    forget: Schedule = field(default_factory=Schedule)
