"""What an agent does with every kind of decision that is signed by a validator and is not what a quorum decided, now.

The chain is real: blocks of the ledger, certificates by the validators' keys, the agent's own verifier. Each message passes the
envelope's check first, so that nothing is refused for its signature alone. Each refusal is a failed ack with its code,
and counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import orjson
import pytest

from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import Topics
from cybermesh.consensus.types import Header
from cybermesh.enforce import guard
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import State
from cybermesh.envelope.nonces import NonceSource
from cybermesh.keystore import FileCounters
from cybermesh.messages import PolicyUpdate
from cybermesh.proof import update_of
from cybermesh.roles.agent import AgentParts, AgentRole
from cybermesh.roles.ring import control_domains, key_ring
from cybermesh.wire import codec
from cybermesh.wire.control import open_policy, seal
from tests.ledger.world import START_MS, World, key, policy
from tests.proofs import Chain

POLICY = 2  # the receipt of a block that holds anomaly, evidence, policy
TTL_MS = 900_000


@dataclass
class Hand:
    """A clock that the test moves."""

    now_ms: int = START_MS

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        return self.now_ms / 1_000


class Scene:
    """A chain with two decisions, the first of them revoked at the end, and an agent."""

    def __init__(self, folder: Path, counters: FileCounters) -> None:
        self.world = World()
        self.chain = Chain(self.world)
        self.chain.commit(*self.world.case("solo", "p1"))
        self.chain.commit(*self.world.case("solo", "p2", policy("203.0.113.20"), entity="203.0.113.20"))
        self.world.now_ms += 1_000
        self.chain.commit(self.world.command("alice", "revoke", policy_id="p1"))
        self.chain.commit()
        self.clock = Hand()
        self.backend = NoopBackend()
        self.state = State(folder / "agent.db", default_mode=Mode.ENFORCE)
        self.agent = AgentRole(
            AgentParts(
                genesis=self.world.genesis,
                key=key("agent"),
                name="agent-1",
                topics=Topics(),
                bus=MemoryBus(self.clock.wall_ms),
                state=self.state,
                backend=self.backend,
                nonces=NonceSource(counters),
                clock=self.clock,
                look=guard.Protected,
            )
        )

    def update(self, block: int = 0, position: int = POLICY) -> PolicyUpdate:
        """The decision of a block as an honest validator publishes it."""
        applied = self.chain.outcomes[block]
        (effect,) = applied.receipts[position].decisions
        rule = applied.rules[effect.decision_seq]
        return update_of(self.chain.headers[block], effect, rule, self.chain.prove(block, position))

    async def send(self, update: PolicyUpdate) -> str:
        """Hand a message over as one validator signs it; return the outcome's code, or its result where all is well."""
        signed = seal(update, key(self.world.genesis.validators[0].name), control_domains(self.world.genesis))
        ring, domains = key_ring(self.world.genesis), control_domains(self.world.genesis)
        opened = open_policy(codec.encode(signed), ring, domains)
        assert isinstance(opened, PolicyUpdate)
        (outcome,) = await self.agent.enforcer.handle([opened])
        return outcome.code or outcome.result

    def installed(self) -> dict[str, int]:
        return {
            str(ip_address(match.base)): (element.expires_at_ms - self.clock.now_ms) // 1_000
            for match, element in self.backend._mirror.view().items()
            if element.expires_at_ms > self.clock.now_ms
        }

    async def acks(self) -> list[tuple[str, int, str, str]]:
        pending = await self.agent.enforcer.pending_acks()
        await self.agent.enforcer.acks_published(item.id for item in pending)
        found = [codec.ACK.layout.to_value(codec.ACK.layout.parse(item.body)) for item in pending]
        return [(ack.policy_id, ack.decision_seq, ack.result, ack.error_code) for ack in found]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with FileCounters(tmp_path / "agent.nonces") as counters:
        made = Scene(tmp_path, counters)
        yield made
        made.state.close()


