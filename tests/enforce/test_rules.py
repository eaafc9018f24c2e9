"""From a policy to rules: which packets, for how long, under which name."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.enforce.rules import Rate, Shape, count, exception, make, rate_of
from cybermesh.policy import PolicySpec, RateLimit, parse


def policy(**changes: Any) -> PolicySpec:
    """Return a policy for one host, with changes at the top level."""
    return parse(
        {
            "policy_id": "p",
            "rule_type": "block",
            "action": "drop",
            "target": {"ips": ["203.0.113.9"]},
            "guardrails": {"ttl_seconds": 60},
            **changes,
        }
    )


def shown(spec: PolicySpec) -> list[str]:
    return [str(rule.element.match) for rule in make(spec, spec.networks(), 1)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"ips": ["203.0.113.9"]}, ["drop from 203.0.113.9"]),
        ({"ips": ["203.0.113.9"], "direction": "egress"}, ["drop to 203.0.113.9"]),
        ({"cidrs": ["2001:db8::/64"]}, ["drop from 2001:db8::/64"]),
        ({"ips": ["203.0.113.9"], "protocols": ["udp"]}, ["drop from 203.0.113.9 udp"]),
        ({"ips": ["203.0.113.9"], "ports": [22]}, ["drop from 203.0.113.9 tcp/22", "drop from 203.0.113.9 udp/22"]),
        (
            {"cidrs": ["198.51.100.0/24"], "ports": [{"from": 80, "to": 90}], "protocols": ["tcp"]},
            ["drop from 198.51.100.0/24 tcp/80-90"],
        ),
        (
            {"ips": ["203.0.113.9", "2001:db8::1"], "protocols": ["icmp", "icmpv6"]},
            ["drop from 203.0.113.9 icmp", "drop from 2001:db8::1 icmpv6"],
        ),
    ],
)
def test_a_target_becomes_these_matches(target: dict[str, Any], expected: list[str]) -> None:
    spec = policy(target=target)
    assert shown(spec) == expected
    assert count(spec) >= len(expected)


def test_a_host_with_one_port_is_a_point_and_anything_wider_an_area() -> None:
    spec = policy(
        target={
            "ips": ["203.0.113.9"],
            "cidrs": ["198.51.100.0/24"],
            "ports": [22, {"from": 80, "to": 81}],
            "protocols": ["tcp"],
        }
    )
    areas = [rule.element.match.area for rule in make(spec, spec.networks(), 1)]
    assert areas == [False, True, True, True]
    assert {rule.element.match.shape for rule in make(spec, spec.networks(), 1)} == {Shape.PORT}


def test_rule_ids_depend_on_the_policy_and_the_match_only() -> None:
    spec = policy()
    (first,), (second,) = make(spec, spec.networks(), 1), make(spec, spec.networks(), 2)
    (other,) = make(policy(policy_id="q"), spec.networks(), 1)
    assert first.rule_id == second.rule_id != other.rule_id
    assert first.rule_id == "65f717453137e5f6"


def test_an_exception_lifts_both_ways() -> None:
    assert [str(rule.element.match) for rule in exception(ip_address("203.0.113.9"), 5)] == [
        "allow from 203.0.113.9",
        "allow to 203.0.113.9",
    ]


@pytest.mark.parametrize(
    ("limit", "rate"),
    [
        (RateLimit(1, 5), Rate(5, 1, 5)),
        (RateLimit(10, 20), Rate(2, 1, 20)),
        (RateLimit(60, 30), Rate(30, 60, 30)),
        (RateLimit(7, 2), Rate(24_685, 86_400, 2)),
        (RateLimit(86_400, 1), Rate(1, 86_400, 1)),
    ],
)
def test_a_rate_is_exact_where_a_unit_is(limit: RateLimit, rate: Rate) -> None:
    assert rate_of(limit) == rate


@given(st.integers(1, 86_400), st.integers(1, 1_000_000))
def test_a_rate_is_never_more_than_asked_and_never_nothing(window_s: int, actions: int) -> None:
    rate = rate_of(RateLimit(window_s, actions))
    assert rate.packets >= 1
    assert rate.packets * window_s <= actions * rate.unit_s
    assert (rate.packets + 1) * window_s > actions * rate.unit_s
