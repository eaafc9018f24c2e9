"""Deliberate protocol bugs: a ladder that does not find them proves nothing about the protocol without them.

Each bug dies on a named rung: the worlds that find it within the seeds that a run of the suite can afford.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from cybermesh.consensus import chain, committee, execution, safety
from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.blocktree import BlockTree
from cybermesh.consensus.certificates import CertificateVerifier
from cybermesh.consensus.events import Broadcast, Persist
from cybermesh.consensus.pacemaker import Pacemaker
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.safety import SafetyRules
from cybermesh.consensus.simulator import machine, world
from cybermesh.consensus.simulator.draw import Setup
from cybermesh.consensus.simulator.scenario import run_scenario
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
    original = chain.judge

    def judge(application, mempool, parent, block):
        judged = original(application, mempool, parent, block)
        if isinstance(judged, str):
            return judged
        state = dataclasses.replace(judged.execution.state, root=bytes(32))
        return dataclasses.replace(judged, execution=dataclasses.replace(judged.execution, state=state))

    patch.setattr(chain, "judge", judge)


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


def ignore_what_a_timeout_certificate_reports(patch: pytest.MonkeyPatch) -> None:
    def extends(block):
        round_ = block.header.round
        return block.qc.round + 1 == round_ or (block.tc is not None and block.tc.round + 1 == round_)

    patch.setattr(safety, "_extends_safely", extends)


def give_up_the_lock(patch: pytest.MonkeyPatch) -> None:
    original = SafetyRules.vote

    def vote(self, block, current):
        before = self.record.locked_round
        signed = original(self, block, current)
        if signed is None:
            return None
        self.record = dataclasses.replace(self.record, locked_round=before)
        (_, broadcast), message = signed
        return (Persist(self.record, block), broadcast), message

    patch.setattr(SafetyRules, "vote", vote)


def trust_an_old_safety_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "standing", lambda *_, **__: None)
    patch.setattr(SafetyRules, "is_betrayed_by", lambda self, cert: False)
    patch.setattr(SafetyRules, "is_barred_from_voting", lambda self, round_: False)
    patch.setattr(SafetyRules, "_may_sign_above", lambda self, round_: self._signer is not None)


def vote_without_comparing_state_roots(patch: pytest.MonkeyPatch) -> None:
    original = chain.judge

    def judge(application, mempool, parent, block):
        judged = original(application, mempool, parent, block)
        if judged != "state root":
            return judged
        context = BlockContext(block.header.epoch, block.height, block.header.time_ms)
        executed = application.execute(parent.state, context, block.payload)
        return execution.node_of(application, block, executed)

    patch.setattr(chain, "judge", judge)


def count_a_voter_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CertificateVerifier, "_is_quorum", lambda self, voters: len(voters) >= self._committee.quorum)


def believe_votes_unseen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CertificateVerifier, "is_signed", lambda self, voter, message, signature: True)


def take_any_block_as_the_certified_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CertificateVerifier, "certified_fault", lambda self, block, certificate, above=(): None)


def accuse_on_hearsay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CertificateVerifier, "is_valid_vote", lambda self, vote: True)
    patch.setattr(CertificateVerifier, "is_valid_evidence", lambda self, evidence: True)


def forget_the_journal_at_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world, "Replica", lambda parts, root, record, now, journal: Replica(parts, root, record, now, ()))
    patch.setattr(CatchUp, "ask", lambda self, now_ms, from_height: None)


def hide_the_timeout_certificate(patch: pytest.MonkeyPatch) -> None:
    original = SafetyRules.timeout

    def timeout(self, current, high_qc, last_tc):
        signed = original(self, current, high_qc, last_tc)
        if signed is None:
            return None
        message = dataclasses.replace(signed[1], last_tc=None)
        self.record = dataclasses.replace(self.record, last_timeout=message)
        return (Persist(self.record, None), Broadcast(message)), message

    patch.setattr(SafetyRules, "timeout", timeout)


FOUR = Setup(validators=4)
TWIN = Setup(validators=4, twins=1, kind="twins")
TRAITOR = Setup(validators=4, traitors=1, kind="byzantine")
CRASH = Setup(validators=4, kind="crash")


@pytest.mark.parametrize(
    ("mutate", "rung", "seeds"),
    [
        (forget_votes_at_restart, FOUR, 300),
        (forget_proposals_at_restart, FOUR, 300),
        (vote_after_timeout, FOUR, 300),
        (vote_twice_in_a_round, TWIN, 300),
        (commit_after_skipped_rounds, FOUR, 300),
        (report_a_stale_certificate, FOUR, 300),
        (send_before_the_write, FOUR, 20),
        (commit_newest_first, FOUR, 300),
        (execute_after_voting, FOUR, 20),
        (never_catch_up, FOUR, 300),
        (never_repeat_a_timeout, FOUR, 300),
        (never_forward, FOUR, 300),
        (ignore_what_a_timeout_certificate_reports, TRAITOR, 600),
        (give_up_the_lock, FOUR, 300),
        (trust_an_old_safety_file, CRASH, 300),
        (vote_without_comparing_state_roots, TRAITOR, 300),
        (count_a_voter_twice, TRAITOR, 600),
        (believe_votes_unseen, TRAITOR, 300),
        (take_any_block_as_the_certified_one, TRAITOR, 600),
        (accuse_on_hearsay, TRAITOR, 300),
        (forget_the_journal_at_restart, FOUR, 300),
        (hide_the_timeout_certificate, FOUR, 300),
    ],
    ids=lambda value: value.__name__ if callable(value) else value.kind if isinstance(value, Setup) else None,
)
def test_the_simulator_finds_a_deliberate_bug(mutate: Mutate, rung: Setup, seeds: int, monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch)
    for seed in range(seeds):
        if run_scenario(seed, rung).failure:
            return
    pytest.fail(f"{seeds} seeds did not show the bug")


def test_a_quorum_of_two_thirds_rounded_down_breaks_the_arithmetic_and_forks():
    def naive(n: int) -> int:
        return 2 * committee.faults(n) + 1

    broken = [n for n in range(1, 50) if 2 * naive(n) - n <= committee.faults(n)]
    assert 5 in broken
    setup = Setup(validators=5, twins=1, quorum=naive(5), kind="twins")
    assert any(run_scenario(seed, setup).unsafe for seed in range(400))
