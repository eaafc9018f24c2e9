"""The table ``inet cybermesh`` as text for nft, and as it comes back from nft's JSON. Pure.

How the table works (measured reasons in ADR 7):

- Every effect is an element with a timeout in a set of its lane. Rules belong to lanes, never to policies, and a lane's set and
  rule are added when its first element comes. So nothing is left when the time is up, and adding a host costs one element.
- Points are in hash sets, areas in interval sets. An interval set is small and is replaced as a whole (flush and add in one
  transaction), which is idempotent whatever was in it; a point is added, deleted and added, which is idempotent too and renews
  the timeout on every kernel.
- Packets are matched before connection tracking (priority raw - 10), so established connections are cut, and traffic to
  containers behind DNAT is covered by the address that arrives.
- A rate limit is a named limit object that a map's element points to; its name is a digest, so it never has to be changed.
- An exception returns from the checks of its own direction only.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import PROTOCOL_NUMBERS, Effect, Element, Lane, Match, Rate, Shape
from cybermesh.policy import Direction

TABLE: Final = "inet cybermesh"
POINTS_MAX: Final = 131_072
# An interval costs two elements of a set's size.
AREAS_MAX: Final = 16_384
PRIORITY: Final = -310

_SIDES: Final = {Direction.INGRESS: "in", Direction.EGRESS: "out"}
_CHAINS: Final = {Direction.INGRESS: "ingress", Direction.EGRESS: "egress"}
_UNITS: Final = {1: "second", 60: "minute", 3_600: "hour", 86_400: "day"}
_NAME: Final = re.compile(r"(allow|drop|reject|limit)_(in|out)([46])_(address|protocol|port)(_area)?")
# Names of sets by what they depend on: there are few, and a hundred thousand elements ask.
_NAMES: Final[dict[tuple[Effect, Direction, int, bool, bool, bool], str]] = {}
_ENDINGS: Final = {
    Effect.DROP: 'counter name "dropped" drop',
    Effect.REJECT: 'counter name "rejected" jump refuse',
    Effect.LIMIT: 'counter name "limited" drop',
    Effect.ALLOW: 'counter name "allowed" return',
}
ALLOW_LANES: Final = tuple(
    Lane(Effect.ALLOW, direction, version, Shape.ADDRESS) for direction in Direction for version in (4, 6)
)

_BASE: Final = f"""\
add table {TABLE}
add counter {TABLE} dropped
add counter {TABLE} rejected
add counter {TABLE} limited
add counter {TABLE} allowed
add chain {TABLE} refuse
add rule {TABLE} refuse meta l4proto tcp reject with tcp reset
add rule {TABLE} refuse reject with icmpx admin-prohibited
add chain {TABLE} ingress
add chain {TABLE} egress
add chain {TABLE} prerouting {{ type filter hook prerouting priority {PRIORITY}; policy accept; }}
add rule {TABLE} prerouting jump ingress
add rule {TABLE} prerouting jump egress
add chain {TABLE} output {{ type filter hook output priority {PRIORITY}; policy accept; }}
add rule {TABLE} output jump egress
"""
REMOVE: Final = f"add table {TABLE}\ndelete table {TABLE}\n"


def set_name(match: Match) -> str:
    """Return the name of the set that holds ``match``."""
    kind = (match.effect, match.direction, match.version, match.protocol != 0, match.first != 0, match.area)
    name = _NAMES.get(kind)
    if name is None:
        name = _NAMES[kind] = _lane_name(match.lane, area=match.area)
    return name


def _lane_name(lane: Lane, *, area: bool) -> str:
    return f"{lane.effect}_{_SIDES[lane.direction]}{lane.version}_{lane.shape}" + ("_area" if area else "")


def define(lane: Lane, *, area: bool) -> str:
    """Return the commands that add a lane's set and the rule that looks it up."""
    name = _lane_name(lane, area=area)
    ip, address = ("ip", "ipv4_addr") if lane.version == 4 else ("ip6", "ipv6_addr")
    key = f"{ip} {'saddr' if lane.direction is Direction.INGRESS else 'daddr'}"
    kind = address
    if lane.shape is not Shape.ADDRESS:
        key, kind = f"{key} . meta l4proto", f"{kind} . inet_proto"
    if lane.shape is Shape.PORT:
        key, kind = f"{key} . th dport", f"{kind} . inet_service"
    size, flags = (AREAS_MAX, "interval,timeout") if area else (POINTS_MAX, "timeout")
    ending = _ENDINGS[lane.effect]
    if lane.effect is Effect.LIMIT:
        collection, lookup = f"add map {TABLE} {name} {{ type {kind} : limit;", f"limit name {key} map @{name}"
    else:
        collection, lookup = f"add set {TABLE} {name} {{ type {kind};", f"{key} @{name}"
    return f"{collection} flags {flags}; size {size}; }}\nadd rule {TABLE} {_CHAINS[lane.direction]} {lookup} {ending}\n"


