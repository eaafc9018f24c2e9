"""Deliberate protocol bugs: a simulator that does not find them proves nothing about the protocol without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from cybermesh.consensus import replica, safety
from cybermesh.consensus.blocktree import BlockTree
from cybermesh.consensus.events import Broadcast, Persist
from cybermesh.consensus.pacemaker import Pacemaker
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.safety import SafetyRules
from cybermesh.consensus.simulator import world
from cybermesh.consensus.simulator.scenario import Setup, run_scenario
from cybermesh.consensus.sync import CatchUp
from cybermesh.consensus.types import QuorumCert, Round

Mutate = Callable[[pytest.MonkeyPatch], None]


def forget_votes_at_restart(patch: pytest.MonkeyPatch) -> None:
    def forgetful(parts, root, record, now, journal):
        forgotten = dataclasses.replace(record, last_voted_round=Round(0), last_vote=None, last_timeout=None)
        return Replica(parts, root, forgotten, now, journal)

    patch.setattr(world, "Replica", forgetful)
    patch.setattr(SafetyRules, "is_barred_from_voting", lambda self, round_: False)
    patch.setattr(SafetyRules, "_may_sign_above", lambda self, round_: self._signer is not None)


def forget_proposals_at_restart(patch: pytest.MonkeyPatch) -> None:
    def forgetful(parts, root, record, now, journal):
        forgotten = dataclasses.replace(record, last_proposed_round=Round(0), last_voted_round=Round(0))
        return Replica(parts, root, forgotten, now, journal)

    patch.setattr(world, "Replica", forgetful)
    patch.setattr(SafetyRules, "is_barred_from_voting", lambda self, round_: False)
    patch.setattr(SafetyRules, "_may_sign_above", lambda self, round_: self._signer is not None)


def vote_after_timeout(patch: pytest.MonkeyPatch) -> None:
    original = SafetyRules.timeout

    def timeout(self, current, high_qc, last_tc):
        before = self.record.last_voted_round
        signed = original(self, current, high_qc, last_tc)
        self.record = dataclasses.replace(self.record, last_voted_round=before)
        return signed

    patch.setattr(SafetyRules, "timeout", timeout)


def vote_twice_in_a_round(patch: pytest.MonkeyPatch) -> None:
    original = SafetyRules.vote

    def vote(self, block, current):
        self.record = dataclasses.replace(self.record, last_voted_round=Round(0))
        return original(self, block, current)

    patch.setattr(SafetyRules, "vote", vote)


def commit_after_skipped_rounds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuorumCert, "proves_parent", property(lambda self: True))


def report_a_stale_certificate(patch: pytest.MonkeyPatch) -> None:
    original = SafetyRules.timeout

    def timeout(self, current, high_qc, last_tc):
        stale = last_tc.high_qc if last_tc is not None else high_qc
        return original(self, current, stale, last_tc)

    patch.setattr(SafetyRules, "timeout", timeout)
    patch.setattr(safety, "max", lambda *rounds: Round(0), raising=False)


def send_before_the_write(patch: pytest.MonkeyPatch) -> None:
    original = Replica._emit

    def emit(self, signed):
        if signed is not None:
            (persist, broadcast), message = signed
            assert isinstance(persist, Persist)
            assert isinstance(broadcast, Broadcast)
            signed = ((broadcast, persist), message)
        original(self, signed)

    patch.setattr(Replica, "_emit", emit)


def commit_newest_first(patch: pytest.MonkeyPatch) -> None:
    original = BlockTree.commit
    patch.setattr(BlockTree, "commit", lambda self, block_hash: original(self, block_hash)[::-1])


def execute_after_voting(patch: pytest.MonkeyPatch) -> None:
    original = replica.judge

    def judge(application, mempool, parent, block):
        judged = original(application, mempool, parent, block)
        if isinstance(judged, str):
            return judged
        state = dataclasses.replace(judged.execution.state, root=bytes(32))
        return dataclasses.replace(judged, execution=dataclasses.replace(judged.execution, state=state))

    patch.setattr(replica, "judge", judge)


def never_catch_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CatchUp, "ask", lambda self, now_ms, from_height: None)


def never_repeat_a_timeout(patch: pytest.MonkeyPatch) -> None:
    def rearm(self, now_ms, certified):
        self._deadline = None

    patch.setattr(Pacemaker, "rearm", rearm)
    patch.setattr(Replica, "_help", lambda self, sender: None)


def never_forward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pacemaker, "misses_proposal", lambda self, now_ms: False)
    patch.setattr(Pacemaker, "arm", lambda self, at_ms, certified: None)


@pytest.mark.parametrize(
    ("mutate", "setup", "seeds"),
    [
        (forget_votes_at_restart, Setup(validators=4), 300),
        (forget_proposals_at_restart, Setup(validators=4), 300),
        (vote_after_timeout, Setup(validators=4), 300),
        (vote_twice_in_a_round, Setup(validators=4, twins=1), 300),
        (commit_after_skipped_rounds, Setup(validators=4), 300),
        (report_a_stale_certificate, Setup(validators=4), 300),
        (send_before_the_write, Setup(validators=4), 20),
        (commit_newest_first, Setup(validators=4), 300),
        (execute_after_voting, Setup(validators=4), 20),
        (never_catch_up, Setup(validators=4), 300),
        (never_repeat_a_timeout, Setup(validators=4), 300),
        (never_forward, Setup(validators=4), 300),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_the_simulator_finds_a_deliberate_bug(mutate: Mutate, setup: Setup, seeds: int, monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch)
    for seed in range(seeds):
        result = run_scenario(seed, setup)
        if result.unsafe or result.stalled:
            return
    pytest.fail(f"{seeds} seeds did not show the bug")
