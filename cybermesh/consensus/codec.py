"""Protocol values to protobuf bytes and back; protobuf types stay here.

Rules:
* A decoder gives a value whose every field fits its width, or raises MalformedError; it never trusts a length.
* Nothing is verified here: signatures, quorums and digests are the replica's business.
* What a proposal names twice is malformed: no honest leader does it, and the replica need not look again.
* Unknown fields are ignored, so that a newer minor version can add some; what is hashed or signed has no room for any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeVar, assert_never

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Wire

from cybermesh.consensus.events import SafetyRecord
from cybermesh.consensus.types import (
    COMMITTEE_MAX,
    PROTOCOL_VERSION,
    Block,
    BlockHash,
    Blocks,
    DoubleProposal,
    DoubleTimeout,
    DoubleVote,
    Evidence,
    Forward,
    GetBlocks,
    GetPayload,
    Header,
    Height,
    MalformedError,
    Payload,
    Proposal,
    QuorumCert,
    Round,
    Sync,
    Timeout,
    TimeoutCert,
    Vote,
)
from cybermesh.wire import consensus_pb2 as pb

MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024
PAYLOAD_COUNT_MAX: Final = 5_000
BLOCKS_MAX: Final = 256
HEADERS_MAX: Final = 4_096
_ROUND_MAX: Final = 2**63

W = TypeVar("W", bound=Wire)


WireMessage = Proposal | GetPayload | Payload | Vote | Timeout | Sync | GetBlocks | Blocks | Forward
"""What a frame holds: a block travels as a proposal."""


def encode_message(message: WireMessage) -> bytes:
    """Return the frame that carries the message to another validator."""
    frame = pb.ConsensusMessage(version=PROTOCOL_VERSION)
    match message:
        case Vote():
            frame.vote.CopyFrom(_vote_out(message))
        case Proposal():
            frame.proposal.CopyFrom(_proposal_out(message))
        case GetPayload(epoch, block_hash, digests):
            asked = pb.GetPayload(epoch=epoch, block_hash=block_hash, digests=b"".join(digests))
            frame.get_payload.CopyFrom(asked)
        case Payload(epoch, block_hash, transactions):
            frame.payload.CopyFrom(pb.Payload(epoch=epoch, block_hash=block_hash, transactions=transactions))
        case Timeout():
            frame.timeout.CopyFrom(_timeout_out(message))
        case Sync():
            frame.sync.CopyFrom(_sync_out(message))
        case GetBlocks(epoch, from_height, wanted):
            frame.get_blocks.CopyFrom(pb.GetBlocks(epoch=epoch, from_height=from_height, wanted=wanted))
        case Blocks(epoch, blocks, certificate, headers):
            inner = [_block_out(block) for block in blocks]
            above = [header.encode() for header in headers]
            frame.blocks.CopyFrom(pb.Blocks(epoch=epoch, blocks=inner, certificate=_qc_out(certificate), headers=above))
        case Forward(epoch, round_, transaction):
            frame.forward.CopyFrom(pb.Forward(epoch=epoch, round=round_, transaction=transaction))
        case _:
            assert_never(message)
    return frame.SerializeToString(deterministic=True)


def decode_message(data: bytes) -> WireMessage:
    """Return the message of a frame.

    Raises:
        MalformedError: the bytes are not a message of this protocol version within its limits.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise MalformedError(f"message: {len(data)} bytes, at most {MESSAGE_BYTES_MAX}")
    frame = _parse(pb.ConsensusMessage(), data)
    if frame.version != PROTOCOL_VERSION:
        raise MalformedError(f"message: protocol version {frame.version} instead of {PROTOCOL_VERSION}")
    return _body_in(frame)


def _body_in(frame: pb.ConsensusMessage) -> WireMessage:
    match frame.WhichOneof("body"):
        case "vote":
            return _vote_in(frame.vote)
        case "proposal":
            return _proposal_in(frame.proposal)
        case "timeout":
            return _timeout_in(frame.timeout)
        case "sync":
            return _sync_in(frame.sync)
        case "get_blocks":
            ask = frame.get_blocks
            return GetBlocks(ask.epoch, Height(_number(ask.from_height, "height")), _hash(ask.wanted))
        case "blocks":
            return _blocks_in(frame.blocks)
        case "forward":
            forward = frame.forward
            return Forward(forward.epoch, _round(forward.round), forward.transaction)
        case body:
            return _payload_in(frame, body)


