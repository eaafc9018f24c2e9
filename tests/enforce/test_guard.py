"""The local guard: a table of targets with the stated refusal, and properties that there is no way through."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.addresses import Network, overlaps
from cybermesh.enforce.guard import Code, Limits, Load, Protected, Refusal, hits, judge
from cybermesh.policy import PolicyError, PolicySpec, parse

HERE = Protected(
    (
        ("own address", ipaddress.ip_network("192.0.2.10/32")),
        ("own address", ipaddress.ip_network("2001:db8:5::10/128")),
        ("interface broadcast", ipaddress.ip_network("192.0.2.255/32")),
        ("gateway", ipaddress.ip_network("192.0.2.1/32")),
        ("gateway", ipaddress.ip_network("2001:db8:5::1/128")),
        ("resolver", ipaddress.ip_network("9.9.9.9/32")),
        ("broker", ipaddress.ip_network("203.0.113.40/32")),
        ("database", ipaddress.ip_network("203.0.113.41/32")),
        ("validator", ipaddress.ip_network("2001:db8:6::7/128")),
        ("ssh session of root", ipaddress.ip_network("198.51.100.77/32")),
        ("configured", ipaddress.ip_network("10.20.0.0/16")),
        ("configured", ipaddress.ip_network("2001:db8:7::/48")),
    )
)
PASSES = "passes"
MALFORMED = "malformed"


def policy(*targets: str, ttl_s: int = 60, **target: Any) -> PolicySpec:
    """Return a drop policy for addresses and prefixes given as text."""
    return parse(
        {
            "policy_id": "p",
            "rule_type": "block",
            "action": "drop",
            "target": {"cidrs": list(targets), **target},
            "guardrails": {"ttl_seconds": ttl_s},
        }
    )


TARGETS = [
    # Plain hosts and prefixes that nobody protects.
    ("203.0.113.9", PASSES),
    ("8.8.8.8", PASSES),
    ("10.21.0.1", PASSES),
    ("192.0.2.11", PASSES),
    ("198.51.100.0/26", PASSES),
    ("203.0.113.128/25", PASSES),
    ("100.64.1.0/24", PASSES),
    ("2001:db8:1::1", PASSES),
    ("2001:db8:1::/64", PASSES),
    ("2001:db8:5:1::/64", PASSES),
    ("fc00::1", PASSES),
    ("::ffff:203.0.113.9", PASSES),
    # Own addresses, in every spelling.
    ("192.0.2.10", Code.PROTECTED_TARGET),
    ("192.0.2.10/32", Code.PROTECTED_TARGET),
    ("::ffff:192.0.2.10", Code.PROTECTED_TARGET),
    ("::ffff:c000:20a", Code.PROTECTED_TARGET),
    ("::FFFF:C000:020A", Code.PROTECTED_TARGET),
    ("0:0:0:0:0:ffff:192.0.2.10", Code.PROTECTED_TARGET),
    ("2001:db8:5::10", Code.PROTECTED_TARGET),
    ("2001:0db8:0005:0000:0000:0000:0000:0010", Code.PROTECTED_TARGET),
    ("2001:DB8:5:0::10/128", Code.PROTECTED_TARGET),
    # Prefixes around, equal to, and inside protected ones.
    ("192.0.2.0/24", Code.PROTECTED_TARGET),
    ("192.0.2.8/29", Code.PROTECTED_TARGET),
    ("192.0.2.10/31", Code.PROTECTED_TARGET),
    ("::ffff:192.0.2.0/120", Code.PROTECTED_TARGET),
    ("::ffff:c000:208/125", Code.PROTECTED_TARGET),
    ("2001:db8:5::/64", Code.PROTECTED_TARGET),
    ("2001:db8:5::/120", Code.PROTECTED_TARGET),
    ("10.20.0.0/24", Code.PROTECTED_TARGET),
    ("10.20.255.255", Code.PROTECTED_TARGET),
    ("10.20.3.4/30", Code.PROTECTED_TARGET),
    ("::ffff:10.20.1.1", Code.PROTECTED_TARGET),
    ("2001:db8:7::/64", Code.PROTECTED_TARGET),
    ("2001:db8:7:ffff::1", Code.PROTECTED_TARGET),
    # Gateways, resolvers, the mesh's own parts, sessions.
    ("192.0.2.1", Code.PROTECTED_TARGET),
    ("192.0.2.0/30", Code.PROTECTED_TARGET),
    ("2001:db8:5::1", Code.PROTECTED_TARGET),
    ("192.0.2.255", Code.PROTECTED_TARGET),
    ("9.9.9.9", Code.PROTECTED_TARGET),
    ("9.9.9.0/24", Code.PROTECTED_TARGET),
    ("203.0.113.40", Code.PROTECTED_TARGET),
    ("203.0.113.41", Code.PROTECTED_TARGET),
    ("203.0.113.40/31", Code.PROTECTED_TARGET),
    ("2001:db8:6::7", Code.PROTECTED_TARGET),
    ("2001:db8:6::/64", Code.PROTECTED_TARGET),
    ("198.51.100.77", Code.PROTECTED_TARGET),
    ("198.51.100.64/26", Code.PROTECTED_TARGET),
    # What nothing may ever block.
    ("127.0.0.1", Code.PROTECTED_TARGET),
    ("127.255.255.254", Code.PROTECTED_TARGET),
    ("127.0.0.0/24", Code.PROTECTED_TARGET),
    ("::1", Code.PROTECTED_TARGET),
    ("::ffff:127.0.0.1", Code.PROTECTED_TARGET),
    ("0.0.0.0", Code.PROTECTED_TARGET),
    ("0.0.0.0/24", Code.PROTECTED_TARGET),
    ("::", Code.PROTECTED_TARGET),
    ("::/64", Code.PROTECTED_TARGET),
    ("::/80", Code.PROTECTED_TARGET),
    ("::fffe:0:0/95", Code.PROTECTED_TARGET),
    ("224.0.0.1", Code.PROTECTED_TARGET),
    ("239.255.255.0/24", Code.PROTECTED_TARGET),
    ("ff02::1", Code.PROTECTED_TARGET),
    ("255.255.255.255", Code.PROTECTED_TARGET),
    ("255.255.255.0/24", Code.PROTECTED_TARGET),
    ("169.254.169.254", Code.PROTECTED_TARGET),
    ("fe80::1", Code.PROTECTED_TARGET),
    ("fe80::/64", Code.PROTECTED_TARGET),
    # Too wide.
    ("0.0.0.0/0", Code.PREFIX_TOO_WIDE),
    ("::/0", Code.PREFIX_TOO_WIDE),
    ("::ffff:0.0.0.0/96", Code.PREFIX_TOO_WIDE),
    ("0.0.0.0/1", Code.PREFIX_TOO_WIDE),
    ("128.0.0.0/1", Code.PREFIX_TOO_WIDE),
    ("203.0.112.0/23", Code.PREFIX_TOO_WIDE),
    ("::ffff:203.0.112.0/119", Code.PREFIX_TOO_WIDE),
    ("2001:db8::/63", Code.PREFIX_TOO_WIDE),
    ("2000::/3", Code.PREFIX_TOO_WIDE),
    # No address at all.
    ("", MALFORMED),
    (" ", MALFORMED),
    ("203.0.113.9/33", MALFORMED),
    ("203.0.113", MALFORMED),
    ("203.0.113.009", MALFORMED),
    ("0x7f.1", MALFORMED),
    ("2130706433", MALFORMED),
    ("fe80::1%eth0", MALFORMED),
    ("::ffff:300.0.0.1", MALFORMED),
    ("203.0.113.9/24", MALFORMED),
]


@pytest.mark.parametrize(("target", "expected"), TARGETS)
def test_a_target_gets_the_stated_answer(target: str, expected: str) -> None:
    if expected == MALFORMED:
        with pytest.raises(PolicyError):
            policy(target)
        return
    spec = policy(target)
    verdict = judge(spec, HERE, Limits(), Load())
    if isinstance(verdict, Refusal):
        assert verdict.code == expected, verdict.detail
    else:
        assert expected == PASSES
        assert verdict == spec.networks()


def test_the_table_is_long_enough_to_mean_something() -> None:
    refused = [target for target, expected in TARGETS if expected != PASSES]
    assert len(refused) >= 60
    assert len(TARGETS) == len(dict(TARGETS))


def test_one_protected_target_refuses_the_whole_policy() -> None:
    verdict = judge(policy("203.0.113.9", "9.9.9.9"), HERE, Limits(), Load())
    assert isinstance(verdict, Refusal)
    assert verdict.detail == "9.9.9.9/32 touches 9.9.9.9/32 (resolver)"


def test_surroundings_that_cannot_be_read_refuse_everything() -> None:
    verdict = judge(policy("203.0.113.9"), Protected(problems=("utmp: permission denied",)), Limits(), Load())
    assert verdict == Refusal(Code.SURROUNDINGS_UNKNOWN, "utmp: permission denied")


@pytest.mark.parametrize(
    ("limits", "load", "code"),
    [
        (Limits(targets_max=2), Load(), Code.TOO_MANY_TARGETS),
        (Limits(ttl_s_max=59), Load(), Code.TTL_TOO_LONG),
        (Limits(rules_max=100), Load(rules=98), Code.TOO_MANY_RULES),
        (Limits(rules_per_policy_max=2), Load(), Code.TOO_MANY_RULES),
        (Limits(rules_per_minute_max=10), Load(rules_last_minute=8), Code.TOO_FAST),
    ],
)
def test_a_limit_refuses_with_its_code(limits: Limits, load: Load, code: Code) -> None:
    three = policy("203.0.113.1", "203.0.113.2", "203.0.113.3")
    verdict = judge(three, HERE, limits, load)
    assert isinstance(verdict, Refusal)
    assert verdict.code is code


def test_a_limit_that_is_just_met_passes() -> None:
    limits = Limits(targets_max=3, ttl_s_max=60, rules_max=100, rules_per_policy_max=3, rules_per_minute_max=10)
    three = policy("203.0.113.1", "203.0.113.2", "203.0.113.3")
    assert judge(three, HERE, limits, Load(rules=97, rules_last_minute=7)) == three.networks()


def test_rules_are_counted_with_ports_and_protocols() -> None:
    spec = policy("203.0.113.1", ports=[22, 80, {"from": 8000, "to": 8100}])
    refusal = judge(spec, HERE, Limits(rules_per_policy_max=5), Load())
    assert isinstance(refusal, Refusal)
    assert refusal.detail.startswith("6 rules")


def test_splitting_goes_around_and_never_cuts_a_host() -> None:
    around = judge(policy("192.0.2.0/24"), HERE, Limits(split_around=True), Load())
    assert not isinstance(around, Refusal)
    covered = {int(address) for network in around for address in network}
    protected = {int(IPv4Address(text)) for text in ("192.0.2.10", "192.0.2.1", "192.0.2.255")}
    assert covered == set(range(int(IPv4Address("192.0.2.0")), int(IPv4Address("192.0.2.255")) + 1)) - protected
    for target in ("192.0.2.10", "10.20.0.0/24", "::/80"):
        assert isinstance(judge(policy(target), HERE, Limits(split_around=True), Load()), Refusal)


def test_pieces_count_as_rules() -> None:
    limits = Limits(split_around=True, rules_per_policy_max=4)
    verdict = judge(policy("192.0.2.0/24"), HERE, limits, Load())
    assert isinstance(verdict, Refusal)
    assert verdict.code is Code.TOO_MANY_RULES


def test_a_rule_is_hit_when_its_address_becomes_protected_later() -> None:
    networks = policy("203.0.113.9").networks()
    assert hits(networks, HERE) is None
    refusal = hits(networks, Protected((("ssh session of ops", ipaddress.ip_network("203.0.113.9/32")),)))
    assert refusal is not None
    assert refusal.code is Code.PROTECTED_TARGET


v4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(20, 32)).map(lambda pair: IPv4Network(pair, strict=False))
v6 = st.tuples(st.integers(0, 2**128 - 1), st.integers(60, 128)).map(lambda pair: IPv6Network(pair, strict=False))
mapped = v4.map(lambda network: IPv6Network((0xFFFF << 32 | int(network.network_address), 96 + network.prefixlen)))


@st.composite
def near(draw: st.DrawFn) -> Network:
    """Draw a prefix that holds, equals, neighbours or lies in a protected network, in either spelling."""
    _, guarded = draw(st.sampled_from(HERE.all()))
    length = draw(st.integers(max(0, guarded.prefixlen - 6), guarded.max_prefixlen))
    base = int(guarded.network_address) ^ draw(st.integers(0, 3)) << draw(st.integers(0, 8))
    if guarded.version == 4:
        network = IPv4Network((base & 0xFFFF_FFFF, length), strict=False)
        if draw(st.booleans()):
            return IPv6Network((0xFFFF << 32 | int(network.network_address), 96 + length))
        return network
    return IPv6Network((base % 2**128, length), strict=False)


@given(st.lists(st.one_of(v4, v6, mapped, near()), min_size=1, max_size=6), st.booleans())
def test_nothing_that_passes_touches_a_protected_network_or_is_too_wide(targets: list[Network], split: bool) -> None:
    spec = policy(*map(str, targets))
    verdict = judge(spec, HERE, Limits(split_around=split), Load())
    if isinstance(verdict, Refusal):
        # A refusal has a cause that an independent look finds: something protected is touched, or a prefix is too wide.
        if verdict.code is Code.PROTECTED_TARGET:
            assert any(overlaps(target, guarded) for target in targets for _, guarded in HERE.all())
        else:
            assert verdict.code in (Code.PREFIX_TOO_WIDE, Code.TOO_MANY_RULES)
        return
    for network in verdict:
        assert network.prefixlen >= (24 if network.version == 4 else 64)
        for _, guarded in HERE.all():
            assert not overlaps(network, guarded)
            assert not overlaps(guarded, network)
    if not split:
        assert set(verdict) == set(spec.networks())
