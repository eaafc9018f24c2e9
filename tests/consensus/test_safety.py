"""What the key signs, rule by rule, and exhaustively over small rounds."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from cybermesh.consensus.events import Broadcast, Persist, Send
from cybermesh.consensus.safety import SafetyRules
from cybermesh.consensus.types import Round


@pytest.fixture
def rules(bench):
    """Makes safety rules of validator 0, open for rounds above 1 unless told otherwise."""

    def make(opened_at: int | None = 0, **fields) -> SafetyRules:
        record = dataclasses.replace(bench.fresh_record(), **fields)
        made = SafetyRules(bench.committee, 0, bench.signer(0), record)
        if opened_at is not None:
            made.open(Round(opened_at))
        return made

    return make


def chain(bench, *rounds):
    """A certificate for the last of a chain of blocks in these rounds."""
    qc = bench.genesis
    for round_ in rounds:
        qc = bench.qc(bench.block(round_, qc))
    return qc


def test_r3_a_vote_is_durable_before_it_is_sent_and_locks_its_parents_round(bench, rules):
    safety = rules()
    block = bench.block(6, chain(bench, 4, 5))
    (persist, broadcast), vote = safety.vote(block, Round(6))
    assert isinstance(persist, Persist)
    assert isinstance(broadcast, Broadcast)
    assert (persist.record.last_voted_round, persist.record.locked_round, persist.record.last_vote) == (6, 5, vote)
    assert persist.block == block
    assert persist.record.high_qc == block.qc
    assert broadcast.message == vote
    assert bench.verifier.is_valid_vote(vote)


def test_r3_no_second_vote_in_a_round_and_none_below(bench, rules):
    safety = rules()
    qc = chain(bench, 4, 5)
    assert safety.vote(bench.block(6, qc), Round(6)) is not None
    assert safety.vote(bench.block(6, qc, payload=[b"other"]), Round(6)) is None
    assert safety.vote(bench.block(5, chain(bench, 4)), Round(5)) is None


def test_r9_a_repetition_sends_the_recorded_bytes_and_only_for_the_same_block(bench, rules):
    safety = rules()
    block = bench.block(6, chain(bench, 4, 5))
    _, vote = safety.vote(block, Round(6))
    assert safety.repeat_vote(block, 3) == (Send(3, vote),)
    assert safety.repeat_vote(bench.block(6, chain(bench, 4, 5), payload=[b"other"]), 3) == ()


def test_r3_the_table_of_rounds(bench, rules):
    """Exhaustively: current round, block round, certificate, timeout certificate and what its signers reported, last vote."""
    checked = 0
    certificates = {round_: chain(bench, *range(1, round_ + 1)) for round_ in range(5)}
    for current, round_, certified in itertools.product(range(2, 6), range(2, 6), range(5)):
        for timed_out, reported, voted in itertools.product([None, *range(1, 5)], range(5), range(6)):
            if certified >= round_ or (timed_out is not None and reported >= timed_out) or (timed_out is None and reported):
                continue
            tc = None if timed_out is None else bench.tc(timed_out, [bench.genesis, bench.genesis, certificates[reported]])
            block = bench.block(round_, certificates[certified], tc=tc)
            safety = rules(last_voted_round=Round(voted))
            follows = certified + 1 == round_
            skips = timed_out is not None and timed_out + 1 == round_ and certified >= reported
            expected = round_ == current and round_ > voted and (follows or skips)
            assert (safety.vote(block, Round(current)) is not None) == expected
            checked += 1
    assert checked == 3_696


def test_r4_a_timeout_ends_voting_in_its_round_and_may_follow_a_vote(bench, rules):
    safety = rules()
    qc = chain(bench, 4, 5)
    assert safety.vote(bench.block(6, qc), Round(6)) is not None
    (persist, broadcast), timeout = safety.timeout(Round(6), qc, None)
    assert persist.record.last_timeout == timeout == broadcast.message
    assert bench.verifier.is_valid_timeout(timeout)
    fresh = rules()
    assert fresh.timeout(Round(6), qc, None) is not None
    assert fresh.vote(bench.block(6, qc), Round(6)) is None


def test_r4_a_timeout_is_repeated_in_the_same_bytes_whatever_was_learned_since(bench, rules):
    safety = rules()
    tc = bench.tc(5)
    _, first = safety.timeout(Round(6), bench.genesis, tc)
    (_, broadcast), again = safety.timeout(Round(6), chain(bench, 4), tc)
    assert again is first
    assert broadcast.message is first


@pytest.mark.parametrize(
    ("fields", "high", "tc"),
    [
        pytest.param({"last_voted_round": Round(7)}, (4, 5), None, id="below the last vote"),
        pytest.param({"locked_round": Round(5)}, (4,), 5, id="reporting less than the lock"),
        pytest.param({}, (4,), None, id="without a certificate of the round before"),
        pytest.param({}, (4,), 4, id="with an older timeout certificate"),
    ],
)
def test_r4_a_timeout_that_could_unlock_others_is_refused(bench, rules, fields, high, tc):
    last_tc = None if tc is None else bench.tc(tc)
    assert rules(**fields).timeout(Round(6), chain(bench, *high), last_tc) is None


def test_r2_one_proposal_per_round_and_none_after_giving_it_up(bench, rules):
    safety = rules()
    block = bench.block(6, chain(bench, 4, 5), author=0)
    assert safety.may_propose(Round(6))
    (persist, broadcast), proposed = safety.propose(block.header, block.qc, None, ())
    assert persist.record.last_proposed_round == 6
    assert persist.block == proposed == broadcast.message
    assert not safety.may_propose(Round(6))
    assert not safety.may_propose(Round(5))
    other = rules()
    other.timeout(Round(6), block.qc, None)
    assert not other.may_propose(Round(6))


def test_r10_nothing_is_signed_before_a_quorum_has_told_where_it_stands(bench, rules):
    safety = rules(opened_at=None)
    qc = chain(bench, 4, 5)
    assert not safety.may_propose(Round(6))
    assert safety.vote(bench.block(6, qc), Round(6)) is None
    assert safety.timeout(Round(6), qc, None) is None


def test_r10_after_a_start_the_first_vote_is_above_one_plus_the_highest_certified_round(bench, rules):
    safety = rules(opened_at=5)
    qc = chain(bench, 4, 5)
    assert safety.is_barred_from_voting(Round(6))
    assert safety.vote(bench.block(6, qc), Round(6)) is None
    assert not safety.may_propose(Round(6))
    assert safety.timeout(Round(6), qc, None) is not None
    assert safety.vote(bench.block(7, bench.qc(bench.block(6, qc))), Round(7)) is not None


def test_r10_a_signature_of_this_key_that_the_record_does_not_know_betrays_an_old_copy(bench, rules):
    block = bench.block(6, chain(bench, 4, 5))
    with_me, without_me = bench.qc(block, [0, 1, 2]), bench.qc(block, [1, 2, 3])
    assert rules(last_voted_round=Round(5)).is_betrayed_by(with_me)
    assert not rules(last_voted_round=Round(6)).is_betrayed_by(with_me)
    assert not rules(last_voted_round=Round(5)).is_betrayed_by(without_me)
    assert rules(last_voted_round=Round(5)).is_betrayed_by(bench.tc(7))


def test_an_observer_and_a_stopped_key_sign_nothing(bench, rules):
    observer = SafetyRules(bench.committee, 0, None, bench.fresh_record())
    observer.open(Round(0))
    stopped = rules()
    stopped.stop()
    qc = chain(bench, 4, 5)
    for safety in (observer, stopped):
        assert safety.is_observer
        assert not safety.may_propose(Round(6))
        assert safety.vote(bench.block(6, qc), Round(6)) is None
        assert safety.timeout(Round(6), qc, None) is None
        assert not safety.is_betrayed_by(bench.qc(bench.block(6, qc), [0, 1, 2]))
