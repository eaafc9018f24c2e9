"""The ledger behind consensus' port: how long a proposer chooses."""

from __future__ import annotations

from cybermesh.consensus.application import BlockContext
from cybermesh.ledger.state import State
from cybermesh.messages import Transaction, TxKind
from cybermesh.roles.application import LedgerApplication
from cybermesh.wire import codec
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
