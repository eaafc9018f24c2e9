"""Changes of the key ring by operators: who may sign what, from the block after the one that commits the change.

A change is read strictly and as a whole; one fault and nothing of it happens. Removing a key takes effect on what it has asked
for (requests are refused when looked at, decisions its budget carries end) but not on what others agreed to.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cybermesh.addresses import AddressError, parse_network
from cybermesh.genesis import MESSAGE_TYPES, VALIDATORS_MAX, Genesis, Producer
from cybermesh.keys import verify
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.receipts import CommitteeEffect
from cybermesh.ledger.records import BudgetRecord, MemberRecord, OperatorRecord, ProducerRecord
from cybermesh.strictjson import JsonError, Reader, text_of

_KEYS_MAX: Final = 1_000
_NETWORKS_MAX: Final = 1_000
_BUDGET_MAX: Final = 10_000
_BUDGET_TTL_MAX: Final = 86_400
_TIME_MS_MAX: Final = 1 << 53
READY_MS: Final = 600_000
"""How old, in block time, a new validator's word that it is ready may be."""


@dataclass(frozen=True, slots=True)
class KeyChange:
    """Keys to add and to remove, each list in order of key."""

    added: tuple[tuple[bytes, ProducerRecord], ...]
    removed: tuple[bytes, ...]
    added_operators: tuple[tuple[bytes, OperatorRecord], ...]
    removed_operators: tuple[bytes, ...]

    def fault(self, draft: Draft) -> str | None:
        """Return the key of the params that cannot be carried out on this state, None when all can."""
        if any(key not in draft.producers for key in self.removed):
            return "remove"
        if any(key not in draft.operators for key in self.removed_operators):
            return "remove_operators"
        taken = set(draft.committee.keys()) | {agent.pubkey for agent in draft.genesis.agents}
        added, added_operators = {key for key, _ in self.added}, {key for key, _ in self.added_operators}
        if any(key in draft.operators or key in taken for key in added) or added & added_operators:
            return "add"
        if any(key in draft.producers or key in taken for key in added_operators):
            return "add_operators"
        left = len(draft.operators) - len(self.removed_operators) + len(added_operators)
        return "remove_operators" if left < 1 else None


def record_of(producer: Producer) -> ProducerRecord:
    """Return the state's record of a producer of the genesis."""
    budget = producer.budget
    return ProducerRecord(
        budget=()
        if budget is None
        else (BudgetRecord(max_active=budget.max_active, max_per_minute=budget.max_per_minute, max_ttl_s=budget.max_ttl_s),),
        message_types=tuple(sorted(producer.message_types)),
        name=producer.name,
        networks=tuple(sorted(str(network) for network in producer.networks)),
        site=producer.site,
    )


def first_ring(draft: Draft, genesis: Genesis) -> None:
    """Put the genesis' producers and operators into an empty state."""
    for producer in genesis.producers:
        draft.producers.put(producer.pubkey, record_of(producer))
    for member in genesis.validators:
        draft.committee.put(member.pubkey, MemberRecord(name=member.name))
    for operator in genesis.operators:
        draft.operators.put(operator.pubkey, OperatorRecord(name=operator.name))


def apply_key_change(draft: Draft, change: KeyChange) -> None:
    """Carry out a change that has no fault."""
    for key in change.removed:
        draft.producers.drop(key)
    for key in change.removed_operators:
        draft.operators.drop(key)
    for key, producer in change.added:
        draft.producers.put(key, producer)
    for key, operator in change.added_operators:
        draft.operators.put(key, operator)


def read_key_change(reader: Reader) -> KeyChange:
    """Read the params of a key-ring command.

    Raises:
        JsonError: with the path of the fault.
    """
    change = KeyChange(
        added=tuple(sorted(reader.items("add", _KEYS_MAX, _producer), key=lambda item: item[0])),
        removed=tuple(sorted(set(reader.items("remove", _KEYS_MAX, _key)))),
        added_operators=tuple(sorted(reader.items("add_operators", _KEYS_MAX, _operator), key=lambda item: item[0])),
        removed_operators=tuple(sorted(set(reader.items("remove_operators", _KEYS_MAX, _key)))),
    )
    reader.text("reason")
    reader.finish()
    if change == KeyChange((), (), (), ()):
        reader.fail("add", "or remove must name a key")
    return change


@dataclass(frozen=True, slots=True)
class NewMember:
    """A validator to be, and its own word, not older than some minutes, that it runs and is ready to join."""

    key: bytes
    name: str
    ready_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class MemberChange:
    """Validators to add and to remove, each list in order of key."""

    added: tuple[NewMember, ...]
    removed: tuple[bytes, ...]

    def plain(self) -> str:
        """Return what operators agree to: who comes and who goes, but not the signs of readiness, which grow old meanwhile."""
        return f"{[(member.key.hex(), member.name) for member in self.added]} {[key.hex() for key in self.removed]}"

    def fault(self, draft: Draft) -> str | None:
        """Return the key of the params that cannot be carried out on this state, None when all can."""
        if any(key not in draft.committee for key in self.removed):
            return "remove"
        names = {record.name for key, record in present_members(draft) if key not in self.removed}
        agents = {agent.pubkey for agent in draft.genesis.agents}
        for member in self.added:
            is_taken = member.key in draft.producers or member.key in draft.operators or member.key in agents
            if is_taken or member.key in draft.committee or member.name in names:
                return "add"
            names.add(member.name)
        return None if 1 <= len(names) <= VALIDATORS_MAX else ("add" if self.added else "remove")

    def unready(self, draft: Draft) -> str | None:
        """Return the name of a new member that has not shown within ten minutes of block time that it is ready."""
        chain_id = draft.genesis.chain_id
        for member in self.added:
            is_fresh = draft.time_ms - READY_MS <= member.ready_ms <= draft.time_ms + READY_MS
            if not is_fresh or not verify(member.key, ready_bytes(chain_id, member.ready_ms), member.signature):
                return member.name
        return None


