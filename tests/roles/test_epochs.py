"""Whole validators when the committee changes: rows, the message to agents, restarts, and the one that has to go."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh.consensus.committee import Committee
from cybermesh.messages import EpochChange
from cybermesh.roles.recovery import RecoveryError, present_committee
from cybermesh.store.store import open_store
from cybermesh.wire import codec
from tests.roles.site import TOPICS, Site


@pytest.fixture
def four(tmp_path: Path) -> Site:
    return Site(tmp_path, 4)


async def test_three_go_on_without_the_fourth_and_after_a_restart(four: Site) -> None:
    async with four.running(1, 2, 3, 4):
        await four.until_votes(1, 2, 3, 4)
        leaving = four.deployment.keys["validator-4"].public.hex()
        last = await four.send(four.command("validator_set", remove=[leaving], reason="gone"))
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
        assert {member.name for member in published[0].committee} == {"validator-1", "validator-2", "validator-3"}
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
