"""An agent on the bus: it believes a quorum's proof and nothing that a single validator says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

from cybermesh.enforce import guard
from cybermesh.enforce.acks import Outcome
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import State
from cybermesh.envelope.nonces import NonceSource
from cybermesh.keystore import FileCounters
from cybermesh.messages import PolicyUpdate
from cybermesh.roles.agent import AgentParts, AgentRole
from cybermesh.roles.ring import control_domains
from cybermesh.wire import codec
from cybermesh.wire.control import seal
from tests.roles.site import TOPICS, Site

ALTERATIONS: dict[str, Callable[[PolicyUpdate], PolicyUpdate]] = {
    "no proof": lambda update: dataclasses.replace(update, proof=b""),
    "a bit of the proof": lambda update: dataclasses.replace(update, proof=update.proof.replace(b"1", b"2", 1)),
    "a longer time": lambda update: dataclasses.replace(update, expires_at_ms=update.expires_at_ms + 1),
    "another policy": lambda update: dataclasses.replace(update, policy_id="p2"),
    "another number": lambda update: dataclasses.replace(update, decision_seq=update.decision_seq + 1),
}


async def decide(site: Site) -> PolicyUpdate:
    """Return a decision as the one validator publishes it."""
    async with site.running(1):
        await site.until_votes(1)
        for message in site.case("p1"):
            await site.send(message)
        (record,) = await site.records(TOPICS.control_policy, 1)
    return codec.POLICY_UPDATE.decode(record.value)


async def test_an_agent_applies_what_is_proven_and_refuses_what_a_validator_made_of_it(alone: Site, tmp_path: Path) -> None:
    update = await decide(alone)
    topics = dataclasses.replace(TOPICS, control_policy="control.policy.test")
    outcomes: list[Outcome] = []
    state = State(tmp_path / "agent.db", default_mode=Mode.ENFORCE)
    with FileCounters(tmp_path / "agent.nonces") as counters:
        agent = AgentRole(
            AgentParts(
                genesis=alone.genesis,
                key=alone.deployment.keys["agent-1"],
                name="agent-1",
                topics=topics,
                bus=alone.bus,
                state=state,
                backend=NoopBackend(),
                nonces=NonceSource(counters),
                clock=alone.clock,
                look=guard.Protected,
                on_outcome=outcomes.append,
            )
        )
        key, domains = alone.deployment.keys["validator-1"], control_domains(alone.genesis)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(agent.run(), name="agent")
            for alter in ALTERATIONS.values():
                await alone.bus.publish(topics.control_policy, b"k", codec.encode(seal(alter(update), key, domains)))
            await alone.bus.publish(topics.control_policy, b"k", codec.encode(update)[:-1])
            await alone.bus.publish(topics.control_policy, b"k", codec.encode(update))
            await alone.until(lambda: any(outcome.result == "applied" for outcome in outcomes))
            await alone.until(lambda: agent.acks_published > 0)
            task.cancel()
    state.close()
    applied = [outcome for outcome in outcomes if outcome.result == "applied"]
    assert [(outcome.policy_id, outcome.decision_seq) for outcome in applied] == [("p1", update.decision_seq)]
    assert outcomes[-1] == applied[0]
    assert len(outcomes) == len(ALTERATIONS) + 1
    assert all(outcome.code for outcome in outcomes[:-1])
    assert agent.refused.total() == 1
