"""Proposals travel as digests, and a replica is handed nothing but whole blocks."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.consensus import courier as module
from cybermesh.consensus.courier import KEPT_BLOCKS, Courier
from cybermesh.consensus.mempool import Mempool, PendingTransaction
from cybermesh.consensus.types import Block, GetPayload, Payload, Proposal
from cybermesh.messages import tx_digest

TRANSACTIONS = tuple(b"transaction %d" % number for number in range(6))


def mempool_with(transactions) -> Mempool:
    mempool = Mempool()
    for each in transactions:
        mempool.add(PendingTransaction(tx_digest(each), b"p", 0, each))
    return mempool


@pytest.fixture
def block(bench) -> Block:
    return bench.block(1, payload=TRANSACTIONS)


@pytest.fixture
def proposer() -> Courier:
    return Courier(mempool_with(TRANSACTIONS))


def test_a_block_is_made_whole_from_the_own_mempool_without_a_question(block, proposer):
    assert Courier(mempool_with(TRANSACTIONS)).take(0, proposer.compact(block)) == block


@given(st.sets(st.sampled_from(TRANSACTIONS)))
def test_exactly_what_is_missing_is_asked_for_and_makes_the_block_whole(known):
    from tests.consensus.conftest import Bench

    whole = Bench().block(1, payload=TRANSACTIONS)
    sender, voter = Courier(Mempool()), Courier(mempool_with(known))
    result = voter.take(0, sender.compact(whole))
    if isinstance(result, GetPayload):
        assert result.digests == tuple(tx_digest(each) for each in TRANSACTIONS if each not in known)
        answer = sender.serve(result)
        assert answer is not None
        result = voter.fill(0, answer)
    assert result == whole
    assert voter.held == 0
    assert voter.fetched == len(TRANSACTIONS) - len(known)
    # Who has completed a block can help the next one.
    assert Courier(Mempool()).take(1, voter.compact(whole)) is not None
    again = voter.serve(GetPayload(1, whole.hash, tuple(tx_digest(each) for each in TRANSACTIONS)))
    assert again is not None
    assert again.transactions == TRANSACTIONS


def test_an_answer_that_holds_only_a_part_is_followed_by_another_question(block, proposer, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_BYTES_MAX", 2 * len(TRANSACTIONS[0]))
    voter = Courier(Mempool())
    result = voter.take(0, proposer.compact(block))
    questions = 0
    while isinstance(result, GetPayload):
        questions += 1
        answer = proposer.serve(result)
        assert answer is not None
        assert len(answer.transactions) == 2
        result = voter.fill(0, answer)
    assert result == block
    assert questions == 3


@pytest.mark.parametrize("given_back", [(), (b"junk",), (b"junk",) * 5_000], ids=["nothing", "junk", "much junk"])
def test_an_answer_that_brings_nothing_ends_the_matter(block, proposer, given_back):
    voter = Courier(Mempool())
    assert isinstance(voter.take(0, proposer.compact(block)), GetPayload)
    assert voter.fill(0, Payload(1, block.hash, given_back)) is None
    assert voter.held == 0
    assert voter.fill(0, Payload(1, block.hash, TRANSACTIONS)) is None


def test_unasked_transactions_are_not_taken(block, proposer):
    voter = Courier(Mempool())
    assert voter.fill(0, Payload(1, block.hash, TRANSACTIONS)) is None
    voter.take(0, proposer.compact(block))
    assert voter.fill(1, Payload(1, block.hash, TRANSACTIONS)) is None
    assert voter.fill(0, Payload(1, bytes(32), TRANSACTIONS)) is None
    assert voter.held == 1


def test_a_peer_holds_no_more_than_its_newest_proposal(bench, proposer):
    voter = Courier(Mempool())
    proposals = [proposer.compact(bench.block(round_, payload=TRANSACTIONS)) for round_ in (2, 3, 1)]
    answers = [voter.take(0, each) for each in proposals]
    assert [isinstance(each, GetPayload) for each in answers] == [True, True, False]
    assert voter.held == 1


def test_only_the_newest_blocks_are_kept_for_others(bench, proposer):
    blocks = [bench.block(round_, payload=TRANSACTIONS) for round_ in range(1, KEPT_BLOCKS + 3)]
    for each in blocks:
        proposer.compact(each)
    asked = [proposer.serve(GetPayload(1, each.hash, (tx_digest(TRANSACTIONS[0]),))) for each in blocks]
    assert [each is not None for each in asked] == [False, False] + [True] * KEPT_BLOCKS


def test_digests_of_another_payload_give_a_block_that_its_header_disowns(bench, block, proposer):
    swapped = dataclasses.replace(proposer.compact(block), digests=tuple(tx_digest(each) for each in TRANSACTIONS[:3]))
    assert isinstance(swapped, Proposal)
    taken = Courier(mempool_with(TRANSACTIONS)).take(0, swapped)
    assert isinstance(taken, Block)
    assert bench.verifier.proposal_fault(taken, bench.leader(1)) == "payload"
