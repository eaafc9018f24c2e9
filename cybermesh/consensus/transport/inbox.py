"""What has arrived from the other validators and is not read yet, for every transport."""

from __future__ import annotations

import asyncio
from collections import deque

from cybermesh.consensus.transport import Frame, Kind
from cybermesh.consensus.transport.queues import PeerQueue


class Inbox:
    """One bounded queue per peer, read one frame of each peer in turn."""

    def __init__(self) -> None:
        self._queues: dict[int, PeerQueue] = {}
        self._turns: deque[int] = deque()
        self._has_frames = asyncio.Event()

    @property
    def lost(self) -> int:
        """How many frames overflowed here."""
        return sum(queue.superseded + queue.dropped for queue in self._queues.values())

    def connected(self, peer: int) -> None:
        """Begin a connection: nothing of an earlier one arrives any more, and the reader is told."""
        self._queues.setdefault(peer, PeerQueue()).clear()
        self.put(peer, Kind.SYNC, b"")

    def put(self, peer: int, kind: Kind, data: bytes) -> bool:
        """Take a frame of a peer that has connected; return whether there was room for it."""
        queue = self._queues[peer]
        superseded = queue.superseded
        is_taken = queue.put(kind, data)
        if is_taken:
            if peer not in self._turns:
                self._turns.append(peer)
            self._has_frames.set()
        return is_taken and queue.superseded == superseded

    async def take(self) -> Frame:
        """Return the next frame."""
        while not self._turns:
            self._has_frames.clear()
            await self._has_frames.wait()
        peer = self._turns.popleft()
        queue = self._queues[peer]
        data = queue.take()
        if queue:
            self._turns.append(peer)
        return Frame(peer, data)
