"""The short rungs of the ladder: arithmetic and the voting table (0), and that nothing altered keeps its signature (1)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random

import pytest

from cybermesh.consensus.certificates import CertificateVerifier, timeout_bytes, vote_bytes
from cybermesh.consensus.codec import decode_block, decode_message, encode_block, encode_message
from cybermesh.consensus.committee import Committee, faults, quorum
from cybermesh.consensus.events import SafetyRecord
from cybermesh.consensus.safety import SafetyRules
from cybermesh.consensus.simulator.tokens import make_keys
from cybermesh.consensus.types import (
    PROTOCOL_VERSION,
    Block,
    BlockHash,
    Header,
    Height,
    MalformedError,
    Message,
    QuorumCert,
    Round,
    Timeout,
    TimeoutCert,
    Vote,
    merkle_root,
)

pytestmark = pytest.mark.ladder

SIGNERS, CHECK = make_keys(4, is_real=False)
COMMITTEE = Committee.of(bytes(range(32)), SIGNERS)
EPOCH = COMMITTEE.epoch
GENESIS = COMMITTEE.genesis_cert()


def signer(index: int):
    return SIGNERS[COMMITTEE.public_keys[index]]


def test_rung_0_quorums_of_every_size_intersect_in_an_honest_validator():
    for n in range(1, 201):
        q, f = quorum(n), faults(n)
        assert 2 * q - n > f
        assert q <= n - f


def block_at(round_: int, parent: QuorumCert, tc: TimeoutCert | None = None, payload: tuple[bytes, ...] = ()) -> Block:
    header = Header(
        PROTOCOL_VERSION, COMMITTEE.chain_id, EPOCH, Round(round_), Height(parent.round + 1), 1, 1_000, parent.block_hash,
        parent.round, parent.signers, parent.digest, bytes(32) if tc is None else tc.digest, merkle_root(payload), bytes(32), 0,
    )  # fmt: skip
    return Block(header, parent, tc, payload, signer(1).sign(header.hash))


def certificate(block: Block) -> QuorumCert:
    header = block.header
    message = vote_bytes(COMMITTEE, header.round, header.hash, header.parent_round, header.parent_hash)
    signatures = tuple((index, signer(index).sign(message)) for index in range(3))
    return QuorumCert(EPOCH, header.round, header.hash, header.parent_round, header.parent_hash, signatures)


def chain(certified: int) -> QuorumCert:
    qc = GENESIS
    for round_ in range(1, certified + 1):
        qc = certificate(block_at(round_, qc))
    return qc


def timeouts(round_: int, high: QuorumCert, reported: tuple[int, ...]) -> TimeoutCert:
    signatures = tuple(
        (index, Round(each), signer(index).sign(timeout_bytes(COMMITTEE, Round(round_), Round(each))))
        for index, each in enumerate(reported)
    )
    return TimeoutCert(EPOCH, Round(round_), high, signatures)


def test_rung_0_the_voting_table_of_small_rounds_is_the_rule_of_the_paper():
    """Exhaustively: a node's round and last vote, a block's round and certificate, what a timeout certificate reports."""
    certificates = {round_: chain(round_) for round_ in range(6)}
    reports = [None, *itertools.product(range(1, 7), itertools.combinations_with_replacement(range(5), 3))]
    checked = 0
    for current, round_, certified, report in itertools.product(range(1, 7), range(1, 8), range(6), reports):
        if certified >= round_ or (report is not None and max(report[1]) >= report[0]):
            continue
        tc = None if report is None else timeouts(report[0], certificates[max(report[1])], report[1])
        block = block_at(round_, certificates[certified], tc)
        follows = certified + 1 == round_
        is_justified = tc is not None and tc.round + 1 == round_ and certified >= tc.high_round
        for last in range(round_ + 3):
            record = dataclasses.replace(SafetyRecord.fresh(GENESIS), last_voted_round=Round(last))
            rules = SafetyRules(COMMITTEE, 0, signer(0), record)
            rules._floor = Round(0)
            voted = rules.vote(block, Round(current)) is not None
            assert voted == (current == round_ and round_ > last and (follows or is_justified))
            checked += 1
    assert checked > 100_000


def examples() -> list[Message]:
    block = block_at(3, chain(1), timeouts(2, chain(1), (0, 1, 1)), (b"one", b"two"))
    vote = Vote(EPOCH, Round(3), block.hash, Round(1), block.header.parent_hash, 2, b"")
    message = vote_bytes(COMMITTEE, vote.round, vote.block_hash, vote.parent_round, vote.parent_hash)
    vote = dataclasses.replace(vote, signature=signer(2).sign(message))
    tc = timeouts(3, chain(1), (1, 1, 0))
    signature = signer(2).sign(timeout_bytes(COMMITTEE, Round(4), Round(1)))
    return [block, vote, Timeout(EPOCH, Round(4), chain(1), tc, 2, signature)]


def encode(message: Message) -> bytes:
    return encode_block(message) if isinstance(message, Block) else encode_message(message)


def decode(message: Message, data: bytes) -> object:
    """Return what the bytes say, read as a message of this kind."""
    return decode_block(data) if isinstance(message, Block) else decode_message(data)


def is_accepted(message: object) -> bool:
    verifier = CertificateVerifier(COMMITTEE, CHECK, GENESIS)
    match message:
        case Block():
            return verifier.proposal_fault(message, 1) is None
        case Vote():
            return verifier.is_valid_vote(message)
        case Timeout():
            return verifier.is_valid_timeout(message)
        case _:
            return False


@pytest.mark.parametrize("message", examples(), ids=lambda message: type(message).__name__)
def test_rung_1_every_flipped_bit_of_a_signed_message_is_noticed(message: Message):
    assert is_accepted(message)
    encoded = encode(message)
    for position, bit in itertools.product(range(len(encoded)), range(8)):
        flipped = bytearray(encoded)
        flipped[position] ^= 1 << bit
        with contextlib.suppress(MalformedError):
            decoded = decode(message, bytes(flipped))
            assert decoded == message or not is_accepted(decoded), f"byte {position}, bit {bit}"


@pytest.mark.parametrize("message", examples(), ids=lambda message: type(message).__name__)
def test_rung_1_thousands_of_mutated_frames_give_a_value_or_the_declared_error(message: Message):
    rng = random.Random(7)
    encoded = encode(message)
    for _ in range(2_000):
        frame = bytearray(encoded)
        for _ in range(rng.randrange(1, 6)):
            start = rng.randrange(len(frame))
            match rng.randrange(4):
                case 0:
                    frame[start] = rng.randrange(256)
                case 1:
                    del frame[start : start + rng.randrange(1, 9)]
                case 2:
                    frame[start:start] = rng.randbytes(rng.randrange(1, 9))
                case _:
                    frame[start:start] = frame[: rng.randrange(1, 40)]
            if not frame:
                break
        with contextlib.suppress(MalformedError):
            decoded = decode(message, bytes(frame))
            assert decoded == message or not is_accepted(decoded)


def test_two_blocks_that_differ_anywhere_differ_in_hash():
    one, other = block_at(1, GENESIS, payload=(b"a", b"b")), block_at(1, GENESIS, payload=(b"b", b"a"))
    assert one.hash != other.hash
    assert one.hash != BlockHash(bytes(32))
