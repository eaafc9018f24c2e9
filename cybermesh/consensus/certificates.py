"""What validators sign, and when a certificate is worth its name.

Every signature is over SHA-256(domain || fixed-width big-endian fields). A signature that has been verified once is
remembered: with broadcast votes a node has already seen most signatures of the certificates it is shown later.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import (
    NO_CERT,
    PROTOCOL_VERSION,
    Block,
    BlockHash,
    DoubleProposal,
    DoubleVote,
    Evidence,
    Header,
    QuorumCert,
    Round,
    Timeout,
    TimeoutCert,
    Vote,
    merkle_root,
)

_VOTE_DOMAIN: Final = b"cm/vote/1"
_TIMEOUT_DOMAIN: Final = b"cm/timeout/1"
_VOTE: Final = struct.Struct(">H32sIQ32sQ32s")
_TIMEOUT: Final = struct.Struct(">H32sIQQ")
_CACHE_MAX: Final = 8192


class Signer(Protocol):
    """The private key of one validator."""

    def sign(self, message: bytes) -> bytes:
        """Return the signature (64 bytes) over ``message``."""
        ...


SignatureCheck = Callable[[bytes, bytes, bytes], bool]
"""Verification of a signature scheme: (public key, message, signature); false for garbage, never an exception."""


def vote_bytes(
    committee: Committee, round_: Round, block_hash: BlockHash, parent_round: Round, parent_hash: BlockHash
) -> bytes:
    """Return the 32 bytes a vote signs."""
    packed = _VOTE.pack(PROTOCOL_VERSION, committee.chain_id, committee.epoch, round_, block_hash, parent_round, parent_hash)
    return hashlib.sha256(_VOTE_DOMAIN + packed).digest()


def timeout_bytes(committee: Committee, round_: Round, high_round: Round) -> bytes:
    """Return the 32 bytes a timeout signs."""
    packed = _TIMEOUT.pack(PROTOCOL_VERSION, committee.chain_id, committee.epoch, round_, high_round)
    return hashlib.sha256(_TIMEOUT_DOMAIN + packed).digest()


@dataclass(frozen=True, slots=True)
class _RememberingSigner:
    """Tells of what it has signed."""

    signer: Signer
    note: Callable[[bytes, bytes], None]

    def sign(self, message: bytes) -> bytes:
        signature = self.signer.sign(message)
        self.note(message, signature)
        return signature


class CertificateVerifier:
    """Checks signatures and certificates of one committee; the same answer on every node and at any time."""

    def __init__(self, committee: Committee, check: SignatureCheck, genesis_cert: QuorumCert) -> None:
        self._committee = committee
        self._check = check
        self._genesis = genesis_cert
        self._seen: dict[tuple[int, bytes, bytes], None] = {}

    def is_signed(self, voter: int, message: bytes, signature: bytes) -> bool:
        """Return whether validator ``voter`` signed ``message``; good signatures are remembered, bad ones are not."""
        if not 0 <= voter < self._committee.n:
            return False
        key = (voter, message, signature)
        if key in self._seen:
            return True
        if not self._check(self._committee.public_keys[voter], message, signature):
            return False
        self._remember(key)
        return True

    def _remember(self, key: tuple[int, bytes, bytes]) -> None:
        if len(self._seen) >= _CACHE_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None

    def remembering(self, signer: Signer, index: int) -> Signer:
        """Return a signer whose signatures need no verification here: this node meets them again in every certificate."""
        return _RememberingSigner(signer, lambda message, signature: self._remember((index, message, signature)))

    def is_valid_header_signature(self, header: Header, signature: bytes) -> bool:
        """Return whether the header's author signed it."""
        return self.is_signed(header.author, header.hash, signature)

    def proposal_fault(self, block: Block, leader: int) -> str | None:
        """Return which part of a proposal is not what the protocol allows, whatever its round; None when all is well."""
        header, qc, tc = block.header, block.qc, block.tc
        if header.version != PROTOCOL_VERSION or header.chain_id != self._committee.chain_id:
            return "chain"
        if header.author != leader:
            return "leader"
        if qc.round >= header.round or (tc is None) != (qc.round + 1 == header.round):
            return "round"
        if tc is not None and tc.round + 1 != header.round:
            return "round"
        return body_fault(block) or self._signature_fault(block)

    def certified_fault(self, block: Block, certificate: QuorumCert, above: Sequence[Header] = ()) -> str | None:
        """Return why ``certificate`` does not vouch for this very block; its header needs no other check then.

        It is over the block, or commits it: then the headers ``above`` lead from the block to the certificate's parent.
        """
        header = block.header
        if header.version != PROTOCOL_VERSION or header.chain_id != self._committee.chain_id:
            return "chain"
        vouched = certificate.block_hash == header.hash or commits(header, above, certificate)
        if not vouched or not self.is_valid_quorum_cert(certificate):
            return "certificate"
        return body_fault(block) or self._signature_fault(block)

    def _signature_fault(self, block: Block) -> str | None:
        if not self.is_valid_header_signature(block.header, block.signature):
            return "signature"
        if not self.is_valid_quorum_cert(block.qc):
            return "certificate"
        if block.tc is not None and not self.is_valid_timeout_cert(block.tc):
            return "timeout certificate"
        return None

    def is_valid_vote(self, vote: Vote) -> bool:
        """Return whether the vote is of this epoch, plausible, and signed by its voter."""
        if vote.epoch != self._committee.epoch or vote.parent_round >= vote.round:
            return False
        message = vote_bytes(self._committee, vote.round, vote.block_hash, vote.parent_round, vote.parent_hash)
        return self.is_signed(vote.voter, message, vote.signature)

    def is_valid_quorum_cert(self, qc: QuorumCert) -> bool:
        """Return whether a quorum of different validators signed the certificate, or it is the epoch's root itself."""
        if qc.round == 0:
            return qc == self._genesis
        voters = [voter for voter, _ in qc.signatures]
        if qc.epoch != self._committee.epoch or qc.parent_round >= qc.round or not self._is_quorum(voters):
            return False
        message = vote_bytes(self._committee, qc.round, qc.block_hash, qc.parent_round, qc.parent_hash)
        return all(self.is_signed(voter, message, signature) for voter, signature in qc.signatures)

    def is_valid_timeout(self, timeout: Timeout) -> bool:
        """Return whether the timeout is signed and shows by its certificates how its sender got into the round."""
        high, last = timeout.high_qc, timeout.last_tc
        if timeout.epoch != self._committee.epoch or high.round >= timeout.round:
            return False
        if high.round + 1 != timeout.round and (last is None or last.round + 1 != timeout.round):
            return False
        message = timeout_bytes(self._committee, timeout.round, high.round)
        if not self.is_signed(timeout.voter, message, timeout.signature) or not self.is_valid_quorum_cert(high):
            return False
        return last is None or self.is_valid_timeout_cert(last)

    def is_valid_timeout_cert(self, tc: TimeoutCert) -> bool:
        """Return whether a quorum signed, each below the round, and the attached certificate is the highest they reported."""
        voters = [voter for voter, _, _ in tc.signatures]
        if tc.epoch != self._committee.epoch or not self._is_quorum(voters):
            return False
        if tc.high_round >= tc.round or tc.high_qc.round != tc.high_round:
            return False
        for voter, high_round, signature in tc.signatures:
            if not self.is_signed(voter, timeout_bytes(self._committee, tc.round, high_round), signature):
                return False
        return self.is_valid_quorum_cert(tc.high_qc)

    def is_valid_evidence(self, evidence: Evidence) -> bool:
        """Return whether the evidence really holds two signatures of one key that no honest validator gives."""
        if isinstance(evidence, DoubleVote):
            one, two = evidence.first, evidence.second
            same = (one.voter, one.round) == (two.voter, two.round) and _voted_for(one) != _voted_for(two)
            return same and self.is_valid_vote(one) and self.is_valid_vote(two)
        if isinstance(evidence, DoubleProposal):
            first, second = evidence.first, evidence.second
            same = (first.epoch, first.author, first.round) == (second.epoch, second.author, second.round)
            return (
                same
                and first.epoch == self._committee.epoch
                and first.hash != second.hash
                and self.is_valid_header_signature(first, evidence.first_signature)
                and self.is_valid_header_signature(second, evidence.second_signature)
            )
        early, late = evidence.first, evidence.second
        same = (early.voter, early.round) == (late.voter, late.round) and early.high_qc.round != late.high_qc.round
        return same and self.is_valid_timeout(early) and self.is_valid_timeout(late)

    def _is_quorum(self, voters: list[int]) -> bool:
        ascending = all(earlier < later for earlier, later in itertools.pairwise(voters))
        return ascending and len(voters) >= self._committee.quorum


def _voted_for(vote: Vote) -> tuple[bytes, int, bytes]:
    return vote.block_hash, vote.parent_round, vote.parent_hash


def commits(header: Header, above: Sequence[Header], certificate: QuorumCert) -> bool:
    """Return whether the certificate, if it is valid, commits the block, by way of the headers above it."""
    chain = [header, *above]
    is_linked = all(child.parent_hash == parent.hash for parent, child in itertools.pairwise(chain))
    return is_linked and certificate.proves_parent and certificate.parent_hash == chain[-1].hash


def body_fault(block: Block) -> str | None:
    """Return which part of the block is not the one its header commits to, None when all are."""
    header, qc = block.header, block.qc
    if header.qc_digest != qc.digest or header.parent_signers != qc.signers:
        return "certificate"
    if (header.parent_hash, header.parent_round) != (qc.block_hash, qc.round):
        return "parent"
    if header.tc_digest != (NO_CERT if block.tc is None else block.tc.digest):
        return "timeout certificate"
    if header.payload_root != merkle_root(block.payload):
        return "payload"
    return None
