"""The bounded queue between a validator and one of its peers."""

from __future__ import annotations

from collections import deque
from typing import Final

from cybermesh.consensus.transport import Kind

FRAMES_MAX: Final = 1_024
BYTES_MAX: Final = 32 * 1024 * 1024


class PeerQueue:
    """Frames in order, bounded in number and bytes; on overflow the oldest of the same kind is superseded."""

    def __init__(self, *, frames_max: int = FRAMES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self.superseded = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, kind: Kind, data: bytes) -> bool:
        """Add a frame, making room if need be; return whether it was taken."""
        while len(self._frames) >= self._frames_max or self._bytes + len(data) > self._bytes_max:
            if not self._drop_oldest(kind):
                self.dropped += 1
                return False
            self.superseded += 1
        self._frames.append((kind, data))
        self._bytes += len(data)
        return True

    def _drop_oldest(self, kind: Kind) -> bool:
        for position, (held, data) in enumerate(self._frames):
            if held is kind:
                del self._frames[position]
                self._bytes -= len(data)
                return True
        return False

    def take(self) -> bytes:
        """Return the oldest frame; there must be one."""
        _, data = self._frames.popleft()
        self._bytes -= len(data)
        return data

    def clear(self) -> None:
        """Forget every frame."""
        self._frames.clear()
        self._bytes = 0
