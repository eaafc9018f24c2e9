"""Validators of one process talk through queues: the transport of the demo and of tests.

Opening an endpoint connects it to every open one and both sides learn of it; closing it loses what was under way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport import Frame, Kind
from cybermesh.consensus.transport.inbox import Inbox


class MemoryNetwork:
    """The endpoints of ``n`` validators."""

    def __init__(self, n: int) -> None:
        self._open: dict[int, MemoryTransport] = {}
        self._n = n

    def endpoint(self, index: int) -> MemoryTransport:
        """Return a new, closed endpoint for a validator; use it with ``with``."""
        assert 0 <= index < self._n
        return MemoryTransport(self, index)

    def attach(self, endpoint: MemoryTransport) -> None:
        """Connect an endpoint with every open one."""
        assert endpoint.index not in self._open
        for peer in self._open.values():
            peer.connected(endpoint.index)
            endpoint.connected(peer.index)
        self._open[endpoint.index] = endpoint

    def detach(self, endpoint: MemoryTransport) -> None:
        """Cut an endpoint off."""
        del self._open[endpoint.index]

    def peer(self, index: int) -> MemoryTransport | None:
        """Return the open endpoint of a validator."""
        return self._open.get(index)


class MemoryNetworks:
    """A network for each committee, so that a process can go on when another one takes over."""

    def __init__(self) -> None:
        self._networks: dict[Committee, MemoryNetwork] = {}

    def of(self, committee: Committee) -> MemoryNetwork:
        """Return the network of a committee."""
        return self._networks.setdefault(committee, MemoryNetwork(committee.n))

    def links(self, public: bytes) -> Callable[[Committee], AbstractAsyncContextManager[MemoryTransport]]:
        """Return what connects the validator with this key to the others of a committee."""

        @asynccontextmanager
        async def connect(committee: Committee) -> AsyncIterator[MemoryTransport]:
            index = committee.index_of(public)
            assert index is not None
            with self.of(committee).endpoint(index) as transport:
                yield transport

        return connect


class MemoryTransport:
    """One validator's end of a ``MemoryNetwork``; a ``Transport``."""

    def __init__(self, network: MemoryNetwork, index: int) -> None:
        self.index = index
        self._network = network
        self._inbox = Inbox()

    def __enter__(self) -> MemoryTransport:
        self._network.attach(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._network.detach(self)

    @property
    def lost(self) -> int:
        """How many frames overflowed on their way here."""
        return self._inbox.lost

    def connected(self, peer: int) -> None:
        """Begin a connection: nothing of an earlier one arrives any more."""
        self._inbox.connected(peer)

    def deliver(self, peer: int, kind: Kind, data: bytes) -> None:
        """Take a frame of ``peer``."""
        self._inbox.put(peer, kind, data)

    def send(self, peer: int, kind: Kind, data: bytes) -> None:
        """Hand a frame to the peer's endpoint if it is open."""
        other = self._network.peer(peer)
        if other is not None and self._network.peer(self.index) is self:
            other.deliver(self.index, kind, data)

    async def receive(self) -> Frame:
        """Return the next frame, one of each peer in turn."""
        return await self._inbox.take()
