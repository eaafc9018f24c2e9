"""Blocks as Kubernetes NetworkPolicies, and back. Pure.

A NetworkPolicy can only allow, and what any of them allows is allowed. So all blocks of a direction are **one** policy in each
namespace: it selects every pod and allows everybody but the blocked. The rules:

- Prefixes form a tree. Of an address the narrowest prefix decides, and a prefix inherits what is blocked around it. Each prefix
  with something left to allow is a rule of its own that leaves out the narrower ones; the whole address space is the widest.
- A block of ports allows the other ports of TCP, UDP and SCTP to the same prefix, in ranges. It never allows a port that
  another block closes.
- What a NetworkPolicy cannot say (rates, protocols without ports) is refused, not approximated. A reject is a drop.
- Elements and their ends are kept in an annotation, because NetworkPolicies do not end by themselves: whoever finds one that
  has ended (the agent, its twin, the janitor) writes the policy again without it.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from cybermesh.addresses import Network
from cybermesh.enforce.packed import PackedError, pack, unpack
from cybermesh.enforce.rules import PROTOCOL_NUMBERS, Effect, Element, Match, Rule
from cybermesh.policy import Direction

LABEL: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "cybermesh"
ELEMENTS: Final = "cybermesh.dev/elements"
NEXT_EXPIRY: Final = "cybermesh.dev/next-expiry-ms"
ELEMENTS_BYTES_MAX: Final = 200_000  # all annotations of an object together: 256 KiB
_PORTED: Final = {PROTOCOL_NUMBERS[name]: name.upper() for name in ("sctp", "tcp", "udp")}
_EVERY_PORT: Final = frozenset({(1, 65_535)})
_END_BYTES: Final = 8

Closed = Mapping[int, frozenset[tuple[int, int]]]
"""Ports that are closed, by protocol number of TCP, UDP and SCTP."""
_NOTHING: Final[Closed] = {}
_EVERYTHING: Final[Closed] = dict.fromkeys(_PORTED, _EVERY_PORT)


class InexpressibleError(Exception):
    """A NetworkPolicy cannot say this."""


def policy_name(direction: Direction) -> str:
    """Return the name of our policy for a direction."""
    return f"cybermesh-{direction}"


def render(elements: Collection[Element], direction: Direction, namespace: str) -> dict[str, Any]:
    """Return the policy that blocks ``elements`` (all of ``direction``) and allows everything else.

    Raises:
        InexpressibleError: An element is a rate or a protocol without ports, or there are too many.
    """
    kind = "Ingress" if direction is Direction.INGRESS else "Egress"
    peers = "from" if direction is Direction.INGRESS else "to"
    rules: list[dict[str, Any]] = []
    for version, everywhere in ((4, "0.0.0.0/0"), (6, "::/0")):
        closed = _tree([element for element in elements if element.match.version == version])
        rules += [
            {peers: [{"ipBlock": block}], **({"ports": ports} if ports else {})} for block, ports in _rules(closed, everywhere)
        ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": policy_name(direction),
            "namespace": namespace,
            "labels": {LABEL: MANAGER},
            "annotations": {
                ELEMENTS: write_elements(elements),
                NEXT_EXPIRY: str(min((element.expires_at_ms for element in elements), default=0)),
            },
        },
        "spec": {"podSelector": {}, "policyTypes": [kind], kind.lower(): rules},
    }


def _tree(elements: Iterable[Element]) -> dict[Network, Closed]:
    """Return, for every prefix that an element names, what is closed to it, with what is closed around it."""
    own: dict[Network, dict[int, frozenset[tuple[int, int]]]] = {}
    excepted: set[Network] = set()
    for match, _, _ in sorted(elements):
        network = match.network
        if match.effect is Effect.ALLOW:
            excepted.add(network)
        for protocol, ports in _closes(match).items():
            known = own.setdefault(network, {})
            known[protocol] = known.get(protocol, frozenset()) | ports
    found: dict[Network, Closed] = {}
    for network in sorted({*own, *excepted}, key=lambda item: (item.prefixlen, int(item.network_address))):
        if network in excepted:
            found[network] = _NOTHING
            continue
        around = next((found[wider] for wider in _wider(network) if wider in found), _NOTHING)
        mine = own[network]
        found[network] = {
            protocol: ports
            for protocol in _PORTED
            if (ports := frozenset((*around.get(protocol, ()), *mine.get(protocol, ()))))
        }
    return found


def _closes(match: Match) -> Closed:
    if match.effect is Effect.ALLOW:
        return _NOTHING
    if match.effect is Effect.LIMIT:
        raise InexpressibleError("a NetworkPolicy cannot limit a rate")
    if not match.protocol:
        return _EVERYTHING
    if match.protocol not in _PORTED:
        raise InexpressibleError("a NetworkPolicy knows only TCP, UDP and SCTP")
    return {match.protocol: frozenset({(match.first, match.last)}) if match.first else _EVERY_PORT}


def _wider(network: Network) -> Iterator[Network]:
    for length in range(network.prefixlen - 1, -1, -1):
        yield network.supernet(new_prefix=length)


def _rules(closed: Mapping[Network, Closed], everywhere: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield (ipBlock, ports) for everything that stays allowed; no ports means all of them."""
    inner: dict[Network | None, list[Network]] = {}
    for network in closed:
        around = next((wider for wider in _wider(network) if wider in closed), None)
        inner.setdefault(around, []).append(network)
    yield _block(everywhere, inner.get(None, ())), []
    for network, ports in closed.items():
        left = [item for protocol in _PORTED for item in _open_ports(protocol, ports.get(protocol, frozenset()))]
        if ports and not left:
            continue
        yield _block(str(network), inner.get(network, ())), left if ports else []


