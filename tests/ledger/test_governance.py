"""Who may cause a block: transcripts of blocks and what they did."""

from __future__ import annotations

import dataclasses

import orjson
import pytest

from cybermesh import genesis as g
from cybermesh.ledger.receipts import Code, Kind
from tests.ledger.world import ATTACKER, World, changes, codes, decisions, deployment, key, policy, rate_limit


def verdict(world: World, who: str, name: str, body: dict[str, object], entity: str = ATTACKER, **how: object) -> Code:
    """The code of a policy whose anomaly and evidence come with it."""
    return codes(world.apply(*world.case(who, name, body, entity, **how)))[2]


# Protected and allowed networks


@pytest.mark.parametrize(
    "target",
    [
        {"ips": ["198.51.100.7"]},  # inside one of the genesis
        {"cidrs": ["198.51.100.0/24"]},  # equal to it
        {"cidrs": ["198.51.0.0/16"]},  # containing it
        {"cidrs": ["0.0.0.0/0"]},
        {"ips": ["::ffff:198.51.100.7"]},  # the same host, written as IPv6
        {"cidrs": ["::ffff:198.51.100.0/120"]},
        {"cidrs": ["::fffe:0:0/95"]},  # around all of IPv4
        {"cidrs": ["::/0"]},
        {"ips": ["2001:db8:1::9"]},
        {"ips": ["10.9.0.5"]},  # infrastructure
        {"ips": ["127.0.0.1"]},
        {"ips": ["::1"]},
        {"ips": ["::"]},
        {"ips": ["0.0.0.0"]},
        {"ips": ["224.0.0.1"]},
        {"ips": ["ff02::1"]},
        {"ips": ["169.254.1.1"]},
        {"ips": ["fe80::1"]},
        {"ips": ["255.255.255.255"]},
        {"ips": [ATTACKER, "198.51.100.7"]},  # one of several
    ],
    ids=str,
)
def test_a_policy_against_a_protected_network_opens_nothing(target: dict[str, object]) -> None:
    world = World()
    body = policy(target=target)
    receipts = world.apply(*world.case("solo", "p1", body), *world.case("south-1", "p2", body))
    assert [receipt.code for receipt in receipts if receipt.kind is Kind.POLICY] == [Code.PROTECTED_TARGET] * 2
    assert not decisions(receipts)
    assert codes(world.apply(world.command("alice", "add", policy=body | {"policy_id": "p3"}))) == [Code.PROTECTED_TARGET]
    assert world.state.decisions() == []


def test_a_neighbour_of_a_protected_network_can_be_blocked() -> None:
    world = World()
    receipts = world.apply(world.command("alice", "add", policy=policy("198.51.101.1") | {"policy_id": "p1"}))
    assert changes(receipts) == [("opened", "p1", "approved")]


def test_an_allowed_network_is_not_blocked_and_its_bans_end() -> None:
    world = World()
    world.apply(*world.case("solo", "p1"))
    receipts = world.apply(world.command("alice", "allow_list", add=["203.0.113.0/24"]))
    assert changes(receipts) == [("ended", "p1", "allowed")]
    assert verdict(world, "solo", "p2", policy(ATTACKER)) is Code.ALLOWED_TARGET
    world.apply(world.command("bob", "allow_list", remove=["203.0.113.0/24"]))
    assert verdict(world, "solo", "p3", policy(ATTACKER)) is Code.OK


# (a) two sites


def test_one_producer_alone_opens_nothing_without_a_budget() -> None:
    world = World()
    receipts = world.apply(*world.case("north-1", "p1"))
    assert codes(receipts) == [Code.OK, Code.OK, Code.PENDING]
    assert not decisions(receipts)


def test_two_producers_of_one_site_do_not_count_as_two() -> None:
    world = World()
    receipts = world.apply(*world.case("north-1", "p1"), *world.case("north-2", "p2"))
    assert codes(receipts)[2::3] == [Code.PENDING, Code.PENDING]
    assert not decisions(receipts)


def test_two_sites_open_the_pending_policy_when_the_second_reports() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    receipts = world.after(59).apply(world.anomaly("south-1", "other"))
    assert changes(receipts) == [("opened", "p1", "corroborated")]
    assert receipts[-1].kind is Kind.SYSTEM_REQUEST
    assert decisions(receipts)[0].reporters == tuple(sorted((key("north-1").public, key("south-1").public)))


