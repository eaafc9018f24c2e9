"""Decision proofs: what convinces a verifier, and that nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh import cli
from cybermesh import genesis as g
from cybermesh.consensus.types import BlockHash, QuorumCert, Round
from cybermesh.ledger import encoding
from cybermesh.ledger.receipts import Code
from cybermesh.messages import PolicyAction, PolicyUpdate
from cybermesh.proof import ProofError, Step, Verifier, prove, update_of, verify_proof, verify_update
from cybermesh.proof import included as place_of
from tests.ledger.test_operators import joining
from tests.ledger.world import World, deployment, key, policy
from tests.proofs import Chain

POLICY_RECEIPT = 2


@pytest.fixture(scope="module")
def chain() -> Chain:
    """A decision in the first block, two empty blocks, a gap of five rounds, two blocks more."""
    made = Chain(World())
    made.commit(*made.world.case("solo", "p1"))
    for _ in range(2):
        made.world.now_ms += 500
        made.commit()
    made.commit(*made.world.case("north-1", "p2"), round_=8)
    made.commit()
    made.commit()
    return made


@pytest.fixture(scope="module")
def proof(chain: Chain) -> bytes:
    return chain.prove(0, POLICY_RECEIPT)


def step_of(data: bytes, genesis: g.Genesis) -> Step:
    with pytest.raises(ProofError) as caught:
        verify_proof(data, genesis)
    assert caught.value.reason
    return caught.value.step


def changed(proof: bytes, **fields: object) -> bytes:
    return orjson.dumps(orjson.loads(proof) | fields, option=orjson.OPT_SORT_KEYS)


def test_a_proof_shows_the_decision_its_height_and_who_agreed(chain: Chain, proof: bytes) -> None:
    proven = verify_proof(proof, chain.world.genesis)
    assert proven.header == chain.headers[0]
    assert proven.receipt.code is Code.OK
    assert [effect.policy_id for effect in proven.receipt.decisions] == ["p1"]
    assert proven.voters == (0, 1, 2)
    assert proven.later_headers == 0


def test_every_receipt_of_every_block_can_be_proved(chain: Chain) -> None:
    for block in (0, 3):
        for position, receipt in enumerate(chain.outcomes[block].receipts):
            assert verify_proof(chain.prove(block, position), chain.world.genesis).receipt == receipt


def test_later_headers_lead_over_skipped_rounds(chain: Chain) -> None:
    for last in (1, 3, 4):
        proven = verify_proof(chain.prove(0, POLICY_RECEIPT, last=last), chain.world.genesis)
        assert proven.header == chain.headers[0]
        assert proven.later_headers == last


def test_a_certificate_that_skips_a_round_commits_nothing(chain: Chain) -> None:
    # Block 3 extends block 2 in round 8, not 4: its certificate is genuine and proves no commit of block 2.
    skipping = chain.certs[4]
    assert skipping.parent_hash == chain.headers[2].hash
    assert not skipping.proves_parent
    good = orjson.loads(chain.prove(0, POLICY_RECEIPT, last=1))
    own = orjson.loads(chain.prove(0, POLICY_RECEIPT, last=3))
    good["later"] = own["later"][:2]
    good["certificate"] = {
        "block_hash": skipping.block_hash.hex(),
        "round": skipping.round,
        "signatures": [{"signature": sig.hex(), "validator": voter} for voter, sig in skipping.signatures[:3]],
    }
    assert step_of(orjson.dumps(good, option=orjson.OPT_SORT_KEYS), chain.world.genesis) is Step.NOT_CONSECUTIVE


def test_every_flipped_bit_is_refused_with_a_step(chain: Chain, proof: bytes) -> None:
    genesis = chain.world.genesis
    steps = set()
    for position in range(len(proof)):
        for bit in range(8):
            flipped = bytearray(proof)
            flipped[position] ^= 1 << bit
            steps.add(step_of(bytes(flipped), genesis))
    assert {
        Step.ENCODING,
        Step.HEADER,
        Step.GENESIS,
        Step.RECEIPT,
        Step.INCLUSION,
        Step.QUORUM,
        Step.CERTIFICATE_SIGNATURES,
    } <= steps


def test_every_truncation_and_any_extension_is_refused(chain: Chain, proof: bytes) -> None:
    for length in range(len(proof)):
        assert step_of(proof[:length], chain.world.genesis) is Step.ENCODING
    for tail in (b"\n", b" ", b"\x00", b"}", b"{}", proof):
        assert step_of(proof + tail, chain.world.genesis) is Step.ENCODING
        assert step_of(tail + proof, chain.world.genesis) is Step.ENCODING


def test_other_json_of_the_same_content_is_refused(chain: Chain, proof: bytes) -> None:
    content = json.loads(proof)
    for other in (
        json.dumps(content).encode(),
        orjson.dumps(dict(reversed(content.items()))),
        proof.replace(content["state_digest"].encode(), content["state_digest"].upper().encode()),
        changed(proof, note="hello"),
        changed(proof, epochs=["1"]),
        changed(proof, format="cybermesh/proof/2"),
        changed(proof, index=float(content["index"])),
        changed(proof, index=-1),
        changed(proof, path=[*content["path"], content["path"][0]]),
    ):
        assert step_of(other, chain.world.genesis) in {Step.ENCODING, Step.INCLUSION}


def test_a_proof_of_another_chain_is_refused(chain: Chain, proof: bytes) -> None:
    assert step_of(proof, deployment(chain_name="another")) is Step.GENESIS


@pytest.mark.parametrize("voters", [(0, 1), (0, 1, 2, 3), (1, 0, 2), (0, 0, 1), (0, 1, 4)])
def test_only_exactly_a_quorum_in_order_counts(chain: Chain, proof: bytes, voters: tuple[int, ...]) -> None:
    certificate = orjson.loads(proof)["certificate"]
    signatures = dict(chain.certs[2].signatures) | {4: bytes(64)}
    certificate["signatures"] = [{"signature": signatures[voter].hex(), "validator": voter} for voter in voters]
    assert step_of(changed(proof, certificate=certificate), chain.world.genesis) is Step.QUORUM


def test_any_quorum_of_the_signers_counts(chain: Chain) -> None:
    certificate = chain.certs[2]
    some = dataclasses.replace(certificate, signatures=certificate.signatures[1:])
    made = prove(chain.headers[:1], some, place_of(chain.outcomes[0], POLICY_RECEIPT), 3)
    assert verify_proof(made, chain.world.genesis).voters == (1, 2, 3)


def test_a_forged_receipt_or_another_height_is_refused(chain: Chain, proof: bytes) -> None:
    receipt = orjson.loads(proof)["receipt"]
    receipt["effects"][0]["expires_at_ms"] += 1_000_000
    assert step_of(changed(proof, receipt=receipt), chain.world.genesis) is Step.INCLUSION
    receipt["height"] = 2
    assert step_of(changed(proof, receipt=receipt), chain.world.genesis) is Step.RECEIPT


def test_signatures_of_strangers_are_refused(chain: Chain, proof: bytes) -> None:
    stranger = Chain(World(deployment(chain_name="another")))
    stranger.commit()
    stranger.commit()
    cert = stranger.certs[2]
    moved = QuorumCert(1, Round(2), BlockHash(chain.headers[1].hash), Round(1), chain.headers[0].hash, cert.signatures)
    made = prove(chain.headers[:1], moved, place_of(chain.outcomes[0], POLICY_RECEIPT), 3)
    assert step_of(made, chain.world.genesis) is Step.CERTIFICATE_SIGNATURES


@given(st.binary(max_size=200))
def test_any_bytes_are_a_proof_error(data: bytes) -> None:
    assert step_of(data, deployment()) is Step.ENCODING


PARTS = ["certificate", "receipt", "later", "path", "header", "index"]
KEYS = st.sampled_from(["certificate", "receipt", "later", "effects", "effect", "signatures", "hashes"])
SCALARS = st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=4)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=6)


@given(VALUES, st.sampled_from(PARTS))
def test_a_part_of_any_other_shape_is_a_proof_error(chain: Chain, proof: bytes, value: object, part: str) -> None:
    data = changed(proof, **{part: value})
    assert data == proof or step_of(data, chain.world.genesis) in Step


def update(chain: Chain, proof: bytes) -> PolicyUpdate:
    proven = verify_proof(proof, chain.world.genesis)
    effect = proven.receipt.decisions[0]
    return update_of(proven.header, effect, chain.world.rules[effect.decision_seq], proof)


def test_an_update_made_of_a_proof_is_accepted_whoever_sends_it(chain: Chain, proof: bytes) -> None:
    made = dataclasses.replace(update(chain, proof), producer_id=bytes(32), signature=bytes(64), pubkey=bytes(32))
    proven, effect = verify_update(made, chain.world.genesis)
    assert made.action == PolicyAction.ADD
    assert (made.effective_height, made.timestamp) == (proven.header.height, proven.header.time_ms // 1000)
    assert effect.policy_id == "p1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy_id", "p9"), ("action", "remove"), ("rule_type", "rate_limit"), ("rule_data", b"{}"), ("rule_hash", bytes(32)),
        ("requires_ack", False), ("rollback_policy_id", "p0"), ("timestamp", 1), ("effective_height", 2),
        ("expiration_height", 9),
        ("decision_seq", 2), ("expires_at_ms", 1), ("epoch", 2),
    ],
)  # fmt: skip
def test_a_field_that_was_not_agreed_is_a_mismatch(chain: Chain, proof: bytes, name: str, value: object) -> None:
    forged = dataclasses.replace(update(chain, proof), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ProofError) as caught:
        verify_update(forged, chain.world.genesis)
    assert caught.value.step is Step.PROOF_MISMATCH
    assert name in caught.value.reason


def test_every_field_of_an_update_is_covered_by_the_mismatch_table() -> None:
    covered = {"policy_id", "action", "rule_type", "rule_data", "rule_hash", "requires_ack", "rollback_policy_id", "timestamp"}
    covered |= {"effective_height", "expiration_height", "decision_seq", "expires_at_ms", "epoch", "proof"}
    assert {field.name for field in dataclasses.fields(PolicyUpdate)} - covered == {"producer_id", "signature", "pubkey", "alg"}


def test_a_proof_is_small(chain: Chain, proof: bytes) -> None:
    # 20 hashes more is what a log of 10**6 receipts has at most; they are 67 bytes each in the file.
    assert len(proof) + 20 * 67 < 4_096
    with_later = chain.prove(0, POLICY_RECEIPT, last=4)
    assert (len(with_later) - len(proof)) / 4 < 250


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command_says_what_was_decided_or_which_step_failed(
    chain: Chain, proof: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genesis, good, bad = tmp_path / "genesis.json", tmp_path / "proof.json", tmp_path / "bad.json"
    genesis.write_bytes(chain.world.genesis.encode())
    good.write_bytes(proof)
    bad.write_bytes(proof.replace(b'"p1"', b'"p2"'))
    code, out, err = run(capsys, str(good), "--genesis", str(genesis))
    assert (code, err) == (0, "")
    assert "p1 opened" in out
    assert "height    1" in out
    assert "single sensor" in out
    code, out, _ = run(capsys, str(good), "--genesis", str(genesis), "--json")
    shown = json.loads(out)
    assert (code, shown["valid"], shown["height"]) == (0, True, 1)
    assert shown["decisions"][0]["policy_id"] == "p1"
    assert len(shown["validators"]) == 3
    code, out, err = run(capsys, str(bad), "--genesis", str(genesis))
    assert (code, out) == (1, "")
    assert "INCLUSION" in err
    assert err.count("\n") == 1


def test_the_command_names_a_file_that_is_missing_or_no_genesis(
    chain: Chain, proof: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genesis, good = tmp_path / "genesis.json", tmp_path / "proof.json"
    good.write_bytes(proof)
    code, _, err = run(capsys, str(good), "--genesis", str(genesis))
    assert code == 2
    assert str(genesis) in err
    genesis.write_bytes(b'{"chain_name":"x"}')
    code, _, err = run(capsys, str(good), "--genesis", str(genesis))
    assert code == 2
    assert "validators" in err
    genesis.write_bytes(chain.world.genesis.encode())
    code, _, err = run(capsys, str(tmp_path / "none.json"), "--genesis", str(genesis))
    assert code == 2
    assert "none.json" in err


def test_encoding_accepts_only_what_it_writes() -> None:
    with pytest.raises(encoding.EncodingError):
        encoding.restore(int, True)


# Skipped rounds and changes of the committee


@pytest.mark.parametrize("skipped", [0, 1, 2, 5])
def test_a_proof_leads_over_skipped_rounds_and_only_with_all_its_headers(skipped: int) -> None:
    chain = Chain(World())
    chain.commit(*chain.world.case("solo", "p1"))
    chain.commit(round_=2 + skipped)
    chain.commit(round_=3 + skipped)
    genesis = chain.world.genesis
    led = chain.prove(0, POLICY_RECEIPT, last=1)
    assert verify_proof(led, genesis).later_headers == 1
    # The certificate of the child that skipped rounds names the block as its parent, and a quorum has signed it.
    child = chain.certs[2]
    votes = [{"signature": signature.hex(), "validator": voter} for voter, signature in child.signatures[:3]]
    certificate = {"block_hash": child.block_hash.hex(), "round": child.round, "signatures": votes}
    direct = changed(led, certificate=certificate, later=[])
    if skipped == 0:
        assert verify_proof(direct, genesis).later_headers == 0
    else:
        assert step_of(direct, genesis) is Step.NOT_CONSECUTIVE, "it was certified, and could still be abandoned"


def chain_of_two_changes() -> Chain:
    """Epoch 1 of v0 to v3; v9 for v0 in epoch 2; v8 comes in epoch 3. A decision in each."""
    chain = Chain(World())
    world = chain.world
    for number, name in enumerate(("v9", "v8")):
        chain.commit(*world.case("solo", f"p{number}", policy(f"203.0.113.{number + 1}"), f"203.0.113.{number + 1}"))
        change = {"add": [joining(world, name)]} | ({} if number else {"remove": [key("v0").public.hex()]})
        chain.commit(*(world.command(who, "validator_set", **change) for who in ("alice", "bob")))
        chain.hand_over("v1", "v2", "v3", "v9", *(("v8",) if number else ()))
        world.after(61)
    chain.commit(*world.case("solo", "p2", policy("203.0.113.3"), "203.0.113.3"))
    chain.commit()
    chain.commit(round_=5)
    chain.commit()
    return chain


def test_proofs_verify_across_changes_of_the_committee() -> None:
    chain = chain_of_two_changes()
    genesis = chain.world.genesis
    assert [header.epoch for header in chain.headers] == [1, 1, 2, 2, 3, 3, 3, 3]
    first = verify_proof(chain.prove(0, POLICY_RECEIPT), genesis)
    assert [name for _, name in first.members] == [member.name for member in genesis.committee]
    newest = verify_proof(chain.prove(4, POLICY_RECEIPT), genesis)
    assert {name for _, name in newest.members} == {"v1", "v2", "v3", "v8", "v9"}
    assert newest.header.epoch == 3
    assert verify_proof(chain.prove(4, POLICY_RECEIPT, last=6), genesis).later_headers == 2
    with pytest.raises(ProofError) as caught:
        Verifier(genesis, {1: 0}).proof(chain.prove(0, POLICY_RECEIPT))
    assert caught.value.step is Step.EPOCH, "an old committee's proof counts only up to its last height"


def test_a_proof_without_the_true_steps_between_epochs_is_refused() -> None:
    chain = chain_of_two_changes()
    genesis = chain.world.genesis
    proof = chain.prove(4, POLICY_RECEIPT)
    content = orjson.loads(proof)
    one, two = content["epochs"]
    decision = orjson.loads(chain.prove(0, POLICY_RECEIPT))
    no_change = {name: decision[name] for name in one}
    effects = two["receipt"]["effects"]
    others = [effects[0] | {"members": [key("v0").public.hex(), *effects[0]["members"][1:]]}, *effects[1:]]
    others[0]["members"].sort()
    forged = {
        Step.EPOCH: [[], [one], [two, one], [no_change, two], [one, one]],
        Step.INCLUSION: [[one, two | {"receipt": two["receipt"] | {"effects": others}}]],
        Step.CERTIFICATE_SIGNATURES: [[one, two | {"certificate": two["certificate"] | {"block_hash": "11" * 32}}]],
        Step.QUORUM: [[one, two | {"certificate": two["certificate"] | {"signatures": two["certificate"]["signatures"][:-1]}}]],
        Step.NOT_CONSECUTIVE: [[one | {"certificate": one["certificate"] | {"round": 9}}, two]],
    }
    for step, cases in forged.items():
        for epochs in cases:
            assert step_of(changed(proof, epochs=epochs), genesis) is step, (step, len(epochs))
    assert step_of(changed(orjson.dumps(decision), epochs=[one]), genesis) is Step.EPOCH


def test_the_old_committee_proves_nothing_after_it_has_handed_over() -> None:
    chain = Chain(World())
    world = chain.world
    change = {"add": [joining(world, "v9")]}
    chain.commit(*(world.command(who, "validator_set", **change) for who in ("alice", "bob")))
    chain.commit(*world.case("solo", "p1"))  # the old four go on as if nothing had been
    chain.commit()
    proof = chain.prove(1, POLICY_RECEIPT)
    verify_proof(proof, world.genesis)  # nobody can know without being told
    with pytest.raises(ProofError) as caught:
        Verifier(world.genesis, {1: 1}).proof(proof)
    assert caught.value.step is Step.EPOCH
