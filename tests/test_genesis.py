"""genesis.json: strict on the way in, canonical on the way out, and named by its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh import genesis as g


def key(number: int) -> bytes:
    return hashlib.sha256(f"key {number}".encode()).digest()


def example() -> g.Genesis:
    return g.Genesis(
        chain_name="test",
        validators=tuple(g.Validator(f"validator-{i}", key(i)) for i in range(4)),
        producers=(
            g.Producer("ai-1", key(10), "north", networks=(ip_network("10.0.0.0/8"),), budget=g.Budget()),
            g.Producer("ai-2", key(11), "south", message_types=("anomaly",)),
        ),
        operators=(g.Operator("alice", key(20)), g.Operator("bob", key(21))),
        agents=(g.Agent("edge-1", key(30)),),
        protected_networks=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
        infrastructure_networks=(ip_network("198.51.100.7/32"),),
    )


def test_parse_of_the_canonical_bytes_gives_the_same_genesis_and_chain_id() -> None:
    genesis = example()
    again = g.parse(genesis.encode())
    assert again == genesis
    assert again.chain_id == genesis.chain_id == hashlib.sha256(genesis.encode()).digest()


def test_layout_and_key_order_of_the_file_do_not_change_the_chain_id() -> None:
    loose = json.dumps(json.loads(example().encode()), indent=3, sort_keys=False).encode()
    assert loose != example().encode()
    assert g.parse(loose).chain_id == example().chain_id


def test_defaults_are_the_careful_ones() -> None:
    bare = json.loads(example().encode())
    for name in ("governance", "limits", "block_limits", "timing", "wire", "protected_networks"):
        del bare[name]
    bare["producers"] = [{"name": "ai", "pubkey": key(40).hex(), "site": "one"}]
    genesis = g.parse(json.dumps(bare).encode())
    assert genesis.producers[0].budget is None
    assert genesis.governance.evidence_required
    assert genesis.governance.corroborating_sites == 2
    assert not genesis.wire.accept_unbound_fields


def _set(path: str, value: object) -> bytes:
    table = json.loads(example().encode())
    *parents, last = path.split(".")
    place = table
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return json.dumps(table).encode()


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (_set("surprise", 1), "surprise"),
        (_set("limits.ttl_max", 1), "limits.ttl_max"),
        (_set("producers.0.budget.max_actve", 1), "producers[0].budget.max_actve"),
        (_set("limits.ttl_max_s", "900"), "limits.ttl_max_s"),
        (_set("limits.ttl_max_s", True), "limits.ttl_max_s"),
        (_set("limits.ttl_max_s", 0), "limits.ttl_max_s"),
        (_set("limits.ttl_min_s", 86_400), None),
        (_set("limits.ttl_max_s", 900.0), "limits.ttl_max_s"),
        (_set("validators.1.pubkey", "AB" * 32), "validators[1].pubkey"),
        (_set("validators.1.pubkey", "ab" * 31), "validators[1].pubkey"),
        (_set("validators.1.pubkey", key(0).hex()), "validators[1].pubkey"),
        (_set("validators.1.name", "validator-0"), "validators[1]"),
        (_set("validators.1.name", ""), "validators[1].name"),
        (_set("validators", []), "validators"),
        (_set("validators", {}), "validators"),
        (_set("agents.0.pubkey", key(10).hex()), "agents[0].pubkey"),
        (_set("producers.1.message_types", ["anomaly", "ack"]), "producers[1].message_types"),
        (_set("producers.0.networks", ["10.0.0.1/8"]), "producers[0].networks[0]"),
        (_set("producers.0.networks", [7]), "producers[0].networks[0]"),
        (_set("producers.0.budget", 5), "producers[0].budget"),
        (_set("governance.operators_needed", 3), "governance.operators_needed"),
        (_set("wire.signing_domains.commits", ""), "wire.signing_domains.commits"),
        (b"{", ""),
        (b"[]", ""),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
        (b'{"chain_name":"a","chain_name":"b"}', "chain_name"),
        (b'{"chain_name":"a"}', "validators"),
    ],
)
def test_a_bad_genesis_is_refused_with_the_path_of_the_fault(data: bytes, path: str | None) -> None:
    if path is None:
        g.parse(data)
        return
    with pytest.raises(g.GenesisError) as caught:
        g.parse(data)
    assert caught.value.path == path
    assert caught.value.reason


def test_a_genesis_made_in_code_is_checked_like_a_parsed_one() -> None:
    with pytest.raises(g.GenesisError, match=r"producers\[0\]\.budget\.max_active"):
        dataclasses.replace(example(), producers=(g.Producer("a", key(50), "x", budget=g.Budget(max_active=0)),))


def test_a_mapped_network_is_read_as_the_ipv4_network_it_means() -> None:
    genesis = g.parse(_set("protected_networks", ["::ffff:192.0.2.0/120"]))
    assert genesis.protected_networks == (ip_network("192.0.2.0/24"),)


def test_the_committee_is_ordered_by_public_key() -> None:
    keys = [member.pubkey for member in example().committee]
    assert keys == sorted(keys)


def test_the_differing_field_of_two_geneses_is_named() -> None:
    ours = example()
    assert g.difference(ours, ours) is None
    theirs = dataclasses.replace(ours, limits=g.Limits(ttl_max_s=3_600))
    assert g.difference(ours, theirs) == "limits.ttl_max_s"
    assert theirs.chain_id != ours.chain_id


@given(
    st.binary(max_size=64)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=8).map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_give_a_genesis_or_a_genesis_error(data: bytes) -> None:
    try:
        g.parse(data)
    except g.GenesisError:
        return
