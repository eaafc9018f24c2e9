"""The genesis of a chain: who takes part and which limits bind, fixed once and named by the digest of its bytes.

Rules:

- every node of a chain holds the same genesis; ``chain_id`` is SHA-256 of its canonical bytes, so two nodes that differ in one
  field never talk to each other by mistake;
- parsing is strict: an unknown key, a missing one, a wrong type or a value out of range is a ``GenesisError`` naming its path;
- a key that is absent takes the default of its dataclass here, and every default is the careful choice: no budget, evidence
  required, no messages of the earlier system;
- integers and strings only, so the canonical form (sorted keys, no spaces, lower-case hex) is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

import orjson

from cybermesh.addresses import AddressError, Network, parse_network
from cybermesh.strictjson import is_printable

KEY_BYTES = 32
VALIDATORS_MAX = 64
MESSAGE_TYPES = ("anomaly", "evidence", "policy")
_NAME_MAX = 256


class GenesisError(ValueError):
    """A genesis that cannot be used; ``path`` says where (``producers[0].budget.max_active``), ``reason`` why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


def _within(low: int, high: int) -> dict[str, tuple[int, int]]:
    return {"within": (low, high)}


@dataclass(frozen=True, slots=True)
class Validator:
    """A member of the first committee; ``pubkey`` is its raw Ed25519 key (32 bytes, hex in the file)."""

    name: str
    pubkey: bytes


@dataclass(frozen=True, slots=True)
class Operator:
    """A person or tool whose signed commands the ledger obeys."""

    name: str
    pubkey: bytes


@dataclass(frozen=True, slots=True)
class Agent:
    """An enforcement point; its acks carry this key."""

    name: str
    pubkey: bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """What one producer may have blocked without anybody agreeing: single hosts, short, few (spec: case c)."""

    max_active: int = field(default=20, metadata=_within(1, 10_000))
    max_per_minute: int = field(default=10, metadata=_within(1, 10_000))
    max_ttl_s: int = field(default=900, metadata=_within(1, 86_400))


@dataclass(frozen=True, slots=True)
class Producer:
    """A detector: its key, its site, what it may sign, the networks it sees, and its budget (None: it blocks nothing alone)."""

    name: str
    pubkey: bytes
    site: str
    message_types: tuple[str, ...] = MESSAGE_TYPES
    networks: tuple[Network, ...] = ()
    budget: Budget | None = None


@dataclass(frozen=True, slots=True)
class Governance:
    """When a policy becomes a decision; times in milliseconds of block time."""

    corroborating_sites: int = field(default=2, metadata=_within(2, 64))
    corroboration_window_ms: int = field(default=60_000, metadata=_within(1_000, 3_600_000))
    waiting_ms: int = field(default=60_000, metadata=_within(1_000, 3_600_000))
    evidence_required: bool = True
    operators_needed: int = field(default=2, metadata=_within(1, 64))
    approval_ttl_s: int = field(default=86_400, metadata=_within(60, 604_800))


@dataclass(frozen=True, slots=True)
class Limits:
    """What no policy may exceed; prefix lengths mean "nothing wider than"."""

    ttl_min_s: int = field(default=1, metadata=_within(1, 86_400))
    ttl_max_s: int = field(default=86_400, metadata=_within(1, 86_400))
    prefix_min_v4: int = field(default=24, metadata=_within(8, 32))
    prefix_min_v6: int = field(default=64, metadata=_within(16, 128))
    targets_per_policy: int = field(default=256, metadata=_within(1, 256))
    targets_per_minute: int = field(default=6_000, metadata=_within(1, 1_000_000))
    targets_active: int = field(default=50_000, metadata=_within(1, 1_000_000))
    targets_active_operators: int = field(default=100_000, metadata=_within(1, 1_000_000))
    wide_targets: int = field(default=32, metadata=_within(1, 256))
    wide_ttl_s: int = field(default=3_600, metadata=_within(1, 86_400))
    deferred_per_producer: int = field(default=1_000, metadata=_within(1, 100_000))
    waiting_per_producer: int = field(default=1_000, metadata=_within(1, 100_000))
    pending_per_producer: int = field(default=1_000, metadata=_within(1, 100_000))
    references_per_producer: int = field(default=20_000, metadata=_within(1, 1_000_000))
    confidence_floor_ppm: int = field(default=500_000, metadata=_within(0, 1_000_000))
    severity_floor: int = field(default=5, metadata=_within(1, 10))


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """What makes a block invalid (transactions, bytes, junk) and what an honest proposer takes."""

    transactions: int = field(default=2_000, metadata=_within(1, 5_000))
    size_bytes: int = field(default=4 * 1024 * 1024, metadata=_within(1_114_112, 16 * 1024 * 1024))
    proposal_transactions: int = field(default=1_000, metadata=_within(1, 5_000))
    proposal_bytes: int = field(default=1024 * 1024, metadata=_within(1_024, 16 * 1024 * 1024))
    junk: int = field(default=16, metadata=_within(0, 1_000))
    system_receipts: int = field(default=1_000, metadata=_within(1, 10_000))