@pytest.mark.parametrize(
    "second",
    [
        {"entity": "203.0.113.8"},
        {"kind": "brute_force"},
        {"severity": 4},
        {"confidence": 0.4},
    ],
    ids=str,
)
def test_a_report_of_something_else_or_below_the_floors_corroborates_nothing(second: dict[str, object]) -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    assert not decisions(world.after(1).apply(world.anomaly("south-1", "other", **second)))  # type: ignore[arg-type]


def test_reports_more_than_the_window_apart_are_two_events() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    assert not decisions(world.after(60.001).apply(world.anomaly("south-1", "late")))
    receipts = world.after(30).apply(world.anomaly("north-2", "again"))
    assert changes(receipts) == [("opened", "p1", "corroborated")]


def test_one_entity_written_in_two_ways_is_one() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    assert decisions(world.apply(world.anomaly("south-1", "mapped", f"::ffff:{ATTACKER}")))


def test_a_true_alarm_does_not_let_a_producer_block_somebody_else() -> None:
    world = World()
    world.apply(world.anomaly("south-1", "real"))
    receipts = world.apply(*world.case("north-1", "p1", policy("192.0.2.99")))
    assert codes(receipts)[2] is Code.PENDING
    assert not decisions(world.apply(world.anomaly("south-1", "again")))


def test_a_flood_with_forged_sources_is_limited_at_the_victim_both_name() -> None:
    world = World()
    details = {"victim": "192.0.2.80"}
    world.apply(*world.case("north-1", "p1", rate_limit("192.0.2.80", 80), "flood-1", kind="ddos", details=details))
    receipts = world.apply(world.anomaly("south-1", "b", "flood-1", kind="ddos", details={"victim": "192.0.2.81"}))
    assert not decisions(receipts)
    receipts = world.apply(world.anomaly("south-1", "c", "flood-1", kind="ddos", details=details))
    assert changes(receipts) == [("opened", "p1", "corroborated")]
    assert decisions(receipts)[0].direction == "egress"


def test_sites_that_see_other_forged_sources_agree_on_the_victim() -> None:
    world = World()
    details = {"victim": "192.0.2.80"}
    body = rate_limit("192.0.2.80", 80)
    world.apply(*world.case("north-1", "p1", body, "203.0.113.20", kind="ddos", details=details))
    receipts = world.apply(*world.case("south-1", "p2", body, "203.0.113.99", kind="ddos", details=details))
    assert changes(receipts) == [("opened", "p2", "corroborated")]
    # Agreement on a victim is none on who attacks it.
    receipts = world.apply(*world.case("north-1", "p3", policy("203.0.113.20"), "203.0.113.20", kind="ddos", details=details))
    assert codes(receipts)[2] is Code.PENDING


def test_a_victim_can_be_limited_but_never_blocked_by_detectors() -> None:
    world = World()
    details = {"victim": "192.0.2.80"}
    body = policy("192.0.2.80")
    receipts = world.apply(
        *world.case("north-1", "p1", body, kind="ddos", details=details),
        *world.case("south-1", "p2", body, kind="ddos", details=details),
    )
    assert not decisions(receipts)


@pytest.mark.parametrize(("packets", "window_s", "code"), [(49, 1, Code.PENDING), (50, 1, Code.OK), (2_999, 60, Code.PENDING)])
def test_a_limit_that_leaves_a_victim_next_to_nothing_is_for_an_operator(packets: int, window_s: int, code: Code) -> None:
    world = World()
    for who, victim in (("solo", "192.0.2.81"), ("north-1", "192.0.2.80")):  # neither a budget nor agreement is enough
        details, body = {"victim": victim}, rate_limit(victim, 80, packets=packets, window_s=window_s)
        if who == "north-1":
            world.apply(world.anomaly("south-1", "other", "flood-1", kind="ddos", details=details))
        assert verdict(world, who, f"p-{who}", body, "flood-1", kind="ddos", details=details) is code
    if code is Code.PENDING:
        receipts = world.apply(world.command("alice", "approve", policy_id="p-north-1"))
        assert ("opened", "p-north-1", "approved") in changes(receipts)


# (b) approval


