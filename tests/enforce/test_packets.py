"""Real packets, both firewalls, three ways past a host: for each rule a packet that must not pass and one that must.

The kernel's own timers end a ban while nobody is left to end it; that part waits for seconds, once per firewall.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cybermesh.enforce.backends import Backend
from cybermesh.enforce.backends.iptables import IptablesBackend, Programs
from cybermesh.enforce.backends.nftables import NftablesBackend, open_channel
from cybermesh.enforce.rules import Element, make
from cybermesh.policy import parse
from tests.enforce.agent_process import Agent
from tests.enforce.namespaces import ATTACKER, BYSTANDER, HOST, command, eventually, inside
from tests.enforce.site import NAMED_PORT, OTHER_PORT, WAYS, Site, site

pytestmark = pytest.mark.netns
T = TypeVar("T")
BACKENDS: dict[str, Callable[[], Backend]] = {
    "nftables": lambda: NftablesBackend(open_channel()),
    "iptables": lambda: IptablesBackend(Programs.find()),
}
# Elements in one transaction: iptables starts programs for each.
AT_ONCE = {"nftables": 1, "iptables": 40}
# Ports as a policy names them: both of the way behind DNAT and of the others.
NAMED = [NAMED_PORT, NAMED_PORT + 500]
RANGES = [{"from": port - 9, "to": port} for port in NAMED]
EVIL = {"ips": [ATTACKER[4]]}


@dataclass(frozen=True)
class Firewall:
    """One backend on the site's host."""

    place: Site
    backend: str

    def do(self, work: Callable[[Backend], Coroutine[Any, Any, T]]) -> T:
        async def call() -> T:
            backend = BACKENDS[self.backend]()
            try:
                return await work(backend)
            finally:
                backend.close()

        return inside(self.place.names.host, lambda: asyncio.run(call()))

    def install(self, wanted: list[Element]) -> None:
        self.do(lambda backend: backend.rebuild(wanted, now_ms()))


@pytest.fixture(scope="module")
def place(netns: None) -> Iterator[Site]:
    with site() as made:
        yield made


@pytest.fixture(scope="module", params=BACKENDS)
def firewall(request: pytest.FixtureRequest, place: Site) -> Iterator[Firewall]:
    made = Firewall(place, request.param)
    yield made
    made.do(lambda backend: backend.remove_all())


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def elements(target: dict[str, Any], action: str = "drop", **guardrails: Any) -> list[Element]:
    spec = parse(
        {
            "policy_id": "p",
            "rule_type": "rate_limit" if action == "rate_limit" else "block",
            "action": action,
            "target": target,
            "guardrails": {"ttl_seconds": 60, **guardrails},
        }
    )
    return [rule.element for rule in make(spec, spec.networks(), now_ms() + 60_000)]


@pytest.mark.parametrize("way", WAYS)
def test_without_rules_everything_passes(place: Site, way: str) -> None:
    for who in ("attacker", "bystander"):
        for version in (4, 6):
            assert place.udp(way, who, version=version) == 1
            assert place.udp_back(way, who, version=version) == 1
            assert place.tcp(way, who, version=version) == "open"
        assert place.ping(way, who) == 1


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("shape", ["host", "prefix"])
def test_a_blocked_source_does_not_arrive_and_others_do(firewall: Firewall, version: int, shape: str) -> None:
    prefix = {4: "10.77.1.64/26", 6: "fd77:1::40/122"}[version]
    firewall.install(elements({"ips": [ATTACKER[version]]} if shape == "host" else {"cidrs": [prefix]}))
    for way in WAYS:
        assert firewall.place.udp(way, "attacker", version=version) == 0
        assert firewall.place.udp(way, "bystander", version=version) == 1
        if version == 4:
            # A neighbour on the same link, just outside of the prefix.
            assert firewall.place.udp(way, "neighbour") == 1
    assert firewall.place.tcp("through it", "attacker", version=version) == "silent"
    assert firewall.place.tcp("through it", "bystander", version=version) == "open"


@pytest.mark.parametrize("ports", [NAMED, RANGES], ids=["single ports", "port ranges"])
@pytest.mark.parametrize("target", [EVIL, {"cidrs": ["10.77.1.64/26"]}], ids=["host", "prefix"])
def test_only_the_named_ports_are_closed(firewall: Firewall, target: dict[str, Any], ports: list[Any]) -> None:
    firewall.install(elements({**target, "ports": ports}))
    for way in WAYS:
        assert firewall.place.udp(way, "attacker") == 0
        assert firewall.place.udp(way, "attacker", port=OTHER_PORT) == 1
        assert firewall.place.tcp(way, "attacker", port=OTHER_PORT) == "open"
        assert firewall.place.udp(way, "bystander") == 1


def test_only_the_named_protocol_is_closed(firewall: Firewall) -> None:
    firewall.install(elements({**EVIL, "protocols": ["udp"]}))
    for way in WAYS:
        assert firewall.place.udp(way, "attacker") == 0
        assert firewall.place.tcp(way, "attacker") == "open"
        assert firewall.place.udp(way, "bystander") == 1
    firewall.install(elements({**EVIL, "protocols": ["tcp", "icmp"]}))
    for way in WAYS:
        assert firewall.place.udp(way, "attacker") == 1
        assert firewall.place.tcp(way, "attacker") == "silent"
        assert firewall.place.tcp(way, "bystander") == "open"
    # An echo request has no port, so DNAT leaves it to the host.
    for way in WAYS[:2]:
        assert firewall.place.ping(way, "attacker") == 0
        assert firewall.place.ping(way, "bystander") == 1


