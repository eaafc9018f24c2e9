"""Network namespaces for tests with real packets: a host with an attacker, a bystander and a container on a link each.

Code runs "inside" a namespace in a thread of its own, so that sockets and threads made there belong to it and no process has to
be started for a packet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PORT = 9_000
HOST = {4: "10.77.1.1", 6: "fd77:1::1"}
ATTACKER = {4: "10.77.1.66", 6: "fd77:1::66"}
HARMLESS = "10.77.1.7"  # a neighbour of the attacker, on the same link
BYSTANDER = {4: "10.77.2.5", 6: "fd77:2::5"}
CONTAINER = {4: "10.77.3.8", 6: "fd77:3::8"}
_CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)


def command(*words: str, text: str | None = None) -> str:
    """Run a program to its end; return what it says."""
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Lab:
    """Names of the namespaces."""

    host: str
    attacker: str
    bystander: str
    container: str


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """Make the namespaces, and remove them whatever happens."""
    tag = f"cme{os.getpid() % 100_000}"
    names = Lab(f"{tag}h", f"{tag}a", f"{tag}b", f"{tag}c")
    made: list[str] = []
    try:
        for name in (names.host, names.attacker, names.bystander, names.container):
            command("ip", "netns", "add", name)
            made.append(name)
            command("ip", "-n", name, "link", "set", "lo", "up")
        _link(names.host, names.attacker, "1", ATTACKER)
        _link(names.host, names.bystander, "2", BYSTANDER)
        _link(names.host, names.container, "3", CONTAINER)
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@contextlib.contextmanager
def bare() -> Iterator[str]:
    """Make one namespace with nothing but loopback, and remove it whatever happens."""
    name = f"cme{os.getpid() % 100_000}n"
    command("ip", "netns", "add", name)
    try:
        command("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def _link(host: str, other: str, network: str, addresses: dict[int, str]) -> None:
    near, far = f"to{network}", "eth0"
    command("ip", "link", "add", near, "netns", host, "type", "veth", "peer", "name", far, "netns", other)
    pairs = (
        (host, near, f"10.77.{network}.1/24", f"fd77:{network}::1/64"),
        (other, far, f"{addresses[4]}/24", f"{addresses[6]}/64"),
    )
    for name, device, v4, v6 in pairs:
        command("ip", "-n", name, "addr", "add", v4, "dev", device)
        command("ip", "-n", name, "addr", "add", v6, "dev", device, "nodad")
        command("ip", "-n", name, "link", "set", device, "up")
    if network == "1":
        command("ip", "-n", other, "addr", "add", f"{HARMLESS}/24", "dev", far)
    command("ip", "-n", other, "route", "add", "default", "via", f"10.77.{network}.1")
    command("ip", "-n", other, "-6", "route", "add", "default", "via", f"fd77:{network}::1")


def inside(name: str, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that lives in the namespace; return or raise what it does."""

    def enter() -> T:
        with Path(f"/run/netns/{name}").open("rb") as handle:
            if _libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {name}")
        return work()

    with concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"inside-{name}") as threads:
        return threads.submit(enter).result()


def udp(name: str, address: str = "", port: int = 0) -> socket.socket:
    """Return a UDP socket in a namespace, bound if an address is given."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(5)
        made.bind((address, port))
        return made

    return inside(name, make)


def eventually(holds: Callable[[], bool], within_s: float) -> bool:
    """Ask until it holds or the time is up; kernel timers are not ours to advance."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Wire:
    """Datagrams from the attacker and the bystander to a port of the host, in one address family."""

    def __init__(self, names: Lab, version: int = 4, port: int = PORT) -> None:
        self.to = (HOST[version], port)
        any_address = "0.0.0.0" if version == 4 else "::"
        self.listening = udp(names.host, any_address, port)
        self.sockets = {
            "attacker": udp(names.attacker, ATTACKER[version]),
            "bystander": udp(names.bystander, BYSTANDER[version]),
        }

    def passes(self, who: str, count: int = 1) -> int:
        """Send ``count`` datagrams; return how many arrive, which a bystander's datagram sent afterwards tells for sure."""
        for _ in range(count):
            self.sockets[who].sendto(b"x", self.to)
        self.sockets["bystander"].sendto(b"end", self.to)
        arrived = 0
        while self.listening.recv(16) != b"end":
            arrived += 1
        return arrived

    def close(self) -> None:
        """Close the sockets."""
        for opened in (self.listening, *self.sockets.values()):
            opened.close()
