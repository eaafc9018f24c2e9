"""The policy schema: what is accepted means one thing, what is refused names its place."""

from __future__ import annotations

import copy
import json
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.policy import Action, PolicyError, PolicySpec, PortRange, RateLimit, RuleType, parse

FULL: dict[str, Any] = {
    "policy_id": "6b1f8f2e-7a9c-4d1e-9a43-0f5f5a1d2c3b",
    "rule_type": "block",
    "action": "drop",
    "tenant": "acme",
    "region": "eu-1",
    "target": {
        "ips": ["203.0.113.9", "2001:DB8::0:1"],
        "cidrs": ["198.51.100.0/24", "2001:db8:1::/64"],
        "direction": "egress",
        "scope": "node",
        "selectors": {"app": "web"},
        "namespace": "shop",
        "ports": [443, 22, {"from": 8000, "to": 8100}, {"from": 8050, "to": 8200}, 22],
        "protocols": ["TCP", "udp"],
    },
    "criteria": {"min_confidence": 0.85, "attempts_per_window": 20, "window_s": 60},
    "guardrails": {
        "ttl_seconds": 900,
        "cidr_max_prefix_len": 24,
        "max_targets": 8,
        "dry_run": True,
        "allowlist": {"ips": ["192.0.2.1"], "cidrs": ["10.0.0.0/8"], "namespaces": ["kube-system"]},
        "max_active_policies": 100,
        "max_policies_per_minute": 10,
        "rate_limit": {"window_s": 60, "max_actions": 30},
        "escalation_cooldown_s": 300,
    },
    "audit": {"reason_code": "scan.vertical", "evidence_refs": ["b", "a"]},
}
SMALL: dict[str, Any] = {
    "policy_id": "p1",
    "rule_type": "block",
    "action": "drop",
    "target": {"ips": ["203.0.113.9"]},
    "guardrails": {"ttl_seconds": 60},
}


def changed(path: str, value: object, base: dict[str, Any] = SMALL) -> dict[str, Any]:
    """Return ``base`` with the value at a dotted path set, or removed when it is ``...``."""
    policy = copy.deepcopy(base)
    *way, last = path.split(".")
    place = policy
    for step in way:
        place = place.setdefault(step, {})
    if value is ...:
        place.pop(last, None)
    else:
        place[last] = value
    return policy


def test_everything_in_the_schema_is_read() -> None:
    spec = parse(json.dumps(FULL).encode())
    assert spec.rule_type is RuleType.BLOCK
    assert spec.action is Action.DROP
    assert spec.target.ips == (ip_address("203.0.113.9"), ip_address("2001:db8::1"))
    assert spec.target.ports == (PortRange(22, 22), PortRange(443, 443), PortRange(8000, 8200))
    assert spec.target.protocols == ("tcp", "udp")
    assert spec.criteria.min_confidence_ppm == 850_000
    assert spec.guardrails.rate_limit == RateLimit(60, 30)
    assert spec.audit.evidence_refs == ("a", "b")
    assert [str(network) for network in spec.networks()] == [
        "203.0.113.9/32",
        "2001:db8::1/128",
        "198.51.100.0/24",
        "2001:db8:1::/64",
    ]


def test_canonical_json_reads_back_as_the_same_policy() -> None:
    spec = parse(FULL)
    assert parse(spec.to_json()) == spec
    assert parse(spec.to_json()).to_json() == spec.to_json()
    assert spec.to_json() == json.dumps(json.loads(spec.to_json()), sort_keys=True, separators=(",", ":")).encode()


def test_order_and_repetition_of_lists_do_not_change_the_canonical_bytes() -> None:
    twice = changed("target.ips", ["203.0.113.9", "192.0.2.7", "::ffff:192.0.2.7", "203.0.113.9"])
    once = changed("target.ips", ["192.0.2.7", "203.0.113.9"])
    assert parse(twice).to_json() == parse(once).to_json()


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:c000:0207/128", "192.0.2.7/32"),
        ("192.0.2.7/32", "192.0.2.7/32"),
        ("0:0:0:0:0:ffff:c000:0200/120", "192.0.2.0/24"),
        ("2001:0DB8:0::/64", "2001:db8::/64"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ],
)
def test_a_prefix_has_one_meaning(text: str, network: str) -> None:
    assert parse(changed("target", {"cidrs": [text]})).networks() == (ip_network(network),)


