"""How often Python looks for garbage that reference counting does not see.

A validator holds tens of thousands of messages whose objects refer to each other in one direction only. With Python's own
limits the collector walked through all of them again and again while messages were taken in, a quarter of the processor's
time, and found nothing. What does form cycles here (exceptions with their frames, tasks) is small and may wait.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (50_000, 20, 100)


def collect_rarely() -> None:
    """Raise the collector's limits for this process, and leave what was imported out of its walks."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
