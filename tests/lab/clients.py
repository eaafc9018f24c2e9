"""What the bystanders do: browsing, look-ups, logins, a download, pings. Bounded lists of commands, paced by a seed.

Each client works through its own list in its own thread while the attacks run. Every command has to succeed: a recording in
which a bystander was not served would label as benign what is the attack's damage.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lab.network import DOMAIN, Lab
from tests.lab.servers import ssh_command

NEEDED = ("curl", "dig", "ping")

_WWW = f"http://www.{DOMAIN}"
_ASSETS = ("style.css", "app.js", "logo.svg", "photo.jpg")


@dataclass(frozen=True, slots=True)
class Errand:
    """One command of a client, and the pause after it."""

    command: tuple[str, ...]
    pause_s: float
    timeout_s: float = 15.0


Script = Callable[[Lab, random.Random, int], list[Errand]]


def browse(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """Pages with what belongs to them over one connection, and single requests over short ones."""
    errands = []
    for _ in range(rounds):
        page = [rng.choice(("index.html", "news.html")), *rng.sample(_ASSETS[:3], 2)]
        if rng.random() < 0.2:
            page.append("photo.jpg")
        errands.append(Errand(_fetch(*page), rng.uniform(0.8, 2.0)))
        errands.append(Errand(_fetch(rng.choice(("logo.svg", "index.html"))), rng.uniform(0.5, 1.5)))
    return errands


def look_around(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """Pages over IPv6, names of several types (some do not exist), pings."""
    errands = []
    for number in range(rounds):
        errands.append(Errand(_fetch("news.html", "style.css", family=6), rng.uniform(0.5, 1.2)))
        name = rng.choice(("www", "git", "shop", "ns", "printer", f"h{rng.randrange(100, 130)}"))
        errands.append(Errand(_dig(lab, f"{name}.{DOMAIN}", rng.choice(("A", "AAAA"))), rng.uniform(0.2, 0.8)))
        errands.append(Errand(_dig(lab, DOMAIN, rng.choice(("MX", "TXT"))), rng.uniform(0.3, 0.9)))
        if number % 3 == 0:
            family = rng.choice((4, 6))
            target = lab.address_of("server", family)
            errands.append(Errand(("ping", "-n", "-q", "-c", "3", "-i", "0.3", target), rng.uniform(0.2, 0.6)))
    return errands


def work(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """Logins by key, a download at a modest rate, a few pages."""
    shell = "for i in 1 2 3 4; do date; uptime -p; sleep 0.4; done"
    download = ("curl", "-sSf", "--limit-rate", "200k", "-o", "/dev/null", f"{_WWW}/update.bin")
    errands = [Errand(_fetch("index.html", "style.css"), 0.5), Errand(tuple(ssh_command(lab, shell)), rng.uniform(1.0, 2.0))]
    errands.append(Errand(download, rng.uniform(0.5, 1.5)))
    for _ in range(rounds):
        errands.append(Errand(_fetch(rng.choice(("index.html", "news.html"))), rng.uniform(0.8, 2.0)))
        errands.append(Errand(_fetch("index.html", "logo.svg"), rng.uniform(0.8, 1.6)))
    errands.append(Errand(tuple(ssh_command(lab, shell)), 0.2))
    return errands


def crowd(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """Bursts of many page loads at once, as from a proxy or a load test: much traffic, no attack."""
    burst = ("ab", "-q", "-n", "300", "-c", "50", f"{_WWW}/logo.svg")
    return [Errand(burst, rng.uniform(1.0, 3.0)) for _ in range(rounds)]


def monitor(lab: Lab, rng: random.Random, rounds: int) -> list[Errand]:
    """A monitoring host that asks ssh, web, DNS and the host itself every second: short, regular, and never logged in."""
    server = lab["server"].ipv4
    probes: tuple[tuple[str, ...], ...] = (
        ("ssh-keyscan", "-T", "5", "-t", "ed25519", server),
        ("curl", "-sSf", "--head", "-o", "/dev/null", f"http://{server}/"),
        _dig(lab, f"www.{DOMAIN}", "A"),
        ("ping", "-n", "-q", "-c", "1", server),
    )
    return [Errand(probe, 0.25) for _ in range(rounds) for probe in probes]


@contextmanager
def busy_clients(lab: Lab, *, seed: int, scripts: Mapping[str, tuple[Script, int]]) -> Iterator[threading.Event]:
    """Let each client of ``scripts`` work, so many rounds of its script, while the context lasts; at its end wait for them.

    The event is set as soon as something failed, so that nobody waits for a recording that is lost.

    Raises:
        LabError: one of their commands failed.
    """
    stop = threading.Event()
    done: list[Future[None]] = []
    with ThreadPoolExecutor(max_workers=max(1, len(scripts)), thread_name_prefix="client") as pool:
        try:
            for name, (script, rounds) in scripts.items():
                errands = script(lab, random.Random(f"{seed}/{name}"), rounds)
                done.append(pool.submit(_work_through, lab, name, errands, stop))
            yield stop
        except BaseException:
            stop.set()
            raise
    for future in done:
        future.result()


def _work_through(lab: Lab, name: str, errands: Sequence[Errand], stop: threading.Event) -> None:
    try:
        for errand in errands:
            lab.run(name, errand.command, timeout_s=errand.timeout_s)
            if stop.wait(errand.pause_s):
                return
    except BaseException:
        stop.set()
        raise


def _fetch(*names: str, family: int = 4) -> tuple[str, ...]:
    parts = [part for name in names for part in ("-o", "/dev/null", f"{_WWW}/{name}")]
    return ("curl", "-sSf", f"-{family}", "--max-time", "10", *parts)


def _dig(lab: Lab, name: str, kind: str) -> tuple[str, ...]:
    return ("dig", "+short", "+time=2", "+tries=2", f"@{lab['server'].ipv4}", name, kind)
