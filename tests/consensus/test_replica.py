"""Transcripts, event and effects, one for each rule and attack."""

from __future__ import annotations

import dataclasses

import pytest

from cybermesh.consensus.events import (
    Accuse,
    Broadcast,
    Commit,
    Connected,
    Halt,
    Persist,
    Refuse,
    Send,
    ServeBlocks,
    ServeEpoch,
    Started,
    StopVoting,
    Tick,
)
from cybermesh.consensus.types import (
    Block,
    Blocks,
    Forward,
    GetBlocks,
    Height,
    Round,
    Sync,
    Timeout,
    Vote,
)


def broadcasts(effects, kind):
    return [effect.message for effect in effects if isinstance(effect, Broadcast) and isinstance(effect.message, kind)]


def of(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


def sends(effects, kind):
    return [(effect.to, effect.message) for effect in effects if isinstance(effect, Send) and isinstance(effect.message, kind)]


def outsider(bench, *rounds):
    """A validator that leads none of these rounds."""
    return next(index for index in range(bench.committee.n) if index not in {bench.leader(round_) for round_ in rounds})


@pytest.fixture
def follower(bench, talk):
    """A validator that leads neither round 2, 3 nor 4, in round 2, with a timeout certificate of round 1."""
    transcript = talk(outsider(bench, 2, 3, 4))
    transcript.start()
    assert transcript.replica.round == 2
    return transcript


def second(bench, **options) -> Block:
    return bench.block(2, tc=bench.tc(1), **options)


def finish(bench, transcript, block, voters=None):
    """Let the replica hear a quorum of votes for a block."""
    effects = []
    for voter in voters or [index for index in range(bench.committee.n) if index != transcript.index]:
        effects += transcript.hear(bench.vote(block, voter), voter)
    return effects


# R10: the start


def test_r10_a_node_asks_all_where_they_stand_and_times_out_the_barred_round_at_once(bench, talk):
    transcript = talk(0)
    (first,) = broadcasts(transcript.event(Started()), Sync)
    assert first.wants_reply
    assert broadcasts(transcript.wait(1_100), Sync), "asks again while nobody answers"
    assert broadcasts(transcript.wait(1_000), Timeout) == [], "signs nothing before a quorum has told"
    assert transcript.replica.waiting_for == "a quorum"
    for peer in (1, 2):
        transcript.hear(bench.sync(), peer)
    assert transcript.replica.waiting_for is None
    (timeout,) = broadcasts(transcript.wait(210), Timeout)
    assert timeout.round == 1


def test_r10_the_first_vote_after_a_start_is_above_one_plus_what_a_quorum_reported(bench, talk):
    transcript = talk(outsider(bench, 1, 2, 3))
    transcript.start(past_first_round=False)
    block = bench.block(1)
    assert broadcasts(transcript.hear(block), Vote) == []
    child = bench.block(2, bench.qc(block))
    assert [vote.block_hash for vote in broadcasts(transcript.hear(child), Vote)] == [child.hash]


def test_r10_a_certificate_with_a_vote_of_mine_that_i_do_not_know_stops_my_key(bench, follower):
    qc = bench.qc(second(bench), range(4))
    effects = follower.hear(bench.block(3, qc))
    assert of(effects, StopVoting)
    assert broadcasts(effects, Vote) == []
    assert broadcasts(follower.wait(20_000), Timeout) == []


def test_r10_a_restart_neither_votes_again_nor_forgets_its_blocks(bench, talk, follower):
    block = second(bench)
    effects = follower.hear(block)
    (persist,) = of(effects, Persist)
    again = talk(follower.index, record=dataclasses.replace(persist.record, boot=2), journal=[persist.block])
    again.start()
    twin = bench.block(2, tc=bench.tc(1), payload=[b"another"])
    assert broadcasts(again.hear(twin), Vote) == []
    effects = again.hear(bench.sync(bench.qc(bench.block(3, bench.qc(block)))))
    assert [each.block for commit in of(effects, Commit) for each in commit.blocks] == [block]


# R1 and R3: advance and vote


def test_r3_a_valid_proposal_is_executed_persisted_and_voted_for_in_this_order(bench, follower):
    block = second(bench, payload=[b"transaction"])
    effects = follower.hear(block, bench.leader(2))
    assert [type(effect) for effect in effects] == [Persist, Broadcast]
    assert effects[0].block == block
    assert effects[1].message.block_hash == block.hash


def test_r1_a_quorum_of_votes_leads_into_the_next_round(bench, follower):
    block = second(bench)
    follower.hear(block)
    finish(bench, follower, block)
    assert follower.replica.round == 3
    assert follower.replica.high_qc.block_hash == block.hash


def test_r3_a_repeated_proposal_is_answered_with_the_same_vote_and_nothing_else(bench, follower):
    block = second(bench)
    (vote,) = broadcasts(follower.hear(block), Vote)
    leader = bench.leader(2)
    assert follower.hear(block, leader) == [Send(leader, vote)]


def test_r3_an_equivocating_leader_gets_one_vote_and_an_accusation(bench, follower):
    one, two = second(bench), second(bench, payload=[b"x"])
    assert len(broadcasts(follower.hear(one), Vote)) == 1
    effects = follower.hear(two)
    assert [type(effect) for effect in effects] == [Accuse]
    assert bench.verifier.is_valid_evidence(effects[0].evidence)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"state_root": bytes(32)}, "state root", id="another state"),
        pytest.param({"decision_seq": 7}, "state root", id="another decision number"),
        pytest.param({"height": Height(9)}, "height", id="a gap in height"),
        pytest.param({"payload": [b"x", b"x"]}, "limits", id="a transaction twice"),
        pytest.param({"payload": [b""]}, "transaction", id="an invalid transaction"),
        pytest.param({"payload_root": bytes(32)}, "payload", id="another payload than the header's"),
        pytest.param({"time_ms": 1_700_000_000_000 + 30_000}, "time", id="too far ahead of the clock"),
        pytest.param(
            {"time_ms": 1_700_000_000_000 + 30_000, "state_root": bytes(32)}, "time", id="too far ahead, and so not executed"
        ),
    ],
)
def test_r3_a_proposal_that_is_not_what_execution_gives_gets_no_vote(bench, follower, options, reason):
    effects = follower.hear(second(bench, **options))
    assert broadcasts(effects, Vote) == []
    assert of(effects, Refuse)[0].reason == reason


