"""A validator that comes later: from an empty store, another one's export and the genesis, into the committee."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cybermesh.cli.ledger import app
from cybermesh.consensus.journal import Journal, standing
from cybermesh.keys import SigningKey
from cybermesh.keystore import save_key
from cybermesh.ledger.keyring import ready_bytes
from cybermesh.roles.backup import export_lines
from cybermesh.roles.joining import JoiningError, join
from cybermesh.store.store import open_store
from tests.ledger.test_operators import joining
from tests.ledger.world import key
from tests.roles.site import Site
from tests.roles.stored_chain import StoredChain, stored

NEW = "validator-5"


@pytest.fixture
def four(tmp_path: Path) -> Site:
    """Four validators, and a fifth key with neither store nor safety file."""
    site = Site(tmp_path, 4)
    site.deployment.keys[NEW] = SigningKey(bytes(range(32)))
    (tmp_path / "5").mkdir()
    return site


async def added(site: Site) -> bytes:
    """Have the operator add the fifth."""
    own, now_ms = site.deployment.keys[NEW], site.clock.wall_ms()
    word = own.sign(ready_bytes(site.genesis.chain_id, now_ms)).hex()
    entry = {"name": NEW, "pubkey": own.public.hex(), "ready_ms": now_ms, "ready_signature": word}
    return await site.send(site.command("validator_set", add=[entry], reason="grow"))


async def export_of(site: Site, number: int) -> list[bytes]:
    return [line async for line in export_lines(site.stores[number], site.genesis)]


async def brought_in(site: Site, lines: list[bytes]) -> int:
    async with open_store(site.ledger_file(5)) as store:
        return await join(store, site.genesis, (site.deployment.keys[NEW], site.safety_file(5)), lines)


async def test_a_new_validator_joins_with_an_export_of_another_and_votes(four: Site) -> None:
    async with four.running(1, 2, 3, 4):
        await four.until_votes(1, 2, 3, 4)
        before = await four.send(four.anomaly("before"))
        await four.until_committed(before, 1, 2, 3, 4)
        change = await added(four)
        await four.until_committed(change, 1, 2, 3, 4)
        # Five need four: they go on without the fifth.
        between = await four.send(four.anomaly("between"))
        await four.until_committed(between, 1, 2, 3, 4)
        height = await brought_in(four, await export_of(four, 1))
        async with four.running(5):
            await four.until_votes(5)
            after = await four.send(four.anomaly("after"))
            await four.until_committed(after, 1, 2, 3, 4, 5)
    # Its vote counts: of five, these four are the least that suffice.
    async with four.running(1, 2, 3, 5):
        await four.until_votes(1, 2, 3, 5)
        with_it = await four.send(four.anomaly("with the fifth"))
        await four.until_committed(with_it, 1, 2, 3, 5)
    await four.assert_agreement(1, 2, 3, 4, 5)
    async with open_store(four.ledger_file(5)) as store:
        head = await store.chain.head()
        assert head is not None
        assert head.height > height


async def test_only_a_key_that_is_a_member_and_has_not_signed_gets_a_memory(four: Site, tmp_path: Path) -> None:
    async with four.running(1, 2, 3, 4):
        await four.until_votes(1, 2, 3, 4)
        before = await four.send(four.anomaly("before"))
        await four.until_committed(before, 1, 2, 3, 4)
        with pytest.raises(JoiningError, match="is no validator"):
            await brought_in(four, await export_of(four, 1))
        assert not four.safety_file(5).exists()
        four.ledger_file(5).unlink()
        change = await added(four)
        await four.until_committed(change, 1, 2, 3, 4)
        await brought_in(four, await export_of(four, 1))
    # Four of five are needed, so every certificate has the fifth's signature.
    async with four.running(1, 2, 3, 5):
        await four.until_votes(1, 2, 3, 5)
        for name in ("one", "two", "three"):
            sent = await four.send(four.anomaly(name))
            await four.until_committed(sent, 1, 2, 3, 5)
        lines = await export_of(four, 1)
    four.ledger_file(5).unlink()
    four.safety_file(5).rename(tmp_path / "lost")
    with pytest.raises(JoiningError, match="has been a validator before"):
        await brought_in(four, lines)
    assert not four.safety_file(5).exists()
    async with open_store(tmp_path / "again.db") as store:
        first = four.deployment.keys["validator-1"]
        with pytest.raises(JoiningError, match="a key of the genesis"):
            await join(store, four.genesis, (first, tmp_path / "again.safety.db"), lines)
        assert await store.chain.head() is None


async def test_a_known_validator_keeps_its_memory_and_an_old_copy_of_it_only_observes(four: Site, tmp_path: Path) -> None:
    own = four.deployment.keys["validator-4"]
    old = four.safety_file(4).read_bytes()
    async with four.running(1, 2, 4):
        await four.until_votes(1, 2, 4)
        for name in ("one", "two", "three"):
            sent = await four.send(four.anomaly(name))
            await four.until_committed(sent, 1, 2, 4)
    async with four.running(1, 2, 3):
        await four.until_votes(1, 2, 3)
        sent = await four.send(four.anomaly("four"))
        await four.until_committed(sent, 1, 2, 3)
        lines = await export_of(four, 1)
    for is_old in (False, True):
        for left in tmp_path.joinpath("4").glob("ledger.db*"):
            left.unlink()
        if is_old:
            for left in tmp_path.joinpath("4").glob("*.safety.db-*"):
                left.unlink()
            four.safety_file(4).write_bytes(old)
        async with open_store(four.ledger_file(4)) as store:
            await join(store, four.genesis, (own, four.safety_file(4)), lines)
        async with four.running(1, 2, 4):
            await four.until(lambda: 4 in four.roles and four.roles[4].status is not None)
            if is_old:
                status = four.roles[4].status
                assert status is not None
                assert status.problem == "observer"
            else:
                await four.until_votes(1, 2, 4)
        four.roles.clear()


def test_the_command_makes_a_memory_that_the_restored_store_does_not_doubt(tmp_path: Path) -> None:
    chain = StoredChain()
    world = chain.world
    chain.add(*(world.command(who, "validator_set", add=[joining(world, "v9")]) for who in ("alice", "bob")))
    chain.add()
    genesis, own = world.genesis, key("v9")
    (tmp_path / "genesis.json").write_bytes(genesis.encode())
    save_key(tmp_path / "validator.key", own)

    async def export() -> bytes:
        async with open_store(await stored(chain, tmp_path / "other.db")) as store:
            return b"".join([line async for line in export_lines(store, genesis)])

    (tmp_path / "export").write_bytes(asyncio.run(export()))
    file = tmp_path / "validator.toml"
    file.write_text(
        f'[node]\ngenesis = "{tmp_path / "genesis.json"}"\nstate_dir = "{tmp_path}"\n'
        f'[store]\nurl = "sqlite:///{tmp_path / "ledger.db"}"\n',
        encoding="utf-8",
    )
    done = CliRunner().invoke(app, ["import", str(tmp_path / "export"), "--join", "-c", str(file)])
    assert done.exit_code == 0, done.output
    head = json.loads(CliRunner().invoke(app, ["head", "-c", str(file), "--json"]).stdout)
    assert head["epoch"] == 2

    async def seen() -> tuple[int, int]:
        async with open_store(tmp_path / "ledger.db") as store:
            return await store.node.last_boot(), await store.node.last_voted_round()

    boot, voted = asyncio.run(seen())
    with Journal.open(tmp_path / "validator.safety.db", chain_id=genesis.chain_id, public_key=own.public) as journal:
        assert standing(journal.load(), stored_boot=boot, stored_voted_round=voted, stored_epoch=head["epoch"]) is None
