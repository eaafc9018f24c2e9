"""What has arrived for one subscriber and was not taken yet: the end that the durable buses share.

Rules:

- whoever fetches records feeds them in order per partition and stops while ``size_bytes`` is above its bound: the buffer itself
  never refuses, so nothing that was fetched is lost;
- a partition that goes to another subscriber is dropped from the buffer: the new owner gets those records again;
- everything here runs on the event loop's thread, so no step can be seen half done.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable

from cybermesh.bus import Delivery

Place = tuple[str, int]  # topic and partition


class Arrivals:
    """Deliveries between the fetcher and the role that takes them."""

    def __init__(self) -> None:
        self._waiting: deque[Delivery] = deque()
        self._wake = asyncio.Event()
        self._has_ended = False
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def feed(self, deliveries: Iterable[Delivery]) -> None:
        """Append deliveries."""
        for delivery in deliveries:
            self._waiting.append(delivery)
            self.size_bytes += _size(delivery)
        self._wake.set()

    def drop(self, places: Collection[Place]) -> None:
        """Forget what waits of these partitions."""
        self._waiting = deque(delivery for delivery in self._waiting if (delivery.topic, delivery.partition) not in places)
        self.size_bytes = sum(map(_size, self._waiting))

    def take(self) -> Delivery | None:
        """Return the oldest delivery, if there is one."""
        if not self._waiting:
            return None
        delivery = self._waiting.popleft()
        self.size_bytes -= _size(delivery)
        return delivery

    def take_many(self, count_max: int, bytes_max: int) -> list[Delivery]:
        """Return the oldest deliveries within the bounds of ``bus.Subscription.take``; empty when there are none."""
        taken: list[Delivery] = []
        size_bytes = 0
        while self._waiting and len(taken) < count_max and size_bytes < bytes_max:
            delivery = self._waiting.popleft()
            taken.append(delivery)
            size_bytes += len(delivery.value)
            self.size_bytes -= _size(delivery)
        return taken

    async def arrived(self) -> None:
        """Wait until there is something to take, or the end."""
        while not self._waiting and not self._has_ended:
            self._wake.clear()
            await self._wake.wait()

    def end(self) -> None:
        """Let nothing be taken any more."""
        self._has_ended = True
        self._waiting.clear()
        self.size_bytes = 0
        self._wake.set()

    @property
    def has_ended(self) -> bool:
        """Whether the subscription or its bus was left."""
        return self._has_ended


def _size(delivery: Delivery) -> int:
    return len(delivery.key) + len(delivery.value)
