"""The only holder of the signing key, and the rules under which it signs.

A signature leaves this module only inside effects that begin with the ``Persist`` of what it promises (rule R9), so no
caller can send one before it is durable. The rules are those of Jolteon (arXiv 2106.10362, figure 2) with the vote naming the
parent:

R2 propose  at most one proposal per round.
R3 vote     for a block of the current round, above the last round voted or given up in, that extends the certificate of the
            round before, or shows a timeout certificate of the round before and extends at least the highest certificate
            any of its signers reported. The vote locks the round of the extended certificate.
R4 timeout  of the current round, never below the last vote, never reporting a certificate below the lock, and only with a
            certificate that shows how the round was entered. It ends voting in that round.
R9 memory   the record is durable before what it allows is sent; a repetition sends the recorded bytes.
R10 start   after any start, proposals and votes only above 1 + the highest certified round that a quorum reported, timeouts
            from that round on. A key that signed what the record does not know never signs again.
"""

from __future__ import annotations

import dataclasses

from cybermesh.consensus.certificates import Signer, timeout_bytes, vote_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Broadcast, Persist, SafetyRecord, Send
from cybermesh.consensus.types import Block, Header, QuorumCert, Round, Timeout, TimeoutCert, Vote


class SafetyRules:
    """Decides what one validator signs. Without a signer (an observer) it signs nothing."""

    def __init__(self, committee: Committee, index: int, signer: Signer | None, record: SafetyRecord) -> None:
        self._committee = committee
        self._index = index
        self._signer = signer
        self.record = record
        self._floor: Round | None = None

    @property
    def is_observer(self) -> bool:
        """Whether this node only watches."""
        return self._signer is None

    @property
    def is_open(self) -> bool:
        """Whether a quorum has reported its rounds since the start (R10)."""
        return self._floor is not None

    def open(self, highest_certified: Round) -> None:
        """Allow signing above what a quorum reported at the start (R10)."""
        assert self._floor is None
        self._floor = Round(highest_certified + 1)

    def is_barred_from_voting(self, round_: Round) -> bool:
        """Return whether only the start keeps this node from voting in the round (R10)."""
        return self._signer is not None and self._floor is not None and round_ <= self._floor

    def stop(self) -> None:
        """Give up the key for good (R10)."""
        self._signer = None

    def may_propose(self, round_: Round) -> bool:
        """Return whether a proposal in this round would be signed (R2, R10)."""
        return self._may_sign_above(round_) and round_ > max(self.record.last_proposed_round, self.record.last_voted_round)

    def may_vote(self, round_: Round) -> bool:
        """Return whether this node could still vote in this round (R3, R10)."""
        return self._may_sign_above(round_) and round_ > self.record.last_voted_round

    def _may_sign_above(self, round_: Round) -> bool:
        return self._signer is not None and self._floor is not None and round_ > self._floor

    def propose(
        self, header: Header, qc: QuorumCert, tc: TimeoutCert | None, payload: tuple[bytes, ...]
    ) -> tuple[tuple[Persist, Broadcast], Block]:
        """Sign the proposal; the caller has asked ``may_propose`` (R2)."""
        assert self._signer is not None
        assert self.may_propose(header.round)
        block = Block(header, qc, tc, payload, self._signer.sign(header.hash))
        self.record = dataclasses.replace(self.record, last_proposed_round=header.round)
        return (Persist(self.record, block), Broadcast(block)), block

    def vote(self, block: Block, current: Round) -> tuple[tuple[Persist, Broadcast], Vote] | None:
        """Sign a vote for an executed block, or refuse (R3)."""
        header = block.header
        if self._signer is None or header.round != current or not self.may_vote(current):
            return None
        if not _extends_safely(block):
            return None
        message = vote_bytes(self._committee, header.round, header.hash, header.parent_round, header.parent_hash)
        vote = Vote(
            header.epoch, header.round, header.hash, header.parent_round, header.parent_hash, self._index,
            self._signer.sign(message),
        )  # fmt: skip
        self.record = dataclasses.replace(
            self.record,
            last_voted_round=header.round,
            locked_round=max(self.record.locked_round, header.parent_round),
            high_qc=_higher(self.record.high_qc, block.qc),
            last_tc=block.tc or self.record.last_tc,
            last_vote=vote,
        )
        return (Persist(self.record, block), Broadcast(vote)), vote

    def repeat_vote(self, block: Block, to: int) -> tuple[Send, ...]:
        """Return the vote already given for this very block, for a peer that sends it again (R9)."""
        vote = self.record.last_vote
        if self._signer is None or vote is None or vote.block_hash != block.hash:
            return ()
        return (Send(to, vote),)

    def timeout(
        self, current: Round, high_qc: QuorumCert, last_tc: TimeoutCert | None
    ) -> tuple[tuple[Persist, Broadcast], Timeout] | None:
        """Sign that the current round is given up, or repeat it, or refuse (R4)."""
        if self._signer is None or self._floor is None or current < self._floor:
            return None
        last = self.record.last_timeout
        if last is not None and last.round == current:
            return (Persist(self.record, None), Broadcast(last)), last
        if current < self.record.last_voted_round or high_qc.round < self.record.locked_round:
            return None
        entered_by_qc = high_qc.round + 1 == current
        if not entered_by_qc and (last_tc is None or last_tc.round + 1 != current):
            return None
        signature = self._signer.sign(timeout_bytes(self._committee, current, high_qc.round))
        timeout = Timeout(self.record.epoch, current, high_qc, None if entered_by_qc else last_tc, self._index, signature)
        self.record = dataclasses.replace(
            self.record,
            last_voted_round=max(self.record.last_voted_round, current),
            high_qc=_higher(self.record.high_qc, high_qc),
            last_tc=last_tc,
            last_timeout=timeout,
        )
        return (Persist(self.record, None), Broadcast(timeout)), timeout

    def is_betrayed_by(self, cert: QuorumCert | TimeoutCert) -> bool:
        """Return whether the certificate carries a signature of this key that the record does not know (R10)."""
        if self._signer is None or cert.round <= self.record.last_voted_round:
            return False
        return any(entry[0] == self._index for entry in cert.signatures)


def _extends_safely(block: Block) -> bool:
    """Return whether a block may be voted for, by its certificates alone (R3)."""
    round_ = block.header.round
    if block.qc.round + 1 == round_:
        return True
    return block.tc is not None and block.tc.round + 1 == round_ and block.qc.round >= block.tc.high_round


def _higher(one: QuorumCert, other: QuorumCert) -> QuorumCert:
    return other if other.round > one.round else one