def test_r8_block_time_may_be_ten_seconds_ahead_but_never_behind_the_parents(bench, follower):
    now = follower.now.wall_ms
    block = second(bench, time_ms=now + 10_000)
    assert broadcasts(follower.hear(block), Vote)
    finish(bench, follower, block)
    child = bench.block(3, bench.qc(block), time_ms=now + 9_999)
    effects = follower.hear(child)
    assert of(effects, Refuse)[0].reason == "time"


def test_r3_a_block_that_hides_what_the_timeouts_reported_gets_no_vote(bench, follower):
    """The attack that a correct twin never makes: the TC shows a certificate above the one the block extends."""
    block = second(bench)
    qc = bench.qc(block)
    tc = bench.tc(3, [bench.genesis, qc, bench.genesis])
    hiding = bench.block(4, tc=tc)
    effects = follower.hear(hiding)
    assert follower.replica.round == 4
    assert broadcasts(effects, Vote) == []


def test_r3_no_vote_in_a_round_after_giving_it_up(bench, follower):
    for peer in [index for index in range(4) if index != follower.index][:2]:
        effects = follower.hear(bench.timeout(2, peer, last_tc=bench.tc(1)), peer)
    assert len(broadcasts(effects, Timeout)) == 1
    assert broadcasts(follower.hear(second(bench)), Vote) == []


# R2 and R7: when to propose


def test_r7_an_idle_leader_waits_for_the_heartbeat(bench, talk):
    transcript = talk(bench.leader(2))
    transcript.start()
    assert broadcasts(transcript.wait(4_990), Block) == []
    (block,) = broadcasts(transcript.wait(20), Block)
    assert block.payload == ()
    assert block.tc is not None