def rebuild(elements: Collection[Element], now_ms: int) -> tuple[str, frozenset[str]]:
    """Return the commands for a table with exactly ``elements``, and the names of its sets."""
    # nft sends the elements of an interval map that is new in a transaction together with the map: the limit objects must be
    # defined before.
    lines = [REMOVE, _BASE, *_limits(elements)]
    # Exceptions come first in their chains, because the rules of a chain are asked in order.
    names = {_lane_name(lane, area=False): define(lane, area=False) for lane in ALLOW_LANES}
    grouped: dict[str, list[Element]] = {}
    for element in elements:
        if element.expires_at_ms > now_ms:
            grouped.setdefault(set_name(element.match), []).append(element)
    for name, members in grouped.items():
        if name not in names:
            names[name] = define(members[0].match.lane, area=members[0].match.area)
    lines.extend(names.values())
    lines.extend(_add(name, members, now_ms) for name, members in grouped.items())
    return "".join(lines), frozenset(names)


def change(plan: Plan, now_ms: int, present: frozenset[str]) -> tuple[str, frozenset[str]]:
    """Return the commands for ``plan`` on a table whose sets are ``present``, and the names of the sets afterwards."""
    names: dict[str, str] = {}
    for element in plan.wanted():
        name = set_name(element.match)
        if name not in present and name not in names:
            names[name] = define(element.match.lane, area=element.match.area)
    sets = present | names.keys()
    before = [*plan.removes, *(old for old, _ in plan.renewals), *plan.adds]
    areas = (element for _, members in plan.areas for element in members)
    lines = [*_limits((*before, *plan.wanted(), *areas)), *names.values()]
    # What is to go or to be renewed is added first, so that deleting it cannot fail; its old end never matters.
    for name, points in _points(before):
        if name in sets:
            lines.extend((_add(name, points, now_ms), _delete(name, points)))
    lines.extend(_add(name, points, now_ms) for name, points in _points(plan.wanted()))
    for lane, members in plan.areas:
        name = _lane_name(lane, area=True)
        if name not in sets:
            continue
        lines.append(f"flush {'map' if lane.effect is Effect.LIMIT else 'set'} {TABLE} {name}\n")
        if members:
            lines.append(_add(name, members, now_ms))
    return "".join(lines), frozenset(sets)


def _points(elements: Iterable[Element]) -> Iterator[tuple[str, list[Element]]]:
    grouped: dict[str, list[Element]] = {}
    for element in elements:
        if not element.match.area:
            grouped.setdefault(set_name(element.match), []).append(element)
    yield from grouped.items()


def _add(name: str, elements: Iterable[Element], now_ms: int) -> str:
    # A time of zero would mean "for ever".
    members = ", ".join(
        f"{_key(element.match)} timeout {max(1, element.expires_at_ms - now_ms)}ms{_data(element)}" for element in elements
    )
    return f"add element {TABLE} {name} {{ {members} }}\n"


def _delete(name: str, elements: Iterable[Element]) -> str:
    return f"delete element {TABLE} {name} {{ {', '.join(_key(element.match) for element in elements)} }}\n"


