"""A process of its own on a local bus, for tests: ``python member.py publish|subscribe PATH [LEASE_S]``.

It prints a line for each record. A publisher does so after each publish; a subscriber acknowledges the deliveries whose values
are written to its standard input, a line each. Both run until they are killed or their standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from cybermesh.bus import Delivery
from cybermesh.bus.local import LocalBus


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def publish(bus: LocalBus) -> None:
    number = 0
    while True:
        await bus.publish("t", b"key", b"%d" % number)
        say(str(number))
        number += 1


async def subscribe(bus: LocalBus) -> None:
    delivered: dict[bytes, Delivery] = {}
    async with bus.subscribe(["t"], "g") as subscription, asyncio.TaskGroup() as tasks:
        say("joined")

        async def read() -> None:
            async for delivery in subscription:
                delivered[delivery.value] = delivery
                say(delivery.value.decode())

        reader = tasks.create_task(read(), name="reader")
        while line := await asyncio.to_thread(sys.stdin.readline):
            await subscription.ack(delivered[line.strip().encode()])
        reader.cancel()


async def main(action: str, path: str, lease_s: str = "10") -> None:
    async with LocalBus(Path(path), lambda: time.time_ns() // 1_000_000, lease_s=float(lease_s)) as bus:
        await {"publish": publish, "subscribe": subscribe}[action](bus)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