def test_r7_a_leader_with_a_transaction_proposes_at_once_and_votes_for_itself(bench, talk):
    transcript = talk(bench.leader(2))
    transcript.start()
    effects = transcript.submit(b"transaction")
    (block,) = broadcasts(effects, Block)
    assert block.payload == (b"transaction",)
    assert [type(effect) for effect in effects] == [Persist, Broadcast, Persist, Broadcast]
    assert effects[0].block == block
    assert bench.verifier.proposal_fault(block, transcript.index) is None


def test_r7_the_last_payload_is_committed_two_hops_later_without_waiting(bench, talk):
    """A block with a payload is followed at once by empty ones until it is committed, and then no more."""
    leader = bench.leader(3)
    transcript = talk(leader)
    transcript.start()
    block = second(bench, payload=[b"transaction"])
    transcript.hear(block)
    effects = finish(bench, transcript, block)
    (child,) = broadcasts(effects, Block)
    assert child.payload == ()
    effects = finish(bench, transcript, child)
    assert [each.block for commit in of(effects, Commit) for each in commit.blocks] == [block]
    assert transcript.replica.round == 4
    later = bench.block(4, bench.qc(child)) if bench.leader(4) == leader else None
    assert later is None
    assert transcript.replica.wake_ms() > transcript.now_ms + 4_000, "idle again: nothing is armed but the heartbeat"


def test_r7_what_the_application_refuses_leaves_the_mempool_and_causes_no_block(bench, talk):
    transcript = talk(bench.leader(2))
    transcript.start(past_first_round=False)
    block = bench.block(1, payload=[b"committed"])
    for each in (block, bench.block(2, bench.qc(block))):
        transcript.hear(each)
    index = transcript.index
    late = bench.rounds_led_by(index, above=2)[0]
    qc = bench.qc(bench.block(2, bench.qc(block)))
    transcript.hear(bench.sync(qc))
    for round_ in range(3, late):
        child = bench.block(round_, qc)
        transcript.hear(child)
        qc = bench.qc(child)
        transcript.hear(bench.sync(qc))
    assert transcript.replica.round == late
    assert transcript.replica.root.height >= 1
    pending = bench.app.admit(bench.app.genesis(), b"committed", 0)
    transcript.mempool.add(pending)
    assert broadcasts(transcript.event(Tick()), Block) == []
    assert len(transcript.mempool) == 0


def test_r7_entering_a_round_starts_no_timer_and_a_transaction_does(bench, follower):
    assert broadcasts(follower.wait(4_000), Timeout) == []
    follower.submit(b"transaction")
    effects = follower.wait(330)
    assert len(broadcasts(effects, Timeout)) == 1


def test_r7_an_overdue_heartbeat_starts_the_timer(bench, follower):
    assert broadcasts(follower.wait(5_250), Timeout) == []
    assert len(broadcasts(follower.wait(100), Timeout)) == 1


def test_r7_the_leader_after_a_dead_one_has_a_whole_timer_although_the_heartbeat_is_overdue(bench, follower):
    follower.wait(5_300)
    follower.hear(bench.sync(last_tc=bench.tc(2)))
    assert follower.replica.round == 3
    assert broadcasts(follower.wait(290), Timeout) == []
    assert broadcasts(follower.hear(bench.block(3, tc=bench.tc(2))), Vote)


def test_r7_a_waiting_transaction_is_sent_to_all_once_per_round(bench, follower):
    follower.submit(b"first")
    follower.submit(b"second")
    effects = follower.wait(250)
    assert [message.transaction for message in broadcasts(effects, Forward)] == [b"first"]
    assert broadcasts(follower.wait(1_000), Forward) == []


def test_r7_a_leader_that_is_sent_a_transaction_proposes_it_at_once(bench, talk):
    transcript = talk(bench.leader(2))
    transcript.start()
    (block,) = broadcasts(transcript.hear(Forward(1, Round(2), b"waiting")), Block)
    assert block.payload == (b"waiting",)


