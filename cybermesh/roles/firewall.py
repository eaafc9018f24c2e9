"""The agent's firewall and what it must never cut off, as the settings name them; for the agent and for ``cybermesh enforce``.

Both must protect the same: the genesis' infrastructure and protected networks, the configured ones, and the broker's and the
database's addresses. A name is looked up when it is asked for and the last answer kept; a name that never had one is a problem,
and with a problem the guard lets nothing new pass.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cybermesh.addresses import AddressError, Network, host, normalise_address, parse_network
from cybermesh.config import ConfigError, Settings
from cybermesh.enforce import surroundings
from cybermesh.enforce.backends import Backend, BackendError
from cybermesh.enforce.backends.iptables import IptablesBackend, Programs
from cybermesh.enforce.backends.nftables import NftablesBackend, open_channel
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.guard import Protected
from cybermesh.genesis import Genesis, GenesisError, parse

Named = tuple[str, Network]
_LOOK_UP_EVERY_MS: Final = 60_000


def open_backend(name: str, namespaces: Sequence[str] = ("default",)) -> Backend:
    """Return the firewall that ``enforce.backend`` names; whoever asks closes it.

    Raises:
        BackendError: It is not installed here.
    """
    match name:
        case "nftables":
            return NftablesBackend(open_channel())
        case "iptables":
            return IptablesBackend(Programs.find())
        case "kubernetes":
            try:
                # An optional extra, and half a second of imports.
                from cybermesh.enforce.backends.kubernetes import KubernetesBackend
            except ImportError as fault:
                raise BackendError("NO_FIREWALL", "install the extra: pip install 'cybermesh[kubernetes]'") from fault
            return KubernetesBackend(namespaces)
        case _:
            return NoopBackend()


async def expire(backend: Backend, now_ms: int) -> int:
    """End what has ended where a firewall does not do it by itself; return how many elements that were.

    Raises:
        BackendError: It could not be read or written.
    """
    before = await backend.audit(0)
    after = await backend.audit(now_ms)
    return len(before.elements) - len(after.elements)


class Shield:
    """Reads what is protected on this host, each time it is called."""

    def __init__(self, settings: Settings, genesis: Genesis, now_ms: Callable[[], int]) -> None:
        """Prepare.

        Raises:
            ConfigError: ``enforce.protected_networks`` holds something else.
        """
        self._fixed = [*named(genesis), *configured(settings)]
        self._names = tuple(_names(settings))
        self._now_ms = now_ms
        self._looked_up_ms: int | None = None
        self._known: dict[str, tuple[Named, ...]] = {}

    def __call__(self) -> Protected:
        """Return what is protected now."""
        found = surroundings.look(surroundings.Places(), [*self._fixed, *self._looked_up()])
        missing = tuple(f"{kind} {name}: no address is known" for kind, name in self._names if name not in self._known)
        return Protected(found.networks, (*found.problems, *missing))

    def _looked_up(self) -> Iterable[Named]:
        now_ms = self._now_ms()
        if self._looked_up_ms is None or now_ms - self._looked_up_ms >= _LOOK_UP_EVERY_MS:
            self._looked_up_ms = now_ms
            for kind, name in self._names:
                found = _addresses_of(kind, name)
                if found:
                    self._known[name] = found
        return [item for found in self._known.values() for item in found]


def named(genesis: Genesis) -> list[Named]:
    """Return the networks that the genesis protects."""
    found: list[Named] = [("infrastructure", network) for network in genesis.infrastructure_networks]
    return found + [("protected", network) for network in genesis.protected_networks]


def configured(settings: Settings) -> list[Named]:
    """Return the networks that the settings protect.

    Raises:
        ConfigError: One of them is no network.
    """
    try:
        return [("configured", parse_network(text)) for text in settings.enforce.protected_networks]
    except AddressError as fault:
        raise ConfigError(f"enforce.protected_networks: {fault}") from fault


def read_genesis(path: Path) -> Genesis:
    """Return the deployment's genesis.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return parse(path.read_bytes())
    except OSError as fault:
        raise ConfigError(f"{path}: {fault.strerror}; node.genesis names the deployment's genesis file") from fault
    except GenesisError as fault:
        raise ConfigError(f"{path}: {fault}") from fault


def _names(settings: Settings) -> Iterable[tuple[str, str]]:
    """Return the hosts of brokers and database that this process itself uses."""
    if settings.bus.kind == "kafka":
        for broker in settings.kafka.brokers:
            yield "broker", broker.rpartition(":")[0].strip("[]")
    database = urlsplit(settings.store.url).hostname if settings.store.url else None
    if database:
        yield "database", database


def _addresses_of(kind: str, name: str) -> tuple[Named, ...]:
    try:
        answers: Sequence[tuple[object, ...]] = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    texts = {str(address[0]).partition("%")[0] for *_, address in answers if isinstance(address, tuple)}
    return tuple((kind, host(normalise_address(ipaddress.ip_address(text)))) for text in sorted(texts))