@dataclass(frozen=True, slots=True)
class Timing:
    """What consensus needs to agree on: base timer and heartbeat of an idle chain."""

    base_ms: int = field(default=200, metadata=_within(20, 60_000))
    heartbeat_s: int = field(default=5, metadata=_within(1, 3_600))


@dataclass(frozen=True, slots=True)
class SigningDomains:
    """First bytes under the signatures of control messages; part of the genesis, so that all nodes agree."""

    commits: str = "control.commits.v1"
    policy: str = "control.policy.v1"
    ack: str = "control.policy.ack.v1"


@dataclass(frozen=True, slots=True)
class WireRules:
    """Which messages count: freshness window, the earlier system's unbound fields, the signing domains."""

    accept_unbound_fields: bool = False
    timestamp_window_ms: int = field(default=300_000, metadata=_within(1_000, 3_600_000))
    signing_domains: SigningDomains = SigningDomains()


@dataclass(frozen=True, slots=True)
class Genesis:
    """The whole genesis; construction checks every range and that no key or name is used twice.

    Raises:
        GenesisError: a value is out of range, a key or a name stands twice, or a quorum cannot be met.
    """

    chain_name: str
    validators: tuple[Validator, ...]
    producers: tuple[Producer, ...] = ()
    operators: tuple[Operator, ...] = ()
    agents: tuple[Agent, ...] = ()
    protected_networks: tuple[Network, ...] = ()
    infrastructure_networks: tuple[Network, ...] = ()
    governance: Governance = Governance()
    limits: Limits = Limits()
    block_limits: BlockLimits = BlockLimits()
    timing: Timing = Timing()
    wire: WireRules = WireRules()
    protocol_version: str = "1.0"
    chain_id: bytes = field(init=False, compare=False)

    def __post_init__(self) -> None:
        _check_values(self, "")
        _check_relations(self)
        object.__setattr__(self, "chain_id", hashlib.sha256(self.encode()).digest())

    def encode(self) -> bytes:
        """Return the canonical bytes: sorted keys, no spaces, lower-case hex; ``parse`` of them gives an equal genesis."""
        return orjson.dumps(_plain(self), option=orjson.OPT_SORT_KEYS)

    @property
    def committee(self) -> tuple[Validator, ...]:
        """The validators in order of public key: the order that numbers them."""
        return tuple(sorted(self.validators, key=lambda validator: validator.pubkey))


def parse(data: bytes) -> Genesis:
    """Read a genesis from JSON of any layout.

    Raises:
        GenesisError: not JSON, an unknown, missing or repeated key, a wrong type, or a value out of range.
    """
    try:
        value = json.loads(data, object_pairs_hook=_table)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise GenesisError("", f"not JSON: {error}") from error
    genesis = _read(Genesis, value, "")
    assert isinstance(genesis, Genesis)
    return genesis


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object's members, refusing a key that stands twice: nobody could say which one was meant."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise GenesisError(twice, "stands twice in one object")
    return table


def difference(ours: Genesis, theirs: Genesis) -> str | None:
    """Return the path of the first field in which two genesis values differ, or None when they are equal."""
    return _first_difference(_plain(ours), _plain(theirs), "")


