"""What four validators cost while nothing happens: processor time and blocks, with every part that the demo runs."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cybermesh.demo.mesh import VALIDATORS, Assembly, Mesh, Watch
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.roles.clock import SystemClock

SETTLE_S = 3.0  # start-up is not idling


@dataclass(frozen=True, slots=True)
class Idle:
    """Shares are of one core; blocks are those committed during the measurement."""

    seconds: float
    cpu_share_per_validator: float
    blocks: int
    blocks_per_day: int


async def measure(seconds: float) -> Idle:
    """Run validators and an agent without work for a while."""
    with tempfile.TemporaryDirectory(prefix="cybermesh-idle-") as folder:
        async with AsyncExitStack() as stack:
            watch = Watch(lambda _: None, lambda _number, _commit: None, lambda _: None)
            assembly = Assembly(Path(folder), SystemClock(), watch)
            mesh = await assembly.open(stack, NoopBackend(), None)
            async with asyncio.TaskGroup() as group:
                running = group.create_task(assembly.run(), name="mesh")
                await asyncio.sleep(SETTLE_S)
                before = (time.process_time(), time.monotonic(), _height(mesh))
                await asyncio.sleep(seconds)
                after = (time.process_time(), time.monotonic(), _height(mesh))
                running.cancel()
    took = after[1] - before[1]
    blocks = after[2] - before[2]
    share = (after[0] - before[0]) / took / VALIDATORS
    return Idle(round(took, 2), round(share, 5), blocks, round(86_400 * blocks / took))


def _height(mesh: Mesh) -> int:
    return max(status.height for role in mesh.validators.values() if (status := role.status) is not None)
