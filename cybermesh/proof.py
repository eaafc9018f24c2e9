"""Decision proofs: what a quorum agreed to, shown to somebody who trusts none of the machines involved.

A proof says: this receipt stands in the log whose root is in this block's header, and a quorum of the genesis' validators has
committed that block; where the committee has changed, each one has named the next. Rules:

- verifying needs the proof and the genesis, nothing else: no network, no clock, no database;
- a certificate proves the commit of its parent only when its round follows the parent's directly (a certified block can still
  be abandoned); else later headers lead to one for which that holds, and a proof that lacks them is NOT_CONSECUTIVE;
- there is one encoding of a proof (docs/proof-format.md): canonical JSON with exactly a quorum of signatures. Every other byte
  string is refused with the step that failed;
- an agent compares the update it was sent with the proven effect, field by field: PROOF_MISMATCH.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.certificates import vote_bytes
from cybermesh.consensus.committee import FIRST_EPOCH, Committee
from cybermesh.consensus.types import (
    NO_CERT,
    PROTOCOL_VERSION,
    BlockHash,
    Header,
    Height,
    MalformedError,
    QuorumCert,
    Round,
    merkle_root,
)
from cybermesh.genesis import VALIDATORS_MAX, Genesis
from cybermesh.keys import verify
from cybermesh.ledger import encoding
from cybermesh.ledger.merkle import AppendedHashes, inclusion_path, leaf_hash, root_from_inclusion
from cybermesh.ledger.receipts import DecisionEffect, Receipt
from cybermesh.ledger.state import Applied, state_root
from cybermesh.messages import PolicyUpdate
from cybermesh.policy_update import update_of as update_of

FORMAT: Final = "cybermesh/proof/1"
LATER_HEADERS_MAX: Final = 4_096
EPOCHS_MAX: Final = 256
PROOF_BYTES_MAX: Final = 2 * 1024 * 1024
_HASH_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_REMEMBERED_MAX: Final = 1_024
_EMPTY_PAYLOAD: Final = merkle_root(())


class Step(enum.StrEnum):
    """What a verifier checks, in order; the step that fails names the fault."""

    ENCODING = "ENCODING"
    HEADER = "HEADER"
    GENESIS = "GENESIS"
    EPOCH = "EPOCH"
    RECEIPT = "RECEIPT"
    INCLUSION = "INCLUSION"
    NOT_CONSECUTIVE = "NOT_CONSECUTIVE"
    QUORUM = "QUORUM"
    CERTIFICATE_SIGNATURES = "CERTIFICATE_SIGNATURES"
    PROOF_MISMATCH = "PROOF_MISMATCH"


class ProofError(Exception):
    """A proof that proves nothing; ``step`` for programs, ``reason`` for people."""

    def __init__(self, step: Step, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteSignature:
    """One validator's signature under the certificate; validators are numbered in order of public key."""

    signature: bytes
    validator: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a quorum signed beside the last header: the block that extends it, and that block's round."""

    block_hash: bytes
    round: int
    signatures: tuple[VoteSignature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterHeader:
    """A header after the first, without what follows from the one before it.

    ``numbers`` are author, decision_seq, parent_signers, round, time_ms; ``hashes`` are payload_root, state_root, tc_digest,
    each empty where it is that of an empty payload, of the header before, of no timeout certificate.
    """

    hashes: tuple[bytes, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStep:
    """How a committee handed over to the next: the proof of the receipt in its last block that names the next one."""

    certificate: Certificate
    header: bytes
    index: int
    later: tuple[LaterHeader, ...]
    log_size: int
    path: tuple[bytes, ...]
    receipt: Receipt
    state_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofBody:
    """A proof as it is written: fields in the order of their names. ``epochs`` leads from the genesis to the header's epoch."""

    certificate: Certificate
    epochs: tuple[EpochStep, ...] = ()
    format: str = FORMAT
    header: bytes
    index: int
    later: tuple[LaterHeader, ...]
    log_size: int
    path: tuple[bytes, ...]
    receipt: Receipt
    state_digest: bytes


@dataclass(frozen=True, slots=True)
class Included:
    """A receipt and its place in a state's log; the state is the one after the block that holds the receipt."""

    receipt: Receipt
    index: int
    log_size: int
    path: tuple[bytes, ...]
    state_digest: bytes


@dataclass(frozen=True, slots=True)
class Proven:
    """What a valid proof shows. ``header`` is that of the receipt's block, ``voters`` index the committee of its epoch."""

    header: Header
    receipt: Receipt
    voters: tuple[int, ...]
    later_headers: int
    members: tuple[tuple[bytes, str], ...]
    """Keys and names of that committee, by key."""

    def decision(self, decision_seq: int) -> DecisionEffect | None:
        """Return the decision effect with this number, if the receipt holds it."""
        return next((effect for effect in self.receipt.decisions if effect.decision_seq == decision_seq), None)


class Places:
    """Where the receipts of a block just executed lie in the log; needs nothing but the block's outcome."""

    def __init__(self, applied: Applied) -> None:
        self._applied = applied
        self._hashes = AppendedHashes(applied.log_before, [leaf_hash(body) for body in applied.bodies])

    def at(self, position: int) -> Included:
        """Place the receipt at ``position`` of the block."""
        applied = self._applied
        index, size = applied.log_before.size + position, applied.state.log.size
        path = inclusion_path(index, size, self._hashes)
        return Included(applied.receipts[position], index, size, path, applied.state.digest)


def included(applied: Applied, position: int) -> Included:
    """Place one receipt of a block just executed; for several of one block make ``Places`` once."""
    return Places(applied).at(position)


def prove(
    headers: Sequence[Header], certificate: QuorumCert, place: Included, quorum: int, epochs: Sequence[EpochStep] = ()
) -> bytes:
    """Return the proof of a receipt in the first of ``headers``, consecutive blocks up to the certificate's parent.

    ``certificate`` must prove its parent's commit; exactly ``quorum`` of its signatures are kept. ``epochs`` holds a step for
    every epoch before the headers'.
    """
    step = prove_step(headers, certificate, place, quorum)
    assert len(epochs) == headers[0].epoch - FIRST_EPOCH
    shared = {entry.name: getattr(step, entry.name) for entry in dataclasses.fields(EpochStep)}
    return encoding.encode(ProofBody(epochs=tuple(epochs), **shared))


def prove_step(headers: Sequence[Header], certificate: QuorumCert, place: Included, quorum: int) -> EpochStep:
    """Return the same as a part of later proofs; the receipt is the one that names the next committee."""
    assert certificate.proves_parent
    assert certificate.parent_hash == headers[-1].hash
    assert len(certificate.signatures) >= quorum
    votes = tuple(VoteSignature(signature=sig, validator=index) for index, sig in certificate.signatures[:quorum])
    return EpochStep(
        certificate=Certificate(block_hash=certificate.block_hash, round=certificate.round, signatures=votes),
        header=headers[0].encode(),
        index=place.index,
        later=tuple(_shortened(before, header) for before, header in itertools.pairwise(headers)),
        log_size=place.log_size,
        path=place.path,
        receipt=place.receipt,
        state_digest=place.state_digest,
    )


def committee_step(headers: Sequence[Header], certificate: QuorumCert, applied: Applied, quorum: int) -> EpochStep | None:
    """Return the step that the first of ``headers`` ends its epoch with; None when its block names no next committee."""
    position = next((place for place, receipt in enumerate(applied.receipts) if receipt.committee is not None), None)
    return None if position is None else prove_step(headers, certificate, included(applied, position), quorum)


def encode_step(step: EpochStep) -> bytes:
    """Return a step's canonical bytes, for keeping."""
    return encoding.encode(step)


def decode_step(data: bytes) -> EpochStep:
    """Return the step that was kept.

    Raises:
        ProofError: the bytes are no step.
    """
    try:
        step = encoding.restore(EpochStep, encoding.load(data))
    except encoding.EncodingError as error:
        raise ProofError(Step.ENCODING, str(error)) from error
    assert isinstance(step, EpochStep)
    return step


def _shortened(before: Header, header: Header) -> LaterHeader:
    short = LaterHeader(
        hashes=(
            b"" if header.payload_root == _EMPTY_PAYLOAD else header.payload_root,
            b"" if header.state_root == before.state_root else header.state_root,
            b"" if header.tc_digest == NO_CERT else header.tc_digest,
        ),
        numbers=(header.author, header.decision_seq, header.parent_signers, header.round, header.time_ms),
    )
    assert _restored(before, short) == header, "a later header that does not follow from the one before"
    return short


def _restored(before: Header, short: LaterHeader) -> Header:
    payload_root, root, tc_digest = short.hashes
    author, decision_seq, parent_signers, round_, time_ms = short.numbers
    certified = QuorumCert(before.epoch, before.round, before.hash, before.parent_round, before.parent_hash, ())
    return Header(
        version=before.version,
        chain_id=before.chain_id,
        epoch=before.epoch,
        round=Round(round_),
        height=Height(before.height + 1),
        author=author,
        time_ms=time_ms,
        parent_hash=before.hash,
        parent_round=before.round,
        parent_signers=parent_signers,
        qc_digest=certified.digest,
        tc_digest=tc_digest or NO_CERT,
        payload_root=payload_root or _EMPTY_PAYLOAD,
        state_root=root or before.state_root,
        decision_seq=decision_seq,
    )


Members = tuple[tuple[bytes, str], ...]


class Verifier:
    """Checks proofs against one genesis, offline. What many proofs share is checked once: a block's certificate.

    The certificates that were good are remembered, the newest 1,024 of them; a bad one is checked each time.
    """

    def __init__(self, genesis: Genesis, last_heights: Mapping[int, int] | None = None) -> None:
        """Take the genesis, and of epochs that are known to have ended the last height: a proof counts only up to it."""
        self._genesis = genesis
        self._last_heights = {} if last_heights is None else dict(last_heights)
        self.steps: list[EpochStep] = []  # that proofs have shown so far, from the first one on
        self.members = tuple((member.pubkey, member.name) for member in genesis.committee)
        self._good: dict[tuple[bytes, Certificate], tuple[int, ...]] = {}

    @property
    def epoch(self) -> int:
        """The newest epoch whose committee is known."""
        return FIRST_EPOCH + len(self.steps)

    def learn(self, step: EpochStep) -> None:
        """Take the step from the newest known committee to the next one; from then on no proof of the old one counts above it.

        Raises:
            ProofError: it does not show that; nothing is taken.
        """
        _check_sizes(step)
        self._next_committee(step, self.epoch, self.members, self._last_heights.get(self.epoch - 1, 0))

    def proof(self, data: bytes) -> Proven:
        """Return what a proof shows; the changes of the committee that it shows are learned.

        Raises:
            ProofError: with the step that failed.
        """
        body = _read(data)
        members = tuple((member.pubkey, member.name) for member in self._genesis.committee)
        height = 0
        for epoch, step in enumerate(body.epochs, start=FIRST_EPOCH):
            members, height = self._next_committee(step, epoch, members, height)
        epoch = FIRST_EPOCH + len(body.epochs)
        proven = self._step(body, epoch, members)
        last = self._last_heights.get(epoch, proven.header.height)
        if not height < proven.header.height <= last:
            raise ProofError(Step.EPOCH, f"height {proven.header.height} is not one of epoch {epoch}")
        return proven

    def _next_committee(self, step: EpochStep, epoch: int, members: Members, above: int) -> tuple[Members, int]:
        """Return who follows the members of an epoch and its last height, and remember it if it is news."""
        shown = self._step(step, epoch, members)
        change, height = step.receipt.committee, shown.header.height
        if change is None or len(change.names) != len(change.members) or height <= above:
            raise ProofError(Step.EPOCH, f"the proof does not show who follows the committee of epoch {epoch}")
        # A committee ends once: another end, made up later by those who have left, is none.
        if self._last_heights.get(epoch, height) != height:
            raise ProofError(Step.EPOCH, f"epoch {epoch} ended at height {self._last_heights[epoch]}, not at {height}")
        following = tuple(zip(change.members, change.names, strict=True))
        if epoch == self.epoch:
            self.steps.append(step)
            self.members = following
            self._last_heights[epoch] = height
        elif step.receipt != self.steps[epoch - FIRST_EPOCH].receipt:
            raise ProofError(Step.EPOCH, f"epoch {epoch} ended with another committee")
        return following, height

    def _step(self, body: ProofBody | EpochStep, epoch: int, members: tuple[tuple[bytes, str], ...]) -> Proven:
        """Check everything that one committee must have agreed to."""
        headers = _headers(body)
        first, last = headers[0], headers[-1]
        chain_id = self._genesis.chain_id
        if first.chain_id != chain_id:
            raise ProofError(Step.GENESIS, f"is of chain {first.chain_id.hex()}, the genesis of {chain_id.hex()}")
        if first.epoch != epoch:
            raise ProofError(Step.EPOCH, f"is of epoch {first.epoch}, the proof shows the committee of epoch {epoch}")
        if body.receipt.height != first.height:
            raise ProofError(Step.RECEIPT, f"is of height {body.receipt.height}, the header of {first.height}")
        _check_inclusion(body, first)
        committee = Committee.of(chain_id, (key for key, _ in members), epoch=epoch)
        return Proven(first, body.receipt, self._voters(body.certificate, last, committee), len(headers) - 1, members)

    def update(self, update: PolicyUpdate) -> tuple[Proven, DecisionEffect]:
        """Check an update's proof and that every field of it is what was proven; only then may an agent read it.

        The sender's own signature is the envelope's business (``wire.control``).

        Raises:
            ProofError: with the step that failed; PROOF_MISMATCH names the first field that differs.
        """
        proven = self.proof(update.proof)
        effect = proven.decision(update.decision_seq)
        if effect is None:
            raise ProofError(Step.PROOF_MISMATCH, f"decision_seq: the receipt holds no decision {update.decision_seq}")
        if hashlib.sha256(update.rule_data).digest() != effect.rule_hash:
            raise ProofError(Step.PROOF_MISMATCH, "rule_data is not what was agreed")
        expected = update_of(proven.header, effect, update.rule_data, update.proof)
        for name in _AGREED:
            if getattr(update, name) != getattr(expected, name):
                raise ProofError(Step.PROOF_MISMATCH, f"{name} is not what was agreed")
        return proven, effect

    def _voters(self, certificate: Certificate, last: Header, committee: Committee) -> tuple[int, ...]:
        key = (last.hash, certificate)
        voters = self._good.get(key)
        if voters is None:
            voters = _check_certificate(certificate, last, committee)
            while len(self._good) >= _REMEMBERED_MAX:
                del self._good[next(iter(self._good))]
            self._good[key] = voters
        return voters


def verify_proof(data: bytes, genesis: Genesis) -> Proven:
    """Check one proof against a genesis, offline.

    Raises:
        ProofError: with the step that failed.
    """
    return Verifier(genesis).proof(data)


def _read(data: bytes) -> ProofBody:
    if len(data) > PROOF_BYTES_MAX:
        raise ProofError(Step.ENCODING, f"{len(data)} bytes, more than {PROOF_BYTES_MAX}")
    try:
        body = encoding.restore(ProofBody, encoding.load(data))
        canonical = encoding.encode(body)
    except (encoding.EncodingError, RecursionError) as error:
        raise ProofError(Step.ENCODING, str(error)) from error
    assert isinstance(body, ProofBody)
    if canonical != data:
        raise ProofError(Step.ENCODING, "is not in the one canonical encoding")
    if body.format != FORMAT:
        raise ProofError(Step.ENCODING, f"is not a proof of format {FORMAT}")
    if len(body.epochs) > EPOCHS_MAX:
        raise ProofError(Step.ENCODING, f"{len(body.epochs)} changes of the committee, more than {EPOCHS_MAX}")
    for step in body.epochs:
        _check_sizes(step)
    _check_sizes(body)
    return body


def _check_sizes(body: ProofBody | EpochStep) -> None:
    change = body.receipt.committee
    keys = () if change is None else change.members
    if list(keys) != sorted(set(keys)) or len(keys) > VALIDATORS_MAX:
        raise ProofError(Step.ENCODING, "the keys of a committee stand in ascending order, each once")
    hashes = [body.state_digest, body.certificate.block_hash, *body.path, *keys]
    if any(len(value) != _HASH_BYTES for value in hashes):
        raise ProofError(Step.ENCODING, f"every hash has {_HASH_BYTES} bytes")
    if any(len(vote.signature) != _SIGNATURE_BYTES for vote in body.certificate.signatures):
        raise ProofError(Step.ENCODING, f"every signature has {_SIGNATURE_BYTES} bytes")
    if len(body.later) > LATER_HEADERS_MAX:
        raise ProofError(Step.ENCODING, f"{len(body.later)} later headers, more than {LATER_HEADERS_MAX}")
    for index, short in enumerate(body.later):
        lengths = [len(value) for value in short.hashes]
        if len(short.numbers) != 5 or len(lengths) != 3 or not set(lengths) <= {0, _HASH_BYTES}:
            raise ProofError(Step.ENCODING, f"later[{index}] has 5 numbers and 3 hashes")


def _headers(body: ProofBody | EpochStep) -> list[Header]:
    try:
        headers = [Header.decode(body.header)]
        for index, short in enumerate(body.later):
            before = headers[-1]
            header = _restored(before, short)
            # Each default has one way to be written; the other would be a second encoding of the same proof.
            if _shortened(before, header) != short:
                raise ProofError(Step.ENCODING, f"later[{index}] is not in its shortest form")
            if header.round <= before.round or header.time_ms < before.time_ms or header.decision_seq < before.decision_seq:
                raise ProofError(Step.HEADER, f"later[{index}] does not follow the header before it")
            headers.append(header)
    except MalformedError as error:
        raise ProofError(Step.HEADER, str(error)) from error
    if headers[0].version != PROTOCOL_VERSION:
        raise ProofError(Step.HEADER, f"protocol version {headers[0].version}, this verifier knows {PROTOCOL_VERSION}")
    return headers


def _check_inclusion(body: ProofBody | EpochStep, header: Header) -> None:
    log_root = root_from_inclusion(body.index, body.log_size, body.receipt.leaf, body.path)
    if log_root is None:
        raise ProofError(Step.INCLUSION, f"a path of {len(body.path)} hashes does not lead from entry {body.index}")
    if state_root(body.log_size, log_root, body.state_digest) != header.state_root:
        raise ProofError(Step.INCLUSION, "the receipt is not in the log that the header commits to")


def _check_certificate(certificate: Certificate, last: Header, committee: Committee) -> tuple[int, ...]:
    if certificate.round != last.round + 1:
        raise ProofError(
            Step.NOT_CONSECUTIVE,
            f"the certificate is of round {certificate.round}, the block of {last.round}: it may have been abandoned",
        )
    voters = tuple(vote.validator for vote in certificate.signatures)
    if len(voters) != committee.quorum or list(voters) != sorted(set(voters)) or voters[-1] >= committee.n:
        raise ProofError(Step.QUORUM, f"needs {committee.quorum} different validators of {committee.n} in ascending order")
    block_hash = BlockHash(certificate.block_hash)
    message = vote_bytes(committee, Round(certificate.round), block_hash, last.round, last.hash)
    for vote in certificate.signatures:
        if not verify(committee.public_keys[vote.validator], message, vote.signature):
            raise ProofError(Step.CERTIFICATE_SIGNATURES, f"validator {vote.validator} did not sign this")
    return voters


_SENDERS_OWN: Final = frozenset({"producer_id", "signature", "pubkey", "alg"})
_AGREED: Final = tuple(entry.name for entry in dataclasses.fields(PolicyUpdate) if entry.name not in _SENDERS_OWN)


def verify_update(update: PolicyUpdate, genesis: Genesis) -> tuple[Proven, DecisionEffect]:
    """Check one update, as ``Verifier.update`` does.

    Raises:
        ProofError: with the step that failed.
    """
    return Verifier(genesis).update(update)