def test_an_operator_approves_a_pending_policy() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    receipts = world.after(3_000).apply(world.command("alice", "approve", policy_id="p1"))
    assert changes(receipts) == [("opened", "p1", "approved")]
    effect = decisions(receipts)[0]
    assert effect.approvers == (key("alice").public,)
    assert effect.reporters == (key("north-1").public,)
    assert effect.expires_at_ms == world.now_ms + 900_000


@pytest.mark.parametrize(
    "body",
    [
        policy(target={"cidrs": ["203.0.113.0/24"]}),
        policy(*(f"203.0.113.{i}" for i in range(1, 34))),
        policy(ATTACKER, ttl=3_601),
    ],
    ids=["prefix", "33 targets", "over an hour"],
)
def test_a_wide_reach_needs_an_operator_even_when_sites_agree(body: dict[str, object]) -> None:
    world = World()
    receipts = world.apply(*world.case("solo", "p1", body), *world.case("south-1", "p2", body))
    assert codes(receipts)[2] is Code.PENDING
    assert codes(receipts)[5] is Code.PENDING
    assert changes(world.apply(world.command("bob", "approve", policy_id="p1")))[0] == ("opened", "p1", "approved")


def test_a_pending_policy_lapses_when_nobody_agrees() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    assert world.state.next_due_ms == world.now_ms + 86_400_000
    receipts = world.wait(86_400)
    assert [(r.id, r.code) for r in receipts] == [("p1", Code.PENDING_EXPIRED)]
    assert world.state.requests() == []
    assert world.state.next_due_ms is None


def test_a_producer_that_repeats_itself_keeps_one_pending_place() -> None:
    world = World()
    for name in ("p1", "p2", "p3"):
        world.after(1).apply(*world.case("north-1", name))
    assert [request.policy_id for request in world.state.requests()] == ["p3"]


def test_what_an_operator_was_shown_cannot_change_under_its_id() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1", policy(ATTACKER, ttl=60)))
    again = [world.anomaly("north-1", "a2"), world.policy("north-1", "p1", policy(ATTACKER, ttl=3_600), anomaly="a2")]
    assert codes(world.apply(*again))[1] is Code.POLICY_ID_TAKEN
    world.apply(world.command("alice", "approve", policy_id="p1"))
    assert [record.ttl_s for record in world.state.decisions()] == [60]


# (c) budget


def test_a_budget_opens_single_hosts_of_the_producers_networks_and_says_so() -> None:
    world = World()
    receipts = world.apply(*world.case("solo", "p1"))
    assert changes(receipts) == [("opened", "p1", "budget")]
    assert decisions(receipts)[0].is_single_sensor
    assert orjson.loads(world.rules[1])["policy_id"] == "p1"


@pytest.mark.parametrize(
    ("body", "entity"),
    [
        (policy(ATTACKER, ttl=901), ATTACKER),
        (policy(target={"cidrs": ["203.0.113.0/25"]}), "203.0.113.0/25"),
        (policy("8.8.8.8"), "8.8.8.8"),
        (policy("203.0.113.9"), ATTACKER),
    ],
    ids=["too long", "a prefix", "outside its networks", "not what it reported"],
)
def test_what_does_not_fit_a_budget_waits_for_agreement(body: dict[str, object], entity: str) -> None:
    world = World()
    assert verdict(world, "solo", "p1", body, entity) is Code.PENDING


def test_a_budget_is_never_exceeded_in_any_minute_nor_in_what_is_active() -> None:
    world = World()
    opened: list[int] = []
    refused = set()
    for number in range(60):
        receipts = world.after(7).apply(*world.case("solo", f"p{number}", entity=f"203.0.113.{number}"))
        if codes(receipts)[2] is Code.OK:
            opened.append(world.now_ms)
        else:
            refused.add(codes(receipts)[2])
        assert len(world.state.decisions()) <= 3
        assert sum(when > world.now_ms - 60_000 for when in opened) <= 2
    assert len(opened) == 3
    assert refused == {Code.OVER_BUDGET}
    world.wait(900)
    assert world.state.decisions() == []
    assert verdict(world, "solo", "after", policy(ATTACKER)) is Code.OK


def test_what_a_budget_did_not_cover_opens_when_another_site_agrees() -> None:
    world = World()
    for number in (1, 2):
        world.apply(*world.case("solo", f"p{number}", entity=f"203.0.113.{number}"))
    assert verdict(world, "solo", "p3", policy(ATTACKER)) is Code.OVER_BUDGET
    assert changes(world.apply(*world.case("south-1", "p4"))) == [("opened", "p4", "corroborated")]


