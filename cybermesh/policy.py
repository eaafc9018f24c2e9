"""The policy: what a decision orders, as one strict schema that detectors, the ledger and the agents read alike.

It exists so that the three never disagree about what a JSON object means. The rules:

- ``parse`` is total over bytes: it returns a ``PolicySpec`` or raises ``PolicyError`` with the path of the first fault. Unknown
  keys, duplicate keys, NaN, booleans in the place of integers, prefixes with host bits and zone ids are faults.
- An IPv4-mapped IPv6 address or prefix *is* the IPv4 one. A prefix of full length is a host.
- Lists are sets: order and repetition carry no meaning, so the parsed form is sorted, and ``to_json`` gives the same bytes for
  the same policy. ``parse(spec.to_json()) == spec``.
- Prefix limits mean that nothing *wider* than the limit passes: /32 passes a limit of 24, 0.0.0.0/0 does not.
- A policy that contradicts its own guardrails (prefix limit, number of targets, allow list) is refused here, for everybody.
- The earlier system's keys that led around the quorum are parsed, ignored and listed in ``PolicySpec.legacy`` to be counted.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import orjson

from cybermesh.addresses import Address, AddressError, Network, host, is_host, overlaps, parse_address, parse_network
from cybermesh.strictjson import JsonError, Reader, integer_of, load, show, text_of

POLICY_BYTES_MAX: Final = 512 * 1024
TARGETS_MAX: Final = 256
TTL_S_MAX: Final = 86_400
LIST_MAX: Final = 1_000
PORTS_MAX: Final = 64
ID_CHARS_MAX: Final = 128
COUNT_MAX: Final = 1_000_000
PPM: Final = 1_000_000

PORT_PROTOCOLS: Final = frozenset({"tcp", "udp", "sctp"})
PROTOCOLS: Final = PORT_PROTOCOLS | {"icmp", "icmpv6", "gre", "esp", "ah"}

_ID: Final = re.compile(r"[!-~]{1,128}")
_LEGACY: Final = re.compile(r"pre_consensus_\w+|fast_path_\w+|rollback_if_no_commit_after_s|approval_required", re.ASCII)


class PolicyError(Exception):
    """A policy breaks the schema: ``path`` names the place (as ``target.cidrs[2]``, "" the whole), ``reason`` the fault."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path or 'policy'}: {reason}")
        self.path = path
        self.reason = reason


class RuleType(enum.StrEnum):
    """What kind of rule a policy makes."""

    BLOCK = "block"
    RATE_LIMIT = "rate_limit"


class Action(enum.StrEnum):
    """What happens to a packet of a target; ``remove`` ends the policy instead."""

    DROP = "drop"
    REJECT = "reject"
    RATE_LIMIT = "rate_limit"
    REMOVE = "remove"


class Direction(enum.StrEnum):
    """Ingress: packets whose source is the target. Egress: packets whose destination is the target."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Scope(enum.StrEnum):
    """Where a policy holds."""

    CLUSTER = "cluster"
    NAMESPACE = "namespace"
    NODE = "node"
    TENANT = "tenant"
    REGION = "region"
    GLOBAL = "global"


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports ``first`` to ``last`` inclusive, 1 to 65,535."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a policy hits; all tuples are sorted and free of repetition, ``cidrs`` holds no host."""

    ips: tuple[Address, ...] = ()
    cidrs: tuple[Network, ...] = ()
    direction: Direction = Direction.INGRESS
    scope: Scope = Scope.CLUSTER
    selectors: tuple[tuple[str, str], ...] = ()
    namespace: str = ""
    ports: tuple[PortRange, ...] = ()
    protocols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Criteria:
    """What made the detector act; confidence in parts per million, because no float enters a comparison of validators."""

    min_confidence_ppm: int | None = None
    attempts_per_window: int | None = None
    window_s: int | None = None