def ready_bytes(chain_id: bytes, time_ms: int) -> bytes:
    """Return what a new validator signs to say that it is ready to join this chain now."""
    return hashlib.sha256(b"cm/join/1" + chain_id + time_ms.to_bytes(8, "big")).digest()


def present_members(draft: Draft) -> list[tuple[bytes, MemberRecord]]:
    """Return the committee in order of public key: the order that numbers it."""
    found = ((key, draft.committee.get(key)) for key in draft.committee.keys())  # noqa: SIM118 - a table, sorted
    return [(key, record) for key, record in found if record is not None]


def apply_member_change(draft: Draft, change: MemberChange) -> CommitteeEffect:
    """Carry out a change that has no fault: the block becomes the last of its epoch."""
    for key in change.removed:
        draft.committee.drop(key)
    for member in change.added:
        draft.committee.put(member.key, MemberRecord(name=member.name))
    members = present_members(draft)
    draft.next_committee = tuple(key for key, _ in members)
    return CommitteeEffect(members=draft.next_committee, names=tuple(record.name for _, record in members))


def read_member_change(reader: Reader) -> MemberChange:
    """Read the params of a validator-set command strictly.

    Raises:
        JsonError: with the path of the fault.
    """
    added, removed = reader.items("add", VALIDATORS_MAX, _member), reader.items("remove", VALIDATORS_MAX, _key)
    reader.text("reason")
    reader.finish()
    if not added and not removed:
        reader.fail("add", "or remove must name a validator")
    if len({member.key for member in added} | set(removed)) != len(added) + len(removed):
        reader.fail("add", "and remove name a validator twice")
    return MemberChange(tuple(sorted(added, key=lambda member: member.key)), tuple(sorted(removed)))


def _member(value: object, path: str) -> NewMember:
    reader = Reader(path, value)
    name, key = _required(reader, "name"), _key(reader.get("pubkey"), reader.at("pubkey"))
    ready_ms = reader.integer("ready_ms", 0, _TIME_MS_MAX)
    signature = _hex(reader.get("ready_signature"), reader.at("ready_signature"), 128)
    reader.finish()
    return NewMember(key, name, ready_ms or 0, signature)


def _key(value: object, path: str) -> bytes:
    return _hex(value, path, 64)


def _hex(value: object, path: str, digits: int) -> bytes:
    text = text_of(value, path)
    if len(text) != digits or not set(text) <= set("0123456789abcdef"):
        raise JsonError(path, f"expected {digits} lower-case hex digits")
    return bytes.fromhex(text)


def _required(reader: Reader, name: str) -> str:
    value = reader.text(name)
    if not value:
        reader.fail(name, "is required")
    return value


def _operator(value: object, path: str) -> tuple[bytes, OperatorRecord]:
    reader = Reader(path, value)
    name, key = _required(reader, "name"), _key(reader.get("pubkey"), reader.at("pubkey"))
    reader.finish()
    return key, OperatorRecord(name=name)


def _producer(value: object, path: str) -> tuple[bytes, ProducerRecord]:
    reader = Reader(path, value)
    name, key, site = _required(reader, "name"), _key(reader.get("pubkey"), reader.at("pubkey")), _required(reader, "site")
    kinds = reader.items("message_types", len(MESSAGE_TYPES), _message_type) if reader.has("message_types") else MESSAGE_TYPES
    networks = reader.items("networks", _NETWORKS_MAX, _network)
    budget = (_budget(reader.child("budget")),) if reader.has("budget") else ()
    reader.finish()
    record = ProducerRecord(
        budget=budget,
        message_types=tuple(sorted(set(kinds))),
        name=name,
        networks=tuple(sorted(set(networks))),
        site=site,
    )
    return key, record


def _message_type(value: object, path: str) -> str:
    text = text_of(value, path)
    if text not in MESSAGE_TYPES:
        raise JsonError(path, f"expected one of {', '.join(MESSAGE_TYPES)}")
    return text


def _network(value: object, path: str) -> str:
    try:
        return str(parse_network(text_of(value, path)))
    except AddressError as fault:
        raise JsonError(path, str(fault)) from fault


def _budget(reader: Reader) -> BudgetRecord:
    active = reader.integer("max_active", 1, _BUDGET_MAX)
    per_minute = reader.integer("max_per_minute", 1, _BUDGET_MAX)
    ttl_s = reader.integer("max_ttl_s", 1, _BUDGET_TTL_MAX)
    reader.finish()
    return BudgetRecord(max_active=active or 20, max_per_minute=per_minute or 10, max_ttl_s=ttl_s or 900)
