"""The audit names the first row that is not what the chain says, whatever somebody with write access to the database did."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
from pathlib import Path

import pytest

from cybermesh.proof import verify_proof
from cybermesh.roles.audit import AuditError, Auditor, Report
from cybermesh.store.store import open_store
from cybermesh.wire import codec
from cybermesh.wire.admission import read_transaction
from tests.ledger.test_operators import joining
from tests.ledger.world import policy, transaction
from tests.postgres import Cluster
from tests.roles.stored_chain import StoredChain, random_chain, stored, usual_chain


@pytest.fixture(scope="module")
def usual() -> StoredChain:
    return usual_chain()


@pytest.fixture
async def usual_store(usual: StoredChain, tmp_path: Path) -> Path:
    return await stored(usual, tmp_path / "ledger.db")


async def audited(chain: StoredChain, where: Path | str, known_head: tuple[int, bytes] | None = None) -> Report:
    async with open_store(where) as store:
        return await Auditor(store.rows, chain.world.genesis).run(known_head)


async def test_an_honest_store_has_no_finding(usual: StoredChain, usual_store: Path) -> None:
    report = await audited(usual, usual_store)
    assert report.finding is None
    assert (report.first_height, report.last_height, report.blocks) == (1, 8, 8)
    assert report.state_root == usual.world.state.root
    assert report.receipts == usual.world.state.log.size


@pytest.mark.parametrize("seed", range(6))
async def test_no_honest_history_has_a_finding(seed: int, tmp_path: Path) -> None:
    chain = random_chain(seed, 40)
    report = await audited(chain, await stored(chain, tmp_path / "ledger.db"))
    assert report.finding is None
    assert report.state_root == chain.world.state.root


async def test_a_store_on_postgresql_is_audited_alike(usual: StoredChain, postgres: Cluster) -> None:
    url = postgres.database()
    async with open_store(url) as store:
        await usual.write(store)
    assert (await audited(usual, url)).finding is None
    postgres.sql("UPDATE decisions SET action = 'reject' WHERE decision_seq = 2", url.partition("@/")[2].partition("?")[0])
    finding = (await audited(usual, url)).finding
    assert finding is not None
    assert (finding.table, finding.row, finding.change) == ("decisions", {"decision_seq": 2}, "changed")


FLIPPED = "CAST(substr({0}, 1, length({0}) - 1) || CASE substr({0}, -1) WHEN x'00' THEN x'01' ELSE x'00' END AS BLOB)"


def flip(column: str) -> str:
    """An SQL expression for the blob with another last byte."""
    return FLIPPED.format(column)


CHAIN_TABLES = ("blocks", "transactions", "receipts", "decisions", "evidence", "certificates", "outbox")
INSERTED = (
    "INSERT INTO decisions SELECT 77, {0}, leaf, 'mine', request_id, change, action, rule_type, rule_data, rule_hash, "
    "opened_at_ms, expires_at_ms, why, ending, reporters, approvers, {1} FROM decisions WHERE decision_seq = 2"
)
TAMPERED = {
    # table, statement: (table, key or None, change) of the finding
    "block: height of nothing": ("UPDATE blocks SET epoch = 2 WHERE height = 3", "blocks", {"height": 3}, "changed"),
    "block: round": ("UPDATE blocks SET round = round + 1 WHERE height = 2", "blocks", {"height": 2}, "changed"),
    "block: time": ("UPDATE blocks SET time_ms = time_ms + 1 WHERE height = 2", "blocks", {"height": 2}, "changed"),
    "block: author": ("UPDATE blocks SET author = 9 WHERE height = 4", "blocks", {"height": 4}, "changed"),
    "block: hash": (f"UPDATE blocks SET hash = {flip('hash')} WHERE height = 5", "blocks", {"height": 5}, "changed"),
    "block: header": (f"UPDATE blocks SET header = {flip('header')} WHERE height = 5", "blocks", {"height": 5}, "changed"),
    "block: frame": (f"UPDATE blocks SET frame = {flip('frame')} WHERE height = 6", "blocks", {"height": 6}, "changed"),
    "block: root": (
        f"UPDATE blocks SET state_root = {flip('state_root')} WHERE height = 6",
        "blocks",
        {"height": 6},
        "changed",
    ),
    "block: seq": ("UPDATE blocks SET decision_seq = 0 WHERE height = 6", "blocks", {"height": 6}, "changed"),
    "block: counts": ("UPDATE blocks SET receipt_count = 0 WHERE height = 3", "blocks", {"height": 3}, "changed"),
    "block: first leaf": ("UPDATE blocks SET first_leaf = 0 WHERE height = 3", "blocks", {"height": 3}, "changed"),
    "block: deleted": ("DELETE FROM blocks WHERE height = 4", "blocks", {"height": 4}, "removed"),
    "block: first deleted": ("DELETE FROM blocks WHERE height = 1", "blocks", {"height": 1}, "removed"),
    "block: two swapped": (
        (
            "UPDATE blocks SET height = 99 - height WHERE height IN (7, 8);"
            "UPDATE blocks SET height = 8 WHERE height = 92; UPDATE blocks SET height = 7 WHERE height = 91"
        ),
        "blocks",
        {"height": 7},
        "changed",
    ),
    "transaction: payload": (
        f"UPDATE transactions SET payload = {flip('payload')} WHERE height = 1 AND position = 1",
        "transactions",
        {"height": 1, "position": 1},
        "changed",
    ),
    "transaction: digest": (
        f"UPDATE transactions SET digest = {flip('digest')} WHERE height = 1 AND position = 2",
        "transactions",
        {"height": 1, "position": 2},
        "changed",
    ),
    "transaction: another's, digest and all": (
        (
            "UPDATE transactions SET payload = o.payload, digest = o.digest FROM transactions o "
            "WHERE o.height = 3 AND o.position = 0 AND transactions.height = 2 AND transactions.position = 1"
        ),
        "transactions",
        {"height": 2, "position": 1},
        "changed",
    ),
    "transaction: deleted": (
        "DELETE FROM transactions WHERE height = 2 AND position = 0",
        "transactions",
        {"height": 2, "position": 0},
        "removed",
    ),
    "transaction: last deleted": (
        "DELETE FROM transactions WHERE height = 2 AND position = 3",
        "transactions",
        {"height": 2, "position": 3},
        "removed",
    ),
    "transaction: added": (
        "INSERT INTO transactions SELECT 4, 1, digest, payload FROM transactions WHERE height = 1 AND position = 0",
        "transactions",
        {"height": 4, "position": 1},
        "added",
    ),
    "receipt: code": ("UPDATE receipts SET code = 'OK' WHERE code = 'PROTECTED_TARGET'", "receipts", {"leaf": 17}, "changed"),
    "receipt: body": (f"UPDATE receipts SET body = {flip('body')} WHERE leaf = 2", "receipts", {"leaf": 2}, "changed"),
    "receipt: deleted": ("DELETE FROM receipts WHERE leaf = 3", "receipts", {"leaf": 3}, "removed"),
    "receipt: added": (
        "INSERT INTO receipts SELECT 500, height, kind, subject, code, body FROM receipts WHERE leaf = 3",
        "receipts",
        {"leaf": 500},
        "added",
    ),
    "decision: expiry": (
        "UPDATE decisions SET expires_at_ms = expires_at_ms + 1 WHERE decision_seq = 1",
        "decisions",
        {"decision_seq": 1},
        "changed",
    ),
    "decision: rule": (
        "UPDATE decisions SET rule_data = x'7b7d' WHERE decision_seq = 2",
        "decisions",
        {"decision_seq": 2},
        "changed",
    ),
    "decision: reporters": (
        "UPDATE decisions SET reporters = '[]' WHERE decision_seq = 2",
        "decisions",
        {"decision_seq": 2},
        "changed",
    ),
    "decision: deleted": ("DELETE FROM decisions WHERE decision_seq = 3", "decisions", {"decision_seq": 3}, "removed"),
    "decision: inserted": (INSERTED.format("height", "is_active"), "decisions", {"decision_seq": 77}, "added"),
    "decision: inserted below the chain": (INSERTED.format(0, 0), "decisions", {"decision_seq": 77}, "added"),
    "decision: an ended one shown as active": (
        "UPDATE decisions SET is_active = 1 WHERE decision_seq = 1",
        "decisions",
        {"decision_seq": 1},
        "changed",
    ),
    "decision: an active one hidden": (
        "UPDATE decisions SET is_active = 0 WHERE decision_seq = 2",
        "decisions",
        {"decision_seq": 2},
        "changed",
    ),
    "evidence: body": ("UPDATE evidence SET body = x'7b7d' WHERE height = 3", "evidence", None, "changed"),
    "evidence: deleted": ("DELETE FROM evidence WHERE height = 3", "evidence", None, "removed"),
    "evidence: added": (
        "INSERT INTO evidence SELECT x'aa', evidence_id, producer, height, body FROM evidence WHERE height = 3",
        "evidence",
        {"digest": b"\xaa"},
        "added",
    ),
    "certificate: swapped": (
        "UPDATE certificates SET body = (SELECT body FROM certificates WHERE height = 3) WHERE height = 4",
        "certificates",
        {"height": 4},
        "changed",
    ),
    "certificate: signature": (
        f"UPDATE certificates SET body = {flip('body')} WHERE height = 4",
        "certificates",
        {"height": 4},
        "changed",
    ),
    "certificate: last deleted": ("DELETE FROM certificates WHERE height = 8", "certificates", {"height": 8}, "removed"),
    "certificate: added above": (
        "INSERT INTO certificates SELECT 9, body FROM certificates WHERE height = 8",
        "certificates",
        {"height": 9},
        "added",
    ),
    "outbox: value": (
        f"UPDATE outbox SET value = {flip('value')} WHERE event = 'decision' AND subject = 2",
        "outbox",
        {"event": "decision", "subject": 2},
        "changed",
    ),
    "outbox: another's message": (
        (
            "UPDATE outbox SET value = (SELECT value FROM outbox WHERE event = 'decision' AND subject = 1) "
            "WHERE event = 'decision' AND subject = 2"
        ),
        "outbox",
        {"event": "decision", "subject": 2},
        "changed",
    ),
    "outbox: deleted": (
        "DELETE FROM outbox WHERE event = 'commit' AND subject = 3",
        "outbox",
        {"event": "commit", "subject": 3},
        "removed",
    ),
    "snapshot: body": (f"UPDATE snapshots SET body = {flip('body')}", "snapshots", {"height": 4}, "changed"),
    "tail cut off in blocks alone": (
        "DELETE FROM blocks WHERE height > 6",
        "transactions",
        {"height": 7, "position": 0},
        "added",
    ),
    "tail cut off below a snapshot": (
        "".join(f"DELETE FROM {name} WHERE height > 3;" for name in CHAIN_TABLES),
        "blocks",
        {"height": 4},
        "removed",
    ),
}


@pytest.mark.parametrize(("statements", "table", "row", "change"), TAMPERED.values(), ids=TAMPERED.keys())
async def test_the_first_tampered_row_is_named(
    statements: str, table: str, row: dict[str, object] | None, change: str, usual: StoredChain, usual_store: Path
) -> None:
    plain = sqlite3.connect(usual_store)
    before = plain.total_changes
    plain.executescript(statements)
    assert plain.total_changes > before
    plain.close()
    finding = (await audited(usual, usual_store)).finding
    assert finding is not None
    assert (finding.table, finding.change) == (table, change), str(finding)
    assert row is None or finding.row == row, str(finding)


async def test_a_tail_cut_off_clean_is_found_by_whoever_knows_a_later_head(usual: StoredChain, usual_store: Path) -> None:
    head = usual.rows[-1][-1].block
    assert (await audited(usual, usual_store, (8, head.hash))).finding is None
    plain = sqlite3.connect(usual_store)
    for name in CHAIN_TABLES:
        plain.execute(f"DELETE FROM {name} WHERE height > 6")
    plain.execute("UPDATE decisions SET is_active = 1 WHERE decision_seq = 3")
    plain.commit()
    plain.close()
    finding = (await audited(usual, usual_store, (8, head.hash))).finding
    assert finding is not None
    assert (finding.table, finding.row, finding.change) == ("blocks", {"height": 7}, "removed")


async def test_a_rewritten_chain_is_found_by_whoever_knows_an_old_head(usual: StoredChain, usual_store: Path) -> None:
    finding = (await audited(usual, usual_store, (2, bytes(32)))).finding
    assert finding is not None
    assert (finding.table, finding.row) == ("blocks", {"height": 2})


async def test_a_transaction_nobody_signed_is_named_though_a_quorum_ordered_it(tmp_path: Path) -> None:
    chain = StoredChain()
    chain.add(chain.world.anomaly("solo", "good"))
    message = read_transaction(chain.world.anomaly("solo", "forged"))
    chain.add(transaction(dataclasses.replace(message, signature=bytes(64))))
    finding = (await audited(chain, await stored(chain, tmp_path / "s.db"))).finding
    assert finding is not None
    assert (finding.table, finding.row) == ("transactions", {"height": 2, "position": 0})


async def test_an_empty_store_is_no_audit(usual: StoredChain, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no block"):
        await audited(usual, tmp_path / "empty.db")


async def test_a_chain_of_other_validators_is_refused(usual: StoredChain, usual_store: Path, tmp_path: Path) -> None:
    other = random_chain(1, 2)
    copy = shutil.copy(usual_store, tmp_path / "copy.db")
    finding = (await audited(other, Path(copy))).finding
    assert finding is not None
    assert finding.table == "blocks"


async def test_an_audit_follows_the_committee_and_the_new_one_proves_its_decisions(tmp_path: Path) -> None:
    chain = StoredChain()
    world = chain.world
    chain.add(*world.case("solo", "before", policy("203.0.113.5"), "203.0.113.5"))
    member = joining(world, "v9")
    chain.add(*(world.command(who, "validator_set", add=[member]) for who in ("alice", "bob")))
    world.after(61)
    chain.add(*world.case("solo", "after", policy("203.0.113.6"), "203.0.113.6"), skipped=1)
    where = await stored(chain, tmp_path / "ledger.db")
    report = await audited(chain, where)
    assert report.finding is None, str(report.finding)
    assert report.state_root == world.state.root
    async with open_store(where) as store:
        raw = await store.outbox.event("decision", 2)
    assert raw is not None
    proven = verify_proof(codec.POLICY_UPDATE.decode(raw).proof, world.genesis)
    assert (proven.header.epoch, len(proven.members)) == (2, 5)
    for change in ("DELETE FROM epochs", "UPDATE epochs SET committee = x'00'", "UPDATE epochs SET step = x'7b7d'"):
        copy = Path(shutil.copy(where, tmp_path / "copy.db"))
        plain = sqlite3.connect(copy)
        plain.executescript(change)
        plain.close()
        finding = (await audited(chain, copy)).finding
        assert finding is not None
        assert finding.table == "epochs", str(finding)
