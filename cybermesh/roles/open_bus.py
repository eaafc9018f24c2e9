"""Chooses the bus that the settings name."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager

from cybermesh.bus import Bus
from cybermesh.bus.memory import MemoryBus
from cybermesh.config import ConfigError, Settings


def open_bus(settings: Settings) -> AbstractAsyncContextManager[Bus]:
    """Return the bus; entering it connects.

    Raises:
        ConfigError: The settings name a bus that this version does not have.
    """
    if settings.bus.kind == "memory":
        return MemoryBus(lambda: time.time_ns() // 1_000_000)
    raise ConfigError(f"bus.kind: {settings.bus.kind} is not part of this version; use memory")
