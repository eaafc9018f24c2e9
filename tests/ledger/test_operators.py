"""What operators order, and how many of them it takes."""

from __future__ import annotations

import pytest

from cybermesh import genesis as g
from cybermesh.ledger.keyring import ready_bytes
from cybermesh.ledger.receipts import Code, Kind, OperatorEffect
from cybermesh.ledger.state import Applied
from tests.ledger.world import ATTACKER, World, changes, codes, decisions, deployment, key, policy


def register(name: str, site: str = "east", **more: object) -> dict[str, object]:
    return {"name": name, "pubkey": key(name).public.hex(), "site": site, **more}


def test_revocation_ends_a_decision_and_names_the_operator() -> None:
    world = World()
    world.apply(*world.case("solo", "p1"))
    receipts = world.apply(world.command("alice", "revoke", policy_id="p1", reason="a customer"))
    assert changes(receipts) == [("ended", "p1", "revoked")]
    (effect,) = [effect for effect in receipts[0].effects if isinstance(effect, OperatorEffect)]
    assert effect.operators == (key("alice").public,)
    assert world.state.decisions() == []


def test_a_revoked_ban_is_not_held_against_its_target() -> None:
    world = World()
    world.apply(*world.case("north-1", "n1"), *world.case("south-1", "s1"))
    world.wait(900)
    world.apply(*world.case("north-1", "n2"), *world.case("south-1", "s2"))
    assert world.state.decisions()[0].ttl_s == 1_800
    world.apply(world.command("alice", "revoke", policy_id=world.state.decisions()[0].policy_id))
    world.apply(*world.case("north-1", "n3"), *world.case("south-1", "s3"))
    assert world.state.decisions()[0].ttl_s == 900


def test_a_rejected_policy_cannot_be_approved_any_more() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    assert codes(world.apply(world.command("alice", "reject", policy_id="p1"))) == [Code.OK]
    assert codes(world.apply(world.command("bob", "approve", policy_id="p1"))) == [Code.UNKNOWN_POLICY]


@pytest.mark.parametrize("action", ["approve", "reject", "revoke"])
def test_a_policy_nobody_knows_is_named_so(action: str) -> None:
    world = World()
    assert codes(world.apply(world.command("alice", action, policy_id="none"))) == [Code.UNKNOWN_POLICY]


def test_an_operators_own_policy_is_decided_at_once_and_renewed_when_repeated() -> None:
    world = World()
    body = policy(target={"cidrs": ["203.0.113.0/24"]}, ttl=86_400)
    assert changes(world.apply(world.command("alice", "add", policy=body | {"policy_id": "p1"}))) == [
        ("opened", "p1", "approved")
    ]
    receipts = world.after(100).apply(world.command("bob", "add", policy=body | {"policy_id": "p2"}))
    assert changes(receipts) == [("renewed", "p1", "approved")]
    assert decisions(receipts)[0].approvers == tuple(sorted((key("alice").public, key("bob").public)))
    other = policy("203.0.113.9") | {"policy_id": "p1"}
    assert codes(world.apply(world.command("bob", "add", policy=other))) == [Code.POLICY_ID_TAKEN]


def test_commands_of_strangers_and_of_producers_are_unknown() -> None:
    world = World()
    stranger = world.command("mallory", "kill_switch", on=True)
    producer = world.command("north-1", "kill_switch", on=True)
    assert codes(world.apply(stranger, producer)) == [Code.UNKNOWN_PRODUCER] * 2
    assert not world.state.registers.is_killed


def test_the_kill_switch_stops_new_rules_and_lets_the_others_run_out() -> None:
    world = World()
    world.apply(*world.case("solo", "p1"), *world.case("north-1", "p2", entity="203.0.113.9"))
    world.apply(world.command("alice", "kill_switch", on=True))
    receipts = world.apply(
        *world.case("solo", "p3", entity="203.0.113.8"),
        world.command("bob", "approve", policy_id="p2"),
        world.command("bob", "add", policy=policy("203.0.113.10") | {"policy_id": "p4"}),
        world.anomaly("south-1", "agree", "203.0.113.9"),
    )
    assert codes(receipts)[2:5] == [Code.KILL_SWITCH] * 3
    assert not decisions(receipts)
    assert changes(world.wait(900)) == [("ended", "p1", "expired")]
    world.apply(world.command("alice", "kill_switch", on=False))
    assert changes(world.apply(world.command("bob", "approve", policy_id="p2"))) == [("opened", "p2", "approved")]