@dataclass(frozen=True, slots=True)
class AllowList:
    """Whom the policy promises to leave alone."""

    ips: tuple[Address, ...] = ()
    cidrs: tuple[Network, ...] = ()
    namespaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most ``max_actions`` (packets, for the action ``rate_limit``) in ``window_s`` seconds."""

    window_s: int
    max_actions: int


@dataclass(frozen=True, slots=True)
class Guardrails:
    """The limits a policy carries; only ``ttl_seconds`` (1 to 86,400) is required, because every policy expires."""

    ttl_seconds: int
    cidr_max_prefix_len: int | None = None
    max_targets: int | None = None
    dry_run: bool = False
    allowlist: AllowList = AllowList()
    max_active_policies: int | None = None
    max_policies_per_minute: int | None = None
    rate_limit: RateLimit | None = None
    escalation_cooldown_s: int | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """Why, for people: a reason code and the digests or ids of evidence."""

    reason_code: str = ""
    evidence_refs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A parsed policy; ``legacy`` lists ignored keys of the earlier system and takes no part in equality."""

    policy_id: str
    rule_type: RuleType
    action: Action
    target: Target
    guardrails: Guardrails
    tenant: str = ""
    region: str = ""
    criteria: Criteria = Criteria()
    audit: Audit = Audit()
    legacy: tuple[str, ...] = field(default=(), compare=False)

    def networks(self) -> tuple[Network, ...]:
        """Return all targets as networks: hosts first, then prefixes, each in ascending order, IPv4 before IPv6."""
        return tuple(host(address) for address in self.target.ips) + self.target.cidrs

    def packet_limit(self) -> RateLimit | None:
        """Return the rate a ``rate_limit`` policy allows: its guardrail, else its criteria; None for other actions."""
        if self.action is not Action.RATE_LIMIT:
            return None
        if self.guardrails.rate_limit is not None:
            return self.guardrails.rate_limit
        criteria = self.criteria
        if criteria.attempts_per_window is None or criteria.window_s is None:
            return None
        return RateLimit(criteria.window_s, criteria.attempts_per_window)

    def to_json(self) -> bytes:
        """Return the canonical JSON (sorted keys, defaults left out), the ``rule_data`` of the wire."""
        return orjson.dumps(_as_json(self), option=orjson.OPT_SORT_KEYS)


def parse(data: bytes | Mapping[str, object]) -> PolicySpec:
    """Parse a policy from JSON bytes (at most 512 KiB) or from an already decoded object.

    Raises:
        PolicyError: The first fault, with its path.
    """
    try:
        spec = _spec(Reader("", load(data, POLICY_BYTES_MAX) if isinstance(data, bytes) else data, _LEGACY))
        _check_meaning(spec)
    except JsonError as fault:
        raise PolicyError(fault.path, fault.reason) from None
    return spec


def _spec(top: Reader) -> PolicySpec:
    policy_id = _identifier(top)
    rule_type, action = top.choice("rule_type", RuleType), top.choice("action", Action)
    tenant, region = top.text("tenant"), top.text("region")
    target = _target(top.child("target"))
    criteria = _criteria(top.child("criteria"))
    guardrails = _guardrails(top.child("guardrails"))
    audit = _audit(top.child("audit"))
    top.finish()
    return PolicySpec(policy_id, rule_type, action, target, guardrails, tenant, region, criteria, audit, tuple(top.ignored))


def _identifier(top: Reader) -> str:
    value = top.get("policy_id")
    if not top.has("policy_id"):
        top.fail("policy_id", "is required")
    if not isinstance(value, str) or not _ID.fullmatch(value):
        top.fail("policy_id", f"expected 1 to {ID_CHARS_MAX} visible ASCII characters")
    return value


def _address_of(value: object, path: str) -> Address:
    text = text_of(value, path)
    try:
        return parse_address(text)
    except AddressError as fault:
        raise PolicyError(path, str(fault)) from None


def _network_of(value: object, path: str) -> Network:
    text = text_of(value, path)
    try:
        return parse_network(text)
    except AddressError as fault:
        raise PolicyError(path, str(fault)) from None


def _port_of(value: object, path: str) -> PortRange:
    if not isinstance(value, Mapping):
        port = integer_of(value, path, 1, 65_535)
        return PortRange(port, port)
    reader = Reader(path, value)
    first, last = reader.integer("from", 1, 65_535), reader.integer("to", 1, 65_535)
    reader.finish()
    if first is None or last is None:
        raise PolicyError(path, "a range needs both from and to")
    if first > last:
        raise PolicyError(path, f"from {first} is above to {last}")
    return PortRange(first, last)


def _protocol_of(value: object, path: str) -> str:
    name = text_of(value, path).lower()
    if name not in PROTOCOLS:
        raise PolicyError(path, f"expected one of {', '.join(sorted(PROTOCOLS))}, got {show(value)}")
    return name