def test_r7_a_leader_that_refuses_what_it_is_sent_proposes_an_empty_block(bench, talk):
    transcript = talk(bench.leader(2))
    transcript.start()
    (block,) = broadcasts(transcript.hear(Forward(1, Round(2), b"")), Block)
    assert block.payload == ()


def with_alarm(bench, transcript, ms):
    """Commit an alarm in the block of round 2 and go on to round 4, which is idle."""
    block = second(bench, payload=[b"alarm %d" % ms], time_ms=transcript.now.wall_ms)
    child = bench.block(3, bench.qc(block))
    for each in (block, child):
        transcript.hear(each)
    effects = transcript.hear(bench.sync(bench.qc(child)))
    assert transcript.replica.round == 4
    assert [each.block for commit in of(effects, Commit) for each in commit.blocks] == [block]


def test_r7_a_leader_proposes_when_something_falls_due(bench, talk):
    transcript = talk(bench.leader(4))
    transcript.start()
    with_alarm(bench, transcript, 700)
    assert broadcasts(transcript.wait(690), Block) == []
    (block,) = broadcasts(transcript.wait(20), Block)
    assert block.payload == ()


def test_r7_the_others_give_it_a_timer_from_then_on(bench, follower):
    with_alarm(bench, follower, 700)
    assert broadcasts(follower.wait(890), Timeout) == []
    assert len(broadcasts(follower.wait(20), Timeout)) == 1


def test_r7_nobody_can_urge_more_than_one_empty_block_in_a_timers_length(bench, talk):
    transcript = talk(bench.leader(2))
    transcript.start()
    urged = 0
    qc, tc = bench.genesis, bench.tc(1)
    for round_ in range(2, 40):
        transcript.hear(Forward(1, Round(round_), b""), 3 if transcript.index != 3 else 2)
        proposal = transcript.replica._collector.proposal
        urged += proposal is not None
        transcript.hear(bench.sync(qc, bench.tc(round_)))
        transcript.now_ms += 10
    assert urged <= 2
    assert tc.round == 1


# R4: timeouts


def test_r4_f_plus_one_timeouts_of_others_are_joined_at_once(bench, follower):
    one, two = [index for index in range(4) if index != follower.index][:2]
    assert broadcasts(follower.hear(bench.timeout(2, one, last_tc=bench.tc(1)), one), Timeout) == []
    effects = follower.hear(bench.timeout(2, two, last_tc=bench.tc(1)), two)
    (timeout,) = broadcasts(effects, Timeout)
    assert timeout.last_tc is not None
    assert follower.replica.round == 3, "the third makes the certificate"


def test_r4_the_timer_sends_the_same_bytes_again(bench, follower):
    follower.submit(b"transaction")
    effects = follower.wait(1_500)
    timeouts = broadcasts(effects, Timeout)
    assert len(timeouts) >= 3
    assert len(set(timeouts)) == 1


def test_r4_a_timeout_brings_the_receiver_into_its_round(bench, follower):
    high = bench.qc(bench.block(7, tc=bench.tc(6)))
    follower.hear(bench.timeout(9, 1, high, bench.tc(8, [high] * 3)), 1)
    assert follower.replica.round == 9
    assert follower.replica.high_qc == high


def test_a_timeout_of_an_old_round_is_answered_with_where_i_stand(bench, follower):
    follower.hear(bench.sync(last_tc=bench.tc(6)))
    peer = (follower.index + 1) % 4
    ((to, answer),) = sends(follower.hear(bench.timeout(2, peer, last_tc=bench.tc(1)), peer), Sync)
    assert (to, answer.last_tc.round) == (peer, 6)
    assert sends(follower.hear(bench.timeout(2, peer, last_tc=bench.tc(1)), peer), Sync) == [], "but not at every message"


# R5: commit


def test_r5_only_a_certificate_of_the_next_round_commits_its_parent(bench, follower):
    first = second(bench)
    follower.hear(first)
    skipped = bench.block(4, bench.qc(first), tc=bench.tc(3, [bench.qc(first)] * 3))
    effects = follower.hear(skipped)
    effects += finish(bench, follower, skipped)
    assert of(effects, Commit) == []
    third = bench.block(5, bench.qc(skipped))
    effects = follower.hear(third)
    effects += finish(bench, follower, third)
    (commit,) = of(effects, Commit)
    assert [each.block for each in commit.blocks] == [first, skipped]
    assert commit.certificate.block_hash == third.hash
    assert commit.certificate.proves_parent