def signed_by_one(scene: Scene) -> PolicyUpdate:
    """A validator makes a block of its own and certifies it alone, as often as a quorum needs."""
    body = orjson.loads(scene.update().proof)
    (one, *_) = body["certificate"]["signatures"]
    body["certificate"]["signatures"] = [{**one, "validator": index} for index in range(3)]
    return dataclasses.replace(scene.update(), proof=orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


def of_an_abandoned_block(scene: Scene) -> PolicyUpdate:
    """The block has a certificate, but the next one to extend it skipped a round: it may have been abandoned."""
    header = scene.chain.headers[0]
    skipping = dataclasses.replace(scene.chain.headers[1], round=header.round + 5)
    certificate = scene.chain.certify(skipping)
    body = orjson.loads(scene.update().proof)
    body["certificate"] = {
        "block_hash": certificate.block_hash.hex(),
        "round": certificate.round,
        "signatures": [{"signature": sig.hex(), "validator": voter} for voter, sig in certificate.signatures[:3]],
    }
    return dataclasses.replace(scene.update(), proof=orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


def of_a_forged_block(scene: Scene) -> PolicyUpdate:
    """The header is another one than the certificate was given for."""
    header = dataclasses.replace(scene.chain.headers[0], time_ms=scene.chain.headers[0].time_ms + 1)
    return with_header(scene, header)


def with_header(scene: Scene, header: Header) -> PolicyUpdate:
    update, body = scene.update(), orjson.loads(scene.update().proof)
    body["header"] = header.encode().hex()
    return dataclasses.replace(update, epoch=header.epoch, proof=orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


def with_rule(scene: Scene, ttl_s: bytes) -> PolicyUpdate:
    """Another rule with a digest of its own; one without is refused by the envelope already."""
    rule = scene.update().rule_data.replace(b"900", ttl_s)
    return dataclasses.replace(scene.update(), rule_data=rule, rule_hash=hashlib.sha256(rule).digest())


REFUSED: dict[str, tuple[Callable[[Scene], PolicyUpdate], str]] = {
    "no proof": (lambda scene: dataclasses.replace(scene.update(), proof=b""), "ENCODING"),
    "one validator instead of a quorum": (signed_by_one, "CERTIFICATE_SIGNATURES"),
    "altered rule_data": (lambda scene: with_rule(scene, b"901"), "PROOF_MISMATCH"),
    "altered action": (lambda scene: dataclasses.replace(scene.update(), action="remove"), "PROOF_MISMATCH"),
    "altered policy_id": (lambda scene: dataclasses.replace(scene.update(), policy_id="p9"), "PROOF_MISMATCH"),
    "altered expiry": (
        lambda scene: dataclasses.replace(scene.update(), expires_at_ms=scene.update().expires_at_ms + 1),
        "PROOF_MISMATCH",
    ),
    "the proof of another block": (
        lambda scene: dataclasses.replace(scene.update(), proof=scene.update(1).proof),
        "PROOF_MISMATCH",
    ),
    "an abandoned block": (of_an_abandoned_block, "NOT_CONSECUTIVE"),
    "a forged block": (of_a_forged_block, "CERTIFICATE_SIGNATURES"),
    "another receipt of the block": (
        lambda scene: dataclasses.replace(scene.update(), proof=scene.chain.prove(0, 0)),
        "PROOF_MISMATCH",
    ),
    "a chain of others": (
        lambda scene: with_header(scene, dataclasses.replace(scene.chain.headers[0], chain_id=bytes(32))),
        "GENESIS",
    ),
}


@pytest.mark.parametrize(("alter", "code"), REFUSED.values(), ids=REFUSED)
async def test_what_no_quorum_decided_is_refused_acked_and_counted(
    scene: Scene, alter: Callable[[Scene], PolicyUpdate], code: str
) -> None:
    await scene.agent.open()
    update = alter(scene)
    assert await scene.send(update) == code
    assert scene.installed() == {}
    assert await scene.acks() == [(update.policy_id, update.decision_seq, "failed", code)]
    assert scene.agent.enforcer.counts[code] == 1
    # Nothing of it sticks: the decision itself is taken.
    assert await scene.send(scene.update()) == "applied"
    assert scene.installed() == {"203.0.113.7": 900}


async def test_an_expired_decision_is_refused(scene: Scene) -> None:
    await scene.agent.open()
    scene.clock.now_ms += TTL_MS
    assert await scene.send(scene.update()) == "EXPIRED"
    assert await scene.acks() == [("p1", 1, "failed", "EXPIRED")]
    assert scene.agent.enforcer.counts["EXPIRED"] == 1


async def test_a_revoked_decision_cannot_be_replayed(scene: Scene) -> None:
    await scene.agent.open()
    assert await scene.send(scene.update()) == "applied"
    assert await scene.send(scene.update(2, 0)) == "applied"
    assert scene.installed() == {}
    assert await scene.send(scene.update()) == "REPLAYED"
    assert scene.installed() == {}
    assert (await scene.acks())[-1] == ("p1", 1, "failed", "REPLAYED")
    assert scene.agent.enforcer.counts["REPLAYED"] == 1


async def test_a_removal_that_comes_first_keeps_the_decision_out(scene: Scene) -> None:
    await scene.agent.open()
    assert await scene.send(scene.update(2, 0)) == "applied"
    assert await scene.send(scene.update()) == "REPLAYED"
    assert scene.installed() == {}


async def test_a_decision_of_an_unknown_epoch_is_parked_and_not_answered(scene: Scene) -> None:
    await scene.agent.open()
    later = with_header(scene, dataclasses.replace(scene.chain.headers[0], epoch=2))
    assert await scene.send(later) == "EPOCH"
    assert (scene.installed(), await scene.acks()) == ({}, [])
    assert scene.agent.enforcer.counts["EPOCH"] == 1
    assert len(scene.state.take_parked()) == 1


async def test_two_minutes_behind_block_time_installs_nothing_new_and_goes_on_ending(scene: Scene) -> None:
    await scene.agent.open()
    assert await scene.send(scene.update()) == "applied"
    scene.clock.now_ms -= 120_000
    assert await scene.send(scene.update(1)) == "CLOCK_BEHIND"
    assert set(scene.installed()) == {"203.0.113.7"}
    # A revocation gets through, and what has reached its end goes.
    assert await scene.send(scene.update(2, 0)) == "applied"
    assert scene.installed() == {}
    assert ("p2", 2, "failed", "CLOCK_BEHIND") in await scene.acks()
    scene.clock.now_ms += 120_000
    assert (await scene.agent.enforcer.reconcile()).released == 1
    assert set(scene.installed()) == {"203.0.113.20"}


async def test_expiry_goes_on_while_the_clock_is_behind(scene: Scene) -> None:
    await scene.agent.open()
    scene.clock.now_ms -= 50_000
    assert await scene.send(scene.update()) == "applied"
    scene.clock.now_ms -= 70_000
    assert await scene.send(scene.update(1)) == "CLOCK_BEHIND"
    scene.clock.now_ms = START_MS + TTL_MS
    await scene.agent.enforcer.tick()
    assert scene.installed() == {}


async def test_two_minutes_ahead_only_shortens(scene: Scene) -> None:
    await scene.agent.open()
    scene.clock.now_ms += 120_000
    assert await scene.send(scene.update()) == "applied"
    assert scene.installed() == {"203.0.113.7": 780}
