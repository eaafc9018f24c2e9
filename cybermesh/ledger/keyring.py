"""Changes of the key ring by operators: who may sign what, from the block after the one that commits the change.

A change is read strictly and as a whole; one fault and nothing of it happens. Removing a key takes effect on what it has asked
for (requests are refused when looked at, decisions its budget carries end) but not on what others agreed to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cybermesh.addresses import AddressError, parse_network
from cybermesh.genesis import MESSAGE_TYPES, Genesis, Producer
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.records import BudgetRecord, OperatorRecord, ProducerRecord
from cybermesh.strictjson import JsonError, Reader, text_of

_KEYS_MAX: Final = 1_000
_NETWORKS_MAX: Final = 1_000
_BUDGET_MAX: Final = 10_000
_BUDGET_TTL_MAX: Final = 86_400


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
        taken = {member.pubkey for member in draft.genesis.validators} | {agent.pubkey for agent in draft.genesis.agents}
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


def read_member_change(reader: Reader) -> None:
    """Read the params of a validator-set command strictly.

    Raises:
        JsonError: with the path of the fault.
    """
    added, removed = reader.items("add", _KEYS_MAX, _operator), reader.items("remove", _KEYS_MAX, _key)
    reader.text("reason")
    reader.finish()
    if not added and not removed:
        reader.fail("add", "or remove must name a validator")


def _key(value: object, path: str) -> bytes:
    text = text_of(value, path)
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise JsonError(path, "expected 64 lower-case hex digits")
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
