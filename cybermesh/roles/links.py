"""A validator's connections over TCP, made anew for every committee: one listening socket, one set of peers for each epoch."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport.tcp import Address, TcpTransport
from cybermesh.keys import SigningKey
from cybermesh.metrics import Figures


class Links:
    """Connects one validator. ``addresses`` tells, whenever it is asked, where validators listen, by public key.

    Whoever opened ``listener`` closes it.
    """

    def __init__(self, key: SigningKey, listener: socket.socket, addresses: Callable[[], Mapping[bytes, Address]]) -> None:
        self._key = key
        self._listener = listener
        self._addresses = addresses
        self._transport: TcpTransport | None = None
        self._refused = 0
        self._lost = 0

    @asynccontextmanager
    async def connect(self, committee: Committee) -> AsyncIterator[TcpTransport]:
        """Stay connected with the others of a committee inside the block; who has no address here must call this node."""
        known = self._addresses()
        by_index = {index: known[public] for index, public in enumerate(committee.public_keys) if public in known}
        transport = TcpTransport(committee, self._key, self._listener, by_index, random.random)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(transport.run(), name="transport")
            self._transport = transport
            try:
                yield transport
            finally:
                self._transport = None
                self._refused += transport.counters.refused.total()
                self._lost += transport.lost
                running.cancel()

    def figures(self) -> Figures:
        """Return the metrics of the connections, of all epochs since the start."""
        now = self._transport
        return {
            "validator_peers_connected": 0 if now is None else len(now.peers),
            "validator_connections_refused_total": self._refused + (0 if now is None else now.counters.refused.total()),
            "validator_frames_lost_total": self._lost + (0 if now is None else now.lost),
        }
