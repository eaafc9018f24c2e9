"""What is recorded together: which attacks at which second, and how long the bystanders keep going.

``demo`` is the capture that ships with the project. The others show one attack each, or none: material for the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.lab import clients, servers
from tests.lab.attacks import Plan, flood, guess_passwords, scan
from tests.lab.clients import Script, browse, crowd, look_around, monitor, work
from tests.lab.network import Lab

Clients = Mapping[str, tuple[Script, int]]


def _clients(browsing: int, looking: int, working: int) -> Clients:
    return {"office1": (browse, browsing), "office2": (look_around, looking), "customer": (work, working)}


@dataclass(frozen=True, slots=True)
class Act:
    """An attack and when it begins, in seconds after the bystanders began."""

    at_s: float
    plan: Callable[[Lab], Plan]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Attacks in order of time among busy clients; ``tools`` are the programs that not every scenario needs."""

    acts: tuple[Act, ...]
    clients: Clients = field(default_factory=lambda: _clients(3, 4, 2))
    extra_servers: tuple[Callable[[Lab], None], ...] = ()
    tools: tuple[str, ...] = ()

    def needed(self) -> set[str]:
        """Every program that has to be installed."""
        return {"tcpdump", *servers.NEEDED, *clients.NEEDED, *self.tools}


def _one(plan: Callable[[Lab], Plan], tool: str) -> Scenario:
    return Scenario((Act(2.0, plan),), tools=(tool,))


DEMO = Scenario(
    (Act(5.0, scan), Act(11.0, guess_passwords), Act(20.0, flood)),
    clients=_clients(13, 11, 8),
    tools=("nmap", "medusa", "hping3"),
)

SCENARIOS = {
    "demo": DEMO,
    "benign": Scenario((), clients=_clients(8, 8, 5)),
    "benign-busy": Scenario(
        (), clients={"office1": (crowd, 6), "office2": (monitor, 15), "customer": (work, 5)}, tools=("ab", "ssh-keyscan")
    ),
    "connect-scan": _one(lambda lab: scan(lab, technique="connect_scan", flags=("-sT", "--top-ports", "200")), "nmap"),
    "fin-scan": _one(lambda lab: scan(lab, technique="fin_scan", flags=("-sF", "--top-ports", "200")), "nmap"),
    "udp-scan": _one(lambda lab: scan(lab, technique="udp_scan", flags=("-sU", "--top-ports", "60")), "nmap"),
    "sweep": _one(
        lambda lab: scan(lab, technique="sweep", flags=("-sS", "-F"), victims=("server", "office1", "office2")), "nmap"
    ),
    "ssh-guesses-slow": _one(lambda lab: guess_passwords(lab, tasks=1, users=4), "medusa"),
    "ftp-guesses": Scenario(
        (Act(2.0, lambda lab: guess_passwords(lab, service="ftp", tasks=8, users=4)),),
        extra_servers=(servers.serve_ftp,),
        tools=("medusa", "vsftpd"),
    ),
    "syn-flood-own": _one(lambda lab: flood(lab, forged=(), packets_each=3_000, interval_us=700), "hping3"),
    # The innocent customer's own address is among the forged ones: nobody may be blocked for this flood.
    "syn-flood-innocent": _one(lambda lab: flood(lab, forged=("203.0.113.25", "203.0.113.140", "203.0.113.141")), "hping3"),
    "udp-flood": _one(lambda lab: flood(lab, technique="udp_flood"), "hping3"),
    "icmp-flood": _one(
        lambda lab: flood(lab, technique="icmp_flood", forged=(), packets_each=3_000, interval_us=700), "hping3"
    ),
}
