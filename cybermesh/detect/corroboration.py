"""When flows of one kind are many enough to be an attack: one odd flow is no port scan.

A flow classifier answers for a single flow, and on a strange network a single answer is easily wrong. Attacks that consist of
many flows are therefore reported once a source (for ``ddos``: all sources of a victim) has shown several of them within the
window; a scan's must have different targets, or it is a flood or a client that retries. Memory is bounded: the longest silent
key goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Set
from dataclasses import dataclass, field

WINDOW_US = 300_000_000
KEYS_MAX = 8_192
FLOWS_MIN = {"port_scan": 10, "brute_force": 5, "ddos": 5, "dos": 5, "botnet": 5}
FLOWS_MIN_OTHERWISE = 2


@dataclass(slots=True)
class _Shown:
    last_us: int
    marks: set[Hashable] = field(default_factory=set)  # never more than ``FLOWS_MIN`` asks for


class Corroboration:
    """Counts the flows of each key and type over packet time."""

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self._keys_max = keys_max
        self._shown: OrderedDict[tuple[bytes, str], _Shown] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shown)

    def add(self, key: bytes, type_: str, marks: Set[Hashable], now_us: int) -> bool:
        """Record flows seen until ``now_us`` and return whether the key has now shown enough of them.

        ``marks`` tell the flows apart: the targets of a scan, start times and ports otherwise.
        """
        entry = self._shown.get((key, type_))
        if entry is None or now_us - entry.last_us > WINDOW_US:
            entry = self._shown[key, type_] = _Shown(now_us)
        enough = FLOWS_MIN.get(type_, FLOWS_MIN_OTHERWISE)
        for mark in marks:
            if len(entry.marks) >= enough:
                break
            entry.marks.add(mark)
        entry.last_us = max(entry.last_us, now_us)
        self._shown.move_to_end((key, type_))
        while len(self._shown) > self._keys_max:
            self._shown.popitem(last=False)
        return len(entry.marks) >= enough
