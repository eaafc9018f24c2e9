"""What a source read and what it left out, by reason: nothing is dropped silently.

Reasons are short constant texts, so that they can be added up over files and shown to people as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

NOT_IP = "not IP"
SHORT_FRAME = "frame shorter than its link header"
BROKEN_IP = "broken IP header"
LINK_TYPE = "link type not supported"
NO_TIME = "no time (simple packet block)"
ODD_TIME = "time out of range"
NO_INTERFACE = "interface not described"


@dataclass(slots=True)
class Counters:
    """Counts of one source; ``packets = metered + sum(skipped.values())`` at every batch border."""

    packets: int = 0  # records read: packets, or the rows and lines of other inputs
    metered: int = 0  # of these, handed on
    skipped: Counter[str] = field(default_factory=Counter)  # of these, left out, by reason
    lost: int = 0  # packets that the kernel dropped before they could be read
    unit: str = "packets"  # what is counted
    ended: str = ""  # why reading stopped before the end of the input; empty if it did not

    def skip(self, reason: str, count: int = 1) -> None:
        """Count records left out for ``reason``."""
        if count:
            self.skipped[reason] += count
