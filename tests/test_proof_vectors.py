"""A verifier written from docs/proof-format.md alone, and the vectors that every verifier must judge alike.

Nothing of the project's encoding, ledger or consensus is used in the verifier below; only Ed25519 comes from the key module.
``python -m tests.test_proof_vectors`` writes the vectors anew after a deliberate change of the format.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cybermesh import genesis as g
from cybermesh.keys import verify
from cybermesh.proof import ProofError, verify_proof
from tests.ledger.test_operators import joining
from tests.ledger.world import World
from tests.proofs import Chain

VECTORS = Path(__file__).parent / "vectors"
GOOD = ("proof.json", "proof-later.json", "proof-refusal.json", "proof-epochs.json")
FIELDS = (
    "version", "chain_id", "epoch", "round", "height", "author", "time_ms", "parent_hash", "parent_round", "parent_signers",
    "qc_digest", "tc_digest", "payload_root", "state_root", "decision_seq",
)  # fmt: skip
LAYOUT = struct.Struct(">H32sIQQHQ32sQQ32s32s32s32sQ")


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def follow(parent: dict[str, Any], short: dict[str, Any]) -> dict[str, Any]:
    author, seq, signers, round_, time_ms = short["numbers"]
    payload, root, tc = map(bytes.fromhex, short["hashes"])
    parent_hash = sha(b"cm/block/1", LAYOUT.pack(*parent.values()))
    qc = struct.pack(">IQ32sQ32s", parent["epoch"], parent["round"], parent_hash, parent["parent_round"], parent["parent_hash"])
    values = (
        parent["version"], parent["chain_id"], parent["epoch"], round_, parent["height"] + 1, author, time_ms, parent_hash,
        parent["round"], signers, sha(b"cm/qc/1", qc), tc or bytes(32), payload or sha(b""), root or parent["state_root"], seq,
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def log_root(index: int, size: int, leaf: bytes, path: list[bytes]) -> bytes | None:
    """The recursive reading of RFC 9162: which side of each split the entry is on."""
    sides = []
    low, high = 0, size
    while high - low > 1:
        middle = low + (1 << ((high - low - 1).bit_length() - 1))
        sides.append(index >= middle)
        low, high = (middle, high) if index >= middle else (low, middle)
    if index >= size or len(sides) != len(path):
        return None
    node = leaf
    for is_right, sibling in zip(reversed(sides), path, strict=True):
        node = sha(b"\x01", sibling, node) if is_right else sha(b"\x01", node, sibling)
    return node


def failing_step(data: bytes, genesis: bytes) -> str | None:
    """Judge a proof that is known to have the right shape; None when it is valid."""
    proof = json.loads(data)
    if canonical(proof) != data:
        return "ENCODING"
    keys = sorted(bytes.fromhex(validator["pubkey"]) for validator in json.loads(genesis)["validators"])
    height = 0
    for epoch, step in enumerate(proof["epochs"], start=1):
        failed, first = failing_part(step, genesis, epoch, keys)
        if failed is not None:
            return failed
        change = [effect for effect in step["receipt"]["effects"] if effect["effect"] == "committee"]
        if not change or first["height"] <= height:
            return "EPOCH"
        keys, height = [bytes.fromhex(member) for member in change[0]["members"]], first["height"]
    failed, first = failing_part(proof, genesis, len(proof["epochs"]) + 1, keys)
    return failed or (None if first["height"] > height else "EPOCH")


def failing_part(proof: dict[str, Any], genesis: bytes, epoch: int, keys: list[bytes]) -> tuple[str | None, dict[str, Any]]:
    """Judge what one committee agreed to."""
    first = last = dict(zip(FIELDS, LAYOUT.unpack(bytes.fromhex(proof["header"])), strict=True))
    for short in proof["later"]:
        last = follow(last, short)
    if first["chain_id"] != sha(genesis):
        return "GENESIS", first
    if first["epoch"] != epoch:
        return "EPOCH", first
    if proof["receipt"]["height"] != first["height"]:
        return "RECEIPT", first
    path = [bytes.fromhex(node) for node in proof["path"]]
    root = log_root(proof["index"], proof["log_size"], sha(b"\x00", canonical(proof["receipt"])), path)
    size, digest = proof["log_size"].to_bytes(8, "big"), bytes.fromhex(proof["state_digest"])
    if root is None or sha(b"cm/state/1", size, root, digest) != first["state_root"]:
        return "INCLUSION", first
    certificate = proof["certificate"]
    if certificate["round"] != last["round"] + 1:
        return "NOT_CONSECUTIVE", first
    voters = [vote["validator"] for vote in certificate["signatures"]]
    if len(voters) != len(keys) - (len(keys) - 1) // 3 or voters != sorted(set(voters)) or voters[-1] >= len(keys):
        return "QUORUM", first
    block_hash = bytes.fromhex(certificate["block_hash"])
    signed = struct.pack(
        ">H32sIQ32sQ32s", 1, first["chain_id"], epoch, certificate["round"], block_hash, last["round"],
        sha(b"cm/block/1", LAYOUT.pack(*last.values())),
    )  # fmt: skip
    message = sha(b"cm/vote/1", signed)
    votes = [(keys[vote["validator"]], bytes.fromhex(vote["signature"])) for vote in certificate["signatures"]]
    is_signed = all(verify(key, message, signature) for key, signature in votes)
    return (None if is_signed else "CERTIFICATE_SIGNATURES"), first


def made() -> dict[str, bytes]:
    """The vectors as this version of the project makes them; keys and times are fixed, so they never differ."""
    chain = Chain(World())
    world = chain.world
    chain.commit(*world.case("north-1", "p1"))
    world.now_ms += 700
    chain.commit(*world.case("south-1", "p2"), world.policy("solo", "p3", {"rule_type": "block", "action": "drop"}), round_=5)
    chain.commit()
    chain.commit(round_=9)
    chain.commit()
    chain.commit()
    changed = Chain(World())
    member = joining(changed.world, "v9")
    changed.commit(*(changed.world.command(who, "validator_set", add=[member]) for who in ("alice", "bob")))
    changed.hand_over("v0", "v1", "v2", "v3", "v9")
    changed.commit(*changed.world.case("solo", "p4"))
    changed.commit()
    return {
        "genesis.json": world.genesis.encode(),
        "proof.json": chain.prove(1, 2),
        "proof-later.json": chain.prove(1, 2, last=4),
        "proof-refusal.json": chain.prove(1, 3),
        "proof-epochs.json": changed.prove(1, 2),
    }


@pytest.mark.parametrize("name", GOOD)
def test_both_verifiers_accept_the_vectors(name: str) -> None:
    genesis, data = (VECTORS / "genesis.json").read_bytes(), (VECTORS / name).read_bytes()
    assert failing_step(data, genesis) is None
    proven = verify_proof(data, g.parse(genesis))
    assert proven.header.height == 2
    assert proven.later_headers == (3 if name == "proof-later.json" else 0)


@pytest.mark.parametrize("name", ["genesis.json", *GOOD])
def test_the_vectors_are_what_the_project_makes(name: str) -> None:
    assert made()[name] == (VECTORS / name).read_bytes()


def test_both_verifiers_name_the_same_step_for_forged_proofs() -> None:
    genesis, good = (VECTORS / "genesis.json").read_bytes(), (VECTORS / "proof-later.json").read_bytes()
    content = json.loads(good)
    certificate, receipt = content["certificate"], content["receipt"]
    votes = certificate["signatures"]
    forged = [
        {"index": content["index"] - 1},
        {"log_size": content["log_size"] + 1},
        {"path": content["path"][1:]},
        {"state_digest": "00" * 32},
        {"receipt": receipt | {"height": 3}},
        {"receipt": receipt | {"code": "STALE"}},
        {"later": content["later"][:-1]},
        {"later": content["later"][:1]},
        {"certificate": certificate | {"round": certificate["round"] + 1}},
        {"certificate": certificate | {"block_hash": "11" * 32}},
        {"certificate": certificate | {"signatures": votes[:-1]}},
        {"certificate": certificate | {"signatures": votes[::-1]}},
        {"certificate": certificate | {"signatures": [votes[0] | {"signature": votes[1]["signature"]}, *votes[1:]]}},
        {"header": content["header"][:4] + "00" * 32 + content["header"][68:]},
    ]
    steps = set()
    for change in forged:
        data = canonical(content | change)
        with pytest.raises(ProofError) as caught:
            verify_proof(data, g.parse(genesis))
        assert failing_step(data, genesis) == caught.value.step, change
        steps.add(str(caught.value.step))
    assert steps == {"GENESIS", "RECEIPT", "INCLUSION", "NOT_CONSECUTIVE", "QUORUM", "CERTIFICATE_SIGNATURES"}


if __name__ == "__main__":
    for file_name, content in made().items():
        (VECTORS / file_name).write_bytes(content)
