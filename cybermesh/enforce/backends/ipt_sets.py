"""Elements as members of ipset sets: which set holds a match, and the names that say so. Pure.

A *group* is one set and the rule that looks it up. ipset keeps protocols and port ranges less freely than nftables, so:

- a host goes into a ``hash:ip`` set, a host with one port into ``hash:ip,port``, both shared by all policies;
- a protocol, a port range of a prefix, and a rate are not part of a key: they belong to the rule, and there is one group for
  each that is in use. Members end by their timeout; an empty group matches nothing and goes with the next rebuild.

A set's name says everything about its group, so nothing has to be remembered: ``cm`` + generation + effect + side, family and
kind + the service and rate in base 62. ipset allows 31 characters.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

from cybermesh.enforce.rules import PROTOCOL_NUMBERS, Effect, Element, Match, Rate, Shape
from cybermesh.policy import Direction

GENERATIONS: Final = "abcd"
SET_SIZE_MAX: Final = 131_072

_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_NAME: Final = re.compile(r"cm([abcd])-(allow|drop|reject|limit)-([io])([46])([hnp])([0-9A-Za-z]*)")
_SIDES: Final = {Direction.INGRESS: "i", Direction.EGRESS: "o"}
_UNITS_S: Final = (1, 60, 3_600, 86_400)
# Fields of the code at a name's end with their widths in bits, lowest first.
_WIDTHS: Final = (8, 16, 16, 8, 2, 20, 37)
PROTOCOL_NAMES: Final = {number: name for name, number in PROTOCOL_NUMBERS.items()}


class Group(NamedTuple):
    """One set: ``kind`` is ``h`` (hosts), ``p`` (hosts with a port in the key) or ``n`` (prefixes).

    ``protocol``, ``first`` and ``last`` are the rule's (0: any), ``length`` is the prefix whose packets share one rate.
    """

    effect: Effect
    direction: Direction
    version: int
    kind: str
    protocol: int = 0
    first: int = 0
    last: int = 0
    length: int = 0
    rate: Rate | None = None

    @property
    def set_type(self) -> str:
        """What ipset calls this kind."""
        return {"h": "hash:ip", "p": "hash:ip,port", "n": "hash:net"}[self.kind]


def group_of(element: Element) -> Group:
    """Return the group that holds ``element``."""
    match, rate = element.match, element.rate
    side = (match.effect, match.direction, match.version)
    if match.effect is Effect.LIMIT:
        return Group(*side, "n" if match.area else "h", match.protocol, match.first, match.last, match.length, rate)
    if match.area:
        return Group(*side, "n", match.protocol, match.first, match.last)
    if match.shape is Shape.PORT:
        return Group(*side, "p")
    return Group(*side, "h", match.protocol)


def name_of(group: Group, generation: str) -> str:
    """Return the name of a group's set."""
    rate = group.rate
    rated = (0, 0, 0) if rate is None else (_UNITS_S.index(rate.unit_s), rate.burst, rate.packets)
    code = shift = 0
    for value, width in zip((group.protocol, group.first, group.last, group.length, *rated), _WIDTHS, strict=True):
        code |= value << shift
        shift += width
    digits = ""
    while code:
        code, digit = divmod(code, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return f"cm{generation}-{group.effect}-{_SIDES[group.direction]}{group.version}{group.kind}{digits}"


def read_name(name: str) -> tuple[str, Group] | None:
    """Return the generation and the group that a name says, None if it is not ours."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    code = 0
    for digit in parts[6]:
        code = code * len(_DIGITS) + _DIGITS.index(digit)
    values: list[int] = []
    for width in _WIDTHS:
        values.append(code & ((1 << width) - 1))
        code >>= width
    protocol, first, last, length, unit, burst, packets = values
    rate = Rate(packets, _UNITS_S[unit], burst) if packets else None
    direction = next(direction for direction, side in _SIDES.items() if side == parts[3])
    group = Group(Effect(parts[2]), direction, int(parts[4]), parts[5], protocol, first, last, length, rate)
    return parts[1], group


def create(group: Group, name: str) -> str:
    """Return the command that makes a group's set; members without a time of their own end after a second."""
    family = "inet" if group.version == 4 else "inet6"
    return f"create {name} {group.set_type} family {family} timeout 1 maxelem {SET_SIZE_MAX}\n"


def add(element: Element, name: str, now_ms: int) -> str:
    """Return the command that adds or renews a member: whole seconds, rounded down, because a later end is not ours to give."""
    # Zero would mean "for ever".
    seconds = max(1, (element.expires_at_ms - now_ms) // 1_000)
    return f"add {name} {_member(element.match, name)} timeout {seconds}\n"


def delete(element: Element, name: str) -> str:
    """Return the command that removes a member."""
    return f"del {name} {_member(element.match, name)}\n"


def _member(match: Match, name: str) -> str:
    address = ipaddress.IPv4Address(match.base) if match.version == 4 else ipaddress.IPv6Address(match.base)
    text = str(address) if match.length == match.bits else f"{address}/{match.length}"
    parts = _NAME.fullmatch(name)
    assert parts is not None
    return f"{text},{PROTOCOL_NAMES[match.protocol]}:{match.first}" if parts[5] == "p" else text


def read_member(group: Group, text: str) -> Match:
    """Return the match of a member as ``ipset save`` tells it.

    Raises:
        ValueError: It is none of ours.
        KeyError: Its protocol is none of ours.
    """
    protocol, first, last = group.protocol, group.first, group.last
    if group.kind == "p":
        text, _, service = text.partition(",")
        name, _, port = service.partition(":")
        protocol, first = PROTOCOL_NUMBERS[name], int(port)
        last = first
    network = ipaddress.ip_network(text)
    if network.version != group.version or (group.length and network.prefixlen != group.length):
        raise ValueError(text)
    return Match(
        group.effect,
        group.direction,
        group.version,
        int(network.network_address),
        network.prefixlen,
        protocol,
        first,
        last,
        group.kind == "n",
    )
