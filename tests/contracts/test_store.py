"""The contract of the store: the same suite for every database.

A database joins by a line in ``KINDS``: a name and a function that gives a fresh one's URL or file. PostgreSQL is the real one,
started by the test run itself (``tests/postgres.py``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import event

from cybermesh.store import BlockConflict, StoreError, StoreUnavailable
from cybermesh.store.records import (
    AuditEntry,
    CommittedBlock,
    JournaledTransaction,
    LifecycleStep,
    OutboxEvent,
    StoredAck,
    StoredBlock,
    StoredDecision,
    StoredEpoch,
    StoredEvidence,
    StoredLabel,
    StoredReceipt,
    StoredSnapshot,
    StoredTransaction,
)
from cybermesh.store.store import Store, open_store

KINDS: dict[str, Callable[[pytest.FixtureRequest], str | Path]] = {
    "postgres": lambda request: request.getfixturevalue("postgres").database(),
    "sqlite": lambda request: request.getfixturevalue("tmp_path") / "store.db",
}


@pytest.fixture(params=sorted(KINDS))
def where(request: pytest.FixtureRequest) -> str | Path:
    return KINDS[request.param](request)


@pytest.fixture
async def store(where: str | Path) -> AsyncIterator[Store]:
    async with open_store(where) as opened:
        yield opened


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def decision(seq: int, policy_id: str, change: str = "opened", **values: object) -> StoredDecision:
    made = StoredDecision(
        decision_seq=seq,
        height=seq,
        leaf=2 * seq - 2,
        policy_id=policy_id,
        request_id="r",
        change=change,
        action="drop",
        rule_type="block",
        rule_data=b'{"policy_id":"p"}',
        rule_hash=digest("rule"),
        opened_at_ms=1,
        expires_at_ms=2,
        why="budget",
        ending="",
        reporters=("aa", "bb"),
        approvers=(),
    )
    return dataclasses.replace(made, **values)  # type: ignore[arg-type]


def block(height: int, fork: str = "", *, certificate: bytes | None = None) -> CommittedBlock:
    """A block with two transactions, two receipts, a decision, evidence and two outbox rows."""
    transactions = tuple(
        StoredTransaction(height, position, digest("tx", height, position), b"\x01body %d %d" % (height, position))
        for position in range(2)
    )
    first_leaf = 2 * (height - 1)
    return CommittedBlock(
        block=StoredBlock(
            height=height,
            hash=digest("block", height, fork),
            epoch=1,
            round=height + 3,
            time_ms=1_700_000_000_000 + height,
            author=height % 4,
            header=b"header %d" % height,
            frame=b"frame",
            state_root=digest("root", height, fork),
            decision_seq=height,
            transaction_count=2,
            first_leaf=first_leaf,
            receipt_count=2,
            last_voted_round=height + 4,
            committed_ms=1_700_000_000_500 + height,
        ),
        certificate=b"certificate %d" % height if certificate is None else certificate,
        transactions=transactions,
        receipts=tuple(
            StoredReceipt(first_leaf + row.position, height, "anomaly", row.digest.hex(), "OK", b"receipt")
            for row in transactions
        ),
        decisions=(decision(height, f"policy-{height}"),),
        evidence=(StoredEvidence(digest("evidence", height), f"e-{height}", b"\x01" * 32, height, b"{}"),),
        epochs=(StoredEpoch(1, 1, b"committee", b""),) if height == 1 else (),
        outbox=(
            OutboxEvent("commit", height, "control.commits.v1", b"k", b"commit %d" % height),
            OutboxEvent("policy", height, "control.policy.v1", b"k", b"policy %d" % height),
        ),
        mempool_done=tuple(row.digest for row in transactions),
    )


def journaled(height: int) -> list[JournaledTransaction]:
    return [JournaledTransaction(row.digest, row.payload, 5) for row in block(height).transactions]


async def everything(store: Store) -> tuple[object, ...]:
    """All that a block writes, for comparing before and after."""
    return (
        await store.chain.blocks(0, 100),
        await store.chain.certificates(0, 100),
        await store.chain.transactions_between(0, 100),
        await store.chain.receipts(0, 100),
        await store.chain.decisions(100),
        await store.chain.counts(),
        await store.outbox.pending(100),
        await store.mempool.load(),
    )


async def test_an_empty_store_says_so(store: Store) -> None:
    assert await store.chain.head() is None
    assert await store.chain.block(1) is None
    assert await store.chain.certificate(1) is None
    assert set((await store.chain.counts()).values()) == {0}
    assert (await store.node.last_boot(), await store.node.last_voted_round()) == (0, 0)
    assert await store.node.newest_snapshot() is None
    assert await store.append([]) == 0


async def test_a_block_reads_back_as_it_was_written(store: Store) -> None:
    written = block(1)
    assert await store.append([written]) == 1
    chain = store.chain
    assert await chain.head() == await chain.block(1) == await chain.block_by_hash(written.block.hash) == written.block
    assert tuple(await chain.transactions(1)) == written.transactions
    assert await chain.transaction(written.transactions[1].digest) == written.transactions[1]
    assert tuple(await chain.receipts_of_block(1)) == written.receipts
    assert tuple(await chain.receipts_about(written.transactions[0].digest.hex())) == written.receipts[:1]
    assert await chain.receipt_of_decision(1) == written.receipts[0]
    expected = dataclasses.replace(written.decisions[0], is_active=True)
    assert await chain.decision(1) == expected
    assert list(await chain.policy_history("policy-1")) == [expected]
    assert await chain.evidence(written.evidence[0].digest) == written.evidence[0]
    assert tuple(await chain.evidence_by_id("e-1")) == written.evidence
    assert tuple(await chain.epochs()) == written.epochs
    assert await chain.certificate(1) == (1, b"certificate 1")
    assert await store.node.last_voted_round() == written.block.last_voted_round
    assert [(row.event, row.subject, row.value) for row in await store.outbox.pending(10)] == [
        ("commit", 1, b"commit 1"),
        ("policy", 1, b"policy 1"),
    ]


async def test_what_was_written_is_there_after_a_restart(where: str | Path) -> None:
    async with open_store(where) as store:
        await store.append([block(1), block(2)])
        before = await everything(store)
    async with open_store(where) as store:
        assert await everything(store) == before


async def test_writing_the_same_block_twice_changes_nothing(store: Store) -> None:
    await store.append([block(1), block(2)])
    before = await everything(store)
    assert await store.append([block(1), block(2)]) == 0
    assert await store.append([dataclasses.replace(block(2), certificate=b"another certificate of the same block")]) == 0
    assert await everything(store) == before


async def test_of_a_batch_only_the_new_blocks_are_written(store: Store) -> None:
    await store.append([block(1), block(2)])
    assert await store.append([block(2), block(3), block(4)]) == 2
    assert [entry.height for entry in await store.chain.blocks(0, 10)] == [1, 2, 3, 4]


@pytest.mark.parametrize("batch", [[2], [2, 3], [1, 2, 3, 4]])
async def test_another_block_at_a_stored_height_stops_with_both_hashes(store: Store, batch: list[int]) -> None:
    await store.append([block(1), block(2), block(3)])
    before = await everything(store)
    with pytest.raises(BlockConflict) as refused:
        await store.append([block(height, "fork" if height == 2 else "") for height in batch])
    assert (refused.value.height, refused.value.stored, refused.value.given) == (
        2,
        block(2).block.hash,
        block(2, "fork").block.hash,
    )
    assert refused.value.stored.hex() in str(refused.value)
    assert refused.value.given.hex() in str(refused.value)
    assert await everything(store) == before


@pytest.mark.parametrize("heights", [[3], [1, 3], [2, 1]])
async def test_a_missing_height_is_refused(store: Store, heights: list[int]) -> None:
    await store.append([block(1)])
    with pytest.raises(StoreError, match=r"follow|consecutive"):
        await store.append([block(height) for height in heights])
    assert [entry.height for entry in await store.chain.blocks(0, 10)] == [1]


async def test_an_empty_store_may_begin_at_a_snapshot(store: Store) -> None:
    assert await store.append([block(7)]) == 1
    with pytest.raises(StoreError, match="follow"):
        await store.append([block(6)])


async def test_the_certificate_of_a_batch_proves_its_earlier_blocks(store: Store) -> None:
    await store.append([block(1, certificate=b""), block(2, certificate=b""), block(3)])
    assert [await store.chain.certificate(height) for height in (1, 2, 3)] == [(3, b"certificate 3")] * 3
    assert await store.chain.certificate(4) is None
    assert list(await store.chain.certificates(0, 9)) == [(3, b"certificate 3")]


async def test_only_the_newest_decision_of_a_policy_that_has_not_ended_is_active(store: Store) -> None:
    def with_decisions(height: int, *made: StoredDecision) -> CommittedBlock:
        return dataclasses.replace(block(height), decisions=tuple(dataclasses.replace(row, height=height) for row in made))

    await store.append([with_decisions(1, decision(1, "a"), decision(2, "b"), decision(3, "a", "renewed"))])
    await store.append([with_decisions(2, decision(4, "b", "ended"), decision(5, "c"), decision(6, "c", "ended"))])
    await store.append([with_decisions(3, decision(7, "c"), decision(8, "d"))])
    assert [row.decision_seq for row in await store.chain.decisions(10, active_only=True)] == [8, 7, 3]
    assert [row.decision_seq for row in await store.chain.decisions(3, before=7)] == [6, 5, 4]
    assert [row.decision_seq for row in await store.chain.decisions_from(4, 2)] == [4, 5]
    assert [row.change for row in await store.chain.policy_history("c")] == ["opened", "ended", "opened"]


async def test_the_same_evidence_body_may_come_twice(store: Store) -> None:
    again = dataclasses.replace(block(2), evidence=block(1).evidence)
    await store.append([block(1), again])
    found = await store.chain.evidence(block(1).evidence[0].digest)
    assert found is not None
    assert found.height == 1


async def test_long_lists_come_in_pages(store: Store) -> None:
    await store.append([block(height) for height in range(1, 8)])
    assert [entry.height for entry in await store.chain.blocks(3, 2)] == [3, 4]
    assert [row.leaf for row in await store.chain.receipts(5, 4)] == [5, 6, 7, 8]
    assert [(row.height, row.position) for row in await store.chain.transactions_between(2, 3)] == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    assert await store.chain.blocks(1, -5) == ()


async def test_a_crash_between_any_two_statements_leaves_nothing_behind(store: Store) -> None:
    """The k-th statement of the transaction fails, for every k; afterwards the same block is written as if nothing had been."""
    await store.append([block(1)])
    await store.mempool.add(journaled(2))
    before = await everything(store)
    engine = store._database.engine.sync_engine
    crashes = 0
    while True:
        countdown = [crashes]

        def crash(*_: object, countdown: list[int] = countdown) -> None:
            if countdown[0] == 0:
                raise OSError(28, "No space left on device")
            countdown[0] -= 1

        event.listen(engine, "before_cursor_execute", crash)
        try:
            await store.append([block(2)])
        except StoreUnavailable:
            crashes += 1
        else:
            break
        finally:
            event.remove(engine, "before_cursor_execute", crash)
        assert await everything(store) == before
    assert crashes >= 10, "every table is a statement of its own"
    assert [entry.height for entry in await store.chain.blocks(0, 9)] == [1, 2]
    assert await store.mempool.load() == ()


async def test_rows_that_contradict_what_is_stored_change_nothing(store: Store) -> None:
    await store.append([block(1)])
    before = await everything(store)
    with pytest.raises(StoreError) as refused:
        await store.append([dataclasses.replace(block(2), decisions=(decision(1, "taken"),))])
    assert not isinstance(refused.value, StoreUnavailable)
    assert await everything(store) == before


async def test_a_cancelled_write_is_whole_or_absent_and_can_be_repeated(store: Store) -> None:
    for rounds in range(12):
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(store.append([block(1)]), name="append")
            for _ in range(rounds * 3):
                await asyncio.sleep(0)
            writing.cancel()
        counts = await store.chain.counts()
        assert counts["transactions"] == 2 * counts["blocks"] == counts["receipts"]
        assert counts["certificates"] == counts["decisions"] == counts["blocks"]
    await store.append([block(1)])
    assert await store.chain.head() == block(1).block


async def test_concurrent_writers_of_one_block_write_it_once(store: Store) -> None:
    async with asyncio.TaskGroup() as tasks:
        writers = [tasks.create_task(store.append([block(1)]), name=f"writer {number}") for number in range(5)]
    assert sorted(writer.result() for writer in writers) == [0, 0, 0, 0, 1]


async def test_reads_see_the_state_before_or_after_a_write(store: Store) -> None:
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(store.append([block(height) for height in range(1, 40)]), name="append")
        while not writing.done():
            assert (await store.chain.counts())["blocks"] in {0, 39}


async def test_the_journal_keeps_order_and_drops_repetitions(where: str | Path) -> None:
    async with open_store(where) as store:
        await store.mempool.add([*journaled(2), *journaled(1)])
        await store.mempool.add(journaled(2))
        await store.mempool.add([])
    async with open_store(where) as store:
        assert list(await store.mempool.load()) == [*journaled(2), *journaled(1)]
        await store.mempool.remove([row.digest for row in journaled(2)])
        await store.mempool.remove([])
        assert list(await store.mempool.load()) == journaled(1)


async def test_a_committed_transaction_leaves_the_journal_and_does_not_come_back(store: Store) -> None:
    await store.mempool.add([*journaled(1), *journaled(2)])
    await store.append([block(1)])
    assert list(await store.mempool.load()) == journaled(2)
    await store.mempool.add(journaled(1))
    assert list(await store.mempool.load()) == journaled(2)
    digests = [row.digest for row in (*journaled(1), *journaled(2))]
    assert await store.mempool.committed(digests) == {row.digest for row in journaled(1)}


async def test_a_thousand_transactions_fit_one_call(store: Store) -> None:
    rows = [JournaledTransaction(digest("many", number), b"x", 1) for number in range(1200)]
    await store.mempool.add(rows)
    assert await store.mempool.committed([row.digest for row in rows]) == frozenset()
    done = dataclasses.replace(block(1), mempool_done=tuple(row.digest for row in rows[:1100]))
    await store.append([done])
    assert list(await store.mempool.load()) == rows[1100:]


async def test_boots_are_recorded_once(store: Store) -> None:
    for boot in (1, 2, 2, 3):
        await store.node.record_boot(boot, 1_000 + boot)
    assert await store.node.last_boot() == 3


async def test_the_newest_snapshots_are_kept(store: Store) -> None:
    for height in (10, 20, 20, 30):
        await store.node.save_snapshot(StoredSnapshot(height, digest(height), digest("root", height), b"s%d" % height, 5))
    newest = await store.node.newest_snapshot()
    assert newest is not None
    assert (newest.height, newest.body) == (30, b"s30")


async def test_the_newest_ack_of_an_agent_counts(store: Store) -> None:
    def ack(agent: bytes, seq: int, acked_ms: int, result: str = "applied") -> StoredAck:
        return StoredAck("p", seq, agent, result, "", "", 7, 5, acked_ms, b"signed")

    late, early, other = ack(b"a", 1, 20), ack(b"a", 1, 10, "failed"), ack(b"b", 1, 15)
    assert [await store.feedback.add_ack(entry) for entry in (early, late, early, late, other)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert list(await store.feedback.acks_of("p")) == [late, other]
    newer = ack(b"a", 2, 5)
    await store.feedback.add_ack(newer)
    assert list(await store.feedback.newest_acks()) == [newer, other]


async def test_the_first_time_of_a_stage_counts(store: Store) -> None:
    first = LifecycleStep("a-1", "committed", 10, 1, "")
    await store.feedback.add_steps([first, LifecycleStep("a-1", "admitted", 5, 0, "")])
    await store.feedback.add_steps([dataclasses.replace(first, at_ms=99)])
    await store.feedback.add_steps([])
    assert [(step.stage, step.at_ms) for step in await store.feedback.steps_of("a-1")] == [("admitted", 5), ("committed", 10)]


async def test_labels_and_the_audit_trail_keep_every_entry(store: Store) -> None:
    labels = [StoredLabel("a-1", label, b"o", "", 5) for label in ("false_positive", "true_positive")]
    for label in labels:
        await store.feedback.add_label(label)
    assert list(await store.feedback.labels_of("a-1")) == labels
    entries = [AuditEntry(at_ms, "v1", "equivocation", "v3", b"{}") for at_ms in (5, 3, 9)]
    for entry in entries:
        await store.node.add_audit(entry)
    assert [entry.at_ms for entry in await store.node.audit_trail(10, since_ms=4)] == [5, 9]


async def test_outbox_rows_are_marked_once(store: Store) -> None:
    await store.append([block(1), block(2)])
    rows = await store.outbox.pending(10)
    assert [(row.event, row.subject) for row in rows] == [("commit", 1), ("policy", 1), ("commit", 2), ("policy", 2)]
    assert await store.outbox.mark_copy("policy", 1, (0, 5), 100)
    assert not await store.outbox.mark_copy("policy", 1, (0, 6), 101)
    assert not await store.outbox.mark_copy("policy", 9, (0, 6), 101)
    assert [row.id for row in await store.outbox.pending(10, after=rows[1].id)] == [rows[2].id, rows[3].id]
    assert await store.outbox.pending_count() == 3
