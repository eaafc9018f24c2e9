"""nftables with real packets: what must not pass does not, what must pass does, and everything ends and leaves on time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cybermesh.enforce.backends import BackendError, nft_script
from cybermesh.enforce.backends.nftables import Channel, LibraryChannel, NftablesBackend, ProcessChannel, open_channel
from cybermesh.enforce.reconcile import Plan, plan
from cybermesh.enforce.rules import Element, make
from cybermesh.policy import parse
from tests.enforce.namespaces import ATTACKER, BYSTANDER, HARMLESS, HOST, PORT, Lab, Wire, command, eventually, inside, lab, udp

pytestmark = pytest.mark.netns
T = TypeVar("T")
OTHERS = """
table inet theirs {
    set friends { type ipv4_addr; flags timeout; elements = { 192.0.2.7, 192.0.2.8 } }
    chain input {
        type filter hook input priority 0; policy accept;
        ip saddr @friends counter accept
    }
}
table ip cybermesh_like {
    chain a {
    }
}
"""


@pytest.fixture(scope="module")
def names(netns: None) -> Iterator[Lab]:
    with lab() as made:
        command("ip", "netns", "exec", made.host, "nft", "-f", "-", text=OTHERS)
        yield made


@pytest.fixture
def clean(names: Lab) -> Iterator[Lab]:
    yield names
    on_host(names, lambda backend: backend.remove_all())


def others(names: Lab) -> str:
    """What is not ours, as bytes."""
    shown = command("ip", "netns", "exec", names.host, "nft", "-a", "list", "ruleset")
    return "".join(part for part in shown.split("table ") if not part.startswith("inet cybermesh {"))


def on_host(
    names: Lab, work: Callable[[NftablesBackend], Coroutine[Any, Any, T]], channel: Callable[[], Channel] = open_channel
) -> T:
    """Use the backend inside the host's namespace."""

    async def call() -> T:
        backend = NftablesBackend(channel())
        try:
            return await work(backend)
        finally:
            backend.close()

    return inside(names.host, lambda: asyncio.run(call()))


def library() -> Channel:
    try:
        return LibraryChannel()
    except BackendError as fault:
        pytest.skip(f"netns: {fault}")


def program() -> Channel:
    return ProcessChannel("nft")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def elements(target: dict[str, Any], action: str = "drop", ttl_s: float = 60, **more: Any) -> list[Element]:
    rule_type = "rate_limit" if action == "rate_limit" else "block"
    spec = parse(
        {
            "policy_id": "p",
            "rule_type": rule_type,
            "action": action,
            "target": target,
            "guardrails": {"ttl_seconds": 60, **more},
        }
    )
    return [rule.element for rule in make(spec, spec.networks(), now_ms() + round(1_000 * ttl_s))]


def install(names: Lab, wanted: list[Element]) -> None:
    """Build our table with these elements."""
    on_host(names, lambda backend: backend.rebuild(wanted, now_ms()))


@contextlib.contextmanager
def wire(names: Lab, version: int = 4, port: int = PORT) -> Iterator[Wire]:
    made = Wire(names, version, port)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("channel", [library, program])
def test_a_banned_host_is_cut_off_and_a_bystander_is_not(clean: Lab, version: int, channel: Callable[[], Channel]) -> None:
    with wire(clean, version) as line:
        assert (line.passes("attacker"), line.passes("bystander")) == (1, 1)
        wanted = elements({"ips": [ATTACKER[version]]})

        async def ban(backend: NftablesBackend) -> None:
            await backend.rebuild([], now_ms())
            await backend.apply(Plan(adds=tuple(wanted)), now_ms())
            assert await backend.read_back([wanted[0].match]) == {wanted[0].match}

        on_host(clean, ban, channel)
        assert (line.passes("attacker"), line.passes("bystander")) == (0, 1)


def test_a_scan_finds_nothing_any_more_and_an_open_connection_is_cut(clean: Lab) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(inside(clean.host, lambda: socket.create_server(("0.0.0.0", 0))))
        port = server.getsockname()[1]

        def connect(wait_s: float) -> socket.socket:
            return socket.create_connection((HOST[4], port), timeout=wait_s)

        opened = stack.enter_context(inside(clean.attacker, lambda: connect(5)))
        accepted = stack.enter_context(server.accept()[0])
        line = stack.enter_context(wire(clean))
        opened.sendall(b"before")
        assert accepted.recv(16) == b"before"
        install(clean, elements({"ips": [ATTACKER[4]]}))
        opened.sendall(b"after")
        assert line.passes("bystander") == 1
        accepted.setblocking(False)
        with pytest.raises(BlockingIOError):
            accepted.recv(16)
        with pytest.raises(TimeoutError):
            inside(clean.attacker, lambda: connect(0.2))


