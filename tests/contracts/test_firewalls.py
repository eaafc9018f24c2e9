"""One contract for every firewall: what is installed is found, renewals and removals are exact, failures change nothing.

Each backend runs in a network namespace of its own, where it can break nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from cybermesh.addresses import parse_address
from cybermesh.enforce.backends import TOLERANCE_MS, Backend, BackendError, ipt_sets, nft_script
from cybermesh.enforce.backends.iptables import IptablesBackend, Programs
from cybermesh.enforce.backends.nftables import LibraryChannel, NftablesBackend, ProcessChannel
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.reconcile import Plan, plan
from cybermesh.enforce.rules import Element, Match, exception, make
from cybermesh.policy import parse
from tests.conftest import skip_or_fail
from tests.enforce.namespaces import bare, command, inside

pytestmark = pytest.mark.netns
T = TypeVar("T")
MAKERS: dict[str, Callable[[], Backend]] = {
    "noop": NoopBackend,
    "nftables library": lambda: NftablesBackend(LibraryChannel()),
    "nftables program": lambda: NftablesBackend(ProcessChannel("nft")),
    "iptables": lambda: IptablesBackend(Programs.find()),
    "iptables legacy": lambda: IptablesBackend(Programs.find("legacy")),
}


@dataclass
class Firewall:
    """A backend in a namespace; ``do`` runs work with a fresh instance of it, as a new process would."""

    kind: str
    name: str
    kept: Backend | None = None

    def do(self, work: Callable[[Backend], Coroutine[Any, Any, T]]) -> T:
        async def call() -> T:
            backend = self.kept or MAKERS[self.kind]()
            try:
                return await work(backend)
            finally:
                backend.close()

        return inside(self.name, lambda: asyncio.run(call()))

    def elements(self) -> dict[Match, Element]:
        return dict(self.do(lambda backend: backend.audit(now_ms())).elements)

    def others(self) -> str:
        """Everything in this namespace's firewalls, without counters."""
        words = ["ip", "netns", "exec", self.name]
        told = command(*words, "nft", "-s", "list", "ruleset") + command(*words, "iptables-legacy-save", "-t", "filter")
        return "\n".join(line for line in told.splitlines() if not line.startswith("#"))


@pytest.fixture(scope="module", params=MAKERS)
def firewall(request: pytest.FixtureRequest, netns: None) -> Iterator[Firewall]:
    kind = str(request.param)
    with bare() as name:
        try:
            made = inside(name, MAKERS[kind])
        except BackendError as fault:
            skip_or_fail("netns", str(fault))
            raise
        made.close()
        yield Firewall(kind, name, made if kind == "noop" else None)


@pytest.fixture(autouse=True)
def _clean(firewall: Firewall) -> Iterator[None]:
    firewall.do(lambda backend: backend.rebuild([], now_ms()))
    yield
    firewall.do(lambda backend: backend.remove_all())


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def elements(target: dict[str, Any], action: str = "drop", ttl_s: float = 60, **guardrails: Any) -> list[Element]:
    spec = parse(
        {
            "policy_id": "p",
            "rule_type": "rate_limit" if action == "rate_limit" else "block",
            "action": action,
            "target": target,
            "guardrails": {"ttl_seconds": 60, **guardrails},
        }
    )
    return [rule.element for rule in make(spec, spec.networks(), now_ms() + round(1_000 * ttl_s))]


def everything() -> list[Element]:
    """Every lane that there is, at least once."""
    slow, fast = {"window_s": 60, "max_actions": 5}, {"window_s": 1, "max_actions": 1_000_000}
    hosts, prefixes = ["203.0.113.1", "2001:db8::1"], ["198.51.100.0/25", "2001:db8:1::/64"]
    services = [{}, {"protocols": ["udp", "gre"]}, {"ports": [53]}, {"ports": [{"from": 80, "to": 443}], "protocols": ["sctp"]}]
    found = [rule.element for rule in exception(parse_address("192.0.2.9"), now_ms() + 60_000)]
    for direction in ("ingress", "egress"):
        for service in services:
            for target in ({"ips": hosts}, {"cidrs": prefixes}):
                wanted = {**target, **service, "direction": direction}
                for action, more in (("drop", {}), ("reject", {}), ("rate_limit", {"rate_limit": slow})):
                    found += elements(wanted, action, **more)
    return found + elements({"ips": ["203.0.113.77"]}, "rate_limit", rate_limit=fast)


def by_match(found: list[Element]) -> dict[Match, Element]:
    return {element.match: element for element in found}


def test_everything_that_can_be_installed_is_found_again_with_its_rate_and_end(firewall: Firewall) -> None:
    wanted = by_match(everything())

    async def work(backend: Backend) -> tuple[int, tuple[str, ...], frozenset[Match]]:
        await backend.apply(plan(wanted, {}, now_ms()), now_ms())
        audit = await backend.audit(now_ms())
        return (
            plan(wanted, audit.elements, now_ms(), TOLERANCE_MS).drift,
            audit.damage,
            await backend.read_back(wanted),
        )

    assert firewall.do(work) == (0, (), frozenset(wanted))
    # Another process reads the same.
    assert plan(wanted, firewall.elements(), now_ms(), TOLERANCE_MS).drift == 0
    firewall.do(lambda backend: backend.rebuild(wanted.values(), now_ms()))
    assert plan(wanted, firewall.elements(), now_ms(), TOLERANCE_MS).drift == 0