# m of n


@pytest.mark.parametrize(
    ("action", "arguments"),
    [
        ("protected_networks", {"add": ["203.0.113.0/24"]}),
        ("key_ring", {"add": [register("new")]}),
        ("key_ring", {"remove": [key("solo").public.hex()]}),
    ],
    ids=["protect", "add a key", "remove a key"],
)
def test_ring_and_protected_networks_need_two_operators_who_sign_the_same(action: str, arguments: dict[str, object]) -> None:
    world = World()
    before = world.state.tables
    assert codes(world.apply(world.command("alice", action, **arguments))) == [Code.AWAITING_OPERATORS]
    assert codes(world.apply(world.command("alice", action, **arguments))) == [Code.AWAITING_OPERATORS]
    assert (world.state.tables.producers, world.state.tables.protected) == (before.producers, before.protected)
    receipts = world.apply(world.command("bob", action, **arguments, reason="agreed on the phone"))
    assert codes(receipts)[0] is Code.OK
    assert (world.state.tables.producers, world.state.tables.protected) != (before.producers, before.protected)
    (effect,) = [effect for effect in receipts[0].effects if isinstance(effect, OperatorEffect)]
    assert effect.operators == tuple(sorted((key("alice").public, key("bob").public)))
    assert not world.state.tables.proposals


def test_two_operators_who_want_different_things_change_nothing() -> None:
    world = World()
    receipts = world.apply(
        world.command("alice", "protected_networks", add=["203.0.113.0/24"]),
        world.command("bob", "protected_networks", add=["203.0.113.0/25"]),
    )
    assert codes(receipts) == [Code.AWAITING_OPERATORS] * 2


def test_a_proposal_lapses() -> None:
    world = World()
    world.apply(world.command("alice", "protected_networks", add=["203.0.113.0/24"]))
    receipts = world.wait(86_400)
    assert [(r.kind, r.code) for r in receipts] == [(Kind.SYSTEM_PROPOSAL, Code.LAPSED)]
    assert codes(world.apply(world.command("bob", "protected_networks", add=["203.0.113.0/24"]))) == [Code.AWAITING_OPERATORS]


def test_one_operator_is_enough_where_there_is_one() -> None:
    world = World(deployment(operators=(g.Operator("alice", key("alice").public),)))
    assert codes(world.apply(world.command("alice", "key_ring", add=[register("new")]))) == [Code.OK]


def test_a_newly_protected_network_ends_the_bans_inside_it() -> None:
    world = World()
    world.apply(*world.case("solo", "p1"))
    change = {"add": ["203.0.113.0/24"]}
    receipts = world.apply(*(world.command(who, "protected_networks", **change) for who in ("alice", "bob")))
    assert changes(receipts) == [("ended", "p1", "protected")]
    assert codes(world.apply(*world.case("solo", "p2")))[2] is Code.PROTECTED_TARGET
    world.apply(*(world.command(who, "protected_networks", remove=["203.0.113.0/24"]) for who in ("alice", "bob")))
    assert codes(world.apply(*world.case("solo", "p3")))[2] is Code.OK


def test_the_constants_cannot_be_unprotected() -> None:
    world = World()
    world.apply(*(world.command(who, "protected_networks", remove=["127.0.0.0/8"]) for who in ("alice", "bob")))
    body = policy("127.0.0.1") | {"policy_id": "p1"}
    assert codes(world.apply(world.command("alice", "add", policy=body))) == [Code.PROTECTED_TARGET]