@pytest.mark.parametrize(
    ("target", "blocked", "open_"),
    [
        ({"cidrs": ["10.77.1.64/26"]}, PORT, None),
        ({"cidrs": ["10.77.1.128/25"]}, None, PORT),
        ({"ips": [ATTACKER[4]], "ports": [PORT]}, PORT, PORT + 1),
        ({"ips": [ATTACKER[4]], "ports": [{"from": PORT - 5, "to": PORT}], "protocols": ["udp"]}, PORT, PORT + 1),
        ({"cidrs": ["10.77.1.0/24"], "ports": [{"from": PORT + 1, "to": PORT + 9}]}, PORT + 1, PORT),
        ({"ips": [ATTACKER[4]], "protocols": ["udp"]}, PORT, None),
        ({"ips": [ATTACKER[4]], "protocols": ["tcp", "icmp"]}, None, PORT),
        ({"ips": [ATTACKER[4]], "direction": "egress"}, None, PORT),
    ],
    ids=str,
)
def test_only_the_packets_of_the_target_are_blocked(
    clean: Lab, target: dict[str, Any], blocked: int | None, open_: int | None
) -> None:
    install(clean, elements(target))
    for port, arrives in ((blocked, 0), (open_, 1)):
        if port is not None:
            with wire(clean, 4, port) as line:
                assert line.passes("attacker") == arrives
                assert line.passes("bystander") == 1


def test_an_egress_ban_stops_what_the_host_sends(clean: Lab) -> None:
    with (
        contextlib.closing(udp(clean.attacker, ATTACKER[4], PORT)) as there,
        contextlib.closing(udp(clean.host, HOST[4])) as here,
    ):
        here.sendto(b"1", (ATTACKER[4], PORT))
        assert there.recv(16) == b"1"
        install(clean, elements({"ips": [ATTACKER[4]], "direction": "egress"}))
        with pytest.raises(PermissionError):
            here.sendto(b"2", (ATTACKER[4], PORT))
        on_host(clean, lambda backend: backend.remove_all())
        here.sendto(b"3", (ATTACKER[4], PORT))
        assert there.recv(16) == b"3"


def test_reject_says_so_at_once(clean: Lab) -> None:
    with inside(clean.host, lambda: socket.create_server(("0.0.0.0", 0))) as server:
        install(clean, elements({"ips": [ATTACKER[4]]}, "reject"))
        with pytest.raises(ConnectionRefusedError):
            inside(clean.attacker, lambda: socket.create_connection((HOST[4], server.getsockname()[1]), timeout=5))


@pytest.mark.parametrize("target", [{"ips": [ATTACKER[4]]}, {"cidrs": ["10.77.1.0/24"]}], ids=["host", "prefix"])
def test_a_rate_limit_lets_a_burst_through_and_no_more(clean: Lab, target: dict[str, Any]) -> None:
    install(clean, elements(target, "rate_limit", rate_limit={"window_s": 60, "max_actions": 5}))
    with wire(clean) as line:
        assert 5 <= line.passes("attacker", 40) <= 7
        assert line.passes("bystander", 40) == 40


def test_an_edit_of_areas_and_points_is_exactly_what_the_audit_finds(clean: Lab) -> None:
    before = [
        *elements({"ips": ["203.0.113.1", "203.0.113.2"], "cidrs": ["198.51.100.0/24", "2001:db8:1::/64"]}),
        *elements({"ips": ["203.0.113.1"], "ports": [22, {"from": 80, "to": 90}]}, "reject"),
        *elements({"ips": ["203.0.113.3"]}, "rate_limit", rate_limit={"window_s": 1, "max_actions": 5}),
    ]
    after = [
        *elements({"ips": ["203.0.113.2"], "cidrs": ["198.51.100.0/25"]}, ttl_s=30),
        *elements({"ips": ["203.0.113.1"], "ports": [22, {"from": 85, "to": 99}]}, "reject"),
        *elements({"ips": ["203.0.113.3"]}, "rate_limit", rate_limit={"window_s": 60, "max_actions": 5}),
        *elements({"ips": ["203.0.113.9"], "protocols": ["udp"], "direction": "egress"}),
    ]
    old, new = ({element.match: element for element in side} for side in (before, after))

    async def edit(backend: NftablesBackend) -> tuple[int, tuple[str, ...]]:
        await backend.rebuild(before, now_ms())
        await backend.apply(plan(new, old, now_ms()), now_ms())
        audit = await backend.audit(now_ms())
        found = await backend.read_back({**old, **new})
        # An area is asked for by its first address, which a narrower area holds as well.
        assert set(new) <= found
        assert not any(match in found for match in old if match not in new and not match.area)
        return plan(new, audit.elements, now_ms(), 2_500).drift, audit.damage

    assert on_host(clean, edit) == (0, ())


