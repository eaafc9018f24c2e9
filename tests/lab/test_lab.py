"""The lab does what its labels say, and leaves nothing behind.

The namespaces, the servers and the tools are real; without root or one of the tools, what needs them is skipped by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.conftest import ROOT, skip_or_fail
from tests.lab import labels
from tests.lab.attacks import carry_out, scan
from tests.lab.capture import ACK, RST, SYN, TCP, Packet, packets, recording
from tests.lab.network import HOSTS, Lab, LabError, missing_tools, wait_until
from tests.lab.record import refuse_names
from tests.lab.scenarios import SCENARIOS
from tests.lab.servers import serve

DEMO = ROOT / "cybermesh" / "data" / "demo.pcap"
FEW = tuple(host for host in HOSTS if host.name in {"server", "office2", "attacker"})
PORTS = 100


@pytest.fixture
def tools(netns: None) -> None:
    """Everything the small recording needs is installed."""
    if missing := missing_tools({"nmap", "tcpdump", "curl", *SCENARIOS["benign"].needed()}):
        skip_or_fail("netns", f"not installed: {', '.join(missing)}")


def _left_by(pid: int) -> list[str]:
    """Namespaces, directories and processes that still carry the name of a lab of process ``pid``."""
    mark = f"cmlab-{pid}-"
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split("\n")
    left = [name for name in listed if name.startswith(mark)]
    left += [str(path) for path in Path(tempfile.gettempdir()).glob(f"{mark}*")]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if mark in command:
            left.append(command)
    return left


def _own_network() -> set[str]:
    """The machine's own interfaces and routes, which no lab may change."""
    commands = (["ip", "-o", "link"], ["ip", "route", "show", "table", "all"], ["ip", "-6", "route", "show", "table", "all"])
    shown = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]
    return {line for text in shown for line in text.splitlines() if "expires" not in line}


