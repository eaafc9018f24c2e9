"""Whole validators with their real files: what they admit, what survives them, what they refuse to believe."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import sqlite3
from collections.abc import Callable

import pytest

from cybermesh.consensus.certificates import vote_bytes
from cybermesh.consensus.codec import decode_evidence, decode_quorum_cert, encode_message, encode_quorum_cert
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.journal import KeyInUseError
from cybermesh.consensus.transport import Kind
from cybermesh.consensus.types import BlockHash, DoubleVote, Round, Vote
from cybermesh.messages import Transaction, TxKind, tx_digest
from cybermesh.roles.recovery import RecoveryError
from cybermesh.roles.validator import ValidatorRole
from cybermesh.store import StoreUnavailable
from cybermesh.store.records import JournaledTransaction
from cybermesh.store.store import open_store
from cybermesh.wire import codec
from tests.roles.site import TOPICS, Site


async def test_four_validators_commit_a_good_message_and_agree(four: Site) -> None:
    async with four.running(1, 2, 3, 4):
        await four.until_votes(1, 2, 3, 4)
        raw = await four.send(four.anomaly("a1"))
        await four.until_committed(raw, 1, 2, 3, 4)
        assert [role.messages.admitted for role in four.roles.values()] == [1] * 4
    await four.assert_agreement(1, 2, 3, 4)


async def test_three_of_four_go_on_and_the_fourth_catches_up_from_its_files(four: Site) -> None:
    async with four.running(1, 2, 3):
        async with four.running(4):
            await four.until_votes(1, 2, 3, 4)
            first = await four.send(four.anomaly("before"))
            await four.until_committed(first, 1, 2, 3, 4)
        second = await four.send(four.anomaly("meanwhile"))
        await four.until_committed(second, 1, 2, 3)
        async with four.running(4):
            await four.until_committed(second, 4)
            await four.until_votes(4)
            third = await four.send(four.anomaly("after"))
            await four.until_committed(third, 1, 2, 3, 4)
    await four.assert_agreement(1, 2, 3, 4)


async def test_a_lost_safety_file_makes_an_observer_that_follows(four: Site) -> None:
    four.safety_file(4).unlink()
    async with four.running(1, 2, 3, 4):
        await four.until_votes(1, 2, 3)
        raw = await four.send(four.anomaly("a1"))
        await four.until_committed(raw, 1, 2, 3, 4)
        status = four.roles[4].status
        assert status is not None
        assert status.problem == "observer"
        assert four.roles[4].figures()["validator_voting"] == 0
    await four.assert_agreement(1, 2, 3, 4)
    assert not four.safety_file(4).exists()


async def test_a_second_process_with_the_same_key_does_not_start(alone: Site) -> None:
    async with alone.running(1):
        await alone.until_votes(1)
        role = ValidatorRole(dataclasses.replace(alone.roles[1]._parts, bus=alone.bus))
        with pytest.raises(KeyInUseError, match="another process uses this key"):
            await role.run()


def _faults(site: Site) -> dict[str, bytes]:
    """One message for each fault that a validator can find, by the code it must get."""
    message = site.anomaly("bad")
    old = site.stamp("ai-1", ts_ms=site.clock.wall_ms() - 400_000)
    new = site.stamp("ai-1", ts_ms=site.clock.wall_ms() + 400_000)
    other = site.anomaly("other")
    good = codec.encode(site.anomaly("unknown field"))

    def with_(**changes: object) -> bytes:
        return codec.encode(dataclasses.replace(message, **changes))  # type: ignore[arg-type]

    return {
        "MALFORMED": b"\xff\xff",
        "NON_CANONICAL": good + b"\xf8\x3f\x01",
        "STRUCTURE": with_(id=""),
        "ALGORITHM": with_(alg="none"),
        "STALE": codec.encode(site.anomaly("old", stamp=old)),
        "FUTURE": codec.encode(site.anomaly("new", stamp=new)),
        "CONTENT_HASH": with_(content_hash=bytes(32)),
        "KEY_MISMATCH": with_(producer_id=other.producer_id[::-1]),
        "SIGNATURE": with_(signature=other.signature),
        "UNKNOWN_PRODUCER": codec.encode(site.anomaly("stranger", stamp=site.stamp("operator-1"))),
        "FIELD_MISMATCH": with_(severity=1),
        "TOO_LARGE": b"\x00" * (1024 * 1024 + 1),
    }


async def test_each_fault_is_a_dead_letter_with_its_code_and_the_next_good_message_is_admitted(alone: Site) -> None:
    faults = _faults(alone)
    async with alone.running(1):
        await alone.until_votes(1)
        for number, raw in enumerate(faults.values(), start=1):
            await alone.send(raw)
            last = await alone.send(alone.anomaly(f"good-{number}"))
            await alone.until(lambda number=number: alone.roles[1].messages.admitted == number)
        await alone.until_committed(last, 1)
        letters = await alone.dead_letters(len(faults))
    assert sorted(letter.code for letter in letters) == sorted(faults)
    assert {letter.raw_sha256 for letter in letters} >= {hashlib.sha256(raw).digest() for raw in faults.values()}
    assert {(letter.topic, letter.node) for letter in letters} == {(TOPICS.ai_anomalies, "validator-1")}
    assert alone.roles[1].figures()["validator_refused_total"] == len(faults)


async def test_a_repeated_message_is_dropped_quietly_before_and_after_its_block(alone: Site) -> None:
    message = alone.anomaly("a1")
    await alone.send(message)
    await alone.send(message)  # both are in the first batch
    async with alone.running(1):
        await alone.until(lambda: 1 in alone.roles and alone.roles[1].messages.duplicates == 1)
        raw = await alone.send(message)
        await alone.until_committed(raw, 1)
        await alone.until(lambda: alone.roles[1].messages.duplicates == 2)
        assert alone.roles[1].messages.admitted == 1
        assert not alone.roles[1].messages.refused


async def test_a_nonce_used_twice_in_one_batch_is_a_replay(alone: Site) -> None:
    await alone.send(alone.anomaly("first", stamp=alone.stamp("ai-1", counter=7)))
    await alone.send(alone.anomaly("second", stamp=alone.stamp("ai-1", counter=7)))
    async with alone.running(1):
        (letter,) = await alone.dead_letters(1)
        await alone.until(lambda: alone.roles[1].messages.admitted == 1)
    assert letter.code == "NONCE_REPLAY"


async def test_a_database_that_cannot_answer_delays_a_dead_letter_and_ends_nothing(alone: Site) -> None:
    async with alone.running(1):
        await alone.until_votes(1)
        journal = alone.stores[1].mempool
        committed, asked = journal.committed, asyncio.Event()

        async def once_away(digests):  # type: ignore[no-untyped-def]
            if not asked.is_set():
                asked.set()
                raise StoreUnavailable("locked")
            return await committed(digests)

        journal.committed = once_away  # type: ignore[method-assign]
        await alone.send(alone.anomaly("old", stamp=alone.stamp("ai-1", ts_ms=alone.clock.wall_ms() - 400_000)))
        await asked.wait()
        await asyncio.sleep(0)
        status = alone.roles[1].status
        assert status is not None
        assert status.problem == "locked"
        (letter,) = await alone.dead_letters(1)
        assert letter.code == "STALE"
        await alone.until_votes(1)


async def test_a_peer_gets_no_blocks_from_a_database_that_cannot_answer_and_nothing_ends(four: Site) -> None:
    async with four.running(1, 2, 3):
        await four.until_votes(1, 2, 3)
        chain = four.stores[1].chain
        read, asked = chain.blocks, asyncio.Event()

        async def once_away(first, limit):  # type: ignore[no-untyped-def]
            if not asked.is_set():
                asked.set()
                raise StoreUnavailable("locked")
            return await read(first, limit)

        chain.blocks = once_away  # type: ignore[method-assign]
        for number in (2, 3):
            four.stores[number].chain.blocks = once_away  # type: ignore[method-assign]
        raw = await four.send(four.anomaly("a1"))
        await four.until_committed(raw, 1, 2, 3)
        async with four.running(4):
            await four.until_committed(raw, 4)
        assert asked.is_set()
    await four.assert_agreement(1, 2, 3, 4)


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda raw: raw[:-70] + bytes(70), id="a message nobody signed"),
        pytest.param(lambda _raw: b"\x07nothing", id="no message"),
    ],
)
async def test_a_forged_entry_of_the_journal_is_struck_out_at_the_start(alone: Site, forge: Callable[[bytes], bytes]) -> None:
    genuine = Transaction(TxKind.ANOMALY, codec.encode(alone.anomaly("accepted"))).encode()
    forged = forge(Transaction(TxKind.ANOMALY, codec.encode(alone.anomaly("forged"))).encode())
    async with open_store(alone.ledger_file(1)) as store:
        await store.mempool.add([JournaledTransaction(tx_digest(raw), raw, 1) for raw in (forged, genuine)])
    async with alone.running(1):
        await alone.until_committed(genuine[1:], 1)
        assert not await alone.stores[1].mempool.load()
        head = await alone.stores[1].chain.head()
        assert head is not None
        rows = await alone.stores[1].chain.transactions_between(1, head.height)
    assert [row.payload for row in rows] == [genuine]


async def test_what_was_committed_but_not_published_is_published_after_a_restart(alone: Site) -> None:
    alone.bus.refused_topics = {TOPICS.control_commits, TOPICS.control_policy}
    async with alone.running(1):
        await alone.until_votes(1)
        for message in alone.case("p1"):
            raw = await alone.send(message)
        await alone.until_committed(raw, 1)
        await alone.bus.has_refused.wait()
    alone.bus.refused_topics = set()
    async with alone.running(1):
        (record,) = await alone.records(TOPICS.control_policy, 1)
        commits = await alone.records(TOPICS.control_commits, 1)
    assert codec.POLICY_UPDATE.decode(record.value).policy_id == "p1"
    assert codec.COMMIT.decode(commits[0].value).anomaly_ids == ("a-p1",)


async def test_what_was_acknowledged_but_not_committed_is_committed_after_a_restart(four: Site) -> None:
    async with four.running(1, 2):  # no quorum
        await four.until(lambda: {1, 2} <= four.roles.keys())
        raw = await four.send(four.anomaly("a1"))
        await four.until(lambda: all(role.messages.admitted == 1 for role in four.roles.values()))
        await four.until(lambda: not _unacknowledged(four, "1") and not _unacknowledged(four, "2"))
    async with four.running(1, 2, 3):
        await four.until_committed(raw, 1, 2, 3)
        assert four.roles[1].messages.admitted == 0


def _unacknowledged(site: Site, number: str) -> bool:
    partitions = site.bus._topics[TOPICS.ai_anomalies]
    return any(
        cursor.acknowledged < partition.end
        for partition in partitions
        for group, cursor in partition.cursors.items()
        if group.endswith(number)
    )


async def test_a_store_whose_head_no_quorum_committed_is_refused(alone: Site) -> None:
    async with alone.running(1):
        await alone.until_votes(1)
        raw = await alone.send(alone.anomaly("a1"))
        await alone.until_committed(raw, 1)
    with sqlite3.connect(alone.ledger_file(1)) as database:
        height, body = database.execute("SELECT height, body FROM certificates ORDER BY height DESC LIMIT 1").fetchone()
        genuine = decode_quorum_cert(body)
        forged = dataclasses.replace(genuine, signatures=((0, bytes(64)),))
        database.execute("UPDATE certificates SET body = ? WHERE height = ?", (encode_quorum_cert(forged), height))
    database.close()
    with pytest.raises(ExceptionGroup) as raised:
        async with alone.running(1):
            await asyncio.sleep(5)
    assert raised.group_contains(RecoveryError, match="no quorum committed")


async def test_equivocation_is_kept_in_the_audit_trail_and_shown(four: Site) -> None:
    committee = Committee.of(four.genesis.chain_id, (member.pubkey for member in four.genesis.validators))
    culprit, key = four.deployment.validator_index(4), four.deployment.keys["validator-4"]
    async with four.running(1, 2, 3):
        await four.until_votes(1, 2, 3)
        status = four.roles[1].status
        assert status is not None
        round_, votes = Round(status.round + 3), []
        for fill in (1, 2):
            place = (round_, BlockHash(bytes((fill,)) * 32), Round(round_ - 1), BlockHash(bytes(32)))
            signature = key.sign(vote_bytes(committee, *place))
            votes.append(Vote(committee.epoch, *place, culprit, signature))
        with four.networks.of(four.committee).endpoint(culprit) as transport:
            for vote in votes:
                transport.send(four.deployment.validator_index(1), Kind.VOTE, encode_message(vote))
            await four.until(lambda: four.roles[1].figures()["validator_equivocations_total"] == 1)
            while not (trail := await four.stores[1].node.audit_trail(10)):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    (entry,) = trail
    assert (entry.actor, entry.action, entry.subject) == ("validator-1", "equivocation DoubleVote", key.public.hex())
    assert decode_evidence(entry.detail) == DoubleVote(*votes)


async def test_a_sensor_that_operators_have_added_is_admitted_and_one_they_have_removed_is_not(alone: Site) -> None:
    second = alone.deployment.keys["ai-2"].public.hex()
    async with alone.running(1):
        await alone.until_votes(1)
        raw = await alone.send(alone.command("key_ring", remove=[second]))
        await alone.until_committed(raw, 1)
        await alone.until(lambda: len(alone.roles[1]._intake.ring) == 4)
        await alone.send(alone.anomaly("removed", who="ai-2"))
        (letter,) = await alone.dead_letters(1)
        assert letter.code == "UNKNOWN_PRODUCER"
    async with alone.running(1):
        await alone.until_votes(1)
        member = {"name": "ai-2", "pubkey": second, "site": "site-2"}
        raw = await alone.send(alone.command("key_ring", add=[member]))
        await alone.until_committed(raw, 1)
        await alone.until(lambda: len(alone.roles[1]._intake.ring) == 5)
        raw = await alone.send(alone.anomaly("added", who="ai-2"))
        await alone.until_committed(raw, 1)