def encode_block(block: Block) -> bytes:
    """Return the stored form of a block."""
    return _block_out(block).SerializeToString(deterministic=True)


def decode_block(data: bytes) -> Block:
    """Return a stored block.

    Raises:
        MalformedError: the bytes are not a block.
    """
    return _block_in(_parse(pb.Block(), data))


def encode_quorum_cert(qc: QuorumCert) -> bytes:
    """Return the stored form of a certificate."""
    return _qc_out(qc).SerializeToString(deterministic=True)


def decode_quorum_cert(data: bytes) -> QuorumCert:
    """Return a stored certificate.

    Raises:
        MalformedError: the bytes are not a certificate.
    """
    return _qc_in(_parse(pb.QuorumCert(), data))


def encode_evidence(evidence: Evidence) -> bytes:
    """Return the stored and exported form of a proof of equivocation."""
    match evidence:
        case DoubleVote(first, second):
            votes = pb.DoubleVote(first=_vote_out(first), second=_vote_out(second))
            out = pb.EquivocationEvidence(double_vote=votes)
        case DoubleTimeout(early, late):
            timeouts = pb.DoubleTimeout(first=_timeout_out(early), second=_timeout_out(late))
            out = pb.EquivocationEvidence(double_timeout=timeouts)
        case DoubleProposal(one, one_signature, two, two_signature):
            headers = pb.DoubleProposal(
                first=one.encode(), first_signature=one_signature, second=two.encode(), second_signature=two_signature
            )
            out = pb.EquivocationEvidence(double_proposal=headers)
        case _:
            assert_never(evidence)
    return out.SerializeToString(deterministic=True)


def decode_evidence(data: bytes) -> Evidence:
    """Return a proof of equivocation, not yet verified.

    Raises:
        MalformedError: the bytes are not one.
    """
    wire = _parse(pb.EquivocationEvidence(), data)
    match wire.WhichOneof("kind"):
        case "double_vote":
            return DoubleVote(_vote_in(wire.double_vote.first), _vote_in(wire.double_vote.second))
        case "double_timeout":
            return DoubleTimeout(_timeout_in(wire.double_timeout.first), _timeout_in(wire.double_timeout.second))
        case "double_proposal":
            two = wire.double_proposal
            return DoubleProposal(
                Header.decode(two.first),
                _signature(two.first_signature),
                Header.decode(two.second),
                _signature(two.second_signature),
            )
        case _:
            raise MalformedError("evidence: of no kind that this version knows")


def encode_record(record: SafetyRecord) -> bytes:
    """Return the stored form of a safety record."""
    out = pb.SafetyRecord(
        epoch=record.epoch,
        boot=record.boot,
        last_voted_round=record.last_voted_round,
        locked_round=record.locked_round,
        last_proposed_round=record.last_proposed_round,
        high_qc=_qc_out(record.high_qc),
    )
    if record.last_tc is not None:
        out.last_tc.CopyFrom(_tc_out(record.last_tc))
    if record.last_vote is not None:
        out.last_vote.CopyFrom(_vote_out(record.last_vote))
    if record.last_timeout is not None:
        out.last_timeout.CopyFrom(_timeout_out(record.last_timeout))
    return out.SerializeToString(deterministic=True)


def decode_record(data: bytes) -> SafetyRecord:
    """Return a stored safety record.

    Raises:
        MalformedError: the bytes are not one.
    """
    wire = _parse(pb.SafetyRecord(), data)
    return SafetyRecord(
        epoch=wire.epoch,
        boot=wire.boot,
        last_voted_round=_round(wire.last_voted_round),
        locked_round=_round(wire.locked_round),
        last_proposed_round=_round(wire.last_proposed_round),
        high_qc=_qc_in(wire.high_qc),
        last_tc=_tc_in(wire.last_tc) if wire.HasField("last_tc") else None,
        last_vote=_vote_in(wire.last_vote) if wire.HasField("last_vote") else None,
        last_timeout=_timeout_in(wire.last_timeout) if wire.HasField("last_timeout") else None,
    )