@pytest.mark.parametrize("length", range(33))
def test_a_prefix_limit_refuses_only_what_is_wider(length: int) -> None:
    policy = changed(
        "guardrails", {"ttl_seconds": 60, "cidr_max_prefix_len": 24}, changed("target", {"cidrs": [f"0.0.0.0/{length}"]})
    )
    if length >= 24:
        assert parse(policy).networks()[0].prefixlen == length
    else:
        with pytest.raises(PolicyError, match=r"wider than guardrails.cidr_max_prefix_len 24") as caught:
            parse(policy)
        assert caught.value.path == "target.cidrs"


def test_a_limit_beyond_32_asks_for_ipv4_hosts_and_limits_ipv6_prefixes() -> None:
    guardrails = {"ttl_seconds": 60, "cidr_max_prefix_len": 64}
    parse(changed("guardrails", guardrails, changed("target", {"ips": ["192.0.2.1"], "cidrs": ["2001:db8::/64"]})))
    for wide in ("192.0.2.0/31", "2001:db8::/63"):
        with pytest.raises(PolicyError, match="wider"):
            parse(changed("guardrails", guardrails, changed("target", {"cidrs": [wide]})))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("policy_id", ..., "policy_id"),
        ("policy_id", "", "policy_id"),
        ("policy_id", "x" * 129, "policy_id"),
        ("policy_id", "two words", "policy_id"),
        ("policy_id", 7, "policy_id"),
        ("rule_type", ..., "rule_type"),
        ("rule_type", "ban", "rule_type"),
        ("action", None, "action"),
        ("action", "DROP", "action"),
        ("action", "rate_limit", "action"),
        ("tenant", "x" * 257, "tenant"),
        ("tenant", "a\nb", "tenant"),
        ("tenant", "\ud800", "tenant"),
        ("region", 1, "region"),
        ("surprise", 1, "surprise"),
        ("target", ..., "target"),
        ("target", [], "target"),
        ("target", {"ips": []}, "target"),
        ("target.ips", "203.0.113.9", "target.ips"),
        ("target.ips", ["203.0.113.9", "203.0.113.256"], "target.ips[1]"),
        ("target.ips", ["203.0.113.09"], "target.ips[0]"),
        ("target.ips", ["203.0.113.9/24"], "target.ips[0]"),
        ("target.ips", ["fe80::1%eth0"], "target.ips[0]"),
        ("target.ips", [""], "target.ips[0]"),
        ("target.ips", [3405803777], "target.ips[0]"),
        ("target.ips", ["localhost"], "target.ips[0]"),
        ("target.ips", [" 203.0.113.9"], "target.ips[0]"),
        ("target.ips", [f"10.0.{n // 256}.{n % 256}" for n in range(257)], "target.ips"),
        ("target.cidrs", ["203.0.113.9/24"], "target.cidrs[0]"),
        ("target.cidrs", ["203.0.113.0/255.255.255.0"], "target.cidrs[0]"),
        ("target.cidrs", ["203.0.113.0/0.0.0.255"], "target.cidrs[0]"),
        ("target.cidrs", ["203.0.113.0/33"], "target.cidrs[0]"),
        ("target.cidrs", ["203.0.113.0/-1"], "target.cidrs[0]"),
        ("target.cidrs", ["203.0.113.0/"], "target.cidrs[0]"),
        ("target.cidrs", ["fe80::%1/64"], "target.cidrs[0]"),
        ("target.direction", "both", "target.direction"),
        ("target.scope", "galaxy", "target.scope"),
        ("target.selectors", {"app": 1}, "target.selectors"),
        ("target.ports", [0], "target.ports[0]"),
        ("target.ports", [65536], "target.ports[0]"),
        ("target.ports", [True], "target.ports[0]"),
        ("target.ports", [22.0], "target.ports[0]"),
        ("target.ports", ["22"], "target.ports[0]"),
        ("target.ports", [{"from": 5}], "target.ports[0]"),
        ("target.ports", [{"from": 5, "to": 4}], "target.ports[0]"),
        ("target.ports", [{"from": 5, "to": 6, "step": 1}], "target.ports[0].step"),
        ("target.protocols", ["ipip"], "target.protocols[0]"),
        ("target.protocols", ["icmpv6"], "target.ips"),
        ("target.protcols", ["tcp"], "target.protcols"),
        ("criteria.min_confidence", float("nan"), "criteria.min_confidence"),
        ("criteria.min_confidence", 1.01, "criteria.min_confidence"),
        ("criteria.min_confidence", True, "criteria.min_confidence"),
        ("criteria.window_s", 0, "criteria.window_s"),
        ("guardrails", ..., "guardrails.ttl_seconds"),
        ("guardrails.ttl_seconds", 0, "guardrails.ttl_seconds"),
        ("guardrails.ttl_seconds", 86_401, "guardrails.ttl_seconds"),
        ("guardrails.ttl_seconds", True, "guardrails.ttl_seconds"),
        ("guardrails.ttl_seconds", 60.0, "guardrails.ttl_seconds"),
        ("guardrails.ttl_seconds", "60", "guardrails.ttl_seconds"),
        ("guardrails.cidr_max_prefix_len", 129, "guardrails.cidr_max_prefix_len"),
        ("guardrails.dry_run", "no", "guardrails.dry_run"),
        ("guardrails.allowlist", {"ips": ["203.0.113.9"]}, "target.ips"),
        ("guardrails.allowlist", {"cidrs": ["::ffff:203.0.113.0/120"]}, "target.ips"),
        ("guardrails.allowlist", {"hosts": []}, "guardrails.allowlist.hosts"),
        ("guardrails.rate_limit", {"window_s": 1}, "guardrails.rate_limit"),
        ("guardrails.rate_limit", None, "guardrails.rate_limit"),
        ("audit.evidence_refs", ["x" * 257], "audit.evidence_refs[0]"),
        ("audit.evidence_refs", ["x"] * 1_001, "audit.evidence_refs"),
        ("audit", None, "audit"),
        (7, 7, ""),
    ],
)
def test_a_fault_names_its_place(path: Any, value: object, where: str) -> None:
    policy = changed(path, value) if isinstance(path, str) else {**SMALL, path: value}
    with pytest.raises(PolicyError) as caught:
        parse(policy)
    assert caught.value.path == where
    assert str(caught.value).startswith(f"{where or 'policy'}: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"policy_id": "a", "policy_id": "b"}',
        b'{"target": {"ips": [], "ips": ["203.0.113.9"]}}',
        b'{"criteria": {"min_confidence": NaN}}',
        b'{"criteria": {"min_confidence": Infinity}}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"n": ' + b"9" * 5_000 + b"}",
        b" " * (512 * 1024 + 1),
    ],
    ids=range(14),
)
def test_what_is_not_one_plain_json_object_is_refused_as_a_whole(data: bytes) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(data)
    assert caught.value.path == ""


