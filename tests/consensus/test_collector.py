"""Votes and timeouts become certificates, equivocation becomes evidence, and nobody can make the memory grow."""

from __future__ import annotations

import pytest

from cybermesh.consensus.collector import Collector
from cybermesh.consensus.types import DoubleProposal, DoubleTimeout, DoubleVote, QuorumCert, Round, TimeoutCert


@pytest.fixture
def collector(bench) -> Collector:
    return Collector(bench.committee, Round(1))


def test_r6_the_quorums_last_vote_completes_the_certificate_once(bench, collector):
    block = bench.block(1)
    results = [collector.add_vote(bench.vote(block, voter)) for voter in (3, 0, 2, 1)]
    assert [result is not None for result in results] == [False, False, True, False]
    assert isinstance(results[2], QuorumCert)
    assert [voter for voter, _ in results[2].signatures] == [0, 2, 3]
    assert bench.verifier.is_valid_quorum_cert(results[2])


def test_r6_votes_for_different_blocks_are_not_added_up(bench, collector):
    one, two = bench.block(1), bench.block(1, payload=[b"x"])
    votes = [bench.vote(one, 0), bench.vote(one, 1), bench.vote(two, 2), bench.vote(two, 3)]
    assert [collector.add_vote(vote) for vote in votes] == [None] * 4


def test_r6_a_second_vote_is_evidence_once_and_does_not_count(bench, collector):
    one, two = bench.block(1), bench.block(1, payload=[b"x"])
    assert collector.add_vote(bench.vote(one, 2)) is None
    assert collector.add_vote(bench.vote(one, 2)) is None
    evidence = collector.add_vote(bench.vote(two, 2))
    assert isinstance(evidence, DoubleVote)
    assert bench.verifier.is_valid_evidence(evidence)
    assert collector.add_vote(bench.vote(two, 2)) is None
    assert collector.add_vote(bench.vote(two, 0)) is None
    assert collector.add_vote(bench.vote(two, 1)) is None


def test_r6_timeouts_become_a_certificate_with_the_highest_of_theirs(bench, collector):
    high = bench.qc(bench.block(1))
    collector.enter(Round(2))
    timeouts = [bench.timeout(2, 3, high), bench.timeout(2, 0, last_tc=bench.tc(1)), bench.timeout(2, 1, high)]
    *none, tc = [collector.add_timeout(timeout) for timeout in timeouts]
    assert none == [None, None]
    assert isinstance(tc, TimeoutCert)
    assert tc.high_qc == high
    assert bench.verifier.is_valid_timeout_cert(tc)
    assert isinstance(collector.add_timeout(bench.timeout(2, 0, high)), DoubleTimeout)


def test_r6_two_proposals_of_a_leader_are_evidence_and_the_first_one_stays(bench, collector):
    one, two = bench.block(1), bench.block(1, payload=[b"x"])
    assert collector.add_proposal(one) is None
    assert collector.add_proposal(one) is None
    evidence = collector.add_proposal(two)
    assert isinstance(evidence, DoubleProposal)
    assert bench.verifier.is_valid_evidence(evidence)
    assert collector.proposal == one


def test_r6_votes_ahead_are_kept_and_far_ones_come_back_when_their_round_is_near(bench, collector):
    near, far = bench.block(9), bench.block(40)
    assert [collector.add_vote(bench.vote(near, voter)) for voter in (0, 1)] == [None, None]
    assert collector.add_vote(bench.vote(far, 2)) is None
    assert collector.enter(Round(9)) == []
    assert isinstance(collector.add_vote(bench.vote(near, 3)), QuorumCert)
    assert collector.enter(Round(35)) == [bench.vote(far, 2)]


def test_r6_a_flood_of_votes_for_future_rounds_is_bounded(bench, collector):
    n = bench.committee.n
    for round_ in range(1, 200):
        block = bench.block(round_)
        for voter in range(n):
            collector.add_vote(bench.vote(block, voter))
    assert collector.size <= (2 * n + 1) * n + n
    collector.enter(Round(1_000))
    assert collector.size == 0


def test_r6_votes_of_past_rounds_are_ignored(bench, collector):
    collector.enter(Round(5))
    assert collector.add_vote(bench.vote(bench.block(4), 0)) is None
    assert collector.size == 0