# Values to protobuf


def _qc_out(qc: QuorumCert) -> pb.QuorumCert:
    return pb.QuorumCert(
        epoch=qc.epoch,
        round=qc.round,
        block_hash=qc.block_hash,
        parent_round=qc.parent_round,
        parent_hash=qc.parent_hash,
        signatures=[pb.Signature(voter=voter, signature=signature) for voter, signature in qc.signatures],
    )


def _tc_out(tc: TimeoutCert) -> pb.TimeoutCert:
    signatures = [
        pb.TimeoutSignature(voter=voter, high_round=high_round, signature=signature)
        for voter, high_round, signature in tc.signatures
    ]
    return pb.TimeoutCert(epoch=tc.epoch, round=tc.round, high_qc=_qc_out(tc.high_qc), signatures=signatures)


def _vote_out(vote: Vote) -> pb.Vote:
    return pb.Vote(
        epoch=vote.epoch,
        round=vote.round,
        block_hash=vote.block_hash,
        parent_round=vote.parent_round,
        parent_hash=vote.parent_hash,
        voter=vote.voter,
        signature=vote.signature,
    )


def _timeout_out(timeout: Timeout) -> pb.Timeout:
    return pb.Timeout(
        epoch=timeout.epoch,
        round=timeout.round,
        high_qc=_qc_out(timeout.high_qc),
        last_tc=None if timeout.last_tc is None else _tc_out(timeout.last_tc),
        voter=timeout.voter,
        signature=timeout.signature,
    )


def _block_out(block: Block) -> pb.Block:
    return pb.Block(
        header=block.header.encode(),
        qc=_qc_out(block.qc),
        tc=None if block.tc is None else _tc_out(block.tc),
        payload=block.payload,
        signature=block.signature,
    )


def _proposal_out(proposal: Proposal) -> pb.Proposal:
    return pb.Proposal(
        header=proposal.header.encode(),
        qc=_qc_out(proposal.qc),
        tc=None if proposal.tc is None else _tc_out(proposal.tc),
        digests=b"".join(proposal.digests),
        signature=proposal.signature,
    )


def _sync_out(sync: Sync) -> pb.Sync:
    return pb.Sync(
        epoch=sync.epoch,
        high_qc=_qc_out(sync.high_qc),
        last_tc=None if sync.last_tc is None else _tc_out(sync.last_tc),
        committed_height=sync.committed_height,
        boot=sync.boot,
        wants_reply=sync.wants_reply,
    )


# Protobuf to values


def _parse(into: W, data: bytes) -> W:
    try:
        into.ParseFromString(data)
    except DecodeError as error:
        raise MalformedError(f"{type(into).__name__}: {error}") from error
    return into


def _qc_in(wire: pb.QuorumCert) -> QuorumCert:
    signatures = tuple((_voter(entry.voter), _signature(entry.signature)) for entry in _few(wire.signatures))
    return QuorumCert(
        wire.epoch, _round(wire.round), _hash(wire.block_hash), _round(wire.parent_round), _hash(wire.parent_hash), signatures
    )


def _tc_in(wire: pb.TimeoutCert) -> TimeoutCert:
    signatures = tuple(
        (_voter(entry.voter), _round(entry.high_round), _signature(entry.signature)) for entry in _few(wire.signatures)
    )
    if not signatures:
        raise MalformedError("timeout certificate: no signatures")
    return TimeoutCert(wire.epoch, _round(wire.round), _qc_in(wire.high_qc), signatures)


def _vote_in(wire: pb.Vote) -> Vote:
    return Vote(
        wire.epoch,
        _round(wire.round),
        _hash(wire.block_hash),
        _round(wire.parent_round),
        _hash(wire.parent_hash),
        _voter(wire.voter),
        _signature(wire.signature),
    )


def _timeout_in(wire: pb.Timeout) -> Timeout:
    return Timeout(
        wire.epoch,
        _round(wire.round),
        _qc_in(wire.high_qc),
        _tc_in(wire.last_tc) if wire.HasField("last_tc") else None,
        _voter(wire.voter),
        _signature(wire.signature),
    )