def test_ports_with_a_protocol_that_has_none_are_refused() -> None:
    with pytest.raises(PolicyError, match="gre has no ports"):
        parse(changed("target", {"ips": ["203.0.113.9"], "ports": [22], "protocols": ["tcp", "gre"]}))


def test_the_policys_own_limit_of_targets_holds_after_joining_equal_ones() -> None:
    guardrails = {"ttl_seconds": 60, "max_targets": 1}
    parse(changed("guardrails", guardrails, changed("target.ips", ["192.0.2.1", "::ffff:192.0.2.1"])))
    with pytest.raises(PolicyError, match="2 targets"):
        parse(changed("guardrails", guardrails, changed("target.ips", ["192.0.2.1", "192.0.2.2"])))


def test_ways_around_the_quorum_are_listed_and_change_nothing() -> None:
    policy = changed("approval_required", False)
    policy["guardrails"] |= {"fast_path_enabled": True, "pre_consensus_ttl_seconds": 5, "rollback_if_no_commit_after_s": 9}
    spec = parse(policy)
    assert spec == parse(SMALL)
    assert spec.to_json() == parse(SMALL).to_json()
    assert set(spec.legacy) == {
        "approval_required",
        "guardrails.fast_path_enabled",
        "guardrails.pre_consensus_ttl_seconds",
        "guardrails.rollback_if_no_commit_after_s",
    }


