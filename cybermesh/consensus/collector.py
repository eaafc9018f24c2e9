"""Votes and timeouts on their way to a certificate, and the proof that somebody signed twice.

R6 collect  one vote per validator for each round from the current one to 2n rounds ahead, of rounds beyond only each
            validator's highest; one timeout per validator for the current round (a timeout brings the certificates that lead
            into its round, so none is ever of a later one); one proposal per leader and round. A second, different one is
            evidence, not an error. The memory is bounded by 2n² votes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import (
    Block,
    BlockHash,
    DoubleProposal,
    DoubleTimeout,
    DoubleVote,
    Evidence,
    QuorumCert,
    Round,
    Timeout,
    TimeoutCert,
    Vote,
)

_Choice = tuple[BlockHash, Round, BlockHash]


@dataclass(slots=True)
class _Ballot:
    """The votes of one round."""

    by_voter: dict[int, Vote] = field(default_factory=dict)
    by_choice: dict[_Choice, list[Vote]] = field(default_factory=dict)


class Collector:
    """Collects what has been verified already; ``round`` is the replica's current one."""

    def __init__(self, committee: Committee, round_: Round) -> None:
        self._committee = committee
        self._round = round_
        self._ballots: dict[Round, _Ballot] = {}
        self._far: dict[int, Vote] = {}
        self._timeouts: dict[int, Timeout] = {}
        self._proposal: Block | None = None
        self._accused: set[tuple[type[Evidence], int, int]] = set()

    @property
    def size(self) -> int:
        """How many votes and timeouts are held."""
        return sum(len(ballot.by_voter) for ballot in self._ballots.values()) + len(self._far) + len(self._timeouts)

    def enter(self, round_: Round) -> list[Vote]:
        """Begin a round: forget older ones, and return the votes from afar that have come within reach."""
        self._round = round_
        self._ballots = {ahead: ballot for ahead, ballot in self._ballots.items() if ahead >= round_}
        self._timeouts = {}
        self._proposal = None
        self._accused = {key for key in self._accused if key[1] >= round_}
        near = [vote for vote in self._far.values() if vote.round <= self._horizon]
        for vote in near:
            del self._far[vote.voter]
        return [vote for vote in near if vote.round >= round_]

    @property
    def _horizon(self) -> int:
        return self._round + 2 * self._committee.n

    def knows_vote(self, vote: Vote) -> bool:
        """Return whether this very vote is held already."""
        ballot = self._ballots.get(vote.round)
        return ballot is not None and ballot.by_voter.get(vote.voter) == vote

    def add_vote(self, vote: Vote) -> QuorumCert | Evidence | None:
        """Add a verified vote; return the certificate that it completes or the equivocation that it proves."""
        if vote.round < self._round:
            return None
        if vote.round > self._horizon:
            held = self._far.get(vote.voter)
            if held is None or held.round < vote.round:
                self._far[vote.voter] = vote
            return None
        ballot = self._ballots.setdefault(vote.round, _Ballot())
        choice = (vote.block_hash, vote.parent_round, vote.parent_hash)
        first = ballot.by_voter.get(vote.voter)
        if first is not None:
            if (first.block_hash, first.parent_round, first.parent_hash) == choice:
                return None
            return self._accuse(DoubleVote(first, vote), vote.round, vote.voter)
        ballot.by_voter[vote.voter] = vote
        alike = ballot.by_choice.setdefault(choice, [])
        alike.append(vote)
        if len(alike) != self._committee.quorum:
            return None
        signatures = tuple(sorted((each.voter, each.signature) for each in alike))
        return QuorumCert(vote.epoch, vote.round, *choice, signatures)

    def add_timeout(self, timeout: Timeout) -> TimeoutCert | Evidence | None:
        """Add a verified timeout of the current round; return the certificate or the equivocation it leads to."""
        assert timeout.round == self._round
        first = self._timeouts.get(timeout.voter)
        if first is not None:
            if first.high_qc.round == timeout.high_qc.round:
                return None
            return self._accuse(DoubleTimeout(first, timeout), timeout.round, timeout.voter)
        self._timeouts[timeout.voter] = timeout
        if len(self._timeouts) != self._committee.quorum:
            return None
        held = self._timeouts.values()
        signatures = tuple(sorted((each.voter, each.high_qc.round, each.signature) for each in held))
        high_qc = max((each.high_qc for each in held), key=lambda qc: qc.round)
        return TimeoutCert(timeout.epoch, timeout.round, high_qc, signatures)

    @property
    def timeouts(self) -> int:
        """How many validators have given up the current round."""
        return len(self._timeouts)

    def knows_proposal(self, block: Block) -> bool:
        """Return whether this very proposal is held already."""
        return self._proposal is not None and self._proposal.hash == block.hash

    def add_proposal(self, block: Block) -> Evidence | None:
        """Note a signed proposal of the current round; return the equivocation that it proves."""
        assert block.round == self._round
        first = self._proposal
        if first is None:
            self._proposal = block
            return None
        if first.hash == block.hash:
            return None
        evidence = DoubleProposal(first.header, first.signature, block.header, block.signature)
        return self._accuse(evidence, block.round, block.header.author)

    @property
    def proposal(self) -> Block | None:
        """The first proposal of the current round."""
        return self._proposal

    def _accuse(self, evidence: Evidence, round_: Round, culprit: int) -> Evidence | None:
        key = (type(evidence), round_, culprit)
        if key in self._accused:
            return None
        self._accused.add(key)
        return evidence
