"""Hosts in network namespaces around one router, and commands run inside them.

Every host hangs on its own veth link to the router, with host routes in place of shared segments: that needs no bridge, and
the router (where a sensor or an agent lives) sees every packet between two hosts. Links are made inside the namespaces, so the
machine's own namespace never holds one. A command also gets its own mounts and its own host name: the lab's resolver, an empty
``/run`` and an empty ``/var/log``; no name of the machine can reach the wire and no login record of the machine is written.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

Role = Literal["attacker", "server", "client"]

ROUTER = "router"
DOMAIN = "lab.test"  # .test is reserved for this, RFC 6761
PROTECTED = ("10.77.0.0/16", "fd77::/32")
OUTSIDE = ("203.0.113.0/24",)  # TEST-NET-3, RFC 5737
NEEDED = ("ip", "unshare", "ethtool")

_PREFIX = "cmlab"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-\S*")
_RUNS = itertools.count()
_KILL_AFTER_S = 3.0
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "USER": "root"}


class LabError(Exception):
    """The lab could not be built, a command in it failed, or something was left behind."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One host to build: its name (at most 12 characters), its role and its addresses."""

    name: str
    role: Role
    ipv4: str
    ipv6: str | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """One built host: where it is and how the router reaches it."""

    name: str
    role: Role | Literal["router"]
    namespace: str
    addresses: tuple[str, ...]
    directory: Path
    tap: str | None  # the router's interface towards this host; None for the router itself

    @property
    def ipv4(self) -> str:
        """The host's IPv4 address."""
        return self.addresses[0]


# The customer shares the attacker's /24: whoever blocks more than the guilty address hurts a bystander.
HOSTS = (
    HostSpec("server", "server", "10.77.1.10", "fd77:0:1::10"),
    HostSpec("office1", "client", "10.77.2.21"),
    HostSpec("office2", "client", "10.77.2.22", "fd77:0:2::22"),
    HostSpec("customer", "client", "203.0.113.25"),
    HostSpec("attacker", "attacker", "203.0.113.66"),
)

# After "ip netns exec" the mounts are private to the process already; $1 is the lab's directory, $2 the host's name.
_ENTER = """\
set -e
lab=$1 name=$2; shift 2
hostname "$name" 2>/dev/null || echo "$name" > /proc/sys/kernel/hostname
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/log
mkdir -p /run/sshd
for file in resolv.conf hosts nsswitch.conf; do
    target=$(readlink -m "/etc/$file")
    case $target in /run/*) mkdir -p "$(dirname "$target")"; touch "$target";; esac
    [ ! -e "$target" ] || mount --bind "$lab/$file" "$target"
done
exec "$@"
"""


