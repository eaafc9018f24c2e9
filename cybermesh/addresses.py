"""Addresses and prefixes as a firewall sees them, so that no two parts disagree about which hosts a text names.

Two rules hold everywhere: an IPv4-mapped IPv6 address or prefix *is* the IPv4 one, and two networks touch when they share an
address in that sense. Zone ids, netmasks in the place of prefix lengths, and host bits in a prefix are refused, not guessed.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

UNBLOCKABLE: Final[tuple[tuple[str, Network], ...]] = (
    ("unspecified", IPv4Network("0.0.0.0/8")),
    ("loopback", IPv4Network("127.0.0.0/8")),
    ("link_local", IPv4Network("169.254.0.0/16")),
    ("multicast", IPv4Network("224.0.0.0/4")),
    ("broadcast", IPv4Network("255.255.255.255/32")),
    ("unspecified", IPv6Network("::/128")),
    ("loopback", IPv6Network("::1/128")),
    ("link_local", IPv6Network("fe80::/10")),
    ("multicast", IPv6Network("ff00::/8")),
)
"""Networks that nothing may ever block, with the reason; the ledger's rule and every agent's guard start from them."""

MAPPED: Final = IPv6Network("::ffff:0:0/96")
"""The IPv6 addresses that mean IPv4 ones."""

_CACHED: Final = 65_536
_PREFIX_LENGTH: Final = re.compile(r"[0-9]{1,3}", re.ASCII)


class AddressError(ValueError):
    """A text names no address or no prefix; the message shows it and says why."""


def host(address: Address) -> Network:
    """Return the network that holds ``address`` alone."""
    # From a number: from an address object, the standard library goes through text.
    if isinstance(address, IPv4Address):
        return IPv4Network((int(address), 32))
    return IPv6Network((int(address), 128))


def is_host(network: Network) -> bool:
    """Say whether ``network`` holds a single address."""
    return network.prefixlen == network.max_prefixlen


def normalise_address(address: Address) -> Address:
    """Return the IPv4 address inside an IPv4-mapped IPv6 address, any other address as it is."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def normalise_network(network: Network) -> Network:
    """Return the IPv4 network that an IPv4-mapped IPv6 prefix means, any other network as it is."""
    if isinstance(network, IPv6Network) and network.subnet_of(MAPPED):
        return IPv4Network((int(network.network_address) & 0xFFFF_FFFF, network.prefixlen - MAPPED.prefixlen))
    return network


def overlaps(left: Network, right: Network) -> bool:
    """Say whether two networks share an address; an IPv6 prefix around the IPv4-mapped range holds every IPv4 address."""
    left, right = normalise_network(left), normalise_network(right)
    if isinstance(left, IPv4Network):
        return left.overlaps(right) if isinstance(right, IPv4Network) else right.overlaps(MAPPED)
    return left.overlaps(right) if isinstance(right, IPv6Network) else left.overlaps(MAPPED)


# One address is parsed many times on its way from an anomaly to a rule, and parsing costs ten times the look into a cache.
@functools.lru_cache(maxsize=_CACHED)
def parse_address(text: str) -> Address:
    """Parse one address without a zone id; an IPv4-mapped one comes back as IPv4.

    Raises:
        AddressError: It is not one address.
    """
    _refuse_zone(text)
    try:
        return normalise_address(ipaddress.ip_address(text))
    except ValueError:
        raise AddressError(f"{text[:64]!r} is not an IP address") from None


@functools.lru_cache(maxsize=_CACHED)
def parse_network(text: str) -> Network:
    """Parse one prefix whose host bits are zero; an address alone is its own /32 or /128.

    Raises:
        AddressError: It is not a prefix, or has host bits.
    """
    _refuse_zone(text)
    if "/" in text and not _PREFIX_LENGTH.fullmatch(text.rpartition("/")[2]):
        raise AddressError(f"{text[:64]!r} has no prefix length from 0 to 128")
    try:
        return normalise_network(ipaddress.ip_network(text))
    except ValueError:
        raise AddressError(_fault_of_network(text)) from None


def _fault_of_network(text: str) -> str:
    try:
        loose = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return f"{text[:64]!r} is not an address prefix"
    return f"{text[:64]!r} has host bits set; did you mean {loose}?"


def _refuse_zone(text: str) -> None:
    if "%" in text:
        raise AddressError(f"{text[:64]!r} has a zone id, which means nothing on another host")
