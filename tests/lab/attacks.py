"""The attacks: real tools with a bounded number of packets or tries, and the truth about each.

An attack runs to its end; what it cannot do in ``timeout_s`` is a failure of the recording, not a shorter attack.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from tests.lab.labels import Truth
from tests.lab.network import Lab

Protocol = Literal["tcp", "udp", "icmp", "ip"]  # ip: any

ATTACKER = "attacker"
VICTIM = "server"
# Forged addresses lie in the attacker's own network, beside an innocent customer's.
FORGED = tuple(f"203.0.113.{number}" for number in range(100, 132))

USERS = (
    *("admin", "administrator", "backup", "deploy", "ftp", "git", "guest", "jenkins"),
    *("mysql", "oracle", "pi", "postgres", "support", "test", "ubuntu", "user"),
)
PASSWORDS = ("123456", "12345678", "admin", "changeme", "letmein", "password", "qwerty", "secret", "test", "welcome1")

# hping3 ends with 1 when nothing came back to it, which is what forging a source means.
_NO_ANSWER = (0, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """One attack to carry out: commands that run at the same time on the attacker, and what they amount to."""

    name: str
    type: Literal["port_scan", "brute_force", "ddos", "dos", "web_attack", "dns_tunnel", "exfiltration", "botnet"]
    technique: str
    commands: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...]
    victims: tuple[str, ...]
    protocol: Protocol
    port: int | None
    timeout_s: float
    ok: tuple[int, ...] = (0,)
    spoofed: bool = False
    host: str = ATTACKER  # where the commands run
    visible_s: float = 0.0  # after its first packet, until it differs from what innocents do


@dataclass(frozen=True, slots=True)
class _Flood:
    options: tuple[str, ...]
    protocol: Protocol
    port: int | None


_FLOODS = {
    "syn_flood": _Flood(("-S", "-p", "80"), "tcp", 80),
    "udp_flood": _Flood(("--udp", "-p", "53", "-d", "64"), "udp", 53),
    "icmp_flood": _Flood(("--icmp", "-d", "56"), "icmp", None),
}


def carry_out(lab: Lab, plan: Plan) -> Truth:
    """Run ``plan`` from the attacker and return the truth about it, with the times at which its tools ran."""
    began_us = time.time_ns() // 1_000

    def run(command: Sequence[str]) -> None:
        lab.run(plan.host, command, timeout_s=plan.timeout_s, ok=plan.ok)

    with ThreadPoolExecutor(max_workers=len(plan.commands)) as pool:
        list(pool.map(run, plan.commands))
    shown = shlex.join(plan.commands[0])
    return Truth(
        name=plan.name,
        type=plan.type,
        technique=plan.technique,
        tool=version(plan.commands[0][0]),
        command=shown if len(plan.commands) == 1 else f"{shown} (and {len(plan.commands) - 1} more like it)",
        sources=plan.sources,
        victims=plan.victims,
        protocol=plan.protocol,
        port=plan.port,
        spoofed=plan.spoofed,
        began_us=began_us,
        ended_us=time.time_ns() // 1_000,
    )


def scan(
    lab: Lab,
    *,
    technique: str = "syn_scan",
    flags: Sequence[str] = ("-sS", "--top-ports", "1000"),
    victims: Sequence[str] = (VICTIM,),
) -> Plan:
    """nmap against ``victims``, at most 500 probes a second."""
    targets = tuple(lab[name].ipv4 for name in victims)
    # -Pn: an office machine that answers no ping is scanned all the same.
    command = ("nmap", "-n", "-Pn", "-T4", "--max-rate", "500", "--max-retries", "1", "--host-timeout", "20s", *flags, *targets)
    protocol: Protocol = "udp" if "-sU" in flags else "tcp"
    sources = (lab[ATTACKER].ipv4,)
    return Plan(technique.replace("_", "-"), "port_scan", technique, (command,), sources, targets, protocol, None, 25.0)


def guess_passwords(lab: Lab, *, service: Literal["ssh", "ftp"] = "ssh", tasks: int = 4, users: int = len(USERS)) -> Plan:
    """medusa with a short list of names and passwords, none of them right.

    Not hydra: version 9.4 waits for ever for one of its own tasks in about every tenth run of this kind.
    """
    directory = lab[ATTACKER].directory
    (directory / "users").write_text("\n".join(USERS[:users]) + "\n")
    (directory / "passwords").write_text("\n".join(PASSWORDS) + "\n")
    victim = lab[VICTIM].ipv4
    command = ("medusa", "-b", "-h", victim, "-U", "users", "-P", "passwords", "-M", service, "-t", str(tasks))
    port = {"ssh": 22, "ftp": 21}[service]
    sources = (lab[ATTACKER].ipv4,)
    return Plan(f"{service}-guesses", "brute_force", "brute_force", (command,), sources, (victim,), "tcp", port, 30.0)


def flood(
    lab: Lab,
    *,
    technique: Literal["syn_flood", "udp_flood", "icmp_flood"] = "syn_flood",
    forged: Sequence[str] = FORGED,
    packets_each: int = 110,
    interval_us: int = 20_000,
) -> Plan:
    """hping3 against the web server: ``packets_each`` from each of ``forged``, or from the attacker itself when there is none.

    Many sources make it a ddos, one a dos.
    """
    kind = _FLOODS[technique]
    victim = lab[VICTIM].ipv4
    limits = ("-q", "-n", "-c", str(packets_each), "-i", f"u{interval_us}")
    forms: list[tuple[str, ...]] = [("-a", address) for address in forged] or [()]
    return Plan(
        technique.replace("_", "-"),
        "ddos" if len(forged) > 1 else "dos",
        technique,
        tuple(("hping3", *kind.options, *limits, *form, victim) for form in forms),
        tuple(forged) or (lab[ATTACKER].ipv4,),
        (victim,),
        kind.protocol,
        kind.port,
        20.0,
        _NO_ANSWER,
        bool(forged),
    )


def version(tool: str) -> str:
    """Name and version of an attack tool, as Debian calls it."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}", tool]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() or tool