def test_an_edit_is_exact(firewall: Firewall) -> None:
    before = [
        *elements({"ips": ["203.0.113.1", "203.0.113.2"], "cidrs": ["198.51.100.0/24"]}),
        *elements({"ips": ["203.0.113.3"]}, "rate_limit", rate_limit={"window_s": 1, "max_actions": 5}),
        *elements({"cidrs": ["192.0.2.0/25"], "ports": [{"from": 5, "to": 9}]}),
    ]
    after = [
        *elements({"ips": ["203.0.113.2"], "cidrs": ["198.51.100.0/25"]}, ttl_s=30),
        *elements({"ips": ["203.0.113.3"]}, "rate_limit", rate_limit={"window_s": 60, "max_actions": 5}),
        *elements({"ips": ["203.0.113.9"], "ports": [22], "direction": "egress"}, "reject"),
    ]
    old, new = by_match(before), by_match(after)

    async def work(backend: Backend) -> int:
        await backend.rebuild(before, now_ms())
        await backend.apply(plan(new, old, now_ms()), now_ms())
        audit = await backend.audit(now_ms())
        assert audit.damage == ()
        assert set(new) <= await backend.read_back(new)
        return plan(new, audit.elements, now_ms(), TOLERANCE_MS).drift

    assert firewall.do(work) == 0


def test_re_assertion_never_gives_a_later_end_and_a_renewal_does(firewall: Firewall) -> None:
    (short,) = elements({"ips": ["203.0.113.1"]}, ttl_s=20)
    longer = short._replace(expires_at_ms=short.expires_at_ms + 30_000)

    async def work(backend: Backend) -> list[int]:
        ends: list[int] = []
        for step in (
            Plan(adds=(short,)),
            Plan(adds=(short,)),
            Plan(renewals=((short, longer),)),
            Plan(renewals=((longer, short),)),
        ):
            await backend.apply(step, now_ms())
            audit = await backend.audit(now_ms())
            ends.append(audit.elements[short.match].expires_at_ms - short.expires_at_ms)
        return ends

    first, again, renewed, shortened = firewall.do(work)
    # Listing takes a moment, in which the kernel's remaining time is still the one of its beginning.
    assert -TOLERANCE_MS <= first <= 500
    assert -TOLERANCE_MS <= again <= 500
    assert 30_000 - TOLERANCE_MS <= renewed <= 30_500
    assert -TOLERANCE_MS <= shortened <= 500


def test_removing_everything_leaves_nothing_of_ours_and_nothing_of_others_changed(firewall: Firewall) -> None:
    firewall.do(lambda backend: backend.remove_all())
    before = firewall.others()
    firewall.do(lambda backend: backend.rebuild(everything(), now_ms()))
    firewall.do(lambda backend: backend.remove_all())
    assert firewall.elements() == {}
    assert firewall.others() == before
    firewall.do(lambda backend: backend.remove_all())
    assert "cm" not in command("ip", "netns", "exec", firewall.name, "ipset", "list", "-n")


def test_a_full_set_is_refused_with_its_code_and_changes_nothing(firewall: Firewall, monkeypatch: pytest.MonkeyPatch) -> None:
    if firewall.kind == "noop":
        return
    monkeypatch.setattr(nft_script, "POINTS_MAX", 64)
    monkeypatch.setattr(ipt_sets, "SET_SIZE_MAX", 64)
    first, more = (elements({"ips": [f"203.0.{third}.{n}" for n in range(200)]}) for third in (113, 114))

    async def work(backend: Backend) -> set[Match]:
        await backend.rebuild(first[:40], now_ms())
        with pytest.raises(BackendError) as caught:
            await backend.apply(Plan(adds=tuple(more)), now_ms())
        assert caught.value.code == "SET_FULL"
        audit = await backend.audit(now_ms())
        assert audit.damage == ()
        return set(audit.elements)

    assert firewall.do(work) == {element.match for element in first[:40]}


def test_a_rebuild_that_fails_leaves_what_was_there(firewall: Firewall, monkeypatch: pytest.MonkeyPatch) -> None:
    if firewall.kind == "noop":
        return
    kept = elements({"ips": ["203.0.113.1"]})
    firewall.do(lambda backend: backend.rebuild(kept, now_ms()))
    monkeypatch.setattr(nft_script, "POINTS_MAX", 64)
    monkeypatch.setattr(ipt_sets, "SET_SIZE_MAX", 64)
    many = elements({"ips": [f"203.0.113.{n}" for n in range(200)]})

    async def work(backend: Backend) -> None:
        with contextlib.suppress(BackendError):
            await backend.rebuild(many, now_ms())
            pytest.fail("200 fit into 64")

    firewall.do(work)
    audit = firewall.do(lambda backend: backend.audit(now_ms()))
    assert (set(audit.elements), audit.damage) == ({kept[0].match}, ())


def test_what_has_ended_is_not_listed_and_not_installed_again(firewall: Firewall) -> None:
    (ended,) = elements({"ips": ["203.0.113.1"]}, ttl_s=-5)
    firewall.do(lambda backend: backend.rebuild([ended], now_ms()))
    assert firewall.elements() == {}
