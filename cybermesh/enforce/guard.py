"""The local guard: the last word about what this host may block, and no message can weaken it.

It exists because a quorum can be wrong about *this* host: it does not know the administrator's session, the gateway, or the
address of the broker. The rules:

- A target that shares an address with a protected network is refused, whichever of the two is the wider one. With
  ``split_around`` a wider target is cut down to what remains beside the protected addresses; hosts are never cut.
- Prefixes wider than the limit, too many targets, too many rules, too fast, too long: refused with the headroom.
- When the surroundings could not be read completely, every new rule is refused: a check that cannot run does not pass.
- The guard only ever takes away. It judges decisions that carry a valid quorum proof exactly like any others.
"""

from __future__ import annotations

import bisect
import enum
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cybermesh.addresses import MAPPED, UNBLOCKABLE, Network, is_host, normalise_network, overlaps
from cybermesh.enforce.rules import count
from cybermesh.policy import PolicySpec

_PIECES_MAX: Final = 512


class Code(enum.StrEnum):
    """Why the guard refuses; sent in the ack's ``error_code``."""

    PROTECTED_TARGET = "PROTECTED_TARGET"
    PREFIX_TOO_WIDE = "PREFIX_TOO_WIDE"
    TOO_MANY_TARGETS = "TOO_MANY_TARGETS"
    TOO_MANY_RULES = "TOO_MANY_RULES"
    TOO_FAST = "TOO_FAST"
    TTL_TOO_LONG = "TTL_TOO_LONG"
    NO_TARGET = "NO_TARGET"
    SURROUNDINGS_UNKNOWN = "SURROUNDINGS_UNKNOWN"


@dataclass(frozen=True, slots=True)
class Limits:
    """This host's own limits; prefix lengths are the widest that pass, times in seconds.

    ``rules_max`` must stay below the size of the kernel's sets, so that the guard speaks before the kernel does.
    """

    prefix_min_v4: int = 24
    prefix_min_v6: int = 64
    targets_max: int = 256
    rules_max: int = 120_000
    rules_per_policy_max: int = 4_096
    rules_per_minute_max: int = 60_000
    ttl_s_max: int = 86_400
    split_around: bool = False


class _Span(NamedTuple):
    """Addresses ``first`` to ``last``, touched by protected networks, and one of those for the message."""

    first: int
    last: int
    reason: str
    network: Network