def test_a_revoked_key_signs_nothing_from_the_next_block_and_its_budget_is_taken_back() -> None:
    world = World()
    world.apply(*world.case("solo", "p1"), *world.case("north-1", "p2"), world.anomaly("south-1", "agree"))
    change = {"remove": [key("solo").public.hex(), key("north-1").public.hex()]}
    last = world.anomaly("solo", "same block")
    receipts = world.apply(*(world.command(who, "key_ring", **change) for who in ("alice", "bob")), last)
    assert codes(receipts)[2] is Code.OK
    # The decision on the attacker was corroborated meanwhile, so nobody's budget carries it and it stays.
    assert [record.holder for record in world.state.decisions()] == [b""]
    assert codes(world.apply(world.anomaly("solo", "next block"))) == [Code.UNKNOWN_PRODUCER]
    alone = World()
    alone.apply(*alone.case("solo", "p1"))
    receipts = alone.apply(*(alone.command(who, "key_ring", remove=[key("solo").public.hex()]) for who in ("alice", "bob")))
    assert changes(receipts) == [("ended", "p1", "key_revoked")]


def test_a_new_producer_with_a_budget_can_use_it() -> None:
    world = World()
    added = register("new", networks=["203.0.113.0/24"], budget={"max_active": 1, "max_per_minute": 1, "max_ttl_s": 60})
    world.apply(*(world.command(who, "key_ring", add=[added]) for who in ("alice", "bob")))
    receipts = world.apply(*world.case("new", "p1", policy(ATTACKER, ttl=60)))
    assert changes(receipts) == [("opened", "p1", "budget")]


@pytest.mark.parametrize(
    ("action", "arguments", "detail"),
    [
        ("approve", {}, "policy_id"),
        ("approve", {"policy_id": "p", "extra": 1}, "extra"),
        ("kill_switch", {}, "on"),
        ("kill_switch", {"on": 1}, "on"),
        ("allow_list", {}, "add"),
        ("allow_list", {"add": ["10.0.0.1/8"]}, "add[0]"),
        ("allow_list", {"add": [7]}, "add[0]"),
        ("mute", {"entity": ATTACKER}, "until_ms"),
        ("label", {"anomaly_id": "a"}, "label"),
        ("add", {}, "policy"),
        ("add", {"policy": {"policy_id": "p"}}, "rule_type"),
        ("key_ring", {"add": [{"name": "x", "pubkey": "zz", "site": "s"}]}, "add[0].pubkey"),
        ("key_ring", {"add": [register("alice")]}, "add"),
        ("key_ring", {"add": [register("v0")]}, "add"),
        ("key_ring", {"remove": [key("nobody").public.hex()]}, "remove"),
        ("key_ring", {"remove_operators": [key("alice").public.hex(), key("bob").public.hex()]}, "remove_operators"),
        ("key_ring", {"add": [register("new", colour="red")]}, "add[0].colour"),
        ("validator_set", {"add": [{"name": "x"}]}, "add[0].pubkey"),
    ],
    ids=str,
)
def test_a_command_that_cannot_be_read_names_the_place(action: str, arguments: dict[str, object], detail: str) -> None:
    world = World()
    receipt = world.apply(world.command("alice", action, **arguments))[0]
    assert (receipt.code, receipt.detail) == (Code.BAD_COMMAND, detail)


def joining(world: World, name: str, *, ready_ms: int | None = None, signer: str = "") -> dict[str, object]:
    """A new validator as operators name it, with its own word that it is ready."""
    when = world.now_ms if ready_ms is None else ready_ms
    signature = key(signer or name).sign(ready_bytes(world.genesis.chain_id, when))
    return {"name": name, "pubkey": key(name).public.hex(), "ready_ms": when, "ready_signature": signature.hex()}


def test_two_operators_change_the_validator_set_and_the_receipt_names_the_next_one() -> None:
    world = World()
    change = {"add": [joining(world, "v9")], "remove": [key("v0").public.hex()]}
    applied = world.try_apply(world.command("alice", "validator_set", **change))
    assert isinstance(applied, Applied)
    assert codes(applied.receipts) == [Code.AWAITING_OPERATORS]
    assert applied.next_committee is None
    world.apply(world.command("alice", "validator_set", **change))
    # The word of readiness has been given anew meanwhile; it is not what the operators agree to.
    renewed = change | {"add": [joining(world.after(60), "v9")]}
    command = world.command("bob", "validator_set", **renewed)
    applied = world.try_apply(command)
    assert isinstance(applied, Applied)
    members = tuple(sorted(key(name).public for name in ("v1", "v2", "v3", "v9")))
    assert applied.next_committee == members
    (receipt,) = world.apply(command)
    assert receipt.committee is not None
    assert receipt.committee.members == members
    assert set(receipt.committee.names) == {"v1", "v2", "v3", "v9"}
    assert [member for member, _ in world.state.committee] == list(members)
    assert world.apply()[:0] == ()
    applied = world.try_apply()
    assert isinstance(applied, Applied)
    assert applied.next_committee is None, "one block ends the epoch, not every one after it"