class Lab:
    """A router and hosts around it, while the context lasts.

    ``with Lab() as lab: lab.run("attacker", ["ping", "-c", "1", lab["server"].ipv4], timeout_s=5)``. Needs root. Leaving the
    context ends every process inside the namespaces by its id, deletes the namespaces and the directory.
    """

    def __init__(self, specs: Sequence[HostSpec] = HOSTS) -> None:
        self._specs = tuple(specs)
        self._run_name = f"{_PREFIX}-{os.getpid()}-{next(_RUNS)}"
        self._hosts: dict[str, Host] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._undo = ExitStack()
        self.directory = Path()

    def __enter__(self) -> Self:
        sweep()
        with ExitStack() as undo:
            self._undo = undo
            self._build()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @property
    def router(self) -> Host:
        """The router, where packets are recorded and a firewall agent may live."""
        return self._hosts[ROUTER]

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All hosts but the router."""
        return tuple(host for host in self._hosts.values() if host.name != ROUTER)

    def address_of(self, name: str, family: int = 4) -> str:
        """The address of host ``name`` in ``family`` (4 or 6)."""
        kind = IPv4Address if family == 4 else IPv6Address
        for address in self._hosts[name].addresses:
            with suppress(ValueError):
                return str(kind(address))
        raise LabError(f"{name} has no IPv{family} address")

    def argv(self, host: str, command: Sequence[str]) -> list[str]:
        """``command`` as it has to be started to run on ``host``; the process then *is* the command (everything execs)."""
        namespace = self._hosts[host].namespace
        wrapped = ["ip", "netns", "exec", namespace, "unshare", "--uts"]
        return [*wrapped, "sh", str(self.directory / "enter"), str(self.directory), host, *command]

    def run(
        self, host: str, command: Sequence[str], *, timeout_s: float, ok: Collection[int] = (0,)
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` on ``host`` and return its output.

        Raises:
            LabError: it took longer than ``timeout_s`` (and was killed) or ended with a code that is not in ``ok``.
        """
        try:
            done = subprocess.run(
                self.argv(host, command),
                cwd=self._hosts[host].directory,
                env={**_ENVIRONMENT, "HOME": str(self._hosts[host].directory)},
                capture_output=True,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{host}: {' '.join(command)}: not done after {timeout_s} s") from error
        if done.returncode not in ok:
            raise LabError(f"{host}: {' '.join(command)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def start(self, host: str, command: Sequence[str], *, log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        """Start ``command`` on ``host`` in the background, output to ``log``; it ends with the lab at the latest."""
        process = subprocess.Popen(
            self.argv(host, command),
            cwd=self._hosts[host].directory,
            env={**_ENVIRONMENT, "HOME": str(self._hosts[host].directory)},
            stdin=subprocess.DEVNULL,
            stdout=log or subprocess.DEVNULL,
            stderr=log or subprocess.DEVNULL,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def _build(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self._run_name}-"))
        self._undo.callback(_remove, self.directory)
        self.directory.chmod(0o755)  # the web server's worker is not root and reads its pages here
        self._write_identity()
        self._undo.callback(self._reap)
        self._add_host(ROUTER, "router", ())
        _set_kernel(self.router.namespace, "ipv4/ip_forward", "1")
        _set_kernel(self.router.namespace, "ipv6/conf/all/forwarding", "1")
        for spec in self._specs:
            self._add_host(spec.name, spec.role, tuple(a for a in (spec.ipv4, spec.ipv6) if a is not None))
        links = [_connect(self.router, host, number) for number, host in enumerate(self.hosts, start=16)]
        addresses = tuple(dict.fromkeys(itertools.chain(*links)))
        self._hosts[ROUTER] = replace(self.router, addresses=addresses)

    def _write_identity(self) -> None:
        nameserver = next((spec.ipv4 for spec in self._specs if spec.role == "server"), "127.0.0.1")
        (self.directory / "enter").write_text(_ENTER)
        (self.directory / "resolv.conf").write_text(f"search {DOMAIN}\nnameserver {nameserver}\noptions timeout:2 attempts:2\n")
        (self.directory / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        (self.directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n")

    def _add_host(self, name: str, role: Role | Literal["router"], addresses: tuple[str, ...]) -> None:
        namespace = f"{self._run_name}-{name}"
        _ip("netns", "add", namespace)
        self._undo.callback(_delete_namespace, namespace)
        directory = self.directory / name
        directory.mkdir()
        for scope in ("all", "default"):
            _set_kernel(namespace, f"ipv4/conf/{scope}/rp_filter", "0")  # forged sources have to get through
            _set_kernel(namespace, f"ipv6/conf/{scope}/accept_dad", "0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        self._hosts[name] = Host(name, role, namespace, addresses, directory, None if role == "router" else f"to-{name}")

    def _reap(self) -> None:
        # Runs after every namespace's processes were ended, so no wait is long.
        for process in self._started:
            process.wait(timeout=_KILL_AFTER_S)


def sweep() -> None:
    """Remove what runs left behind whose process was killed before it could clean up."""
    for namespace in _ip("netns", "list").split("\n"):
        if (owner := _NAME.match(namespace)) and not Path("/proc", owner[1]).exists():
            _delete_namespace(owner[0])
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}-*"):
        if (owner := _NAME.match(directory.name)) and not Path("/proc", owner[1]).exists():
            _remove(directory)


def missing_tools(tools: Collection[str]) -> list[str]:
    """Those of ``tools`` that are not installed, in order."""
    return sorted(tool for tool in {*NEEDED, *tools} if shutil.which(tool, path=_ENVIRONMENT["PATH"]) is None)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for another process to make ``condition`` true, and fail loudly when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not after {timeout_s} s")
        time.sleep(0.02)


def _connect(router: Host, host: Host, number: int) -> list[str]:
    """Lay the link between router and host; return the router's addresses on it. MAC addresses follow from ``number``."""
    assert host.tap is not None
    rules = [f"link add {host.tap} address 02:00:00:00:00:{number:02x} type veth peer name eth0 netns {host.namespace}"]
    inside = [f"link set eth0 address 02:00:00:00:01:{number:02x}", "link set eth0 up"]
    rules.append(f"link set {host.tap} up")
    gateways = []
    for address in host.addresses:
        network = ip_network(f"{address}/{24 if '.' in address else 64}", strict=False)
        bits, gateway, everything = network.max_prefixlen, str(network[1]), "0.0.0.0/0" if network.version == 4 else "::/0"
        nodad = "" if network.version == 4 else " nodad"
        rules += [f"addr add {gateway}/{bits} dev {host.tap}{nodad}", f"route add {address}/{bits} dev {host.tap}"]
        # What answers a forged source has to vanish, as it does on the Internet, and not come back as "unreachable".
        rules += [f"route replace blackhole {network}", f"route replace blackhole {everything}"]
        inside += [f"addr add {address}/{bits} dev eth0{nodad}", f"route add {gateway}/{bits} dev eth0"]
        inside.append(f"route add {everything} via {gateway} dev eth0")
        gateways.append(gateway)
    _ip("-n", router.namespace, "-batch", "-", lines=rules)
    _ip("-n", host.namespace, "-batch", "-", lines=inside)
    # Without this the kernel hands over unfinished checksums and segments of 64 kB, which no wire ever carries.
    for namespace, interface in ((router.namespace, host.tap), (host.namespace, "eth0")):
        _ip("netns", "exec", namespace, "ethtool", "-K", interface, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
    return gateways


def _ip(*arguments: str, lines: Sequence[str] = ()) -> str:
    done = subprocess.run(["ip", *arguments], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _set_kernel(namespace: str, key: str, value: str) -> None:
    _ip("netns", "exec", namespace, "sh", "-c", f"echo {value} > /proc/sys/net/{key}")


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def _delete_namespace(namespace: str) -> None:
    # Whatever runs in this namespace was started by a lab: nobody else knows its name.
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _pids(namespace):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + _KILL_AFTER_S
        while _pids(namespace) and time.monotonic() < deadline:
            time.sleep(0.02)
    _ip("netns", "delete", namespace)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory)