def test_r5_votes_that_overtake_their_block_commit_when_it_arrives(bench, follower):
    one = second(bench)
    two = bench.block(3, bench.qc(one))
    follower.hear(one)
    effects = finish(bench, follower, one)
    effects += finish(bench, follower, two)
    assert follower.replica.round == 4
    assert [each.block for commit in of(effects, Commit) for each in commit.blocks] == [one]
    effects = follower.hear(two, bench.leader(3))
    assert broadcasts(effects, Vote) == []
    assert sends(follower.wait(100), GetBlocks) == [], "nothing is missing any more"


# R11: catch up


def test_r11_a_missing_block_is_asked_of_its_voters_and_another_one_when_no_answer_comes(bench, follower):
    blocks = [second(bench)]
    for round_ in (3, 4, 5):
        blocks.append(bench.block(round_, bench.qc(blocks[-1])))
    high = bench.qc(blocks[-1])
    assert sends(follower.hear(bench.sync(high)), GetBlocks) == [], "votes often overtake proposals: wait a moment"
    asked = [to for to, _ in sends(follower.wait(1_000), GetBlocks)]
    assert len(asked) == 3
    assert len(set(asked)) == 3 or follower.index in [voter for voter, _ in high.signatures]
    answer = Blocks(1, tuple(blocks), high)
    effects = follower.hear(answer, asked[-1])
    committed = [each.block for commit in of(effects, Commit) for each in commit.blocks]
    assert committed == blocks[:3]
    assert follower.replica.waiting_for is None


def test_r11_blocks_nobody_asked_for_are_refused(bench, follower):
    block = second(bench)
    effects = follower.hear(Blocks(1, (block,), bench.qc(block)), 1)
    assert of(effects, Refuse)[0].reason == "unasked blocks"


def test_r11_an_answer_must_be_certified_block_by_block(bench, follower):
    one = second(bench)
    two = bench.block(3, bench.qc(one))
    follower.hear(bench.sync(bench.qc(two)))
    ((asked, _),) = sends(follower.wait(25), GetBlocks)
    forged = dataclasses.replace(one, payload=(b"swapped",))
    effects = follower.hear(Blocks(1, (forged, two), bench.qc(two)), asked)
    assert of(effects, Refuse)[0].reason == "payload"
    assert follower.replica.root.height == 0


def test_r11_a_certified_block_with_another_result_than_mine_halts_the_node(bench, follower):
    one = second(bench, state_root=b"\x01" * 32)
    follower.hear(bench.sync(bench.qc(one)))
    ((asked, _),) = sends(follower.wait(25), GetBlocks)
    effects = follower.hear(Blocks(1, (one,), bench.qc(one)), asked)
    assert of(effects, Halt)


def test_r11_a_request_is_served_from_the_store_and_the_tree(bench, follower):
    blocks = [second(bench)]
    follower.hear(blocks[0])
    for round_ in (3, 4):
        blocks.append(bench.block(round_, bench.qc(blocks[-1])))
        follower.hear(blocks[-1])
    assert follower.replica.root.height == 1
    (serve,) = of(follower.hear(GetBlocks(1, Height(1), blocks[-1].hash), 1), ServeBlocks)
    assert (serve.to, serve.from_height, serve.stored_to) == (1, 1, 1)
    assert [block.height for block in serve.tail] == [2, 3]


def test_a_new_connection_begins_with_where_i_stand(bench, follower):
    ((to, sync),) = sends(follower.event(Connected(3)), Sync)
    assert (to, sync.wants_reply) == (3, True)


# Attacks


