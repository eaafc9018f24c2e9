"""What every role takes from the genesis before it trusts a message: who may sign what, under which domains, how fresh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cybermesh.genesis import Genesis
from cybermesh.keys import KeyHolder, KeyRing
from cybermesh.ledger.state import State
from cybermesh.messages import MessageType
from cybermesh.wire.admission import AdmissionRules
from cybermesh.wire.control import ControlDomains

_Members = Sequence[tuple[bytes, str]]
_VALIDATOR_TYPES = frozenset({MessageType.COMMIT, MessageType.POLICY_UPDATE, MessageType.EPOCH_CHANGE})


def key_ring(genesis: Genesis) -> KeyRing:
    """Return the key ring of the genesis."""
    producers = (_producer(holder.name, holder.pubkey, holder.message_types) for holder in genesis.producers)
    return _ring(genesis, [*producers, *(_operator(holder.name, holder.pubkey) for holder in genesis.operators)])


def ledger_ring(genesis: Genesis, state: State) -> KeyRing:
    """Return the key ring as operators have changed it up to a state; validators and agents are those of the genesis."""
    producers = (_producer(record.name, key, record.message_types) for key, record in state.tables.producers.items())
    return _ring(genesis, [*producers, *(_operator(record.name, key) for key, record in state.tables.operators.items())])


def committee_ring(genesis: Genesis, members: _Members) -> KeyRing:
    """Return who may sign control messages when ``members`` (keys, names) are the validators, not those of the genesis."""
    return _ring(genesis, (), members)


def _ring(genesis: Genesis, senders: Iterable[KeyHolder], committee: _Members | None = None) -> KeyRing:
    validators = [(member.pubkey, member.name) for member in genesis.validators] if committee is None else committee
    members = (KeyHolder(name, key, _VALIDATOR_TYPES) for key, name in validators)
    agents = (KeyHolder(agent.name, agent.pubkey, frozenset({MessageType.ACK})) for agent in genesis.agents)
    return KeyRing([*senders, *members, *agents])


def _producer(name: str, key: bytes, message_types: Iterable[str]) -> KeyHolder:
    return KeyHolder(name, key, frozenset(MessageType(kind) for kind in message_types))


def _operator(name: str, key: bytes) -> KeyHolder:
    return KeyHolder(name, key, frozenset({MessageType.OPERATOR}))


def control_domains(genesis: Genesis) -> ControlDomains:
    """Return the signing domains of the control topics."""
    domains = genesis.wire.signing_domains
    return ControlDomains(domains.commits.encode(), domains.policy.encode(), domains.ack.encode())


def admission_rules(genesis: Genesis) -> AdmissionRules:
    """Return which messages of the wire count."""
    return AdmissionRules(genesis.wire.accept_unbound_fields, genesis.wire.timestamp_window_ms)