def _first_difference(ours: object, theirs: object, path: str) -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            found = _first_difference(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            found = _first_difference(mine, other, f"{path}[{index}]")
            if found is not None:
                return found
        return None
    return None if ours == theirs else path


def _settings(cls: type) -> list[dataclasses.Field[object]]:
    return [entry for entry in dataclasses.fields(cls) if entry.init]


def _plain(value: object) -> object:
    """Return ``value`` as JSON knows it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in _settings(type(value))}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, IPv4Network | IPv6Network):
        return str(value)
    return value


def _read(hint: object, value: object, path: str) -> object:
    """Return ``value`` (from JSON) as the type ``hint`` says, or raise GenesisError."""
    origin = typing.get_origin(hint)
    if hint == Network:
        return _read_network(value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise GenesisError(path, "must be a list")
        item = typing.get_args(hint)[0]
        return tuple(_read(item, entry, f"{path}[{index}]") for index, entry in enumerate(value))
    if origin is types.UnionType:
        return None if value is None else _read(typing.get_args(hint)[0], value, path)
    if hint is bytes:
        return _read_key(value, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _read_table(hint, value, path)
    if type(value) is not hint:
        raise GenesisError(path, f"must be {_JSON_NAMES[typing.cast(type, hint)]}")
    return value


_JSON_NAMES: Mapping[type, str] = {int: "an integer", str: "a string", bool: "true or false"}


def _read_table(cls: type, value: object, path: str) -> object:
    if not isinstance(value, dict):
        raise GenesisError(path, "must be an object")
    known = {entry.name: entry for entry in _settings(cls)}
    for key in value:
        if key not in known:
            raise GenesisError(f"{path}.{key}" if path else key, "unknown key")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, object] = {}
    for name, entry in known.items():
        where = f"{path}.{name}" if path else name
        if name in value:
            arguments[name] = _read(hints[name], value[name], where)
        elif entry.default is dataclasses.MISSING:
            raise GenesisError(where, "missing")
    made: object = cls(**arguments)
    return made


def _read_key(value: object, path: str) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * KEY_BYTES or not set(value) <= set("0123456789abcdef"):
        raise GenesisError(path, f"must be {2 * KEY_BYTES} lower-case hex digits (an Ed25519 public key)")
    return bytes.fromhex(value)


def _read_network(value: object, path: str) -> Network:
    if not isinstance(value, str):
        raise GenesisError(path, "must be a network such as 10.0.0.0/8")
    try:
        return parse_network(value)
    except AddressError as error:
        raise GenesisError(path, str(error)) from error


def _check_values(value: object, path: str) -> None:
    """Check ranges and texts of a dataclass and of all inside it."""
    for entry in _settings(type(value)):
        where = f"{path}.{entry.name}" if path else entry.name
        _check_value(getattr(value, entry.name), where, entry.metadata.get("within"))


def _check_value(item: object, where: str, within: tuple[int, int] | None) -> None:
    if within is not None and not (isinstance(item, int) and within[0] <= item <= within[1]):
        raise GenesisError(where, f"must be {within[0]} to {within[1]}")
    if isinstance(item, str) and not (0 < len(item) <= _NAME_MAX and is_printable(item)):
        raise GenesisError(where, f"must be 1 to {_NAME_MAX} printable characters")
    if isinstance(item, bytes) and len(item) != KEY_BYTES:
        raise GenesisError(where, f"must be {KEY_BYTES} bytes")
    if isinstance(item, tuple):
        for index, member in enumerate(item):
            _check_value(member, f"{where}[{index}]", None)
    elif dataclasses.is_dataclass(item):
        _check_values(item, where)


def _check_relations(genesis: Genesis) -> None:
    if not 1 <= len(genesis.validators) <= VALIDATORS_MAX:
        raise GenesisError("validators", f"must name 1 to {VALIDATORS_MAX} validators")
    _check_unique("validators", (entry.name for entry in genesis.validators))
    _check_unique("producers", (entry.name for entry in genesis.producers))
    _check_unique("operators", (entry.name for entry in genesis.operators))
    _check_unique("agents", (entry.name for entry in genesis.agents))
    seen: dict[bytes, str] = {}
    for group in ("validators", "producers", "operators", "agents"):
        members: Sequence[Validator | Producer | Operator | Agent] = getattr(genesis, group)
        for index, member in enumerate(members):
            where = f"{group}[{index}].pubkey"
            if member.pubkey in seen:
                raise GenesisError(where, f"the key of {seen[member.pubkey]} again; every member needs its own")
            seen[member.pubkey] = where
    for index, producer in enumerate(genesis.producers):
        for kind in producer.message_types:
            if kind not in MESSAGE_TYPES:
                raise GenesisError(
                    f"producers[{index}].message_types", f"unknown type {kind!r}; known: {', '.join(MESSAGE_TYPES)}"
                )
        _check_unique(f"producers[{index}].message_types", producer.message_types)
    limits = genesis.limits
    if limits.ttl_min_s > limits.ttl_max_s:
        raise GenesisError("limits.ttl_min_s", "must not be above limits.ttl_max_s")
    # The default of two means "two where there are two"; an explicit higher number that nobody can meet is a mistake.
    if genesis.governance.operators_needed > max(2, len(genesis.operators)):
        raise GenesisError("governance.operators_needed", f"is above the number of operators ({len(genesis.operators)})")


def _check_unique(where: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise GenesisError(f"{where}[{index}]", f"{name!r} stands twice")
        seen.add(name)