@pytest.mark.parametrize("nat", [False, True], ids=["through the host", "to a container behind DNAT"])
def test_a_banned_host_does_not_get_through_the_host_either(clean: Lab, nat: bool) -> None:
    command("ip", "netns", "exec", clean.host, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    script = f"""table ip nat {{
        chain pre {{
            type nat hook prerouting priority dstnat;
            iifname "to1" ip daddr {HOST[4]} udp dport {PORT} dnat to {BYSTANDER[4]}
        }}
    }}"""
    command("ip", "netns", "exec", clean.host, "nft", "-f", "-", text=script if nat else "")
    try:
        with (
            contextlib.closing(udp(clean.bystander, BYSTANDER[4], PORT)) as there,
            contextlib.closing(udp(clean.attacker, ATTACKER[4])) as bad,
            contextlib.closing(udp(clean.attacker, HARMLESS)) as good,
        ):
            to = (HOST[4] if nat else BYSTANDER[4], PORT)
            install(clean, elements({"ips": [ATTACKER[4]]}))
            bad.sendto(b"bad", to)
            good.sendto(b"good", to)
            assert there.recv(16) == b"good"
            on_host(clean, lambda backend: backend.remove_all())
            bad.sendto(b"bad", to)
            assert there.recv(16) == b"bad"
    finally:
        if nat:
            command("ip", "netns", "exec", clean.host, "nft", "delete", "table", "ip", "nat")


def test_a_full_set_is_refused_with_a_reason_and_changes_nothing(clean: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft_script, "POINTS_MAX", 4)
    four = elements({"ips": [f"203.0.113.{n}" for n in range(4)]})
    fifth = elements({"ips": ["203.0.113.9"]})

    async def fill(backend: NftablesBackend) -> int:
        await backend.rebuild(four, now_ms())
        with pytest.raises(BackendError) as caught:
            await backend.apply(Plan(adds=tuple(fifth)), now_ms())
        assert caught.value.code == "SET_FULL"
        return len((await backend.audit(now_ms())).elements)

    assert on_host(clean, fill) == 4


@pytest.mark.parametrize(
    ("script", "damage"),
    [
        ("insert rule inet cybermesh ingress accept", "the rules of chain ingress are not ours alone"),
        ("add set inet cybermesh mine { type ipv4_addr; }", "the set mine is not ours"),
        ("flush chain inet cybermesh prerouting", "the rules of chain prerouting are not ours alone"),
        ("delete table inet cybermesh", "there is no table inet cybermesh"),
        ("flush ruleset", "there is no table inet cybermesh"),
    ],
)
def test_a_foreign_hand_in_our_table_is_seen(clean: Lab, script: str, damage: str) -> None:
    install(clean, elements({"ips": ["203.0.113.1"]}))
    saved = command("ip", "netns", "exec", clean.host, "nft", "list", "ruleset")
    command("ip", "netns", "exec", clean.host, "nft", "-f", "-", text=script)
    audit = on_host(clean, lambda backend: backend.audit(now_ms()))
    assert damage in audit.damage
    if script == "flush ruleset":
        command("ip", "netns", "exec", clean.host, "nft", "-f", "-", text=OTHERS)
        assert "friends" in saved


AGENT = """
import asyncio, dataclasses, hashlib, sys, time
from pathlib import Path
from cybermesh.enforce.acks import Place
from cybermesh.enforce.backends import BackendError, nft_script
from cybermesh.enforce.backends.nftables import NftablesBackend, open_channel
from cybermesh.enforce.decisions import Mode, Proven
from cybermesh.enforce.enforcer import Enforcer, Ports
from cybermesh.enforce.guard import Protected
from cybermesh.enforce.state import State
from cybermesh.messages import PolicyUpdate
from cybermesh.policy import parse

def now_ms(): return time.time_ns() // 1_000_000

async def main(folder, address, ttl_s):
    state = State(Path(folder) / "agent.sqlite", Mode.ENFORCE)
    def prove(update):
        return Proven(update.policy_id, update.action, update.rule_hash, update.expires_at_ms, 1, 0, 1, now_ms(), "qc")
    ports = Ports(prove, lambda ack: b"ack", Protected, now_ms)
    enforcer = Enforcer(state, NftablesBackend(open_channel()), ports, Place("edge", "agent"))
    await enforcer.open()
    if ttl_s:
        rule = parse({"policy_id": "p", "rule_type": "block", "action": "drop", "target": {"ips": [address]},
                      "guardrails": {"ttl_seconds": ttl_s}}).to_json()
        digest = hashlib.sha256(rule).digest()
        update = PolicyUpdate("p", "add", "block", rule, digest, True, "", 0, 1, 0, bytes(32), bytes(64), bytes(32),
                              decision_seq=1, expires_at_ms=now_ms() + 1_000 * ttl_s)
        (outcome,) = await enforcer.handle([update])
        print(outcome.result, outcome.code, flush=True)
    else:
        print("open", enforcer.status()["rules"], flush=True)
    await enforcer.run(tick_s=0.1, reconcile_s=0.2)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@contextlib.contextmanager
def agent(names: Lab, folder: Path, ttl_s: int) -> Iterator[str]:
    """Run an agent process on the host until the block is left; yield the first thing it says. It is killed, not stopped."""
    words = [
        "ip",
        "netns",
        "exec",
        names.host,
        sys.executable,
        "-c",
        textwrap.dedent(AGENT),
        str(folder),
        ATTACKER[4],
        str(ttl_s),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_ban_ends_by_its_timeout_with_the_agent_dead(clean: Lab, tmp_path: Path) -> None:
    with wire(clean) as line:
        with agent(clean, tmp_path, ttl_s=3) as said:
            assert said == "applied"
            assert (line.passes("attacker"), line.passes("bystander")) == (0, 1)
        assert line.passes("attacker") == 0
        assert eventually(lambda: line.passes("attacker") == 1, within_s=8)


def enforce(names: Lab, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``cybermesh enforce`` on the host, with nothing else of the cluster anywhere."""
    settings = folder / "agent.toml"
    settings.write_text(f'[node]\nstate_dir = "{folder}"\n[enforce]\nbackend = "nftables"\nmode = "enforce"\n')
    program = [sys.executable, "-c", "from cybermesh.cli import main; main()"]
    command_line = ["ip", "netns", "exec", names.host, *program, "enforce", *words, "-c", str(settings)]
    return subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=30)


