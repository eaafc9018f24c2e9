"""Backup and restore: the same ledger comes back, and nothing else is taken for it; pruning keeps every proof."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from cybermesh.cli.ledger import app
from cybermesh.consensus.committee import Committee
from cybermesh.proof import verify_proof
from cybermesh.roles.audit import AuditError, Auditor
from cybermesh.roles.backup import BackupError, export_lines, import_lines
from cybermesh.roles.recovery import present_committee
from cybermesh.store.records import AuditEntry, StoredLabel
from cybermesh.store.rows import FEEDBACK
from cybermesh.store.store import open_store
from cybermesh.wire import codec
from tests.ledger.test_operators import joining
from tests.ledger.world import policy
from tests.postgres import Cluster
from tests.roles.stored_chain import StoredChain, random_chain, stored, usual_chain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def usual() -> StoredChain:
    return usual_chain()


async def exported(chain: StoredChain, where: Path | str) -> bytes:
    async with open_store(where) as store:
        return b"".join([line async for line in export_lines(store, chain.world.genesis)])


@pytest.fixture
async def backup(usual: StoredChain, tmp_path: Path) -> bytes:
    where = await stored(usual, tmp_path / "ledger.db")
    async with open_store(where) as store:
        await store.feedback.add_label(StoredLabel("a-1", "false_positive", b"\x01\x02", "lunch", 5))
        await store.node.add_audit(AuditEntry(7, "operator", "export", "ledger", b"\x00"))
    return await exported(usual, where)


async def test_a_restored_ledger_is_the_same_and_publishes_nothing_again(
    usual: StoredChain, backup: bytes, tmp_path: Path
) -> None:
    async with open_store(tmp_path / "restored.db") as store:
        assert (await import_lines(store, usual.world.genesis, io.BytesIO(backup))).height == 8
        report = await Auditor(store.rows, usual.world.genesis).run()
        assert report.finding is None, str(report.finding)
        assert report.state_root == usual.world.state.root
        assert await store.outbox.pending_count() == 0
        raw = await store.outbox.event("decision", 2)
        assert raw is not None
        assert verify_proof(codec.POLICY_UPDATE.decode(raw).proof, usual.world.genesis).decision(2) is not None
        assert [label.note for label in await store.feedback.labels_of("a-1")] == ["lunch"]
        assert len(await store.node.audit_trail(10)) == 1
        for record in FEEDBACK:
            assert isinstance(await store.rows.all(record), list)
    assert await exported(usual, tmp_path / "restored.db") == backup


async def test_a_backup_moves_a_ledger_to_postgresql_and_back(
    usual: StoredChain, backup: bytes, postgres: Cluster, tmp_path: Path
) -> None:
    url = postgres.database()
    async with open_store(url) as store:
        await import_lines(store, usual.world.genesis, io.BytesIO(backup))
    assert await exported(usual, url) == backup


@pytest.fixture
async def two_epochs(tmp_path: Path) -> tuple[StoredChain, bytes]:
    """A committee that grows; the rounds above its last block were skipped, so headers lead to the proof of its end."""
    chain = StoredChain()
    world = chain.world
    chain.add(*world.case("solo", "before", policy("203.0.113.5"), "203.0.113.5"))
    chain.add(*(world.command(who, "validator_set", add=[joining(world, "v9")]) for who in ("alice", "bob")), above=2)
    world.after(61)
    chain.add(*world.case("solo", "after", policy("203.0.113.6"), "203.0.113.6"), skipped=1)
    chain.add()
    return chain, await exported(chain, await stored(chain, tmp_path / "epochs.db"))


async def test_an_export_leads_through_a_change_of_the_committee(two_epochs: tuple[StoredChain, bytes], tmp_path: Path) -> None:
    chain, backup = two_epochs
    genesis = chain.world.genesis
    async with open_store(tmp_path / "restored.db") as store:
        replay = await import_lines(store, genesis, io.BytesIO(backup))
        assert (replay.height, replay.committee) == (4, chain.committee)
        assert (await Auditor(store.rows, genesis).run()).finding is None
        first = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
        assert await present_committee(store, first) == chain.committee
        raw = await store.outbox.event("decision", 2)
        assert raw is not None
        assert verify_proof(codec.POLICY_UPDATE.decode(raw).proof, genesis).header.epoch == 2
        assert await store.outbox.pending_count() == 0
    assert await exported(chain, tmp_path / "restored.db") == backup


@pytest.mark.parametrize("case", ["no suffix", "cut suffix", "suffix elsewhere", "certificate", "no certificate", "old epoch"])
async def test_an_end_of_an_epoch_that_no_quorum_signed_is_refused(
    case: str, two_epochs: tuple[StoredChain, bytes], tmp_path: Path
) -> None:
    chain, backup = two_epochs
    lines = backup.splitlines(keepends=True)
    end, later = json.loads(lines[2]), json.loads(lines[3])
    forge, height = {
        "no suffix": (lambda: _edit(lines, 3, suffix=[]), 2),
        "cut suffix": (lambda: _edit(lines, 3, suffix=end["suffix"][1:]), 2),
        "suffix elsewhere": (lambda: _edit(lines, 2, suffix=end["suffix"]), 1),
        "certificate": (lambda: _edit(lines, 3, certificate=later["certificate"]), 2),
        "no certificate": (lambda: _edit(lines, 3, certificate=""), 3),
        "old epoch": (lambda: _edit([*lines[:3], lines[2], *lines[4:]], 1), 3),
    }[case]
    async with open_store(tmp_path / "restored.db") as store:
        with pytest.raises(BackupError, match=f"height {height}"):
            await import_lines(store, chain.world.genesis, forge())


async def test_only_an_empty_store_is_restored_into(usual: StoredChain, backup: bytes, tmp_path: Path) -> None:
    async with open_store(await stored(usual, tmp_path / "other.db")) as store:
        with pytest.raises(BackupError, match="holds blocks already"):
            await import_lines(store, usual.world.genesis, io.BytesIO(backup))


def _edit(lines: list[bytes], number: int, **values: object) -> list[bytes]:
    """Change a line and repair the end, as somebody would who wants to be believed."""
    lines[number - 1] = orjson.dumps({**json.loads(lines[number - 1]), **values}, option=orjson.OPT_SORT_KEYS) + b"\n"
    digest = hashlib.sha256(b"".join(lines[:-1])).hexdigest()
    return [*lines[:-1], orjson.dumps({"lines": len(lines) - 2, "sha256": digest}) + b"\n"]


@pytest.mark.parametrize("case", ["cut", "bit", "chain", "format", "transactions", "certificate", "frame", "no end", "order"])
async def test_a_changed_export_is_refused_with_its_line_or_height(
    case: str, usual: StoredChain, backup: bytes, tmp_path: Path
) -> None:
    lines = backup.splitlines(keepends=True)
    forged = {
        "cut": lambda: lines[:5],
        "bit": lambda: [*lines[:3], lines[3].replace(b"a", b"b", 1), *lines[4:]],
        "chain": lambda: _edit(lines, 1, chain_id="00" * 32),
        "format": lambda: _edit(lines, 1, format="cybermesh/ledger/2"),
        "transactions": lambda: _edit(lines, 2, transactions=json.loads(lines[3])["transactions"]),
        "certificate": lambda: _edit(lines, 4, certificate=json.loads(lines[4])["certificate"]),
        "frame": lambda: _edit(lines, 4, frame=json.loads(lines[4])["frame"]),
        "no end": lambda: lines[:-1],
        "order": lambda: _edit([*lines[:1], lines[2], lines[1], *lines[3:]], 1),
    }[case]()
    async with open_store(tmp_path / "restored.db") as store:
        with pytest.raises(BackupError, match=r"line \d|height \d"):
            await import_lines(store, usual.world.genesis, forged)


async def test_pruned_bodies_leave_a_store_that_is_audited_from_its_snapshot(usual: StoredChain, tmp_path: Path) -> None:
    where = await stored(usual, tmp_path / "ledger.db")
    genesis = usual.world.genesis
    async with open_store(where) as store:
        assert (await store.rows.prune_bodies(3))[0] == 10
        report = await Auditor(store.rows, genesis).run()
        assert report.finding is None, str(report.finding)
        assert (report.executed_from, report.last_height, report.blocks) == (5, 8, 8)
        assert report.receipts == usual.world.state.log.size
        raw = await store.outbox.event("decision", 1)
        assert raw is not None
        verify_proof(codec.POLICY_UPDATE.decode(raw).proof, genesis)
        with pytest.raises(BackupError, match="pruned"):
            _ = [line async for line in export_lines(store, genesis)]


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("UPDATE receipts SET code = 'STALE' WHERE leaf = 2", "receipts"),
        ("UPDATE decisions SET rule_data = x'7b7d' WHERE decision_seq = 1", "decisions"),
        ("DELETE FROM decisions WHERE decision_seq = 1", "decisions"),
        ("DELETE FROM certificates WHERE height = 1; UPDATE blocks SET round = 9 WHERE height = 1", "blocks"),
        ("UPDATE certificates SET body = (SELECT body FROM certificates WHERE height = 4) WHERE height = 1", "certificates"),
        ("DELETE FROM transactions WHERE height = 1 AND position = 0", "transactions"),
        ("DELETE FROM receipts WHERE leaf = 1", "receipts"),
    ],
)
async def test_what_was_changed_below_the_pruned_height_is_found_too(
    statement: str, table: str, usual: StoredChain, tmp_path: Path
) -> None:
    where = await stored(usual, tmp_path / "ledger.db")
    async with open_store(where) as store:
        await store.rows.prune_bodies(3)
    plain = sqlite3.connect(where)
    plain.executescript(statement)
    plain.close()
    async with open_store(where) as store:
        finding = (await Auditor(store.rows, usual.world.genesis).run()).finding
    assert finding is not None
    assert finding.table == table, str(finding)


async def test_bodies_pruned_without_a_snapshot_cannot_be_audited(usual: StoredChain, tmp_path: Path) -> None:
    async with open_store(await stored(usual, tmp_path / "ledger.db")) as store:
        await store.rows.prune_bodies(6)
        with pytest.raises(AuditError, match="no snapshot"):
            await Auditor(store.rows, usual.world.genesis).run()


# The commands


def settings_for(chain: StoredChain, folder: Path, store: str) -> list[str]:
    (folder / "genesis.json").write_bytes(chain.world.genesis.encode())
    file = folder / f"{Path(store).stem}.toml"
    file.write_text(
        f'[node]\ngenesis = "{folder / "genesis.json"}"\nstate_dir = "{folder}"\n[store]\nurl = "{store}"\n', encoding="utf-8"
    )
    return ["-c", str(file)]


def test_the_commands_export_restore_and_audit(usual: StoredChain, tmp_path: Path) -> None:
    asyncio.run(stored(usual, tmp_path / "ledger.db"))
    runner = CliRunner()
    here = settings_for(usual, tmp_path, f"sqlite:///{tmp_path / 'ledger.db'}")
    head = json.loads(runner.invoke(app, ["head", *here, "--json"]).stdout)
    assert (head["height"], head["hash"]) == (8, usual.certificate.block_hash.hex())
    assert len(json.loads(runner.invoke(app, ["blocks", *here, "--from", "3", "--json"]).stdout)) == 6
    audit = runner.invoke(app, ["audit", *here, "--head", f"8:{head['hash']}", "--json"])
    assert audit.exit_code == 0, audit.output
    assert json.loads(audit.stdout)["valid"]
    assert runner.invoke(app, ["export", str(tmp_path / "backup"), *here]).exit_code == 0
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
    assert runner.invoke(app, ["export", str(tmp_path / "backup"), *here]).exit_code != 0
    there = settings_for(usual, tmp_path, f"sqlite:///{tmp_path / 'restored.db'}")
    restored = runner.invoke(app, ["import", str(tmp_path / "backup"), *there])
    assert restored.exit_code == 0, restored.output
    assert json.loads(runner.invoke(app, ["audit", *there, "--json"]).stdout)["state_root"] == head["state_root"]
    pruned = runner.invoke(app, ["prune", "--keep-days", "0", *here])
    assert pruned.exit_code == 0, pruned.output
    assert json.loads(runner.invoke(app, ["audit", *here, "--json"]).stdout)["executed_from"] == 5


# Determinism: wherever the blocks come from, whichever process executes them


def test_blocks_from_every_store_executed_anywhere_give_the_same_bytes(postgres: Cluster, tmp_path: Path) -> None:
    chain = random_chain(7, 30)
    (tmp_path / "genesis.json").write_bytes(chain.world.genesis.encode())
    url, file, export = postgres.database(), tmp_path / "ledger.db", tmp_path / "export"

    async def fill() -> None:
        await stored(chain, file)
        async with open_store(url) as store:
            await chain.write(store)

    asyncio.run(fill())
    export.write_bytes(asyncio.run(exported(chain, file)))
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "tests.roles.replayed", str(tmp_path / "genesis.json"), str(source)],
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for source, seed in ((file, "1"), (url, "4242"), (export, "1"), (export, "0"))
    ]  # fmt: skip
    assert len(set(outputs)) == 1
    lines = outputs[0].splitlines()
    assert len(lines) == 30
    assert lines[-1].split()[1] == chain.world.state.root.hex()
    receipts = b"".join(receipt.encode() for receipt in chain.world.receipts)
    assert sum(int(line.split()[2]) for line in lines) == len(receipts)