@pytest.mark.netns
def test_a_small_lab_records_a_labelled_scan_and_a_bystander_and_leaves_nothing(tools: None, tmp_path: Path) -> None:
    before = _own_network()
    path = tmp_path / "small.pcap"
    with Lab(FEW) as lab:
        serve(lab)
        with recording(lab, path):
            lab.run("office2", ["curl", "-sSf", "-6", "-o", "/dev/null", "http://www.lab.test/news.html"], timeout_s=10)
            truth = carry_out(lab, scan(lab, flags=("-sS", "--top-ports", str(PORTS))))
            lab.run("office2", ["curl", "-sSf", "-4", "-o", "/dev/null", "http://www.lab.test/"], timeout_s=10)
        described = json.loads(json.dumps(labels.describe(lab, path, [truth], scenario="small", snaplen=160)))
        attacker, server = lab["attacker"].ipv4, lab["server"].ipv4
        bystander = lab.address_of("office2", 6)

    assert _left_by(os.getpid()) == []
    assert before <= _own_network()
    assert not [
        line for line in _own_network() - before if any(mark in line for mark in ("to-", "10.77.", "203.0.113.", "fd77:"))
    ]

    recorded = list(packets(path))
    probed = {packet.dport for packet in recorded if (packet.src, packet.dst, packet.flags) == (attacker, server, SYN)}
    opened = {packet.sport for packet in recorded if (packet.src, packet.dst, packet.flags) == (server, attacker, SYN | ACK)}
    assert len(probed) == PORTS
    assert opened == {22, 53, 80}
    assert any(b"GET /news.html" in packet.payload for packet in recorded if packet.src == bystander)
    served = sum(packet.wire for packet in recorded if packet.dst == bystander and packet.protocol == TCP)
    assert served > 11_000  # the wire length, not what the snap length left of it
    assert all(packet.wire <= 1_514 for packet in recorded)

    (attack,) = described["attacks"]
    own = [packet.ts_us for packet in recorded if packet.src == attacker]
    assert (attack["type"], attack["sources"], attack["victims"], attack["port"]) == ("port_scan", [attacker], [server], None)
    assert (attack["first_us"], attack["last_us"], attack["flows"]) == (min(own), max(own), PORTS)
    assert bystander in described["never_block"]
    assert attacker not in described["never_block"]


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_recording_removes_everything(tools: None, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.lab.record", "--out", str(tmp_path), "--scenario", "benign"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any("tcpdump" in line for line in _left_by(process.pid)), "the recording to begin")
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert _left_by(process.pid) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.netns
def test_the_next_lab_sweeps_up_after_a_killed_one(tools: None) -> None:
    script = "import sys; from tests.lab.network import Lab\nwith Lab(()) as lab: print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
    assert _left_by(process.pid) != []
    with Lab(()):
        assert _left_by(process.pid) == []


@pytest.mark.netns
def test_a_command_that_fails_or_hangs_is_an_error_that_names_it(netns: None) -> None:
    with Lab(()) as lab:
        with pytest.raises(LabError, match="router: sh -c exit 3: exit 3"):
            lab.run("router", ["sh", "-c", "exit 3"], timeout_s=5)
        with pytest.raises(LabError, match="not done after"):
            lab.run("router", ["tail", "-f", "/dev/null"], timeout_s=0.2)
        assert lab.run("router", ["hostname"], timeout_s=5).stdout == "router\n"


def test_a_forged_innocents_own_connection_is_not_part_of_the_flood() -> None:
    innocent, server = "203.0.113.25", "10.77.1.10"
    truth = labels.Truth(
        "flood", "ddos", "syn_flood", "tool", "command", (innocent, "203.0.113.140"), (server,), "tcp", 80, True, 1_000, 9_000
    )

    def packet(ts_us: int, src: str, sport: int, dst: str, dport: int, flags: int) -> Packet:
        return Packet(ts_us, src, dst, TCP, sport, dport, flags, 60, b"")

    recorded = [
        packet(1_000, innocent, 5_000, server, 80, SYN),  # forged: the innocent's own host knows nothing of it
        packet(1_001, server, 80, innocent, 5_000, SYN | ACK),
        packet(1_002, innocent, 5_000, server, 80, RST),
        packet(1_003, innocent, 6_000, server, 80, SYN),  # its own
        packet(1_004, server, 80, innocent, 6_000, SYN | ACK),
        packet(1_005, innocent, 6_000, server, 80, ACK),
        packet(1_006, innocent, 7_000, server, 22, SYN),  # another port
        packet(999, innocent, 8_000, server, 80, SYN),  # before the flood
    ]
    names = labels.attribute(recorded, [truth])
    assert names == ["flood"] * 3 + ["benign"] * 5
    assert labels.flow_labels(recorded, names) == {"flood": 1, "benign": 3}


def test_the_shipped_capture_is_what_its_labels_say() -> None:
    described = json.loads(DEMO.with_name("demo.labels.json").read_text())
    recorded = list(packets(DEMO))
    assert hashlib.sha256(DEMO.read_bytes()).hexdigest() == described["capture_sha256"]
    assert DEMO.stat().st_size <= 2_000_000
    assert (len(recorded), recorded[0].ts_us, recorded[-1].ts_us) == tuple(
        described[key] for key in ("packets", "first_us", "last_us")
    )
    assert sorted(attack["type"] for attack in described["attacks"]) == ["brute_force", "ddos", "port_scan"]
    for attack in described["attacks"]:
        own = [
            packet
            for packet in recorded
            if packet.src in attack["sources"] and packet.dst in attack["victims"] and attack["port"] in {None, packet.dport}
        ]
        inside = [packet for packet in own if attack["first_us"] <= packet.ts_us <= attack["last_us"]]
        # Of its sources' packets at most a straggler may lie outside: a flood has no excuse to go on.
        assert len(inside) >= 0.3 * attack["packets"], attack["name"]
        assert {attack["first_us"], attack["last_us"]} <= {packet.ts_us for packet in own}, attack["name"]
    sources = {source for attack in described["attacks"] for source in attack["sources"]}
    assert not sources & set(described["never_block"])
    assert set(described["benign"]) <= set(described["never_block"])
    assert set(described["benign"]) <= {packet.src for packet in recorded}


def test_the_shipped_capture_holds_test_addresses_only_and_no_name_of_this_machine() -> None:
    described = json.loads(DEMO.with_name("demo.labels.json").read_text())
    allowed = [ip_network(text) for key in ("protected", "outside") for text in described["networks"][key]]
    allowed += [ip_network("fe80::/10"), ip_network("ff02::/16"), ip_network("::/128")]
    addresses = {ip_address(address) for packet in packets(DEMO) for address in (packet.src, packet.dst)}
    assert [address for address in addresses if not any(address in network for network in allowed)] == []
    refuse_names(DEMO)


def test_a_capture_that_spells_the_machines_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under this name the shipped capture would betray its machine: it is in every request's Host line.
    monkeypatch.setattr(socket, "gethostname", lambda: "www")
    with pytest.raises(LabError, match="www"):
        refuse_names(DEMO)


def test_a_capture_that_ends_within_a_record_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.pcap"
    cut.write_bytes(DEMO.read_bytes()[:-1])
    with pytest.raises(LabError, match="ends within a record"):
        list(packets(cut))