def test_off_removes_everything_of_ours_and_nothing_else_and_on_brings_it_back(clean: Lab, tmp_path: Path) -> None:
    before = others(clean)
    with wire(clean) as line:
        with agent(clean, tmp_path, ttl_s=60) as said:
            assert said == "applied"
        assert line.passes("attacker") == 0
        done = enforce(clean, tmp_path, "off")
        assert (done.returncode, done.stderr) == (0, "enforcement is off; no rule of ours is left\n")
        assert line.passes("attacker") == 1
        assert "inet cybermesh " not in command("ip", "netns", "exec", clean.host, "nft", "list", "tables")
        assert others(clean) == before
        with agent(clean, tmp_path, ttl_s=0):
            assert line.passes("attacker") == 1
        assert enforce(clean, tmp_path, "on").returncode == 0
        assert line.passes("attacker") == 0
        lifted = enforce(clean, tmp_path, "except", ATTACKER[4], "--for", "1h", "--reason", "test")
        assert lifted.returncode == 0, lifted.stderr
        assert line.passes("attacker") == 1
    assert others(clean) == before


def test_a_wiped_firewall_is_repaired_within_one_reconciliation(clean: Lab, tmp_path: Path) -> None:
    with wire(clean) as line, agent(clean, tmp_path, ttl_s=60):
        command("ip", "netns", "exec", clean.host, "nft", "delete", "table", "inet", "cybermesh")
        assert eventually(lambda: line.passes("attacker") == 0, within_s=5)
