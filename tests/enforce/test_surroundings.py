"""What a host must not cut itself off from: read from files as Linux writes them, and from this very host."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from cybermesh.enforce.surroundings import Places, look

FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
Local:
  +-- 0.0.0.0/0 2 0 2
     |-- 192.0.2.10
        /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
"""
# Columns: interface, destination, gateway, flags … ; addresses in the machine's byte order.
ROUTE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t{gateway}\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
IF_INET6 = "20010db8000500000000000000000010 02 40 00 80     eth0\n"
IPV6_ROUTE = (
    f"{'0' * 32} 00 {'0' * 32} 00 20010db8000500000000000000000001 00000400 00000001 00000000 00000003     eth0\n"
    f"20010db8000500000000000000000000 40 {'0' * 32} 00 {'0' * 32} 00000100 00000001 00000000 00000001     eth0\n"
)


def utmp(user: str, address: str, kind: int = 7) -> bytes:
    """Return one login record as glibc writes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address) if address else b""
    head = struct.pack("=hxxi32s4s32s256s", kind, 4242, b"pts/0", b"ts/0", user.encode(), address.encode())
    return head + struct.pack("=hhiii16s20x", 0, 0, 1, 1_700_000_000, 0, raw)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        "proc/net/fib_trie": FIB_TRIE,
        "proc/net/route": ROUTE.format(gateway=f"{struct.unpack('=I', socket.inet_aton('192.0.2.1'))[0]:08X}"),
        "proc/net/if_inet6": IF_INET6,
        "proc/net/ipv6_route": IPV6_ROUTE,
        "etc/resolv.conf": "# made by hand\nsearch example.org\nnameserver 9.9.9.9\nnameserver 2620:fe::fe%eth0\n",
        "run/systemd/resolve/resolv.conf": "nameserver 192.0.2.53\n",
        "run/systemd/sessions/c3": "# systemd\nUID=0\nUSER=root\nREMOTE=1\nREMOTE_HOST=198.51.100.78\n",
        "run/systemd/sessions/c4": "UID=0\nUSER=root\nREMOTE=0\nTTY=tty1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    records = (
        utmp("root", "198.51.100.77"),
        utmp("ops", "2001:db8:9::7"),
        utmp("gone", "203.0.113.9", kind=8),
        utmp("tty", ""),
    )
    (tmp_path / "run/utmp").write_bytes(b"".join(records))
    return tmp_path


def test_everything_that_matters_is_found_with_its_reason(root: Path) -> None:
    found = look(Places(root))
    assert found.problems == ()
    assert {(reason, str(network)) for reason, network in found.networks} == {
        ("own address", "192.0.2.10/32"),
        ("interface broadcast", "192.0.2.255/32"),
        ("own address", "2001:db8:5::10/128"),
        ("gateway", "192.0.2.1/32"),
        ("gateway", "2001:db8:5::1/128"),
        ("resolver", "9.9.9.9/32"),
        ("resolver", "2620:fe::fe/128"),
        ("resolver", "192.0.2.53/32"),
        ("session of root", "198.51.100.77/32"),
        ("session of ops", "2001:db8:9::7/128"),
        ("session of root", "198.51.100.78/32"),
    }


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("proc/net/fib_trie", None, "own_addresses_v4"),
        ("proc/net/route", b"Iface\neth0\tx", "gateways_v4"),
        ("proc/net/if_inet6", b"zz", "own_addresses_v6"),
        ("etc/resolv.conf", b"nameserver dns.example.org\n", "resolvers"),
        ("etc/resolv.conf", b"\xff\xfe", "resolvers"),
        ("run/utmp", b"short", "sessions"),
        ("run/systemd/sessions/c3", b"REMOTE=1\nREMOTE_HOST=host.example.org\n", "sessions"),
    ],
    ids=range(7),
)
def test_a_source_that_cannot_be_read_is_a_problem_and_not_an_empty_answer(
    root: Path, name: str, content: bytes | None, problem: str
) -> None:
    path = root / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    (found,) = look(Places(root)).problems
    assert found.startswith(f"{problem}: ")


def test_a_host_without_login_records_says_so_unless_it_is_told_that_there_are_none(root: Path) -> None:
    (root / "run/utmp").unlink()
    for path in (root / "run/systemd/sessions").iterdir():
        path.unlink()
    (root / "run/systemd/sessions").rmdir()
    assert look(Places(root)).problems == ("sessions: no login records: neither /run/utmp nor /run/systemd/sessions",)
    assert look(Places(root, sessions_required=False)).problems == ()


def test_a_host_without_ipv6_has_no_problem(root: Path) -> None:
    (root / "proc/net/if_inet6").unlink()
    (root / "proc/net/ipv6_route").unlink()
    assert look(Places(root)).problems == ()
    (root / "proc/sys/net/ipv6").mkdir(parents=True)
    assert len(look(Places(root)).problems) == 2


def test_this_hosts_own_loopback_address_is_found() -> None:
    found = look(Places(sessions_required=False))
    assert ("own address", "127.0.0.1/32") in {(reason, str(network)) for reason, network in found.networks}