def test_messages_of_another_epoch_and_forged_ones_are_refused_and_change_nothing(bench, follower):
    block = second(bench)
    before = follower.replica.round
    for message in [
        dataclasses.replace(bench.vote(block, 1), epoch=9),
        dataclasses.replace(bench.vote(block, 1), signature=bytes(64)),
        dataclasses.replace(bench.timeout(2, 1, last_tc=bench.tc(1)), signature=bytes(64)),
        dataclasses.replace(block, signature=bytes(64)),
        bench.sync(dataclasses.replace(bench.qc(block), signatures=())),
    ]:
        assert [type(effect) for effect in follower.hear(message, 1) if not isinstance(effect, Send)] == [Refuse]
    assert follower.replica.round == before


def test_r12_who_is_in_an_ended_epoch_is_led_on_and_nothing_else_of_it_is_taken(make_bench, make_talk):
    bench = make_bench(epoch=3)
    transcript = make_talk(bench, 0)
    transcript.start()
    late = dataclasses.replace(bench.sync(), epoch=2, committed_height=41)
    assert transcript.hear(late, 1) == [ServeEpoch(1, 2, 42)]
    assert transcript.hear(late, 1) == [], "once in a while"
    (refused,) = transcript.hear(dataclasses.replace(bench.timeout(1, 2), epoch=2), 2)
    assert refused == Refuse(2, "epoch")


def test_a_flood_of_messages_leaves_the_memory_bounded(bench, follower):
    qc, tc = bench.genesis, bench.tc(1)
    for round_ in range(2, 60):
        block = bench.block(round_, qc, tc=tc)
        follower.hear(block)
        for voter in range(4):
            follower.hear(bench.vote(bench.block(round_ + 500, tc=bench.tc(499)), voter), voter)
        tc = bench.tc(round_)
        follower.hear(bench.sync(last_tc=tc))
    assert follower.replica.round == 60
    assert follower.replica.held <= 3 * 8


def test_an_observer_follows_the_chain_and_signs_nothing(bench, talk):
    observer = talk(0, is_observer=True)
    effects = observer.start()
    block = second(bench)
    child = bench.block(3, bench.qc(block, [1, 2, 3]))
    for each in (block, child, bench.block(4, bench.qc(child, [1, 2, 3]))):
        effects += observer.hear(each)
    effects += observer.wait(20_000)
    assert [each.block for commit in of(effects, Commit) for each in commit.blocks] == [block]
    assert broadcasts(effects, Vote) == broadcasts(effects, Timeout) == broadcasts(effects, Block) == []


def test_an_observer_that_misses_the_votes_asks_instead_of_giving_up_the_round(bench, talk):
    observer = talk(0, is_observer=True)
    observer.start()
    block = second(bench, payload=[b"x"])
    observer.hear(block)
    (question, *_) = broadcasts(observer.wait(320), Sync)
    assert question.wants_reply
    observer.hear(bench.sync(bench.qc(block)))
    assert observer.replica.round == 3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_committees_commit_on_their_own(make_bench, make_talk, n):
    bench = make_bench(n)
    if n == 1:
        transcript = make_talk(bench, 0)
        transcript.start(past_first_round=False)
        transcript.wait(300)
        first, *_ = [each.block for commit in of(transcript.submit(b"alone"), Commit) for each in commit.blocks]
        assert first.payload == (b"alone",)
    else:
        assert bench.committee.quorum == n


def test_a_leader_stops_proposing_what_nobody_certifies(bench, talk):
    transcript = talk(0)
    transcript.start()
    transcript.submit(b"poison")
    proposed = []
    for round_ in bench.rounds_led_by(0, above=2)[:4]:
        effects = transcript.hear(bench.sync(last_tc=bench.tc(round_ - 1)))
        proposed += [block.payload for block in broadcasts(effects, Block)]
        transcript.hear(bench.sync(last_tc=bench.tc(round_)))
    assert proposed == [(b"poison",)] * 3
    transcript.submit(b"harmless")
    round_ = bench.rounds_led_by(0, above=2)[4]
    effects = transcript.hear(bench.sync(last_tc=bench.tc(round_ - 1)))
    assert [block.payload for block in broadcasts(effects, Block)] == [(b"harmless",)]