@dataclass(frozen=True, slots=True)
class Protected:
    """Networks that must not be blocked, each with the reason, and what could not be found out (then nothing passes).

    What nothing may ever block (``UNBLOCKABLE``) is always among them, without being listed.
    """

    networks: tuple[tuple[str, Network], ...] = ()
    problems: tuple[str, ...] = ()
    _spans: dict[int, list[_Span]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_spans", _disjoint_spans(self.all()))

    def all(self) -> tuple[tuple[str, Network], ...]:
        """Return these networks together with those that nothing may ever block."""
        return UNBLOCKABLE + self.networks

    def touching(self, network: Network) -> tuple[str, Network] | None:
        """Return the first protected network that shares an address with ``network``, and its reason."""
        return self.meeting(network.version, int(network.network_address), network.prefixlen)

    def meeting(self, version: int, base: int, length: int) -> tuple[str, Network] | None:
        """Return what ``touching`` does for a prefix in numbers; an IPv4-mapped one must come as IPv4."""
        spans = self._spans[version]
        first = base
        last = first + (1 << (32 if version == 4 else 128) - length) - 1
        # The spans are disjoint and ascending: only the last one that begins in or before the network can reach into it.
        index = bisect.bisect_right(spans, last, key=_first_of) - 1
        if index < 0 or spans[index].last < first:
            return None
        return spans[index].reason, spans[index].network


def _first_of(span: _Span) -> int:
    return span.first


def _disjoint_spans(everything: Iterable[tuple[str, Network]]) -> dict[int, list[_Span]]:
    spans: dict[int, list[_Span]] = {4: [], 6: []}
    # An IPv6 prefix around the IPv4-mapped range holds every IPv4 address, and some of those are always protected.
    for reason, network in (*everything, ("every IPv4 address", MAPPED)):
        plain = normalise_network(network) if network != MAPPED else network
        span = _Span(int(plain.network_address), int(plain.broadcast_address), reason, plain)
        spans[plain.version].append(span)
    for version, found in spans.items():
        joined: list[_Span] = []
        for span in sorted(found, key=_first_of):
            if joined and span.first <= joined[-1].last:
                joined[-1] = joined[-1]._replace(last=max(joined[-1].last, span.last))
            else:
                joined.append(span)
        spans[version] = joined
    return spans


@dataclass(frozen=True, slots=True)
class Load:
    """How full the host is: rules installed now (without this policy's own), and rules added in the last minute."""

    rules: int = 0
    rules_last_minute: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a policy may not be enforced here."""

    code: Code
    detail: str


def judge(spec: PolicySpec, protected: Protected, limits: Limits, load: Load) -> tuple[Network, ...] | Refusal:
    """Return the networks of ``spec`` that may be blocked here (all, or what splitting leaves), or the refusal."""
    if protected.problems:
        return Refusal(Code.SURROUNDINGS_UNKNOWN, "; ".join(protected.problems))
    networks = tuple(normalise_network(network) for network in spec.networks())
    refusal = _too_much(spec, networks, limits, load) or _too_wide(networks, limits)
    if refusal is not None:
        return refusal
    allowed: list[Network] = []
    for network in networks:
        left = _beside(network, protected, split=limits.split_around)
        if isinstance(left, Refusal):
            return left
        allowed.extend(left)
    if not allowed:
        return Refusal(Code.PROTECTED_TARGET, "every address of the target is protected")
    # Splitting multiplies: count again what is really to be installed.
    return _too_many(count(spec) // len(networks) * len(allowed), limits, load) or tuple(allowed)


def hits_prefix(version: int, base: int, length: int, protected: Protected, limits: Limits) -> Code | None:
    """Judge one prefix of a rule that was admitted earlier, in numbers: whether it is protected or too wide today."""
    if length < (limits.prefix_min_v4 if version == 4 else limits.prefix_min_v6):
        return Code.PREFIX_TOO_WIDE
    return Code.PROTECTED_TARGET if protected.meeting(version, base, length) is not None else None


def hits(networks: Iterable[Network], protected: Protected) -> Refusal | None:
    """Return the refusal if one of ``networks`` has come to touch a protected one since it was judged."""
    for network in networks:
        touched = protected.touching(normalise_network(network))
        if touched is not None:
            return _touches(network, *touched)
    return None


def _too_much(spec: PolicySpec, networks: tuple[Network, ...], limits: Limits, load: Load) -> Refusal | None:
    if not networks:
        return Refusal(Code.NO_TARGET, "the policy names no address")
    if len(networks) > limits.targets_max:
        return Refusal(Code.TOO_MANY_TARGETS, f"{len(networks)} targets, this host allows {limits.targets_max}")
    if spec.guardrails.ttl_seconds > limits.ttl_s_max:
        return Refusal(Code.TTL_TOO_LONG, f"{spec.guardrails.ttl_seconds} s, this host allows {limits.ttl_s_max} s")
    return _too_many(count(spec), limits, load)


def _too_many(rules: int, limits: Limits, load: Load) -> Refusal | None:
    if rules > min(limits.rules_per_policy_max, limits.rules_max - load.rules):
        headroom = max(0, limits.rules_max - load.rules)
        detail = f"{rules} rules; {limits.rules_per_policy_max} per policy, headroom {headroom} of {limits.rules_max}"
        return Refusal(Code.TOO_MANY_RULES, detail)
    if load.rules_last_minute + rules > limits.rules_per_minute_max:
        detail = f"{rules} more rules after {load.rules_last_minute} in a minute, allowed {limits.rules_per_minute_max}"
        return Refusal(Code.TOO_FAST, detail)
    return None


def _too_wide(networks: tuple[Network, ...], limits: Limits) -> Refusal | None:
    for network in networks:
        narrowest = limits.prefix_min_v4 if network.version == 4 else limits.prefix_min_v6
        if network.prefixlen < narrowest:
            return Refusal(Code.PREFIX_TOO_WIDE, f"{network} is wider than /{narrowest}")
    return None


def _beside(network: Network, protected: Protected, *, split: bool) -> list[Network] | Refusal:
    """Return what remains of ``network`` beside the protected ones: itself, its pieces when splitting, or the refusal."""
    touched = protected.touching(network)
    if touched is None:
        return [network]
    if not split or is_host(network):
        return _touches(network, *touched)
    pieces = [network]
    for reason, guarded in protected.all():
        plain = normalise_network(guarded)
        if plain.version != network.version:
            continue
        pieces = [rest for piece in pieces for rest in _without(piece, plain)]
        if len(pieces) > _PIECES_MAX:
            return _touches(network, reason, plain)
    if any(protected.touching(piece) for piece in pieces):
        return _touches(network, *touched)
    return pieces


def _without(piece: Network, guarded: Network) -> list[Network]:
    if not overlaps(piece, guarded):
        return [piece]
    if isinstance(piece, ipaddress.IPv4Network) and isinstance(guarded, ipaddress.IPv4Network):
        return [] if piece.subnet_of(guarded) else sorted(piece.address_exclude(guarded))
    if isinstance(piece, ipaddress.IPv6Network) and isinstance(guarded, ipaddress.IPv6Network):
        return [] if piece.subnet_of(guarded) else sorted(piece.address_exclude(guarded))
    return []


def _touches(network: Network, reason: str, guarded: Network) -> Refusal:
    return Refusal(Code.PROTECTED_TARGET, f"{network} touches {guarded} ({reason})")
