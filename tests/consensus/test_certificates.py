"""When a vote, a certificate or a proof of equivocation is worth its name."""

from __future__ import annotations

import dataclasses

import pytest

from cybermesh.consensus.certificates import CertificateVerifier, body_fault
from cybermesh.consensus.types import (
    DoubleProposal,
    DoubleTimeout,
    DoubleVote,
    QuorumCert,
    Round,
    accused,
    merkle_root,
)
from cybermesh.keys import SigningKey, verify


def replaced(value, **fields):
    return dataclasses.replace(value, **fields)


def test_a_quorum_of_different_validators_makes_a_certificate(bench):
    block = bench.block(1)
    assert bench.verifier.is_valid_quorum_cert(bench.qc(block, [0, 1, 2]))
    assert bench.verifier.is_valid_quorum_cert(bench.qc(block, [0, 1, 2, 3]))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda qc: replaced(qc, signatures=qc.signatures[:2]), id="too few"),
        pytest.param(lambda qc: replaced(qc, signatures=(qc.signatures[0], *qc.signatures[:2])), id="one twice"),
        pytest.param(lambda qc: replaced(qc, signatures=qc.signatures[::-1]), id="not ascending"),
        pytest.param(lambda qc: replaced(qc, signatures=(*qc.signatures[:2], (9, qc.signatures[2][1]))), id="a stranger"),
        pytest.param(lambda qc: replaced(qc, signatures=(*qc.signatures[:2], (3, qc.signatures[2][1]))), id="another's"),
        pytest.param(lambda qc: replaced(qc, signatures=(*qc.signatures[:2], (2, bytes(64)))), id="a bad signature"),
        pytest.param(lambda qc: replaced(qc, round=Round(2)), id="another round"),
        pytest.param(lambda qc: replaced(qc, epoch=2), id="another epoch"),
        pytest.param(lambda qc: replaced(qc, block_hash=bytes(32)), id="another block"),
        pytest.param(lambda qc: replaced(qc, parent_hash=bytes(32)), id="another parent"),
        pytest.param(lambda qc: replaced(qc, parent_round=qc.round), id="a parent of the same round"),
        pytest.param(lambda qc: replaced(qc, round=Round(0)), id="passed off as genesis"),
    ],
)
def test_a_spoilt_certificate_is_refused(bench, spoil):
    assert not bench.verifier.is_valid_quorum_cert(spoil(bench.qc(bench.block(1))))


def test_the_root_certificate_is_valid_only_by_equality(bench):
    assert bench.verifier.is_valid_quorum_cert(bench.genesis)
    assert not bench.verifier.is_valid_quorum_cert(replaced(bench.genesis, block_hash=bytes(32)))
    signed = replaced(bench.genesis, signatures=bench.qc(bench.block(1)).signatures)
    assert not bench.verifier.is_valid_quorum_cert(signed)


def test_a_timeout_certificate_carries_the_highest_certificate_reported(bench):
    block = bench.block(1)
    high = bench.qc(block)
    tc = bench.tc(2, [bench.genesis, high, bench.genesis])
    assert tc.high_round == 1
    assert bench.verifier.is_valid_timeout_cert(tc)
    assert not bench.verifier.is_valid_timeout_cert(replaced(tc, high_qc=bench.genesis))
    assert not bench.verifier.is_valid_timeout_cert(replaced(tc, signatures=tc.signatures[:2]))
    assert not bench.verifier.is_valid_timeout_cert(replaced(tc, round=Round(1)))
    lowered = tuple((voter, Round(0), signature) for voter, _, signature in tc.signatures)
    assert not bench.verifier.is_valid_timeout_cert(replaced(tc, high_qc=bench.genesis, signatures=lowered))


def test_a_timeout_must_show_how_its_sender_got_into_the_round(bench):
    assert bench.verifier.is_valid_timeout(bench.timeout(1, 0))
    assert not bench.verifier.is_valid_timeout(bench.timeout(2, 0))
    assert bench.verifier.is_valid_timeout(bench.timeout(2, 0, last_tc=bench.tc(1)))
    assert not bench.verifier.is_valid_timeout(bench.timeout(3, 0, last_tc=bench.tc(1)))
    high = bench.qc(bench.block(1))
    assert not bench.verifier.is_valid_timeout(bench.timeout(1, 0, high))


