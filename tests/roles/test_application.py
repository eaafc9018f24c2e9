"""The ledger behind consensus' port: how long a proposer chooses, and what an honest validator votes for."""

from __future__ import annotations

import dataclasses

from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.events import Broadcast, Refuse
from cybermesh.consensus.types import Vote
from cybermesh.genesis import Genesis
from cybermesh.ledger.receipts import Code
from cybermesh.ledger.state import State
from cybermesh.messages import Transaction, TxKind
from cybermesh.roles.application import LedgerApplication
from cybermesh.wire import codec
from tests.consensus.conftest import Bench, Talk
from tests.ledger.world import World, codes, policy
from tests.roles.site import Site


async def test_a_proposer_stops_choosing_after_a_quarter_of_the_round_timer(alone: Site) -> None:
    sent = [Transaction(TxKind.ANOMALY, codec.encode(alone.anomaly(f"a{i}"))).encode() for i in range(6)]
    times = iter(range(100))
    slow = LedgerApplication(alone.genesis, lambda: next(times) * alone.genesis.timing.base_ms / 10_000)
    state, context = State.at_genesis(alone.genesis), BlockContext(1, 1, alone.clock.wall_ms())
    selection = slow.select(state, context, sent)
    assert selection.payload == tuple(sent[:3])
    assert selection.refused == ()
    quick = LedgerApplication(alone.genesis, lambda: 0.0)
    assert quick.select(state, context, sent).payload == tuple(sent)


class _Ledger(LedgerApplication):
    """The ledger of a genesis, as the bench of consensus wants its application."""

    def __init__(self, genesis: Genesis) -> None:
        super().__init__(genesis, lambda: 0.0)
        self._state = State.at_genesis(genesis)

    def genesis(self) -> State:
        return self._state


def _follower(bench: Bench) -> Talk:
    talk = Talk(bench, next(index for index in range(4) if index != bench.leader(2)))
    talk.start()
    return talk


def test_a_header_that_claims_the_root_of_another_outcome_gets_no_honest_vote() -> None:
    world = World()
    body = policy("198.51.100.7")  # inside a protected network
    transactions = world.case("solo", "p1", body, entity="198.51.100.7")
    bench = Bench(application=_Ledger(world.genesis))  # type: ignore[arg-type]
    follower = _follower(bench)
    honest = bench.block(2, tc=bench.tc(1), payload=transactions)
    open_genesis = dataclasses.replace(
        world.genesis,
        protected_networks=(),
        producers=tuple(dataclasses.replace(each, networks=()) for each in world.genesis.producers),
    )
    loose = _Ledger(open_genesis).execute(
        State.at_genesis(open_genesis), BlockContext(1, 1, honest.header.time_ms), tuple(transactions)
    )
    assert loose is not None
    for claim in (
        {"state_root": loose.state_root},
        {"state_root": loose.state_root, "decision_seq": 1},
        {"decision_seq": 1},
        {"state_root": bytes(32)},
    ):
        effects = _follower(bench).hear(bench.block(2, tc=bench.tc(1), payload=transactions, **claim))
        assert not any(isinstance(effect, Broadcast) and isinstance(effect.message, Vote) for effect in effects)
        assert [effect.reason for effect in effects if isinstance(effect, Refuse)] == ["state root"]
    # The same block with the root that execution gives is voted for: the refusal stands in it, and nothing is opened.
    effects = follower.hear(honest)
    assert any(isinstance(effect, Broadcast) and isinstance(effect.message, Vote) for effect in effects)
    world.now_ms = honest.header.time_ms
    assert codes(world.apply(*transactions))[2] is Code.PROTECTED_TARGET
    assert honest.header.state_root == world.state.root
    assert honest.header.decision_seq == 0