def _block_in(wire: pb.Block) -> Block:
    if len(wire.payload) > PAYLOAD_COUNT_MAX:
        raise MalformedError(f"block: {len(wire.payload)} transactions, at most {PAYLOAD_COUNT_MAX}")
    header = Header.decode(wire.header)
    _round(header.round)
    _number(header.height, "height")
    _number(header.time_ms, "time")
    return Block(
        header,
        _qc_in(wire.qc),
        _tc_in(wire.tc) if wire.HasField("tc") else None,
        tuple(wire.payload),
        _signature(wire.signature),
    )


def _proposal_in(wire: pb.Proposal) -> Proposal:
    whole = _block_in(
        pb.Block(header=wire.header, qc=wire.qc, tc=wire.tc if wire.HasField("tc") else None, signature=wire.signature)
    )
    return Proposal(whole.header, whole.qc, whole.tc, _digests(wire.digests), whole.signature)


def _payload_in(frame: pb.ConsensusMessage, body: str | None) -> GetPayload | Payload:
    match body:
        case "get_payload":
            asked = frame.get_payload
            return GetPayload(asked.epoch, _hash(asked.block_hash), _digests(asked.digests))
        case "payload":
            given = frame.payload
            if len(given.transactions) > PAYLOAD_COUNT_MAX:
                raise MalformedError(f"payload: {len(given.transactions)} transactions, at most {PAYLOAD_COUNT_MAX}")
            return Payload(given.epoch, _hash(given.block_hash), tuple(given.transactions))
        case _:
            raise MalformedError("message: no body that this version knows")


def _digests(data: bytes) -> tuple[bytes, ...]:
    if len(data) % 32 or len(data) > 32 * PAYLOAD_COUNT_MAX:
        raise MalformedError(f"digests: {len(data)} bytes; at most {PAYLOAD_COUNT_MAX} of 32")
    digests = tuple(data[at : at + 32] for at in range(0, len(data), 32))
    if len(set(digests)) < len(digests):
        raise MalformedError("digests: one is there twice")
    return digests


def _blocks_in(wire: pb.Blocks) -> Blocks:
    if not 1 <= len(wire.blocks) <= BLOCKS_MAX:
        raise MalformedError(f"blocks: {len(wire.blocks)}, at least 1 and at most {BLOCKS_MAX}")
    if len(wire.headers) > HEADERS_MAX:
        raise MalformedError(f"blocks: {len(wire.headers)} headers, at most {HEADERS_MAX}")
    headers = tuple(Header.decode(header) for header in wire.headers)
    return Blocks(wire.epoch, tuple(_block_in(block) for block in wire.blocks), _qc_in(wire.certificate), headers)


def _sync_in(wire: pb.Sync) -> Sync:
    return Sync(
        wire.epoch,
        _qc_in(wire.high_qc),
        _tc_in(wire.last_tc) if wire.HasField("last_tc") else None,
        Height(_number(wire.committed_height, "height")),
        wire.boot,
        wire.wants_reply,
    )


def _few(entries: Sequence[W]) -> Iterable[W]:
    if len(entries) > COMMITTEE_MAX:
        raise MalformedError(f"certificate: {len(entries)} signatures, at most {COMMITTEE_MAX}")
    return entries


def _hash(data: bytes) -> BlockHash:
    if len(data) != 32:
        raise MalformedError(f"hash: {len(data)} bytes instead of 32")
    return BlockHash(data)


def _signature(data: bytes) -> bytes:
    if len(data) != 64:
        raise MalformedError(f"signature: {len(data)} bytes instead of 64")
    return data


def _voter(index: int) -> int:
    if index >= COMMITTEE_MAX:
        raise MalformedError(f"voter: {index}, a committee has at most {COMMITTEE_MAX}")
    return index


def _number(value: int, name: str) -> int:
    # Room for the sums that are made of rounds and heights: every later one still fits its 64 bits.
    if value >= _ROUND_MAX:
        raise MalformedError(f"{name}: {value} is not below 2^63")
    return value


def _round(value: int) -> Round:
    return Round(_number(value, "round"))
