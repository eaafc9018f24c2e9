"""A new deployment: who takes part, their keys, and the genesis that names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

from cybermesh.genesis import Agent, Budget, Genesis, Operator, Producer, Timing, Validator
from cybermesh.keys import SigningKey
from cybermesh.keystore import generate_key

EVERYWHERE = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


@dataclass(frozen=True, slots=True)
class Roster:
    """How many of each, and what the detectors may do alone; every detector is a site of its own."""

    chain_name: str
    validators: int
    producers: int
    agents: int
    operators: int = 0
    budget: Budget | None = None
    networks: tuple[IPv4Network | IPv6Network, ...] = EVERYWHERE
    infrastructure: tuple[IPv4Network | IPv6Network, ...] = ()
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A genesis and the private keys of everybody in it, by name (``validator-1``, ``ai-1``, ``agent-1``, ``operator-1``)."""

    genesis: Genesis
    keys: Mapping[str, SigningKey] = field(repr=False)

    def validator_index(self, number: int) -> int:
        """Return the consensus index (order of public keys) of ``validator-NUMBER``."""
        public = self.keys[f"validator-{number}"].public
        return next(index for index, member in enumerate(self.genesis.committee) if member.pubkey == public)


def create(roster: Roster) -> Deployment:
    """Generate all keys and write the genesis that names them.

    Raises:
        GenesisError: The roster asks for something no genesis may say.
    """
    counts = {"validator": roster.validators, "ai": roster.producers, "agent": roster.agents, "operator": roster.operators}
    names = {role: [f"{role}-{number}" for number in range(1, count + 1)] for role, count in counts.items()}
    keys = {name: generate_key() for group in names.values() for name in group}
    genesis = Genesis(
        chain_name=roster.chain_name,
        validators=tuple(Validator(name, keys[name].public) for name in names["validator"]),
        producers=tuple(
            Producer(name, keys[name].public, site=f"site-{number}", networks=roster.networks, budget=roster.budget)
            for number, name in enumerate(names["ai"], start=1)
        ),
        operators=tuple(Operator(name, keys[name].public) for name in names["operator"]),
        agents=tuple(Agent(name, keys[name].public) for name in names["agent"]),
        infrastructure_networks=roster.infrastructure,
        timing=roster.timing,
    )
    return Deployment(genesis, keys)