def test_corroboration_frees_the_budget_that_carried_a_decision() -> None:
    world = World()
    world.apply(*world.case("solo", "p1"))
    receipts = world.after(2).apply(*world.case("south-1", "p2"))
    assert changes(receipts) == [("renewed", "p1", "corroborated")]
    assert world.state.index.tallies.get(key("solo").public, None).budget_targets == 0


def test_one_sensor_cannot_prolong_what_others_decided() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"), *world.case("south-1", "p2"))
    receipts = world.after(100).apply(*world.case("solo", "p3", kind="brute_force"))
    assert codes(receipts)[2] is Code.ALREADY_ACTIVE


# References


def test_a_policy_waits_for_its_references_in_any_order() -> None:
    world = World()
    anomaly, evidence, wanted = world.case("solo", "p1")
    assert codes(world.apply(wanted)) == [Code.WAITING]
    assert codes(world.after(10).apply(evidence)) == [Code.OK]
    receipts = world.after(10).apply(anomaly)
    assert changes(receipts) == [("opened", "p1", "budget")]


def test_a_policy_whose_references_never_come_is_given_up_after_the_waiting_time() -> None:
    world = World()
    world.apply(world.case("solo", "p1")[2])
    assert world.wait(59.999) == ()
    assert [(r.id, r.code) for r in world.wait(0.001)] == [("p1", Code.UNKNOWN_REFERENCE)]


def test_another_producers_anomaly_is_no_reference() -> None:
    world = World()
    world.apply(world.anomaly("north-1", "a-p1"), world.evidence("north-1", "e-p1"))
    assert codes(world.apply(world.case("solo", "p1")[2])) == [Code.WAITING]


def test_evidence_is_needed_unless_the_genesis_says_otherwise() -> None:
    world = World()
    anomaly, _, wanted = world.case("solo", "p1")
    assert codes(world.apply(anomaly, wanted)) == [Code.OK, Code.WAITING]
    loose = World(deployment(governance=g.Governance(evidence_required=False)))
    anomaly, _, wanted = loose.case("solo", "p1")
    assert codes(loose.apply(anomaly, wanted)) == [Code.OK, Code.OK]


def test_only_so_many_policies_wait_for_one_producer() -> None:
    world = World(deployment(limits=g.Limits(waiting_per_producer=2)))
    wanted = [world.case("solo", f"p{i}", entity=f"203.0.113.{i}")[2] for i in range(3)]
    assert codes(world.apply(*wanted)) == [Code.WAITING, Code.WAITING, Code.QUEUE_FULL]