def test_a_certificate_digest_covers_what_is_certified_and_not_by_whom(bench):
    block = bench.block(1)
    assert bench.qc(block, [0, 1, 2]).digest == bench.qc(block, [1, 2, 3]).digest
    assert bench.qc(block).digest != bench.qc(bench.block(2)).digest
    assert bench.tc(1).digest != bench.tc(2).digest


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"qc_digest": bytes(32)}, "certificate"),
        ({"parent_signers": 0b1011}, "certificate"),
        ({"parent_hash": bytes(32)}, "parent"),
        ({"parent_round": Round(0)}, "parent"),
        ({"tc_digest": b"\x01" * 32}, "timeout certificate"),
        ({"payload_root": merkle_root([b"other"])}, "payload"),
    ],
)
def test_a_body_that_is_not_the_headers_is_named(bench, part, fault):
    qc = bench.qc(bench.block(1))
    assert body_fault(bench.block(2, qc)) is None
    assert body_fault(bench.block(2, qc, **part)) == fault


def test_a_relay_cannot_strip_or_swap_the_timeout_certificate(bench):
    block = bench.block(2, tc=bench.tc(1))
    assert bench.verifier.proposal_fault(block, bench.leader(2)) is None
    assert bench.verifier.proposal_fault(replaced(block, tc=None), bench.leader(2)) == "round"
    bench.me = 0
    other = bench.tc(1)
    assert bench.verifier.proposal_fault(replaced(block, tc=other), bench.leader(2)) == "timeout certificate"


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"version": 2}, "chain"),
        ({"chain_id": bytes(32)}, "chain"),
        ({"author": "another"}, "leader"),
    ],
)
def test_a_proposal_of_another_chain_or_leader_is_refused(bench, fields, fault):
    if "author" in fields:
        fields = {"author": (bench.leader(1) + 1) % 4}
    assert bench.verifier.proposal_fault(bench.block(1, **fields), bench.leader(1)) == fault


def test_a_proposal_with_a_bad_signature_is_refused(bench):
    block = bench.block(1)
    assert bench.verifier.proposal_fault(replaced(block, signature=bytes(64)), bench.leader(1)) == "signature"


def test_evidence_holds_only_what_no_honest_validator_signs(bench):
    one, two = bench.block(1), bench.block(1, payload=[b"x"])
    high = bench.qc(one)
    votes = DoubleVote(bench.vote(one, 2), bench.vote(two, 2))
    proposals = DoubleProposal(one.header, one.signature, two.header, two.signature)
    timeouts = DoubleTimeout(bench.timeout(2, 3, high), bench.timeout(2, 3, bench.genesis, bench.tc(1, [bench.genesis] * 3)))
    for evidence, culprit in [(votes, 2), (proposals, bench.leader(1)), (timeouts, 3)]:
        assert bench.verifier.is_valid_evidence(evidence)
        assert accused(evidence) == culprit
    assert not bench.verifier.is_valid_evidence(DoubleVote(bench.vote(one, 2), bench.vote(one, 2)))
    assert not bench.verifier.is_valid_evidence(DoubleVote(bench.vote(one, 2), bench.vote(two, 1)))
    assert not bench.verifier.is_valid_evidence(
        DoubleVote(bench.vote(one, 2), replaced(bench.vote(two, 2), signature=bytes(64)))
    )
    assert not bench.verifier.is_valid_evidence(DoubleProposal(one.header, one.signature, one.header, one.signature))
    assert not bench.verifier.is_valid_evidence(DoubleTimeout(bench.timeout(1, 3), bench.timeout(1, 3)))


def test_a_signature_is_verified_once_and_a_bad_one_is_never_remembered(bench):
    calls = []

    def check(public_key: bytes, message: bytes, signature: bytes) -> bool:
        calls.append(signature)
        return bench.check(public_key, message, signature)

    verifier = CertificateVerifier(bench.committee, check, bench.genesis)
    qc = bench.qc(bench.block(1))
    for _ in range(3):
        assert verifier.is_valid_quorum_cert(qc)
    assert len(calls) == 3
    bad = replaced(qc, signatures=(*qc.signatures[:2], (2, bytes(64))))
    for _ in range(2):
        assert not verifier.is_valid_quorum_cert(bad)
    assert len(calls) == 5


def test_real_keys_satisfy_the_ports(make_bench):
    key = SigningKey(bytes(32))
    assert verify(key.public, b"message", key.sign(b"message"))
    assert isinstance(make_bench(1).genesis, QuorumCert)
