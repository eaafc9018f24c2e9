"""How frames get from one validator to another, whatever carries them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class Kind(enum.Enum):
    """What a frame holds; on overflow a newer frame replaces the oldest one of its kind."""

    PROPOSAL = "proposal"
    VOTE = "vote"
    TIMEOUT = "timeout"
    SYNC = "sync"
    GET_BLOCKS = "get_blocks"
    BLOCKS = "blocks"
    FORWARD = "forward"
    GET_PAYLOAD = "get_payload"
    PAYLOAD = "payload"


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes from validator ``peer``; empty when a connection to it was made, after which earlier frames may be lost."""

    peer: int
    data: bytes

    @property
    def is_connection(self) -> bool:
        """Whether this tells of a new connection instead of carrying a message."""
        return not self.data


class Transport(Protocol):
    """One validator's connections to the others.

    Contract: a frame arrives at most once, whole, unaltered, and its ``peer`` is authentic; frames of one peer keep their order
    while the connection lasts; nothing is promised beyond. Every queue is per peer and bounded, so a slow or flooding peer
    costs the others nothing; where one is full, the oldest frame of the same kind makes room, since a newer one supersedes it,
    and without one the new frame is dropped and counted. Whoever opened the transport closes it; ``receive`` is cancelled.
    """

    def send(self, peer: int, kind: Kind, data: bytes) -> None:
        """Queue a frame for ``peer`` and return at once; to a peer that is not connected nothing is sent."""
        ...

    async def receive(self) -> Frame:
        """Return the next frame, fairly among the peers."""
        ...