@pytest.mark.parametrize("case", ["old", "early", "of another", "of another chain"])
def test_a_validator_that_has_not_shown_itself_ready_does_not_join(case: str) -> None:
    world = World()
    member = {
        "old": lambda: joining(world, "v9", ready_ms=world.now_ms - 600_001),
        "early": lambda: joining(world, "v9", ready_ms=world.now_ms + 600_001),
        "of another": lambda: joining(world, "v9", signer="v8"),
        "of another chain": lambda: joining(World(deployment(chain_name="other")), "v9"),
    }[case]()
    for who in ("alice", "bob"):
        (receipt,) = world.apply(world.command(who, "validator_set", add=[member]))
        assert (receipt.code, receipt.detail) == (Code.NOT_READY, "v9")
    assert len(world.state.committee) == 4


def test_a_block_changes_the_validator_set_once() -> None:
    world = World()
    commands = [
        world.command(who, "validator_set", add=[joining(world, name)]) for name in ("v8", "v9") for who in ("alice", "bob")
    ]
    receipts = world.apply(*commands)
    assert codes(receipts) == [Code.AWAITING_OPERATORS, Code.OK, Code.NOT_READY, Code.NOT_READY]
    assert {name for _, name in world.state.committee} == {"v0", "v1", "v2", "v3", "v8"}


def test_a_validator_set_that_cannot_be_is_refused() -> None:
    world = World()
    everybody = [key(f"v{number}").public.hex() for number in range(4)]
    for change, fault in (
        ({"remove": [key("v9").public.hex()]}, "remove"),
        ({"remove": everybody}, "remove"),
        ({"add": [joining(world, "v1")]}, "add"),
        ({"add": [joining(world, "solo")]}, "add"),
        ({"add": [joining(world, "alice")]}, "add"),
        ({"add": [joining(world, "v9") | {"name": "v1"}]}, "add"),
        ({"add": [joining(world, "v9")], "remove": [key("v9").public.hex()]}, "add"),
    ):
        (receipt,) = world.apply(world.command("alice", "validator_set", **change))
        assert (receipt.code, receipt.detail) == (Code.BAD_COMMAND, fault), change


def test_labels_and_mutes_are_recorded_without_addresses() -> None:
    world = World()
    receipts = world.apply(
        world.command("alice", "label", anomaly_id="a1", label="false_positive"),
        world.command("alice", "mute", entity=ATTACKER, type="port_scan", until_ms=1_800_000_000_000),
    )
    assert codes(receipts) == [Code.OK] * 2
    label, mute = (receipt.effects[0] for receipt in receipts)
    assert isinstance(label, OperatorEffect)
    assert isinstance(mute, OperatorEffect)
    assert (label.subject, label.detail) == ("a1", "false_positive")
    assert mute.detail == "port_scan:1800000000000"
    assert ATTACKER.encode() not in receipts[1].encode()


def test_deeply_nested_params_are_refused_alike_everywhere() -> None:
    world = World()
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    applied = world.try_apply(world.command("alice", "revoke", policy_id="p", extra=deep))
    assert isinstance(applied, Applied)
    assert (applied.receipts[0].code, applied.receipts[0].detail) == (Code.BAD_COMMAND, "")


def test_a_change_is_named_by_its_canonical_bytes_and_not_by_how_an_interpreter_shows_it() -> None:
    """An unassigned character is shown differently by interpreters with different Unicode tables."""
    world = World()
    command = world.command("alice", "key_ring", add=[register("east-\u0378")])
    (receipt,) = world.apply(command)
    assert receipt.code is Code.AWAITING_OPERATORS
    (effect,) = [effect for effect in receipt.effects if isinstance(effect, OperatorEffect)]
    assert effect.subject == "772e8f04532c9c467b3ba5a0273a79a404d990b480af1d8619d0b13eeabbf424"
