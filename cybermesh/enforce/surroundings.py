"""What this host must never cut itself off from, read from the system: own addresses, gateways, resolvers, sessions.

The guard asks for this before every batch of new rules. Login records are asked for sessions, not connections: who merely
guesses passwords is connected too. A source that cannot be read is a problem, and with a problem the guard refuses everything
new; a source that the system does not have (no IPv6, no resolver configured) is not.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cybermesh.addresses import AddressError, Network, host, parse_address
from cybermesh.enforce.guard import Protected

Found = Iterator[tuple[str, Network]]

# struct utmp of glibc on Linux; 384 bytes on every 64-bit platform, times are 32 bits wide there.
_UTMP: Final = struct.Struct("=hxxi32s4s32s256shhiii16s20x")
_USER_PROCESS: Final = 7
_ROUTE_GATEWAY: Final = 0x2


class SourceError(Exception):
    """A source of the surroundings exists and makes no sense; the message names it."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the system keeps what is read; another root is for tests."""

    root: Path = Path("/")
    sessions_required: bool = True

    def at(self, name: str) -> Path:
        """Return the place of an absolute file name."""
        return self.root / name.lstrip("/")


def look(places: Places, configured: Sequence[tuple[str, Network]] = ()) -> Protected:
    """Read everything now; ``configured`` are further networks with their reasons (settings, broker, database, validators)."""
    networks: list[tuple[str, Network]] = list(configured)
    problems: list[str] = []
    sources: tuple[Callable[[Places], Found], ...] = (
        _own_addresses_v4,
        _own_addresses_v6,
        _gateways_v4,
        _gateways_v6,
        _resolvers,
        _sessions,
    )
    for source in sources:
        try:
            networks.extend(source(places))
        except (OSError, SourceError, AddressError, ValueError, IndexError) as fault:
            problems.append(f"{source.__name__.strip('_')}: {fault}")
    return Protected(tuple(dict.fromkeys(networks)), tuple(problems))


def _own_addresses_v4(places: Places) -> Found:
    """Read the kernel's table of local and broadcast addresses."""
    address = ""
    for line in places.at("/proc/net/fib_trie").read_text().splitlines():
        words = line.split()
        if words[:1] == ["|--"]:
            address = words[1]
        elif words[:1] == ["/32"] and words[-1] in ("LOCAL", "BROADCAST"):
            kind = "own address" if words[-1] == "LOCAL" else "interface broadcast"
            yield kind, host(parse_address(address))


def _own_addresses_v6(places: Places) -> Found:
    for fields in _table(places, "/proc/net/if_inet6"):
        yield "own address", host(ipaddress.IPv6Address(int(fields[0], 16)))


def _gateways_v4(places: Places) -> Found:
    for fields in _table(places, "/proc/net/route", skip=1):
        if int(fields[3], 16) & _ROUTE_GATEWAY:
            # The file shows addresses as numbers in the machine's byte order.
            yield "gateway", host(ipaddress.IPv4Address(struct.pack("=I", int(fields[2], 16))))


def _gateways_v6(places: Places) -> Found:
    for fields in _table(places, "/proc/net/ipv6_route"):
        if int(fields[8], 16) & _ROUTE_GATEWAY:
            yield "gateway", host(ipaddress.IPv6Address(int(fields[4], 16)))


def _table(places: Places, name: str, skip: int = 0) -> Iterator[list[str]]:
    path = places.at(name)
    if not path.exists() and "6" in path.name and not places.at("/proc/sys/net/ipv6").exists():
        return
    for line in path.read_text().splitlines()[skip:]:
        yield line.split()


def _resolvers(places: Places) -> Found:
    # systemd-resolved hides the real servers behind 127.0.0.53 and lists them in a file of its own.
    for name in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        path = places.at(name)
        if not path.exists():
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                yield "resolver", host(parse_address(words[1].partition("%")[0]))


def _sessions(places: Places) -> Found:
    """Read who is logged in from elsewhere: utmp, and systemd-logind, which newer systems have in its place."""
    utmp, logind = places.at("/run/utmp"), places.at("/run/systemd/sessions")
    if not utmp.exists() and not logind.is_dir():
        if places.sessions_required:
            raise SourceError("no login records: neither /run/utmp nor /run/systemd/sessions")
        return
    if utmp.exists():
        yield from _utmp_sessions(utmp.read_bytes())
    if logind.is_dir():
        for path in sorted(logind.iterdir()):
            if not path.name.endswith(".ref"):
                yield from _logind_session(path)


def _utmp_sessions(records: bytes) -> Found:
    if len(records) % _UTMP.size:
        raise SourceError(f"utmp: {len(records)} bytes are not whole records of {_UTMP.size}")
    for record in _UTMP.iter_unpack(records):
        kind, user, address = record[0], record[4], record[11]
        if kind != _USER_PROCESS or not any(address):
            continue
        # An IPv4 address fills the first of the four words and leaves the others empty.
        raw = address if any(address[4:]) else address[:4]
        yield f"session of {_name(user)}", host(parse_address(str(ipaddress.ip_address(raw))))


def _logind_session(path: Path) -> Found:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return  # the session has ended meanwhile
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    if fields.get("REMOTE") != "1" or not fields.get("REMOTE_HOST"):
        return
    yield f"session of {fields.get('USER', '?')}", host(parse_address(fields["REMOTE_HOST"].partition("%")[0]))


def _name(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", errors="replace")
