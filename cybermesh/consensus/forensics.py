"""Who broke the protocol when two chains disagree: with f + 1 or more at fault safety ends, and the guilty can be named.

Two conflicting chains carry, in the certificates of their blocks, signatures that no honest validator gives together (Sheng,
Wang, Nayak, Kannan, Viswanath: BFT Protocol Forensics, CCS 2021, arXiv 2010.06785):

- two votes in one round, when both chains certified a block of that round;
- a vote that locked a round, and a timeout of the same or a later round that reports less than that lock, when one chain went
  on above a timeout certificate that hides what the other one committed.

Any two quorums share at least f + 1 validators, and each of those signed both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cybermesh.consensus.certificates import CertificateVerifier, timeout_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import Block, DoubleVote, QuorumCert, Round, TimeoutCert, Vote


@dataclass(frozen=True, slots=True)
class BrokenLock:
    """A vote, and a later timeout of the same key that reports a certificate below the round that the vote had locked."""

    vote: Vote
    timeout_round: Round
    high_round: Round
    timeout_signature: bytes


Charge = DoubleVote | BrokenLock


@dataclass(frozen=True, slots=True)
class Testimony:
    """A chain, or a consecutive part of it, up to the block that ``certificate`` certifies and that commits its parent."""

    blocks: Sequence[Block]
    certificate: QuorumCert


def charges(one: Testimony, other: Testimony, epoch: int) -> dict[int, Charge]:
    """Return a charge against each validator of an epoch that two testimonies convict; none when they do not conflict there."""
    both = (one, other)
    certificates = {(qc.round, qc.block_hash): qc for each in both for qc in _quorum_certs(each) if qc.epoch == epoch}
    blocks = [block for each in both for block in each.blocks if block.header.epoch == epoch]
    timeouts = {block.tc.digest: block.tc for block in blocks if block.tc is not None}
    found: dict[int, Charge] = {}
    ordered = sorted(certificates.values(), key=lambda qc: (qc.round, qc.block_hash))
    for first, second in itertools.pairwise(ordered):
        if first.round == second.round:
            for voter in sorted({voter for voter, _ in first.signatures} & {voter for voter, _ in second.signatures}):
                found.setdefault(voter, DoubleVote(_vote(first, voter), _vote(second, voter)))
    for qc in ordered:
        for tc in timeouts.values():
            if tc.round >= qc.round:
                for charge in _broken_locks(qc, tc):
                    found.setdefault(charge.vote.voter, charge)
    return found


def is_proven(charge: Charge, committee: Committee, verifier: CertificateVerifier) -> bool:
    """Return whether a charge holds by its signatures alone."""
    if isinstance(charge, DoubleVote):
        return verifier.is_valid_evidence(charge)
    vote = charge.vote
    message = timeout_bytes(committee, charge.timeout_round, charge.high_round)
    is_contradiction = charge.timeout_round >= vote.round and charge.high_round < vote.parent_round
    return (
        is_contradiction and verifier.is_valid_vote(vote) and verifier.is_signed(vote.voter, message, charge.timeout_signature)
    )


def _quorum_certs(testimony: Testimony) -> Iterable[QuorumCert]:
    yield from (block.qc for block in testimony.blocks if block.qc.round > 0)
    yield testimony.certificate


def _vote(qc: QuorumCert, voter: int) -> Vote:
    signature = dict(qc.signatures)[voter]
    return Vote(qc.epoch, qc.round, qc.block_hash, qc.parent_round, qc.parent_hash, voter, signature)


def _broken_locks(qc: QuorumCert, tc: TimeoutCert) -> Iterable[BrokenLock]:
    voters = {voter for voter, _ in qc.signatures}
    for voter, high_round, signature in tc.signatures:
        if voter in voters and high_round < qc.parent_round:
            yield BrokenLock(_vote(qc, voter), tc.round, high_round, signature)