@pytest.mark.parametrize("version", [4, 6])
def test_a_direction_leaves_the_other_alone(firewall: Firewall, version: int) -> None:
    firewall.install(elements({"ips": [ATTACKER[version]], "direction": "egress"}))
    for way in WAYS:
        assert firewall.place.udp(way, "attacker", version=version) == 1
        assert firewall.place.udp_back(way, "attacker", version=version) == 0
        assert firewall.place.udp_back(way, "bystander", version=version) == 1


@pytest.mark.parametrize("target", [EVIL, {"cidrs": ["10.77.1.64/26"]}], ids=["host", "prefix"])
def test_a_rate_limit_lets_a_burst_through_and_no_more(firewall: Firewall, target: dict[str, Any]) -> None:
    for way in WAYS:
        firewall.install(elements(target, "rate_limit", rate_limit={"window_s": 600, "max_actions": 5 + WAYS.index(way)}))
        assert 5 <= firewall.place.udp(way, "attacker", count=40) <= 8
        assert firewall.place.udp(way, "bystander", count=40) == 40
        assert firewall.place.udp(way, "neighbour", count=10) == 10


@pytest.mark.parametrize("version", [4, 6])
def test_reject_says_so_at_once(firewall: Firewall, version: int) -> None:
    firewall.install([])
    # A banned host on the same link is not heard when IPv6 asks for its hardware address, so that is asked before.
    firewall.place.udp_back("to the host", "attacker", version=version)
    firewall.install(elements({"ips": [ATTACKER[version]]}, "reject"))
    for way in WAYS:
        assert firewall.place.tcp(way, "attacker", version=version) == "refused"
        assert firewall.place.tcp(way, "bystander", version=version) == "open"


def test_expiry_renewal_escalation_and_revocation_hold_with_the_agent_killed(firewall: Firewall, tmp_path: Path) -> None:
    """Four bans: one ends, one was renewed, one escalated from a rate limit to a block, one was revoked; then the kill."""
    bad, neighbour, far = {"ips": [ATTACKER[4]]}, {"ips": ["10.77.1.7"]}, {"ips": [ATTACKER[6]]}
    limit = {"rate_limit": {"window_s": 600, "max_actions": 1}}
    lab = firewall.place
    with Agent(lab.names.host, tmp_path, firewall.backend) as agent:
        agent.send("renewed", 2, bad, ttl_s=2)
        agent.send("renewed", 3, bad, ttl_s=60, action="update")
        agent.send("escalated", 4, far, ttl_s=2, kind="rate_limit", **limit)
        agent.send("escalated", 5, far, ttl_s=60, action="update")
        agent.send("revoked", 6, {"ips": [BYSTANDER[4]], "direction": "egress"}, ttl_s=60)
        agent.send("revoked", 7, {"ips": [BYSTANDER[4]], "direction": "egress"}, ttl_s=60, action="remove")
        # The short one last: what comes before takes its time on a busy machine.
        agent.send("ends", 8, neighbour, ttl_s=4)
        agent.kill()
    for way in WAYS:
        assert lab.udp(way, "attacker") == 0
        assert lab.udp(way, "attacker", version=6) == 0
        assert lab.udp(way, "neighbour") == 0
        assert lab.udp_back(way, "bystander") == 1
    assert eventually(lambda: lab.udp("to the host", "neighbour") == 1, within_s=12)
    for way in WAYS:
        assert lab.udp(way, "neighbour") == 1
        assert lab.udp(way, "attacker") == 0
        assert lab.udp(way, "attacker", version=6) == 0
        assert lab.udp(way, "bystander") == 1


def test_no_packet_of_an_allowed_host_is_lost_during_ten_thousand_updates(firewall: Firewall, tmp_path: Path) -> None:
    with Agent(firewall.place.names.host, tmp_path, firewall.backend) as agent:
        told = agent.churn(10_000, AT_ONCE[firewall.backend], watched=BYSTANDER[4], port=NAMED_PORT + 77)
        count = send_until_done(firewall.place, told.done)
        received = told.result()
    assert received["lost"] == []
    assert received["last"] == count - 1
    assert count > 1_000
    assert received["updates"] == 10_000


def send_until_done(place: Site, done: Callable[[], bool]) -> int:
    """Send numbered datagrams from the bystander until ``done``; return how many."""
    import socket
    import struct

    count = 0
    with inside(place.names.bystander, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        while not done():
            sender.sendto(struct.pack("!I", count), (HOST[4], NAMED_PORT + 77))
            count += 1
            time.sleep(0.0005)
        for _ in range(3):
            sender.sendto(b"end", (HOST[4], NAMED_PORT + 77))
    return count


def test_the_namespaces_are_as_the_others_left_them(firewall: Firewall) -> None:
    words = ["ip", "netns", "exec", firewall.place.names.host]
    firewall.do(lambda backend: backend.remove_all())
    assert "CYBERMESH" not in command(*words, "iptables-save")
    assert "inet cybermesh" not in command(*words, "nft", "list", "tables")
    assert command(*words, "ipset", "list", "-n") == ""
