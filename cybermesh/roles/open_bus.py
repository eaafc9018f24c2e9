"""Chooses the bus that the settings name."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager

from cybermesh.bus import Bus
from cybermesh.bus.local import LocalBus
from cybermesh.bus.memory import MemoryBus
from cybermesh.config import ConfigError, Settings


def open_bus(settings: Settings) -> AbstractAsyncContextManager[Bus]:
    """Return the bus; entering it connects.

    Raises:
        ConfigError: The settings name a bus that this version does not have.
    """
    if settings.bus.kind == "memory":
        return MemoryBus(_now_ms)
    if settings.bus.kind == "local":
        settings.bus.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return LocalBus(settings.bus.path, _now_ms)
    raise ConfigError(f"bus.kind: {settings.bus.kind} is not part of this version; use local or memory")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
