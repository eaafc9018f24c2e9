"""Operators' commands: signed with their own key, sent over the bus, and what the ledger makes of them."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection
from typer import Typer
from typer.testing import CliRunner, Result

from cybermesh.bus.local import LocalBus
from cybermesh.cli import operator
from cybermesh.cli.allowlist import allowlist
from cybermesh.cli.operator import app
from cybermesh.cli.output import CommandError
from cybermesh.cli.policy import policy
from cybermesh.config import load
from cybermesh.keystore import KeystoreError, save_key
from cybermesh.ledger.receipts import Code, Receipt
from cybermesh.messages import Transaction, TxKind, tx_digest
from cybermesh.roles.clock import SystemClock
from cybermesh.roles.process import store_location
from cybermesh.store import tables
from cybermesh.store.store import open_store
from cybermesh.wire.admission import verify_transaction
from tests.ledger.world import World, codes, key


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "genesis.json").write_bytes(World().genesis.encode())
    for name in ("alice", "bob", "v9"):
        save_key(tmp_path / f"{name}.key", key(name))
    file = tmp_path / "validator.toml"
    file.write_text(
        f'[node]\ngenesis = "{tmp_path / "genesis.json"}"\nstate_dir = "{tmp_path / "state"}"\n'
        f'[bus]\nkind = "local"\npath = "{tmp_path / "bus.db"}"\n',
        encoding="utf-8",
    )
    return file


def order(settings: Path, who: str, *arguments: str, text: str | None = None) -> Result:
    options = [] if arguments[0] == "ready" else ["--no-wait"]
    options += ["--key", str(settings.parent / f"{who}.key"), "-c", str(settings)]
    return CliRunner().invoke(app, [*arguments, *options], input=text)


def waiting(settings: Path, tree: Typer, *arguments: str) -> Result:
    """A command that waits for its receipt, and a validator that has one store, one bus and one block."""
    where = store_location(load(settings).settings)
    assert isinstance(where, Path)
    where.parent.mkdir(parents=True, exist_ok=True)

    async def make() -> None:
        async with open_store(where):
            pass

    async def keep(raw: bytes, receipt: Receipt) -> None:
        values = {"leaf": 0, "height": 7, "kind": receipt.kind, "subject": tx_digest(raw).hex(), "code": receipt.code}
        async with open_store(where) as store:

            async def work(connection: AsyncConnection) -> None:
                await connection.execute(insert(tables.receipts).values(**values, body=b""))

            await store._database.write(work)

    def validate() -> None:
        (raw,) = sent(settings, 1)
        world = at_ledgers_time(World(), raw)
        world.apply(*world.case("north-1", "p1"))
        asyncio.run(keep(raw, world.apply(raw)[0]))

    asyncio.run(make())
    validator = threading.Thread(target=validate)
    validator.start()
    done = CliRunner().invoke(tree, [*arguments, "--key", str(settings.parent / "alice.key"), "-c", str(settings)])
    validator.join()
    return done


@pytest.mark.parametrize(
    ("tree", "arguments", "code"),
    [
        (app, ("approve", "p1"), "OK"),
        (policy, ("approve", "p1"), "OK"),
        (policy, ("reject", "p1"), "OK"),
        (policy, ("revoke", "p1"), "UNKNOWN_POLICY"),
        (app, ("protect", "192.0.2.8/32"), "AWAITING_OPERATORS"),
        (allowlist, ("add", "192.0.2.7/32"), "OK"),
        (allowlist, ("remove", "192.0.2.7/32"), "OK"),
    ],
)
def test_an_order_waits_for_its_receipt_and_says_what_the_ledger_made_of_it(
    tree: Typer, arguments: tuple[str, ...], code: str, settings: Path
) -> None:
    done = waiting(settings, tree, *arguments)
    told = json.loads(done.stdout)
    assert (told["code"], told["height"]) == (code, 7)
    if code == "UNKNOWN_POLICY":
        assert isinstance(done.exception, CommandError)
        assert done.exception.exit_code == 1
    else:
        assert done.exit_code == 0, done.output


def test_an_order_that_could_not_learn_its_receipt_is_not_sent(settings: Path) -> None:
    options = ["approve", "p1", "--key", str(settings.parent / "alice.key"), "-c", str(settings)]
    done = CliRunner().invoke(app, options)
    assert isinstance(done.exception, CommandError)
    assert "--no-wait" in str(done.exception)
    assert not (settings.parent / "bus.db").exists()


def test_an_order_without_a_receipt_in_time_says_so(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "RECEIPT_WAIT_S", 0.3)
    where = store_location(load(settings).settings)
    assert isinstance(where, Path)
    where.parent.mkdir(parents=True, exist_ok=True)
    where.touch()
    done = CliRunner().invoke(app, ["approve", "p1", "--key", str(settings.parent / "alice.key"), "-c", str(settings)])
    assert isinstance(done.exception, CommandError)
    assert "no receipt within" in str(done.exception)


def sent(settings: Path, count: int) -> list[bytes]:
    """The transactions that validators read from the bus."""

    async def read() -> list[bytes]:
        found: list[bytes] = []
        file, topics = settings.parent / "bus.db", ("control.operator.v1",)
        async with LocalBus(file, SystemClock().wall_ms) as bus, bus.subscribe(topics, "test") as deliveries:
            async for delivery in deliveries:
                found.append(Transaction(TxKind.OPERATOR, delivery.value).encode())
                await deliveries.ack(delivery)
                if len(found) == count:
                    break
        return found

    return asyncio.run(read())


def at_ledgers_time(world: World, raw: bytes) -> World:
    world.now_ms = 1_000 * verify_transaction(raw).ts
    return world


def test_an_approval_is_signed_sent_and_obeyed(settings: Path) -> None:
    done = order(settings, "alice", "approve", "p1", "--reason", "seen it")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    (raw,) = sent(settings, 1)
    assert told["transaction"] == tx_digest(raw).hex()
    world = at_ledgers_time(World(), raw)
    world.apply(*world.case("north-1", "p1"))
    (receipt,) = world.apply(raw)
    assert receipt.code is Code.OK
    assert world.state.decision("p1") is not None


def test_every_order_has_a_nonce_of_its_own_across_calls(settings: Path) -> None:
    for _ in range(3):
        assert order(settings, "alice", "kill-switch", "on").exit_code == 0
    raws = sent(settings, 3)
    world = at_ledgers_time(World(), raws[0])
    assert codes(world.apply(*raws)) == [Code.OK] * 3


def test_two_operators_add_a_validator_that_says_it_is_ready(settings: Path) -> None:
    ready = order(settings, "v9", "ready", "v9")
    assert ready.exit_code == 0, ready.output
    change = json.dumps({"add": [json.loads(ready.stdout)]})
    for who in ("alice", "bob"):
        done = order(settings, who, "send", "validator_set", "-", text=change)
        assert done.exit_code == 0, done.output
    raws = sent(settings, 2)
    world = at_ledgers_time(World(), raws[0])
    assert codes(world.apply(*raws)) == [Code.AWAITING_OPERATORS, Code.OK]
    assert "v9" in {name for _, name in world.state.committee}


def test_lists_are_changed_by_those_who_may(settings: Path) -> None:
    assert order(settings, "alice", "allow", "192.0.2.7/32").exit_code == 0
    for who in ("alice", "bob"):
        assert order(settings, who, "protect", "192.0.2.8/32").exit_code == 0
    raws = sent(settings, 3)
    world = at_ledgers_time(World(), raws[0])
    assert codes(world.apply(*raws)) == [Code.OK, Code.AWAITING_OPERATORS, Code.OK]
    assert "192.0.2.8/32" in world.state.tables.protected


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (("kill-switch", "maybe"), None, "on or off"),
        (("send", "format_disk", "-"), "{}", "no such action"),
        (("send", "label", "-"), "{", "not JSON"),
        (("send", "label", "-"), '{"id": "x"}', "without id"),
        (("send", "label", "nowhere.json"), None, "nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_nothing_is_sent(
    arguments: tuple[str, ...], text: str | None, words: str, settings: Path
) -> None:
    done = order(settings, "alice", *arguments, text=text)
    assert isinstance(done.exception, CommandError)
    assert words in str(done.exception)
    assert not (settings.parent / "bus.db").exists()


def test_a_key_that_others_may_read_signs_nothing(settings: Path) -> None:
    (settings.parent / "alice.key").chmod(0o644)
    done = order(settings, "alice", "approve", "p1")
    assert isinstance(done.exception, KeystoreError)
    assert "open to others" in str(done.exception)
