"""NetworkPolicies: what they mean, by an evaluator of their semantics; and how they reach an API server."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from kubernetes_asyncio import config as kube_config
from kubernetes_asyncio.client import ApiClient, Configuration, NetworkingV1Api

from cybermesh.enforce.backends import TOLERANCE_MS, BackendError
from cybermesh.enforce.backends.k8s_policy import InexpressibleError, read_elements, render, write_elements
from cybermesh.enforce.backends.kubernetes import KubernetesBackend
from cybermesh.enforce.packed import PackedError
from cybermesh.enforce.reconcile import Plan, plan
from cybermesh.enforce.rules import Effect, Element, Match, make
from cybermesh.policy import Direction, parse
from tests.enforce.api_server import ApiServer

# A kubeconfig of a real API server, as tools/kube_api_server prints it; read before the environment is cleared for a test.
REAL = os.environ.get("CYBERMESH_TEST_KUBECONFIG", "")
START_MS = 1_700_000_000_000
INGRESS = Direction.INGRESS


def elements(target: dict[str, Any], action: str = "drop", ends_at_ms: int = START_MS + 60_000, **more: Any) -> list[Element]:
    spec = parse(
        {
            "policy_id": "p",
            "rule_type": "rate_limit" if action == "rate_limit" else "block",
            "action": action,
            "target": target,
            "guardrails": {"ttl_seconds": 60, **more},
        }
    )
    return [rule.element for rule in make(spec, spec.networks(), ends_at_ms)]


def allows(policies: list[dict[str, Any]], direction: Direction, address: str, protocol: str, port: int) -> bool:
    """Say whether a pod that these policies select may talk: a union of allows, and everything where nobody isolates.

    Written from the API's documentation (NetworkPolicySpec, NetworkPolicyPeer, IPBlock, NetworkPolicyPort).
    """
    kind, peers = ("Ingress", "from") if direction is INGRESS else ("Egress", "to")
    isolating = [policy for policy in policies if kind in policy["spec"]["policyTypes"]]
    if not isolating:
        return True
    for policy in isolating:
        for rule in policy["spec"].get(kind.lower()) or ():
            ports = rule.get("ports")
            is_port = not ports or any(
                item["protocol"] == protocol and item["port"] <= port <= item.get("endPort", item["port"]) for item in ports
            )
            if is_port and any(_is_in(address, peer["ipBlock"]) for peer in rule[peers]):
                return True
    return False


def _is_in(address: str, block: dict[str, Any]) -> bool:
    host, around = ipaddress.ip_address(address), ipaddress.ip_network(block["cidr"])
    for text in block.get("except", ()):
        inner = ipaddress.ip_network(text)
        # What the API server validates: strictly inside, and of the same family.
        assert inner.version == around.version
        assert inner.subnet_of(around)  # type: ignore[arg-type]
        assert inner != around
        if host in inner:
            return False
    return host in around


def is_meant(wanted: list[Element], address: str, protocol: str, port: int) -> bool:
    """Say whether the intent lets a packet pass, element by element."""
    host, number = ipaddress.ip_address(address), {"TCP": 6, "UDP": 17, "SCTP": 132}[protocol]
    hits = [
        match
        for match, _, _ in wanted
        if host in match.network and match.protocol in (0, number) and (not match.first or match.first <= port <= match.last)
    ]
    return any(match.effect is Effect.ALLOW for match in hits) or not hits


BLOCKS: dict[str, list[dict[str, Any]]] = {
    "one host": [{"ips": ["203.0.113.9"]}],
    "many hosts": [{"ips": [f"203.0.113.{n}" for n in range(0, 200, 3)]}],
    "a prefix and a host in it on a port": [{"cidrs": ["203.0.113.0/28"]}, {"ips": ["203.0.113.9"], "ports": [443]}],
    "a port of a host": [{"ips": ["203.0.113.9"], "ports": [443], "protocols": ["tcp"]}],
    "ports of a prefix and others of a host in it": [
        {"cidrs": ["203.0.113.0/28"], "ports": [{"from": 80, "to": 443}], "protocols": ["tcp"]},
        {"ips": ["203.0.113.9"], "ports": [53], "protocols": ["udp"]},
    ],
    "IPv6": [{"ips": ["2001:db8::9"]}, {"cidrs": ["2001:db8:1::/64"], "ports": [443]}],
    "every port of a protocol": [{"ips": ["203.0.113.9"], "protocols": ["udp"]}],
}
ADDRESSES = ["203.0.113.9", "203.0.113.8", "203.0.113.0", "203.0.113.66", "198.51.100.1", "10.0.0.1"]
ADDRESSES += ["2001:db8::9", "2001:db8:1::9"]


@pytest.mark.parametrize("targets", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("direction", list(Direction))
def test_blocked_pairs_are_blocked_and_all_others_allowed(targets: list[dict[str, Any]], direction: Direction) -> None:
    wanted = [element for target in targets for element in elements({**target, "direction": direction})]
    policies = [render(wanted, direction, "default")]
    blocked = 0
    for address in ADDRESSES:
        for protocol in ("TCP", "UDP", "SCTP"):
            for port in (1, 53, 79, 80, 443, 444, 65_535):
                meant = is_meant(wanted, address, protocol, port)
                blocked += not meant
                assert allows(policies, direction, address, protocol, port) is meant, (address, protocol, port)
                other = Direction.EGRESS if direction is INGRESS else INGRESS
                assert allows(policies, other, address, protocol, port)
    assert blocked


networks = st.tuples(st.integers(0, 15), st.integers(28, 32)).map(
    lambda pair: ipaddress.IPv4Network((0xCB007100 | pair[0] >> (32 - pair[1]) << (32 - pair[1]), pair[1]))
)
services = st.one_of(
    st.just((0, 0, 0)),
    st.tuples(st.sampled_from([6, 17]), st.just(0), st.just(0)),
    st.tuples(st.sampled_from([6, 17]), st.integers(1, 9), st.integers(1, 9)).map(
        lambda item: (item[0], min(item[1:]), max(item[1:]))
    ),
)


@st.composite
def blocks(draw: st.DrawFn) -> Element:
    network, (protocol, first, last) = draw(networks), draw(services)
    base, length = int(network.network_address), network.prefixlen
    return Element(Match(Effect.DROP, INGRESS, 4, base, length, protocol, first, last, length < 32 or first != last), START_MS)


exempt = st.integers(0, 15).map(lambda host: Element(Match(Effect.ALLOW, INGRESS, 4, 0xCB007100 | host, 32), START_MS))


@given(st.lists(st.one_of(blocks(), blocks(), exempt), min_size=1, max_size=8), st.integers(0, 17), st.integers(1, 10))
def test_no_set_of_blocks_allows_what_it_blocks_or_blocks_more(wanted: list[Element], host: int, port: int) -> None:
    policies = [render(wanted, INGRESS, "default")]
    address = str(ipaddress.IPv4Address(0xCB007100 | host))
    for protocol in ("TCP", "UDP", "SCTP"):
        assert allows(policies, INGRESS, address, protocol, port) is is_meant(wanted, address, protocol, port)


@given(st.lists(blocks(), max_size=6))
def test_elements_come_back_from_their_annotation(wanted: list[Element]) -> None:
    assert read_elements(write_elements(wanted)) == {element.match: element for element in wanted}


@pytest.mark.parametrize("text", ["", "x", "AAAA", "eJxLBAAAYgBi"])
def test_an_annotation_of_somebody_else_is_refused(text: str) -> None:
    with pytest.raises(PackedError):
        read_elements(text)


def test_what_a_network_policy_cannot_say_is_refused() -> None:
    for wanted in (
        elements({"ips": ["203.0.113.9"]}, "rate_limit", rate_limit={"window_s": 60, "max_actions": 5}),
        elements({"ips": ["203.0.113.9"], "protocols": ["icmp"]}),
    ):
        with pytest.raises(InexpressibleError):
            render(wanted, INGRESS, "default")


# Through kubernetes-asyncio, against an API server


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as started:
        yield started


def backend(server: ApiServer, *namespaces: str) -> KubernetesBackend:
    async def connect() -> ApiClient:
        return ApiClient(Configuration(host=server.url))

    return KubernetesBackend(namespaces or ("default", "shop"), connect)


async def test_blocks_reach_every_namespace_and_leave_it_again(server: ApiServer) -> None:
    firewall = backend(server)
    wanted = elements({"ips": ["203.0.113.9"]}) + elements({"cidrs": ["198.51.100.0/24"], "direction": "egress"})
    step = plan({element.match: element for element in wanted}, {}, START_MS)
    await firewall.apply(step, START_MS)
    assert sorted(server.policies) == [
        (namespace, f"cybermesh-{way}") for namespace in ("default", "shop") for way in ("egress", "ingress")
    ]
    assert not allows(list(server.policies.values()), INGRESS, "203.0.113.9", "TCP", 80)
    assert await firewall.read_back([element.match for element in wanted]) == {element.match for element in wanted}
    audit = await firewall.audit(START_MS)
    assert (plan(audit.elements, {e.match: e for e in wanted}, START_MS, TOLERANCE_MS).drift, audit.damage) == (0, ())
    await firewall.apply(Plan(removes=(wanted[0],)), START_MS)
    assert sorted(name for _, name in server.policies) == ["cybermesh-egress", "cybermesh-egress"]
    server.edit("default", "theirs", {"podSelector": {}, "policyTypes": ["Ingress"]})
    await firewall.remove_all()
    assert list(server.policies) == [("default", "theirs")]


async def test_a_foreign_hand_is_a_conflict_that_a_rebuild_settles(server: ApiServer) -> None:
    firewall = backend(server, "default")
    first, second = elements({"ips": ["203.0.113.9"]}), elements({"ips": ["203.0.113.10"]})
    await firewall.rebuild(first, START_MS)
    server.edit("default", "cybermesh-ingress", {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]})
    audit = await firewall.audit(START_MS)
    assert audit.damage == ("default: cybermesh-ingress is not as we wrote it",)
    assert await firewall.read_back([first[0].match]) == frozenset()
    with pytest.raises(BackendError, match="somebody else has changed") as caught:
        await firewall.apply(Plan(adds=tuple(second)), START_MS)
    assert caught.value.code == "APPLY_FAILED"
    await firewall.rebuild([*first, *second], START_MS)
    assert set((await firewall.audit(START_MS)).elements) == {first[0].match, second[0].match}


async def test_where_others_isolate_pods_a_block_is_refused_because_it_would_allow(server: ApiServer) -> None:
    server.edit("shop", "deny-all", {"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"]})
    with pytest.raises(BackendError, match="shop: others isolate pods") as caught:
        await backend(server).apply(Plan(adds=tuple(elements({"ips": ["203.0.113.9"]}))), START_MS)
    assert caught.value.code == "CONFLICT"
    # The namespace that came before has been written back.
    assert list(server.policies) == [("shop", "deny-all")]
    egress = elements({"ips": ["203.0.113.9"], "direction": "egress"})
    await backend(server).apply(Plan(adds=tuple(egress)), START_MS)
    assert len(server.policies) == 3


async def test_a_failure_half_way_leaves_what_was_there(server: ApiServer) -> None:
    firewall = backend(server)
    first, second = elements({"ips": ["203.0.113.9"]}), elements({"ips": ["203.0.113.10"]})
    await firewall.rebuild(first, START_MS)
    server.refuse_after = 1
    with pytest.raises(BackendError, match="the API server: 500"):
        await firewall.apply(Plan(adds=tuple(second)), START_MS)
    server.refuse_after = None
    await firewall.audit(START_MS)
    for _ in range(2):
        found = await firewall.audit(START_MS)
        assert set(found.elements) == {first[0].match}


async def test_what_has_ended_goes_with_the_next_look_or_the_janitor(server: ApiServer) -> None:
    firewall = backend(server)
    short, long = elements({"ips": ["203.0.113.9"]}), elements({"ips": ["203.0.113.10"]}, ends_at_ms=START_MS + 600_000)
    await firewall.rebuild([*short, *long], START_MS)
    annotations = server.policies["shop", "cybermesh-ingress"]["metadata"]["annotations"]
    assert annotations["cybermesh.dev/next-expiry-ms"] == str(START_MS + 60_000)
    assert await firewall.expire(START_MS + 59_000) == 0
    assert await backend(server).expire(START_MS + 61_000) == 1
    assert allows(list(server.policies.values()), INGRESS, "203.0.113.9", "TCP", 80)
    assert set((await firewall.audit(START_MS + 700_000)).elements) == set()
    assert server.policies == {}


async def test_a_change_by_others_is_heard_and_our_own_is_not() -> None:
    # Not the fixture: its connections must have ended when the test does.
    async with ApiServer() as server:
        firewall = backend(server, "default")
        await firewall.rebuild(elements({"ips": ["203.0.113.9"]}), START_MS)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(firewall.wait_changed(), name="watch")
            await server.is_watched.wait()
            await firewall.apply(Plan(adds=tuple(elements({"ips": ["203.0.113.10"]}))), START_MS)
            assert not waiting.done()
            server.remove("default", "cybermesh-ingress")
            async with asyncio.timeout(5):
                await waiting


async def test_an_api_server_that_is_away_is_named() -> None:
    server = ApiServer()
    server.url = "http://127.0.0.1:9"
    with pytest.raises(BackendError) as caught:
        await backend(server).audit(START_MS)
    assert caught.value.code == "NO_FIREWALL"


@pytest.mark.skipif(not REAL, reason="kubernetes: CYBERMESH_TEST_KUBECONFIG names no real API server")
async def test_a_real_api_server_takes_what_we_write_and_conflicts_where_others_write() -> None:
    """The same as against the fixture, on the real thing: validation, ownership, watch, expiry, removal."""

    async def connect() -> ApiClient:
        await kube_config.load_kube_config(REAL)
        return ApiClient()

    firewall = KubernetesBackend(["default"], connect)
    await firewall.remove_all()
    wanted = [element for targets in BLOCKS.values() for target in targets for element in elements(target)]
    await firewall.apply(plan({element.match: element for element in wanted}, {}, START_MS), START_MS)
    audit = await firewall.audit(START_MS)
    assert (set(audit.elements), audit.damage) == ({element.match for element in wanted}, ())
    async with asyncio.TaskGroup() as group:
        heard = group.create_task(firewall.wait_changed(), name="watch")
        async with await connect() as client:
            api = NetworkingV1Api(client)
            name = "cybermesh-ingress"
            held = client.sanitize_for_serialization(await api.read_namespaced_network_policy(name, "default"))
            spec = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]}
            body = {"apiVersion": held["apiVersion"], "kind": held["kind"], "metadata": {"name": name}, "spec": spec}
            await api.patch_namespaced_network_policy(
                name, "default", body, field_manager="other", force=True, _content_type="application/apply-patch+yaml"
            )
        async with asyncio.timeout(10):
            await heard
    assert (await firewall.audit(START_MS)).damage
    with pytest.raises(BackendError, match="somebody else has changed"):
        await firewall.apply(Plan(adds=tuple(elements({"ips": ["203.0.113.250"]}))), START_MS)
    await firewall.rebuild(wanted, START_MS)
    assert (await firewall.audit(START_MS)).damage == ()
    assert await firewall.expire(START_MS + 61_000) == len(audit.elements)
    assert (await firewall.audit(START_MS)).elements == {}
    await firewall.remove_all()
