"""Whole validators when the committee changes: rows, the message to agents, restarts, and the one that has to go."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cybermesh.consensus.application import BlockContext, Execution
from cybermesh.consensus.committee import Committee
from cybermesh.ledger.state import State
from cybermesh.messages import EpochChange
from cybermesh.roles import validator as module
from cybermesh.roles.application import LedgerApplication
from cybermesh.roles.recovery import RecoveryError, present_committee
from cybermesh.store.store import open_store
from cybermesh.wire import codec
from tests.roles.site import TOPICS, Site

ENDING = b"the-last-of-its-epoch"


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A committee whose fourth validator leaves with the block that holds a certain anomaly."""
    site = Site(tmp_path, 4)
    staying = tuple(site.deployment.keys[f"validator-{number}"].public for number in (1, 2, 3))

    class Ending(LedgerApplication):
        def execute(self, parent: State, context: BlockContext, payload: tuple[bytes, ...]) -> Execution[State] | None:
            execution = super().execute(parent, context, payload)
            if execution is None or not any(ENDING in each for each in payload):
                return execution
            return dataclasses.replace(execution, next_committee=staying)

    monkeypatch.setattr(module, "LedgerApplication", Ending)
    return site


async def test_three_go_on_without_the_fourth_and_after_a_restart(four: Site) -> None:
    async with four.running(1, 2, 3, 4):
        await four.until_votes(1, 2, 3, 4)
        last = await four.send(four.anomaly(ENDING.decode()))
        await four.until_committed(last, 1, 2, 3, 4)
        after = await four.send(four.anomaly("after"))
        await four.until_committed(after, 1, 2, 3)
        status = four.roles[4].status
        assert status is not None
        assert status.problem == "not in the committee any more"
        published: list[EpochChange] = []
        async with four.bus.subscribe((TOPICS.control_policy,), "reader") as deliveries:
            async for delivery in deliveries:
                if codec.is_epoch_change(delivery.value):
                    published.append(codec.EPOCH_CHANGE.decode(delivery.value))
                    break
        assert published[0].epoch == 2
        assert len(published[0].committee) == 3
    async with four.running(1, 2, 3):
        await four.until_votes(1, 2, 3)
        again = await four.send(four.anomaly("again"))
        await four.until_committed(again, 1, 2, 3)
    await four.assert_agreement(1, 2, 3, 4)
    async with open_store(four.ledger_file(1)) as store:
        (row,) = await store.chain.epochs()
        blocks = await store.chain.blocks(1, 1_000)
        assert {block.epoch for block in blocks if block.height < row.first_height} == {1}
        assert {block.epoch for block in blocks if block.height >= row.first_height} == {2}
        committee = await present_committee(store, four.committee)
        assert (committee.epoch, committee.n) == (2, 3)
        stranger = Committee.of(four.genesis.chain_id, [bytes([number]) * 32 for number in range(4)])
        with pytest.raises(RecoveryError, match="no quorum ended"):
            await present_committee(store, stranger)
