"""What every role takes from the genesis before it trusts a message: who may sign what, under which domains, how fresh."""

from __future__ import annotations

from cybermesh.genesis import Genesis
from cybermesh.keys import KeyHolder, KeyRing
from cybermesh.messages import MessageType
from cybermesh.wire.admission import AdmissionRules
from cybermesh.wire.control import ControlDomains

_VALIDATOR_TYPES = frozenset({MessageType.COMMIT, MessageType.POLICY_UPDATE, MessageType.EPOCH_CHANGE})


def key_ring(genesis: Genesis) -> KeyRing:
    """Return the key ring of the genesis; the ledger's own ring, which operators change, decides on block time."""
    holders = [
        KeyHolder(producer.name, producer.pubkey, frozenset(MessageType(kind) for kind in producer.message_types))
        for producer in genesis.producers
    ]
    holders += [KeyHolder(member.name, member.pubkey, _VALIDATOR_TYPES) for member in genesis.validators]
    holders += [KeyHolder(operator.name, operator.pubkey, frozenset({MessageType.OPERATOR})) for operator in genesis.operators]
    holders += [KeyHolder(agent.name, agent.pubkey, frozenset({MessageType.ACK})) for agent in genesis.agents]
    return KeyRing(holders)


def control_domains(genesis: Genesis) -> ControlDomains:
    """Return the signing domains of the control topics."""
    domains = genesis.wire.signing_domains
    return ControlDomains(domains.commits.encode(), domains.policy.encode(), domains.ack.encode())


def admission_rules(genesis: Genesis) -> AdmissionRules:
    """Return which messages of the wire count."""
    return AdmissionRules(genesis.wire.accept_unbound_fields, genesis.wire.timestamp_window_ms)