def _data(element: Element) -> str:
    return "" if element.rate is None else f' : "{_limit_name(element)}"'


def _limit_name(element: Element) -> str:
    named = "|".join(str(part) for part in (*element.match, *(element.rate or ())))
    return "l" + hashlib.sha256(named.encode()).hexdigest()[:16]


def _limits(elements: Iterable[Element]) -> Iterator[str]:
    for element in dict.fromkeys(element._replace(expires_at_ms=0) for element in elements if element.rate is not None):
        if element.rate is not None:
            rate = element.rate
            speed = f"{rate.packets}/{_UNITS[rate.unit_s]} burst {rate.burst} packets"
            yield f"add limit {TABLE} {_limit_name(element)} {{ rate over {speed} }}\n"


def _key(match: Match) -> str:
    base = match.base
    if match.version == 4:
        text = f"{base >> 24}.{base >> 16 & 255}.{base >> 8 & 255}.{base & 255}"
    else:
        text = str(ipaddress.IPv6Address(base))
    if match.length < match.bits:
        text = f"{text}/{match.length}"
    if match.shape is not Shape.ADDRESS:
        text = f"{text} . {match.protocol}"
    if match.shape is Shape.PORT:
        text = f"{text} . {match.first}" + (f"-{match.last}" if match.last != match.first else "")
    return text


@dataclass(slots=True)
class Listing:
    """Our table as nft lists it; ``damage`` is what no edit of elements can mend."""

    elements: dict[Match, Element] = field(default_factory=dict)
    sets: frozenset[str] = frozenset()
    limits: int = 0
    damage: list[str] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)


def read(listing: Mapping[str, Any], now_ms: int) -> Listing:
    """Read nft's JSON of our table; what is in it that we did not put there becomes damage."""
    found = Listing()
    objects = [next(iter(item.items())) for item in listing.get("nftables", ())]
    rates = {body["name"]: _rate(body) for kind, body in objects if kind == "limit"}
    rules: dict[str, list[str]] = {}
    chains: dict[str, Any] = {}
    names: set[str] = set()
    for kind, body in objects:
        if kind in ("set", "map"):
            names.add(body["name"])
            _read_set(body, rates, now_ms, found)
        elif kind == "rule":
            rules.setdefault(body["chain"], []).append(" ".join(_words(body["expr"])))
        elif kind == "chain":
            chains[body["name"]] = (body.get("hook"), body.get("prio"), body.get("policy"))
        elif kind == "counter":
            found.counters[body["name"]] = body["packets"]
    found.sets, found.limits = frozenset(names), len(rates)
    _check_structure(chains, rules, found)
    return found


def _check_structure(chains: Mapping[str, Any], rules: Mapping[str, list[str]], found: Listing) -> None:
    expected_chains = {
        "refuse": (None, None, None),
        "ingress": (None, None, None),
        "egress": (None, None, None),
        "prerouting": ("prerouting", PRIORITY, "accept"),
        "output": ("output", PRIORITY, "accept"),
    }
    if dict(chains) != expected_chains:
        found.damage.append("the chains are not ours alone")
    expected = {
        "refuse": ["l4proto reject", "reject"],
        "prerouting": ["jump ingress", "jump egress"],
        "output": ["jump egress"],
        **{chain: _lane_rules(direction, found.sets) for direction, chain in _CHAINS.items()},
    }
    for chain, ours in expected.items():
        listed = rules.get(chain, [])
        # The order of lanes does not matter, except that exceptions are asked first.
        allows = len(ALLOW_LANES) // 2 if chain in _CHAINS.values() else len(ours)
        if listed[:allows] != ours[:allows] or sorted(listed) != sorted(ours):
            found.damage.append(f"the rules of chain {chain} are not ours alone")


