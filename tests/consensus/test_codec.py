"""Every value survives its encoding; every other byte string is refused with the one declared error."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cybermesh.consensus.codec import (
    BLOCKS_MAX,
    MESSAGE_BYTES_MAX,
    PAYLOAD_COUNT_MAX,
    decode_block,
    decode_evidence,
    decode_message,
    decode_quorum_cert,
    decode_record,
    encode_block,
    encode_evidence,
    encode_message,
    encode_quorum_cert,
    encode_record,
)
from cybermesh.consensus.events import SafetyRecord
from cybermesh.consensus.types import (
    Block,
    Blocks,
    DoubleProposal,
    DoubleTimeout,
    DoubleVote,
    Forward,
    GetBlocks,
    GetPayload,
    Header,
    MalformedError,
    Payload,
    Proposal,
    QuorumCert,
    Sync,
    Timeout,
    TimeoutCert,
    Vote,
)
from cybermesh.wire import consensus_pb2 as pb

digests = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
epochs = st.integers(0, 2**32 - 1)
rounds = st.integers(0, 2**63 - 1)
voters = st.integers(0, 63)
qcs = st.builds(
    QuorumCert, epochs, rounds, digests, rounds, digests, st.lists(st.tuples(voters, signatures), max_size=4).map(tuple)
)
tcs = st.builds(
    TimeoutCert, epochs, rounds, qcs, st.lists(st.tuples(voters, rounds, signatures), min_size=1, max_size=4).map(tuple)
)
votes = st.builds(Vote, epochs, rounds, digests, rounds, digests, voters, signatures)
timeouts = st.builds(Timeout, epochs, rounds, qcs, st.none() | tcs, voters, signatures)
u64 = st.integers(0, 2**64 - 1)
headers = st.builds(
    Header, st.integers(0, 2**16 - 1), digests, epochs, rounds, rounds, st.integers(0, 2**16 - 1), rounds, digests, u64, u64,
    digests, digests, digests, digests, u64,
)  # fmt: skip
blocks = st.builds(Block, headers, qcs, st.none() | tcs, st.lists(st.binary(max_size=20), max_size=4).map(tuple), signatures)
messages = st.one_of(
    votes,
    timeouts,
    st.builds(Proposal, headers, qcs, st.none() | tcs, st.lists(digests, max_size=4, unique=True).map(tuple), signatures),
    st.builds(GetPayload, epochs, digests, st.lists(digests, max_size=4, unique=True).map(tuple)),
    st.builds(Payload, epochs, digests, st.lists(st.binary(max_size=20), max_size=4).map(tuple)),
    st.builds(Sync, epochs, qcs, st.none() | tcs, rounds, u64, st.booleans()),
    st.builds(GetBlocks, epochs, rounds, digests),
    st.builds(Blocks, epochs, st.lists(blocks, min_size=1, max_size=3).map(tuple), qcs),
    st.builds(Forward, epochs, rounds, st.binary(max_size=40)),
)
evidences = st.one_of(
    st.builds(DoubleVote, votes, votes),
    st.builds(DoubleTimeout, timeouts, timeouts),
    st.builds(DoubleProposal, headers, signatures, headers, signatures),
)
records = st.builds(
    SafetyRecord, epochs, u64, rounds, rounds, rounds, qcs, st.none() | tcs, st.none() | votes, st.none() | timeouts
)


@given(messages)
def test_a_message_survives_its_encoding(message):
    assert decode_message(encode_message(message)) == message


@given(blocks, qcs, evidences, records)
def test_what_is_stored_survives_its_encoding(block, qc, evidence, record):
    assert decode_block(encode_block(block)) == block
    assert decode_quorum_cert(encode_quorum_cert(qc)) == qc
    assert decode_evidence(encode_evidence(evidence)) == evidence
    assert decode_record(encode_record(record)) == record


DECODERS = [decode_message, decode_block, decode_quorum_cert, decode_evidence, decode_record]


@settings(max_examples=150)
@given(st.sampled_from(DECODERS), st.binary(max_size=400))
def test_any_bytes_give_a_value_or_the_declared_error(decode, data):
    with contextlib.suppress(MalformedError):
        decode(data)


@settings(max_examples=150)
@given(messages, st.data())
def test_a_damaged_message_gives_a_value_or_the_declared_error(message, data):
    encoded = bytearray(encode_message(message))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(encoded) - 1))
        encoded[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for spoilt in (bytes(encoded), bytes(encoded[:cut]), bytes(encoded) + b"\x00"):
        with contextlib.suppress(MalformedError):
            decode_message(spoilt)


def wire_vote(**fields) -> bytes:
    plain = pb.Vote(epoch=1, round=3, block_hash=bytes(32), parent_round=2, parent_hash=bytes(32), voter=1, signature=bytes(64))
    plain.MergeFrom(pb.Vote(**fields))
    return pb.ConsensusMessage(version=1, vote=plain).SerializeToString()


def wire_block(**fields) -> bytes:
    certificate = pb.QuorumCert(block_hash=bytes(32), parent_hash=bytes(32))
    blocks = pb.Blocks(blocks=[pb.Block(qc=certificate, signature=bytes(64), **fields)], certificate=certificate)
    return pb.ConsensusMessage(version=1, blocks=blocks).SerializeToString()


def wire_proposal(digests: bytes, header: bytes = bytes(248)) -> bytes:
    certificate = pb.QuorumCert(block_hash=bytes(32), parent_hash=bytes(32))
    proposal = pb.Proposal(header=header, qc=certificate, digests=digests, signature=bytes(64))
    return pb.ConsensusMessage(version=1, proposal=proposal).SerializeToString()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(wire_vote(block_hash=bytes(31)), id="a short hash"),
        pytest.param(wire_vote(parent_hash=bytes(33)), id="a long hash"),
        pytest.param(wire_vote(signature=bytes(63)), id="a short signature"),
        pytest.param(wire_vote(voter=64), id="a voter beyond the bitmap"),
        pytest.param(wire_vote(round=2**63), id="a round without a successor"),
        pytest.param(pb.ConsensusMessage(version=1).SerializeToString(), id="no body"),
        pytest.param(pb.ConsensusMessage(version=2, vote=pb.Vote()).SerializeToString(), id="a newer version"),
        pytest.param(b"\xff" * 20, id="no protobuf"),
        pytest.param(b"\x00" * (MESSAGE_BYTES_MAX + 1), id="too long"),
        pytest.param(wire_block(header=bytes(247)), id="a short header"),
        pytest.param(wire_block(header=bytes(56) + b"\x80" + bytes(191)), id="a time without a successor"),
        pytest.param(
            wire_block(header=bytes(248), payload=[b""] * (PAYLOAD_COUNT_MAX + 1)),
            id="too many transactions",
        ),
        pytest.param(wire_proposal(bytes(33)), id="digests of another length"),
        pytest.param(wire_proposal(bytes(64)), id="a transaction named twice"),
        pytest.param(wire_proposal(random.Random(1).randbytes(32 * (PAYLOAD_COUNT_MAX + 1))), id="too many digests"),
        pytest.param(wire_proposal(b"", header=bytes(247)), id="a proposal with a short header"),
        pytest.param(
            pb.ConsensusMessage(
                version=1, payload=pb.Payload(block_hash=bytes(32), transactions=[b""] * (PAYLOAD_COUNT_MAX + 1))
            ).SerializeToString(),
            id="too many transactions in an answer",
        ),
        pytest.param(pb.ConsensusMessage(version=1, blocks=pb.Blocks()).SerializeToString(), id="no blocks"),
        pytest.param(
            pb.ConsensusMessage(version=1, blocks=pb.Blocks(blocks=[pb.Block()] * (BLOCKS_MAX + 1))).SerializeToString(),
            id="too many blocks",
        ),
        pytest.param(
            pb.ConsensusMessage(
                version=1,
                sync=pb.Sync(
                    high_qc=pb.QuorumCert(
                        block_hash=bytes(32), parent_hash=bytes(32), signatures=[pb.Signature(signature=bytes(64))] * 65
                    )
                ),
            ).SerializeToString(),
            id="more signatures than validators",
        ),
    ],
)
def test_what_breaks_a_limit_is_refused(data: bytes):
    assert isinstance(decode_message(wire_vote()), Vote)
    assert isinstance(decode_message(wire_block(header=bytes(248))), Blocks)
    assert isinstance(decode_message(wire_proposal(bytes(32))), Proposal)
    with pytest.raises(MalformedError):
        decode_message(data)


def test_a_timeout_certificate_without_signatures_is_refused():
    qc = pb.QuorumCert(block_hash=bytes(32), parent_hash=bytes(32))
    sync = pb.Sync(high_qc=qc, last_tc=pb.TimeoutCert(high_qc=qc))
    with pytest.raises(MalformedError):
        decode_message(pb.ConsensusMessage(version=1, sync=sync).SerializeToString())