def _merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Join ranges that share a port; neighbours stay apart, since single ports are cheaper in the kernel than ranges."""
    merged: list[PortRange] = []
    for item in sorted(ranges):
        if merged and item.first <= merged[-1].last:
            merged[-1] = PortRange(merged[-1].first, max(merged[-1].last, item.last))
        else:
            merged.append(item)
    return tuple(merged)


def _order(network: Network) -> tuple[int, int, int]:
    return network.version, int(network.network_address), network.prefixlen


def _addresses(reader: Reader, count_max: int) -> tuple[tuple[Address, ...], tuple[Network, ...]]:
    """Read ``ips`` and ``cidrs``; a prefix of full length becomes an address."""
    hosts = [host(address) for address in reader.items("ips", count_max, _address_of)]
    prefixes = reader.items("cidrs", count_max, _network_of)
    found = sorted({*hosts, *prefixes}, key=_order)
    ips = tuple(network.network_address for network in found if is_host(network))
    return ips, tuple(network for network in found if not is_host(network))


def _target(reader: Reader) -> Target:
    ips, cidrs = _addresses(reader, TARGETS_MAX)
    target = Target(
        ips=ips,
        cidrs=cidrs,
        direction=reader.choice("direction", Direction, Direction.INGRESS),
        scope=reader.choice("scope", Scope, Scope.CLUSTER),
        selectors=reader.child("selectors").texts(PORTS_MAX),
        namespace=reader.text("namespace"),
        ports=_merged(reader.items("ports", PORTS_MAX, _port_of)),
        protocols=tuple(sorted(set(reader.items("protocols", len(PROTOCOLS), _protocol_of)))),
    )
    reader.finish()
    return target


def _criteria(reader: Reader) -> Criteria:
    confidence: int | None = None
    if reader.has("min_confidence"):
        value = reader.get("min_confidence")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            reader.fail("min_confidence", "expected a number from 0 to 1")
        confidence = round(value * PPM)
    criteria = Criteria(
        min_confidence_ppm=confidence,
        attempts_per_window=reader.integer("attempts_per_window", 1, COUNT_MAX),
        window_s=reader.integer("window_s", 1, TTL_S_MAX),
    )
    reader.finish()
    return criteria


def _guardrails(reader: Reader) -> Guardrails:
    ttl = reader.integer("ttl_seconds", 1, TTL_S_MAX)
    if ttl is None:
        reader.fail("ttl_seconds", "is required: every policy expires")
    guardrails = Guardrails(
        ttl_seconds=ttl,
        cidr_max_prefix_len=reader.integer("cidr_max_prefix_len", 0, 128),
        max_targets=reader.integer("max_targets", 1, COUNT_MAX),
        dry_run=reader.boolean("dry_run"),
        allowlist=_allowlist(reader.child("allowlist")),
        max_active_policies=reader.integer("max_active_policies", 1, COUNT_MAX),
        max_policies_per_minute=reader.integer("max_policies_per_minute", 1, COUNT_MAX),
        rate_limit=_rate_limit(reader.child("rate_limit")) if reader.has("rate_limit") else None,
        escalation_cooldown_s=reader.integer("escalation_cooldown_s", 0, COUNT_MAX),
    )
    reader.finish()
    return guardrails


def _allowlist(reader: Reader) -> AllowList:
    ips, cidrs = _addresses(reader, LIST_MAX)
    allowlist = AllowList(ips, cidrs, tuple(sorted(set(reader.items("namespaces", LIST_MAX, text_of)))))
    reader.finish()
    return allowlist


def _rate_limit(reader: Reader) -> RateLimit:
    window, actions = reader.integer("window_s", 1, TTL_S_MAX), reader.integer("max_actions", 1, COUNT_MAX)
    reader.finish()
    if window is None or actions is None:
        raise PolicyError(reader.path, "needs both window_s and max_actions")
    return RateLimit(window, actions)


def _audit(reader: Reader) -> Audit:
    audit = Audit(reader.text("reason_code"), tuple(sorted(set(reader.items("evidence_refs", LIST_MAX, text_of)))))
    reader.finish()
    return audit


def _check_meaning(spec: PolicySpec) -> None:
    """Refuse a policy whose parts contradict each other."""
    target, guardrails = spec.target, spec.guardrails
    if spec.action is not Action.REMOVE:
        if (spec.action is Action.RATE_LIMIT) != (spec.rule_type is RuleType.RATE_LIMIT):
            raise PolicyError("action", f"{spec.action} does not go with rule_type {spec.rule_type}")
        if not target.ips and not target.cidrs:
            raise PolicyError("target", "names no address: ips and cidrs are empty")
        if spec.action is Action.RATE_LIMIT and spec.packet_limit() is None:
            raise PolicyError("guardrails.rate_limit", "is required for the action rate_limit")
    portless = sorted(set(target.protocols) - PORT_PROTOCOLS)
    if target.ports and portless:
        raise PolicyError("target.protocols", f"{portless[0]} has no ports, but ports are given")
    networks = spec.networks()
    if len(networks) > min(TARGETS_MAX, guardrails.max_targets or TARGETS_MAX):
        raise PolicyError("target", f"{len(networks)} targets, more than the policy's own limit or {TARGETS_MAX}")
    for network in networks:
        _check_network(spec, network, "target.ips" if is_host(network) else "target.cidrs")


def _check_network(spec: PolicySpec, network: Network, path: str) -> None:
    limit = spec.guardrails.cidr_max_prefix_len
    # One number serves both families, so above 32 it can only ask for a host of an IPv4 target.
    if limit is not None and network.prefixlen < min(limit, network.max_prefixlen):
        raise PolicyError(path, f"{network} is wider than guardrails.cidr_max_prefix_len {limit}")
    allowlist = spec.guardrails.allowlist
    for allowed in (*map(host, allowlist.ips), *allowlist.cidrs):
        if overlaps(network, allowed):
            raise PolicyError(path, f"{network} overlaps {allowed} of guardrails.allowlist")
    other = "icmpv6" if network.version == 4 else "icmp"
    if spec.target.protocols == (other,):
        raise PolicyError(path, f"{other} does not exist in IPv{network.version}, so nothing would be blocked")


def _as_json(spec: PolicySpec) -> dict[str, object]:
    target, guardrails, audit = spec.target, spec.guardrails, spec.audit
    return {
        "policy_id": spec.policy_id,
        "rule_type": spec.rule_type,
        "action": spec.action,
        **_given(tenant=spec.tenant, region=spec.region),
        "target": {
            **_given(
                ips=[str(address) for address in target.ips],
                cidrs=[str(network) for network in target.cidrs],
                selectors=dict(target.selectors),
                namespace=target.namespace,
                ports=[
                    item.first if item.first == item.last else {"from": item.first, "to": item.last} for item in target.ports
                ],
                protocols=list(target.protocols),
            ),
            "direction": target.direction,
            "scope": target.scope,
        },
        **_given(criteria=_criteria_json(spec.criteria)),
        "guardrails": _guardrails_json(guardrails),
        **_given(audit=_given(reason_code=audit.reason_code, evidence_refs=list(audit.evidence_refs))),
    }


def _criteria_json(criteria: Criteria) -> dict[str, object]:
    # The quotient of an integer by a million is the correctly rounded double, so every node prints the same digits.
    confidence = None if criteria.min_confidence_ppm is None else criteria.min_confidence_ppm / PPM
    return _given(min_confidence=confidence, attempts_per_window=criteria.attempts_per_window, window_s=criteria.window_s)


def _guardrails_json(guardrails: Guardrails) -> dict[str, object]:
    allowlist, limit = guardrails.allowlist, guardrails.rate_limit
    return _given(
        ttl_seconds=guardrails.ttl_seconds,
        cidr_max_prefix_len=guardrails.cidr_max_prefix_len,
        max_targets=guardrails.max_targets,
        dry_run=guardrails.dry_run or None,
        allowlist=_given(
            ips=[str(address) for address in allowlist.ips],
            cidrs=[str(network) for network in allowlist.cidrs],
            namespaces=list(allowlist.namespaces),
        ),
        max_active_policies=guardrails.max_active_policies,
        max_policies_per_minute=guardrails.max_policies_per_minute,
        rate_limit=None if limit is None else {"window_s": limit.window_s, "max_actions": limit.max_actions},
        escalation_cooldown_s=guardrails.escalation_cooldown_s,
    )


def _given(**fields: object) -> dict[str, object]:
    """Return the fields that say something: neither None nor empty (zero and false-like numbers stay)."""
    return {key: value for key, value in fields.items() if value is not None and value not in ("", [], {})}