def _block(cidr: str, without: Iterable[Network]) -> dict[str, Any]:
    left_out = [str(network) for network in sorted(without, key=lambda item: (int(item.network_address), item.prefixlen))]
    return {"cidr": cidr, "except": left_out} if left_out else {"cidr": cidr}


def _open_ports(protocol: int, closed: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    name, first = _PORTED[protocol], 1
    for start, end in (*sorted(closed), (65_536, 65_536)):
        if first < start:
            yield {"protocol": name, "port": first} | ({"endPort": start - 1} if start - 1 > first else {})
        first = max(first, end + 1)


def write_elements(elements: Iterable[Element]) -> str:
    """Return elements with their ends as an annotation.

    Raises:
        InexpressibleError: There are more than fit.
    """
    parts = (pack([Rule("", element)]) + element.expires_at_ms.to_bytes(_END_BYTES, "big") for element in sorted(elements))
    text = base64.b64encode(zlib.compress(b"".join(parts))).decode()
    if len(text) > ELEMENTS_BYTES_MAX:
        raise InexpressibleError(f"{len(text)} bytes of elements, {ELEMENTS_BYTES_MAX} fit into an annotation")
    return text


def read_elements(text: str) -> dict[Match, Element]:
    """Return what ``write_elements`` wrote.

    Raises:
        PackedError: Somebody else wrote this.
    """
    record = len(pack([_ANY])) + _END_BYTES
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
    except (binascii.Error, zlib.error) as fault:
        raise PackedError(f"{ELEMENTS}: {fault}") from fault
    if len(data) % record:
        raise PackedError(f"{ELEMENTS}: {len(data)} bytes are not whole records")
    found: dict[Match, Element] = {}
    for start in range(0, len(data), record):
        end_ms = int.from_bytes(data[start + record - _END_BYTES : start + record], "big")
        ((_, element),) = unpack(data[start : start + record - _END_BYTES], "", end_ms)
        found[element.match] = element
    return found


_ANY: Final = Rule("", Element(Match(Effect.DROP, Direction.INGRESS, 4, 0, 32), 0))