# Limits and deferral


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (policy(ATTACKER, target={"cidrs": ["203.0.0.0/16"]}), "prefix_min_v4"),
        (policy(target={"cidrs": ["2001:db9::/56"]}), "prefix_min_v6"),
        (policy(ATTACKER, "203.0.113.8", "203.0.113.9"), "targets_per_policy"),
        (policy(ATTACKER, ttl=5_001), "ttl_max_s"),
        (policy(ATTACKER, ttl=4), "ttl_min_s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nobody_gets_more_than_the_limits(body: dict[str, object], detail: str) -> None:
    limits = g.Limits(targets_per_policy=2, ttl_max_s=5_000, ttl_min_s=5)
    world = World(deployment(limits=limits))
    for receipt in (
        world.apply(*world.case("solo", "p1", body))[2],
        world.apply(world.command("alice", "add", policy=body | {"policy_id": "p2"}))[0],
    ):
        assert (receipt.code, receipt.detail) == (Code.OUT_OF_LIMITS, detail)


@pytest.mark.parametrize("how", [{"severity": 4}, {"confidence": 0.49}], ids=str)
def test_an_anomaly_below_the_floors_causes_nothing(how: dict[str, object]) -> None:
    world = World()
    assert verdict(world, "solo", "p1", policy(ATTACKER), **how) is Code.BELOW_FLOOR


def crowd(
    world: World, count: int, *, first: int = 0, severity: int = 9, who: tuple[str, str] = ("north-1", "south-1")
) -> list[bytes]:
    """Cases that two sites report, each against a host of its own, in the order of their numbers."""
    sent: list[bytes] = []
    for number in range(first, first + count):
        entity = f"192.0.{2 + number // 250}.{number % 250}"
        sent.append(world.anomaly(who[1], f"o-{who[0]}-{number}", entity, severity=severity))
        sent += world.case(who[0], f"{who[0]}-{number:04}", entity=entity, severity=severity)
    return sent


def test_over_the_rate_policies_are_deferred_and_released_as_the_minute_passes() -> None:
    world = World(deployment(limits=g.Limits(targets_per_minute=3)))
    receipts = world.apply(*crowd(world, 5))
    assert codes(receipts)[3::4] == [Code.OK, Code.OK, Code.OK, Code.DEFERRED, Code.DEFERRED]
    due = world.state.next_due_ms
    assert due is not None
    assert 60_000 <= due - world.now_ms <= 61_000
    receipts = world.wait((due - world.now_ms) / 1_000)
    assert [(r.kind, r.id, r.code) for r in receipts] == [
        (Kind.SYSTEM_DEFERRED, "north-1-0003", Code.OK),
        (Kind.SYSTEM_DEFERRED, "north-1-0004", Code.OK),
    ]


def test_deferred_policies_wait_for_room_among_the_active_ones() -> None:
    world = World(deployment(limits=g.Limits(targets_active=2)))
    world.apply(*crowd(world, 3))
    assert world.state.next_due_ms == world.now_ms + 900_000
    receipts = world.apply(world.command("alice", "revoke", policy_id="north-1-0000"))
    assert changes(receipts) == [("ended", "north-1-0000", "revoked"), ("opened", "north-1-0002", "corroborated")]


def test_release_is_by_severity_then_by_turns_of_the_producers() -> None:
    world = World(deployment(limits=g.Limits(targets_active=1)))
    world.apply(*crowd(world, 1, severity=10))
    world.apply(*crowd(world, 2, first=10, severity=7))
    world.apply(*crowd(world, 2, first=20, severity=7, who=("south-1", "north-1")))
    world.apply(*crowd(world, 1, first=30, severity=9))
    order = []
    active = "north-1-0000"
    for _ in range(5):
        receipts = world.after(1).apply(world.command("alice", "revoke", policy_id=active))
        active = decisions(receipts)[1].policy_id
        order.append(active)
    assert order[0] == "north-1-0030"
    assert {order[1][:7], order[2][:7]} == {"north-1", "south-1"}
    assert {order[3][:7], order[4][:7]} == {"north-1", "south-1"}
    assert [name for name in order if name.startswith("south")] == ["south-1-0020", "south-1-0021"]


def test_a_deferred_policy_expires_with_its_ttl() -> None:
    world = World(deployment(limits=g.Limits(targets_active=1)))
    world.apply(world.command("alice", "add", policy=policy("192.0.2.200", ttl=5_000) | {"policy_id": "own"}))
    world.apply(*crowd(world, 1))
    world.after(600).apply(*crowd(world, 1, first=1))
    receipts = world.wait(299)
    assert receipts == ()
    receipts = world.after(1).apply(world.command("alice", "add", policy=policy("192.0.2.201") | {"policy_id": "more"}))
    assert ("ended", "north-1-0000", "expired") in changes(receipts)
    assert ("opened", "north-1-0001", "corroborated") in changes(receipts)
    world.apply(*crowd(world, 1, first=2))
    receipts = world.wait(900)
    assert (Kind.SYSTEM_DEFERRED, "north-1-0002", Code.DEFERRED_EXPIRED) in [(r.kind, r.id, r.code) for r in receipts]


def test_a_deferred_policy_that_became_protected_is_refused_at_release() -> None:
    world = World(deployment(limits=g.Limits(targets_active=1)))
    world.apply(*crowd(world, 2))
    receipts = world.apply(
        world.command("alice", "allow_list", add=["192.0.2.1"]), world.command("bob", "revoke", policy_id="north-1-0000")
    )
    assert (receipts[-1].id, receipts[-1].code) == ("north-1-0001", Code.ALLOWED_TARGET)


def test_operators_are_exempt_from_the_detectors_limits_up_to_their_own() -> None:
    world = World(deployment(limits=g.Limits(targets_active=1, targets_per_minute=1, targets_active_operators=3)))
    world.apply(*crowd(world, 2))
    assert len(world.state.decisions()) == 1
    receipts = world.apply(
        world.command("alice", "approve", policy_id="north-1-0001"),
        world.command("alice", "add", policy=policy("203.0.113.1") | {"policy_id": "p1"}),
        world.command("alice", "add", policy=policy("203.0.113.2") | {"policy_id": "p2"}),
    )
    assert codes(receipts) == [Code.OK, Code.OK, Code.OUT_OF_LIMITS]


# Renewal and escalation


def test_a_repeated_policy_renews_and_never_makes_a_second_rule() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"), *world.case("south-1", "p2"))
    receipts = world.after(300).apply(*world.case("north-1", "p3"), *world.case("south-1", "p4"))
    assert changes(receipts) == [("renewed", "p1" if world.state.decision("p1") else "p2", "corroborated")]
    (record,) = world.state.decisions()
    assert record.expires_at_ms == world.now_ms + 900_000
    assert record.ttl_s == 900


def test_the_time_doubles_once_per_expired_ttl_up_to_the_maximum() -> None:
    world = World(deployment(limits=g.Limits(ttl_max_s=3_000)))
    seen = []
    for number in range(5):
        receipts = world.apply(*world.case("north-1", f"n{number}"), *world.case("south-1", f"s{number}"))
        (record,) = world.state.decisions()
        seen.append((decisions(receipts)[-1].change.value, record.ttl_s))
        assert orjson.loads(record.rule_data)["guardrails"]["ttl_seconds"] == record.ttl_s
        world.wait(record.ttl_s)
        assert world.state.decisions() == []
    assert seen == [("opened", 900), ("opened", 1_800), ("opened", 3_000), ("opened", 3_000), ("opened", 3_000)]


def test_a_ban_that_is_kept_alive_doubles_when_its_ttl_has_passed_not_before() -> None:
    world = World()
    for number, (pause, ttl_s) in enumerate([(0, 900), (500, 900), (399, 900), (1, 1_800), (1_799, 1_800), (1, 3_600)]):
        world.after(pause).apply(*world.case("north-1", f"n{number}"), *world.case("south-1", f"s{number}"))
        (record,) = world.state.decisions()
        assert record.ttl_s == ttl_s, number


def test_what_is_agreed_to_again_and_again_goes_past_the_hour_that_may_be_asked_for_up_to_a_day() -> None:
    world = World()
    seen = []
    for number in range(9):
        world.apply(*world.case("north-1", f"n{number}"), *world.case("south-1", f"s{number}"))
        (record,) = world.state.decisions()
        seen.append((record.ttl_s, record.why.value))
        world.wait(record.ttl_s)
    granted = [900, 1_800, 3_600, 7_200, 14_400, 28_800, 57_600, 86_400, 86_400]
    assert seen == [(ttl_s, "corroborated") for ttl_s in granted]
    # One site cannot take the next step alone, and nobody may ask for so much at once.
    assert codes(world.after(61).apply(*world.case("north-1", "n9")))[2] is Code.PENDING
    asked = policy("203.0.113.8", ttl=7_200)
    world.apply(world.anomaly("south-1", "o", "203.0.113.8"))
    assert verdict(world, "north-1", "wide", asked, "203.0.113.8") is Code.PENDING


def test_one_sensor_alone_never_escalates() -> None:
    world = World()
    for number in range(3):
        world.apply(*world.case("solo", f"p{number}"))
        (record,) = world.state.decisions()
        assert record.ttl_s == 900
        world.wait(900)


def test_an_offender_is_forgotten_after_as_long_as_the_ban_was() -> None:
    world = World()
    world.apply(*world.case("north-1", "n1"), *world.case("south-1", "s1"))
    world.wait(900)
    world.after(900).apply(*world.case("north-1", "n2"), *world.case("south-1", "s2"))
    assert world.state.decisions()[0].ttl_s == 900


def test_an_ipv6_host_becomes_its_64_after_repeated_bans() -> None:
    world = World()
    host = "2001:db8:77::5"
    for number in range(4):
        world.apply(*world.case("north-1", f"n{number}", entity=host), *world.case("south-1", f"s{number}", entity=host))
        (record,) = world.state.decisions()
        wide = number >= 3
        assert (record.hosts, record.networks) == ((0, 1) if wide else (1, 0))
        target = orjson.loads(record.rule_data)["target"]
        assert target.get("cidrs") == (["2001:db8:77::/64"] if wide else None)
        world.wait(record.ttl_s)


def test_the_64_is_not_taken_when_something_protected_lives_in_it() -> None:
    base = deployment()
    world = World(
        dataclasses.replace(base, protected_networks=(*base.protected_networks, g.parse_network("2001:db8:77::1/128")))
    )
    host = "2001:db8:77::5"
    for number in range(5):
        world.apply(*world.case("north-1", f"n{number}", entity=host), *world.case("south-1", f"s{number}", entity=host))
        (record,) = world.state.decisions()
        assert (record.hosts, record.networks) == (1, 0)
        world.wait(record.ttl_s)


# Ids


def test_an_id_taken_by_another_producer_does_not_stop_a_policy() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1", entity="203.0.113.50"))
    receipts = world.apply(*world.case("solo", "p1"))
    (effect,) = decisions(receipts)
    assert effect.policy_id == f"p1~{key('solo').public[:8].hex()}"
    assert effect.request_id == "p1"
    assert verdict(world, "solo", "p1", policy("203.0.113.60"), "203.0.113.60") is Code.POLICY_ID_TAKEN


def test_an_operators_policy_under_a_pending_ones_id_takes_nothing_from_anybody() -> None:
    world = World()
    world.apply(world.command("alice", "add", policy=policy(ATTACKER) | {"policy_id": "own"}))
    world.apply(*world.case("north-1", "p1", entity="203.0.113.50"))
    # The rule is in force already, under another id; it would be a renewal.
    again = world.command("alice", "add", policy=policy(ATTACKER, ttl=1_800) | {"policy_id": "p1"})
    assert codes(world.after(1).apply(again)) == [Code.POLICY_ID_TAKEN]
    assert [request.policy_id for request in world.state.requests()] == ["p1"]
    receipts = world.apply(world.anomaly("south-1", "o", "203.0.113.50"))
    assert changes(receipts) == [("opened", "p1", "corroborated")]


def test_who_comes_second_with_an_id_is_treated_under_one_of_its_own_and_both_are_decided() -> None:
    world = World()
    for who, entity in (("north-1", "203.0.113.50"), ("north-2", "203.0.113.51"), ("south-1", "203.0.113.52")):
        assert verdict(world, who, "p1", policy(entity), entity) is Code.PENDING
    names = {key(who).public: "p1" + ("" if who == "north-1" else f"~{key(who).public[:8].hex()}")
             for who in ("north-1", "north-2", "south-1")}  # fmt: skip
    assert {request.producer: request.policy_id for request in world.state.requests()} == names
    for name in names.values():
        receipts = world.apply(world.command("alice", "approve", policy_id=name))
        assert changes(receipts) == [("opened", name, "approved")]


@pytest.mark.parametrize(
    ("body", "code", "detail"),
    [
        (policy(ATTACKER, colour="red"), Code.BAD_POLICY, "colour"),
        (policy("203.0.113.300"), Code.BAD_POLICY, "target.ips[0]"),
        (policy(ATTACKER) | {"guardrails": {}}, Code.BAD_POLICY, "guardrails.ttl_seconds"),
        (policy(ATTACKER, policy_id="p2"), Code.BAD_POLICY, "policy_id"),
        (policy(ATTACKER, action="remove"), Code.NOT_PERMITTED, "action"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_policy_that_cannot_be_read_names_the_place(body: dict[str, object], code: Code, detail: str) -> None:
    world = World()
    receipt = world.apply(*world.case("solo", "p1", body))[2]
    assert (receipt.code, receipt.detail) == (code, detail)


def test_expiry_gives_at_most_a_thousand_receipts_a_block_oldest_first() -> None:
    world = World(deployment(block_limits=g.BlockLimits(system_receipts=4)))
    for number in range(10):
        world.after(1).apply(*crowd(world, 1, first=9 - number))
    world.wait(880)
    receipts = world.wait(1_000)
    assert [r.id for r in receipts] == [f"north-1-{n:04}" for n in (6, 7, 8, 9)]
    assert world.state.next_due_ms is not None
    assert world.state.next_due_ms <= world.now_ms
    assert len(world.apply()) == 4
    assert len(world.apply()) == 2
    assert world.state.next_due_ms is None
    assert [effect.decision_seq for effect in decisions(tuple(world.receipts))] == list(range(1, 21))