def test_a_rate_limit_comes_from_the_guardrail_or_else_from_the_criteria() -> None:
    limited = {**SMALL, "rule_type": "rate_limit", "action": "rate_limit"}
    with pytest.raises(PolicyError, match="required for the action rate_limit"):
        parse(limited)
    from_criteria = parse({**limited, "criteria": {"attempts_per_window": 20, "window_s": 10}})
    assert from_criteria.packet_limit() == RateLimit(10, 20)
    guardrails = {"ttl_seconds": 60, "rate_limit": {"window_s": 1, "max_actions": 5}}
    assert parse({**limited, "guardrails": guardrails}).packet_limit() == RateLimit(1, 5)
    assert parse(SMALL).packet_limit() is None


def test_a_removal_needs_no_target() -> None:
    assert parse({**SMALL, "action": "remove", "target": {}}).networks() == ()


addresses = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.ip_addresses(v=4).map(lambda address: f"::ffff:{address}"),
)
prefixes = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda pair: str(IPv4Network(pair, strict=False))),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(lambda pair: str(IPv6Network(pair, strict=False))),
)
ports = st.integers(1, 65_535)
port_items = st.one_of(ports, st.tuples(ports, ports).map(lambda pair: {"from": min(pair), "to": max(pair)}))


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    target: dict[str, Any] = {
        "ips": draw(st.lists(addresses, min_size=1, max_size=6)),
        "cidrs": draw(st.lists(prefixes, max_size=4)),
    }
    if draw(st.booleans()):
        target["ports"] = draw(st.lists(port_items, max_size=5))
        target["protocols"] = draw(st.lists(st.sampled_from(["tcp", "udp", "sctp"]), max_size=3))
    guardrails: dict[str, Any] = {"ttl_seconds": draw(st.integers(1, 86_400))}
    criteria = {"min_confidence": draw(st.floats(0, 1))} if draw(st.booleans()) else {}
    return {**SMALL, "target": target, "guardrails": guardrails, "criteria": criteria}


@given(policies())
def test_any_policy_survives_the_round_trip_and_holds_no_mapped_address(policy: dict[str, Any]) -> None:
    spec = parse(json.dumps(policy).encode())
    assert parse(spec.to_json()) == spec
    for network in spec.networks():
        assert network.version == 4 or not network.subnet_of(IPv6Network("::ffff:0:0/96"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FULL)), st.sampled_from(["", *sorted(FULL["target"]), *sorted(FULL["guardrails"])]), json_values)
def test_any_value_anywhere_gives_a_policy_or_a_policy_error(top: str, inner: str, value: object) -> None:
    policy = copy.deepcopy(FULL)
    if inner and isinstance(policy[top], dict):
        policy[top][inner] = value
    else:
        policy[top] = value
    try:
        spec = parse(policy)
    except PolicyError:
        return
    assert isinstance(spec, PolicySpec)
    assert parse(spec.to_json()) == spec


@given(st.binary(max_size=200))
def test_any_bytes_give_a_policy_error(data: bytes) -> None:
    with pytest.raises(PolicyError):
        parse(data)


@pytest.mark.parametrize(
    ("text", "is_fine"), [("Straße 7", True), ("\u0378", True), ("a\u200bb", False), ("\x7f", False), ("\n", False)]
)
def test_what_may_stand_in_a_text_does_not_depend_on_the_interpreters_unicode_tables(text: str, is_fine: bool) -> None:
    """U+0378 is not assigned: an interpreter that knows a newer alphabet would take what another one refuses."""
    body = {
        "policy_id": "p", "rule_type": "block", "action": "drop", "tenant": text,
        "target": {"ips": ["203.0.113.7"]}, "guardrails": {"ttl_seconds": 60},
    }  # fmt: skip
    if is_fine:
        assert parse(body).tenant == text
    else:
        with pytest.raises(PolicyError, match="tenant"):
            parse(body)


def test_a_legacy_key_has_ascii_letters_only() -> None:
    body = {
        "policy_id": "p", "rule_type": "block", "action": "drop", "fast_path_\u00e4": 1,
        "target": {"ips": ["203.0.113.7"]}, "guardrails": {"ttl_seconds": 60},
    }  # fmt: skip
    with pytest.raises(PolicyError, match="unknown key"):
        parse(body)