def _lane_rules(direction: Direction, sets: Collection[str]) -> list[str]:
    endings = {"drop": "counter dropped drop", "reject": "counter rejected jump refuse", "allow": "counter allowed return"}
    allows = [_lane_name(lane, area=False) for lane in ALLOW_LANES if lane.direction is direction]
    side, field_name = _SIDES[direction], "saddr" if direction is Direction.INGRESS else "daddr"
    lines: list[str] = []
    for name in (*allows, *sorted(set(sets) - set(allows))):
        parts = _NAME.fullmatch(name)
        if parts is None or parts[2] != side:
            continue
        key = field_name + {"address": "", "protocol": " l4proto", "port": " l4proto dport"}[parts[4]]
        lines.append(f"{key} @{name} {endings.get(parts[1], 'counter limited drop')}")
    return lines


def _words(expression: Any) -> Iterator[str]:
    """Yield what a rule does, in order and in words that do not depend on nft's version."""
    if isinstance(expression, list):
        for item in expression:
            yield from _words(item)
    elif isinstance(expression, dict):
        for key, value in expression.items():
            if key in ("drop", "accept", "return", "reject", "queue", "log", "notrack"):
                yield key
            elif key in ("jump", "goto"):
                yield f"{key} {value['target']}"
            elif key == "counter":
                yield f"counter {value if isinstance(value, str) else '?'}"
            elif key in ("field", "key") and isinstance(value, str):
                yield value
            else:
                yield from _words(value)
    elif isinstance(expression, str) and expression.startswith("@"):
        yield expression


def _read_set(body: Mapping[str, Any], rates: Mapping[str, Rate | None], now_ms: int, found: Listing) -> None:
    parts = _NAME.fullmatch(body["name"])
    if parts is None:
        found.damage.append(f"the set {body['name']} is not ours")
        return
    direction = next(direction for direction, side in _SIDES.items() if side == parts[2])
    lane = Lane(Effect(parts[1]), direction, int(parts[3]), Shape(parts[4]))
    foreign = 0
    for item in body.get("elem", ()):
        key, data = item if isinstance(item, list) else (item, None)
        try:
            member = key["elem"]
            match = _read_key(lane, member["val"], area=parts[5] is not None)
            expires_at_ms = now_ms + 1_000 * int(member["expires"])
        except (KeyError, TypeError, ValueError):
            foreign += 1
            continue
        found.elements[match] = Element(match, expires_at_ms, rates.get(data) if isinstance(data, str) else None)
    if foreign:
        found.damage.append(f"{foreign} elements of {body['name']} are not ours")


def _read_key(lane: Lane, value: Any, *, area: bool) -> Match:
    """Return the match of one listed key; raise KeyError, TypeError or ValueError when it is none of ours."""
    parts = value["concat"] if isinstance(value, dict) and "concat" in value else [value]
    if len(parts) != {Shape.ADDRESS: 1, Shape.PROTOCOL: 2, Shape.PORT: 3}[lane.shape]:
        raise ValueError(parts)
    base, length = _read_address(parts[0])
    protocol = first = last = 0
    if len(parts) > 1:
        protocol = _protocol_number(parts[1])
    if len(parts) > 2:
        first, last = parts[2]["range"] if isinstance(parts[2], dict) else (parts[2], parts[2])
    return Match(
        lane.effect,
        lane.direction,
        lane.version,
        base,
        length,
        protocol,
        int(first),
        int(last),
        area,
    )


def _read_address(address: Any) -> tuple[int, int]:
    if isinstance(address, dict):
        network = ipaddress.ip_network(f"{address['prefix']['addr']}/{address['prefix']['len']}")
        return int(network.network_address), network.prefixlen
    if ":" in address:
        return int(ipaddress.IPv6Address(address)), 128
    # By hand: a set may hold a hundred thousand of them, and nft has written them.
    first, second, third, fourth = address.split(".")
    return int(first) << 24 | int(second) << 16 | int(third) << 8 | int(fourth), 32


def _protocol_number(value: Any) -> int:
    names = PROTOCOL_NUMBERS | {"ipv6-icmp": 58}
    return names[value] if value in names else int(value)


def _rate(body: Mapping[str, Any]) -> Rate | None:
    unit = next((unit for unit, name in _UNITS.items() if name == body.get("per")), None)
    return None if unit is None else Rate(body["rate"], unit, body.get("burst", 0))
