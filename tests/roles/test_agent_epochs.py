"""What an agent does when the committee changes: whom it believes from then on, and whom no more, also after a restart.

The chain is real: v9 takes the place of v0 in epoch 2. Messages go the whole way of a delivery, from the bytes on the bus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from cybermesh.bus import Delivery
from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import Topics
from cybermesh.consensus import codec as consensus_codec
from cybermesh.enforce import guard
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import State, StateError
from cybermesh.envelope.nonces import NonceSource
from cybermesh.keystore import FileCounters
from cybermesh.messages import CommitteeMember, ControlMessage, EpochChange, PolicyUpdate
from cybermesh.proof import encode_step, update_of
from cybermesh.roles.agent import AgentParts, AgentRole
from cybermesh.roles.ring import control_domains
from cybermesh.wire import codec
from cybermesh.wire.control import seal
from tests.ledger.world import World, key, policy
from tests.proofs import Chain
from tests.roles.test_agent_proofs import Hand
from tests.test_proof import joining


class Scene:
    """Blocks 0 and 3 hold decisions, of epochs 1 and 2; block 1 ends epoch 1. ``fork`` goes on with the old committee."""

    def __init__(self, folder: Path, counters: FileCounters) -> None:
        self.folder, self.counters = folder, counters
        self.chain = self._chain()
        self.chain.hand_over("v1", "v2", "v3", "v9")
        self.fork = self._chain()
        for chain in (self.chain, self.fork):
            chain.world.after(1)
            chain.commit()
            chain.commit(*chain.world.case("solo", "late", policy("203.0.113.30"), "203.0.113.30"))
            chain.commit()
        self.genesis = self.chain.world.genesis
        self.outcomes: list[tuple[str, str]] = []
        self.state = self.restart()

    @staticmethod
    def _chain() -> Chain:
        chain = Chain(World())
        world = chain.world
        chain.commit(*world.case("solo", "early", policy("203.0.113.20"), "203.0.113.20"))
        change = {"add": [joining(world, "v9")], "remove": [key("v0").public.hex()]}
        chain.commit(*(world.command(who, "validator_set", **change) for who in ("alice", "bob")))
        return chain

    def restart(self) -> State:
        """Begin again with what is on the disk."""
        self.clock = Hand(self.chain.world.now_ms)
        self.state = State(self.folder / "agent.db", default_mode=Mode.ENFORCE)
        self.agent = AgentRole(
            AgentParts(
                genesis=self.genesis, key=key("agent"), name="agent-1", topics=Topics(), bus=MemoryBus(self.clock.wall_ms),
                state=self.state, backend=NoopBackend(), nonces=NonceSource(self.counters), clock=self.clock,
                look=guard.Protected, on_outcome=lambda done: self.outcomes.append((done.policy_id, done.code or done.result)),
            )
        )  # fmt: skip
        return self.state

    def decision(self, block: int, chain: Chain | None = None) -> PolicyUpdate:
        chain = chain or self.chain
        applied, position = chain.outcomes[block], 2
        (effect,) = applied.receipts[position].decisions
        return update_of(chain.headers[block], effect, applied.rules[effect.decision_seq], chain.prove(block, position))

    def change(self) -> EpochChange:
        return EpochChange(
            epoch=2,
            last_height=2,
            headers=(self.chain.headers[1].encode(),),
            certificate=consensus_codec.encode_quorum_cert(self.chain.ends[1]),
            committee=tuple(CommitteeMember(public.hex()[:8], public) for public in self.chain.committee.public_keys),
            timestamp=1_700_000_000,
            producer_id=b"",
            signature=b"",
            pubkey=b"",
            step=encode_step(self.chain.steps[0]),
        )

    async def send(self, who: str, *messages: ControlMessage) -> list[tuple[str, str]]:
        """Deliver messages that ``who`` has signed, as one batch; return what became of decisions."""
        await self.agent.open()
        self.outcomes.clear()
        raws = [codec.encode(seal(message, key(who), control_domains(self.genesis))) for message in messages]
        await self.agent._take([Delivery("t", 0, place, b"", raw, 0) for place, raw in enumerate(raws)])
        return list(self.outcomes)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with FileCounters(tmp_path / "agent.nonces") as counters:
        made = Scene(tmp_path, counters)
        yield made
        made.state.close()


async def test_a_new_member_is_believed_after_a_proven_change_and_a_removed_one_is_not(scene: Scene) -> None:
    assert await scene.send("v0", scene.decision(0)) == [("early", "applied")]
    assert await scene.send("v9", scene.decision(0)) == []
    assert scene.agent.refused == {"UNKNOWN_PRODUCER": 1}
    await scene.send("v1", scene.change())
    assert await scene.send("v0", scene.decision(3)) == []
    assert scene.agent.refused == {"UNKNOWN_PRODUCER": 2}
    assert await scene.send("v9", scene.decision(3)) == [("late", "applied")]


async def test_a_decision_that_proves_its_committee_is_enough(scene: Scene) -> None:
    assert await scene.send("v9", scene.decision(3)) == [("late", "applied")]
    assert await scene.send("v0", scene.decision(0)) == []


async def test_a_removed_member_cannot_hand_over_the_news_of_its_removal_as_a_decision(scene: Scene) -> None:
    assert await scene.send("v0", scene.decision(3)) == []
    assert scene.agent.refused == {"UNKNOWN_PRODUCER": 1}


@pytest.mark.parametrize("is_restarted", [False, True], ids=["at once", "after a restart"])
async def test_what_the_old_committee_decides_after_its_end_is_refused(scene: Scene, is_restarted: bool) -> None:
    late = scene.decision(3, scene.fork)
    assert late.epoch == 1
    await scene.send("v1", scene.change())
    if is_restarted:
        scene.state.close()
        scene.restart()
    # Signed by one who is a member still, proven by a quorum of those who were.
    assert await scene.send("v1", late) == [("late", "EPOCH")]
    assert scene.state.take_parked() == []
    # What it decided before its end counts.
    assert await scene.send("v1", scene.decision(0)) == [("early", "applied")]


async def test_without_the_change_the_old_committee_is_believed_which_is_the_stated_limit(scene: Scene) -> None:
    assert await scene.send("v1", scene.decision(3, scene.fork)) == [("late", "applied")]


async def test_a_change_that_is_not_proven_changes_nothing(scene: Scene) -> None:
    good = scene.change()
    bad_step = dataclasses.replace(scene.chain.steps[0], state_digest=bytes(32))
    for step in (b"", b"{}", encode_step(bad_step)):
        await scene.send("v1", dataclasses.replace(good, step=step))
    await scene.send("v1", dataclasses.replace(good, epoch=3))
    assert scene.agent.refused == {"EPOCH_ENCODING": 2, "EPOCH_INCLUSION": 1}
    assert scene.state.epochs() == []
    assert await scene.send("v0", scene.decision(0)) == [("early", "applied")]


async def test_what_was_parked_for_an_unknown_epoch_is_done_when_the_change_is_proven(scene: Scene) -> None:
    later = scene.decision(3)
    sealed = codec.encode(seal(later, key("v1"), control_domains(scene.genesis)))
    assert scene.state.park(later.policy_id, later.decision_seq, sealed)
    assert await scene.send("v1", scene.change()) == [("late", "applied")]


async def test_kept_changes_of_another_chain_stop_the_agent_with_words(scene: Scene) -> None:
    scene.state.keep_epochs([b"{}"])
    scene.state.close()
    with pytest.raises(StateError, match="do not follow from this genesis"):
        scene.restart()
