"""Who leads is a pure function of what was committed long ago; the dead are passed over, the slow and the returned are not."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.leader import Reputation, RoundRobin
from cybermesh.consensus.types import NO_CERT, PROTOCOL_VERSION, ZERO_HASH, BlockHash, Header, Height, Round, bitmap


def committee_of(n: int) -> Committee:
    return Committee.of(bytes(32), [hashlib.sha256(bytes([each])).digest() for each in range(n)])


class History:
    """A chain of headers as a committee with dead and slow members makes it, each round led as ``election`` says."""

    def __init__(self, n: int = 4, *, ms_per_block: int = 2) -> None:
        self.committee = committee_of(n)
        self.election = Reputation(self.committee)
        self.turns = RoundRobin(self.committee)
        self.headers: list[Header] = []
        self.round = 0
        self.skipped: list[int] = []
        self._ms = ms_per_block

    def go_on(self, rounds: int, *, dead=(), slow=()) -> None:
        for round_ in range(self.round + 1, self.round + 1 + rounds):
            leader = self.election.leader(Round(round_), self.headers)
            if leader in dead:
                self.skipped.append(round_)
            else:
                voters = [each for each in range(self.committee.n) if each not in dead and each not in slow]
                self._append(round_, leader, voters)
        self.round += rounds

    def _append(self, round_: int, author: int, voters: list[int]) -> None:
        before = self.headers[-1] if self.headers else None
        parent_hash = BlockHash(ZERO_HASH) if before is None else before.hash
        header = Header(
            version=PROTOCOL_VERSION,
            chain_id=self.committee.chain_id,
            epoch=1,
            round=Round(round_),
            height=Height(len(self.headers) + 1),
            author=author,
            time_ms=1_000 + self._ms * len(self.headers),
            parent_hash=parent_hash,
            parent_round=Round(0 if before is None else before.round),
            parent_signers=bitmap(voters),
            qc_digest=bytes(32),
            tc_digest=NO_CERT,
            payload_root=bytes(32),
            state_root=bytes(32),
            decision_seq=0,
        )
        self.headers.append(header)


@pytest.mark.parametrize("n", [4, 7, 10, 31])
def test_a_dead_leader_is_benched_within_two_turns_and_costs_nothing_afterwards(n):
    history = History(n)
    history.go_on(3 * n)
    dead = history.turns.leader(Round(history.round + 1), ())
    history.go_on(2 * n + 5, dead={dead})
    assert len(history.skipped) <= 3
    early = len(history.skipped)
    history.go_on(20 * n, dead={dead})
    assert len(history.skipped) == early


def test_a_validator_that_votes_again_leads_again():
    history = History()
    history.go_on(12)
    dead = history.turns.leader(Round(history.round + 1), ())
    history.go_on(60, dead={dead})
    history.go_on(40)
    assert dead in {header.author for header in history.headers[-8:]}


def test_one_whose_votes_always_come_too_late_keeps_its_turns():
    history = History()
    history.go_on(200, slow={2})
    authors = [header.author for header in history.headers]
    assert history.skipped == []
    assert all(2 in authors[start : start + 4] for start in range(0, 196, 4))


def test_one_that_was_benched_and_is_slow_now_comes_back_with_its_second_chance():
    history = History(ms_per_block=500)
    history.go_on(12)
    dead = history.turns.leader(Round(history.round + 1), ())
    history.go_on(40, dead={dead})
    benched_until = len(history.headers)
    history.go_on(80, slow={dead})
    assert dead in {header.author for header in history.headers[benched_until:]}
    assert dead in {header.author for header in history.headers[-8:]}


def test_nobody_is_benched_when_more_than_f_were_silent():
    history = History()
    history.go_on(16)
    history.go_on(60, dead={0, 1})
    led = {history.election.leader(Round(history.round + each), history.headers) for each in range(4)}
    assert led == {0, 1, 2, 3}


def test_after_a_long_silence_every_owner_leads():
    history = History()
    history.go_on(16)
    dead = history.turns.leader(Round(history.round + 1), ())
    history.go_on(40, dead={dead})
    far = history.round + 100
    for round_ in range(far, far + 4):
        assert history.election.leader(Round(round_), history.headers) == history.turns.leader(Round(round_), ())


@given(st.integers(0, 30), st.integers(0, 3), st.integers(1, 12), st.integers(0, 40))
def test_nodes_that_share_what_is_old_agree_whatever_is_newer(alive, dead, ahead, more):
    """One node has committed everything, another lacks the newest rounds, a third has forgotten what is beyond the window."""
    history = History()
    history.go_on(12 + alive)
    history.go_on(20 + more, dead={dead})
    round_ = Round(history.round + ahead)
    lag = 4 + 4
    needed = [header for header in history.headers if header.round <= round_ - lag]
    fresh = Reputation(history.committee)
    full = fresh.leader(round_, history.headers)
    assert Reputation(history.committee).leader(round_, history.headers[-fresh.window :]) == full
    for count in range(len(needed), len(history.headers) + 1):
        assert Reputation(history.committee).leader(round_, history.headers[:count]) == full


@pytest.mark.looptime
async def test_a_committee_without_one_member_stops_waiting_for_it(tmp_path):
    from tests.consensus.test_driver import Cluster, settle

    cluster = Cluster(tmp_path)
    cluster.leaders = Reputation
    async with cluster.running(0, 1, 3):
        await settle()
        for number in range(40):
            cluster.submit(b"tx %d" % number, 0, 1, 3)
            await cluster.until_committed(b"tx %d" % number, 0, 1, 3)
        loop = asyncio.get_running_loop()
        given_up, began = cluster.drivers[0].counters.sent["timeout"], loop.time()
        for number in range(40, 100):
            cluster.submit(b"tx %d" % number, 0, 1, 3)
            await cluster.until_committed(b"tx %d" % number, 0, 1, 3)
        assert cluster.drivers[0].counters.sent["timeout"] == given_up
        assert loop.time() - began < 1
    cluster.assert_agreement()
