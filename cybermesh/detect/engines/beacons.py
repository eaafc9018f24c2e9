"""Beacons: a host that calls the same place outside again and again at the same interval, saying about the same.

For each client, server, port and protocol the starts of its last ``SIGHTINGS_MAX`` answered flows are kept. The period is their
median gap; a beacon's gaps are the period or, after missed beats, a small multiple of it, give or take ``JITTER``, and what it
sends has nearly always the same size. Pieces of one long connection (the same client port again) are no new sightings.

Health checks, polls and updates beat as regularly as malware does, so what is found is a low alert, never a policy; time
services, names and everything within one's own networks are left out. A key that has been seen often is forgotten last, so
that a flood of new ones does not push a slow beacon out.

Most flows of most sites go outside, so a call must cost little: columns are taken apart by numpy, and a key is judged after a
batch, and within one after every ``SIGHTINGS_MIN`` calls, not at each.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from cybermesh.detect.engines import Finding
from cybermesh.detect.engines.rules import address_text
from cybermesh.telemetry.features import COLUMN
from cybermesh.telemetry.flows import FlowBatch

SIGHTINGS_MAX = 64
SIGHTINGS_MIN = 12
SPAN_MIN_US = 60_000_000
PERIOD_MIN_US = 1_000_000
JITTER = 0.35  # of the period, either way
REGULAR_SHARE = 0.85
MISSED_MAX = 4
SAME_SIZE = 0.1
KEYS_MAX = 20_000
_FEW = 4  # sightings after which a key is no longer among the first to be forgotten
_TCP, _UDP = 6, 17
_LEFT_OUT = np.array([53, 67, 68, 123, 137, 138, 161, 1900, 3702, 5353], np.uint16)
_INSIDE = (
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10", "224.0.0.0/3"),
    *("0.0.0.0/8", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8"),
)


def _halves(number: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(number >> 64), np.uint64(number & (1 << 64) - 1)


def _prefix(text: str) -> tuple[tuple[np.uint64, np.uint64], tuple[np.uint64, np.uint64]]:
    """Return mask and value of a network, 64 bits and 64, as packed addresses have it (IPv4 mapped into IPv6)."""
    network = ipaddress.ip_network(text)
    if network.version == 4:
        network = ipaddress.ip_network(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
    return _halves(int(network.netmask)), _halves(int(network.network_address))


_PREFIXES = tuple(map(_prefix, _INSIDE))


@dataclass(slots=True)
class _Calls:
    """The last calls of a key; ``unjudged`` of them came after it was judged."""

    sport: int = -1
    unjudged: int = 0
    starts_us: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, sport: int, start_us: int, size: int) -> bool:
        """Take a call unless it is a piece of the one before; return whether there are enough new ones to judge."""
        if sport == self.sport:
            return False
        self.sport = sport
        self.unjudged += 1
        self.starts_us.append(start_us)
        self.sizes.append(size)
        if len(self.starts_us) > SIGHTINGS_MAX:
            del self.starts_us[0], self.sizes[0]
        return self.unjudged >= SIGHTINGS_MIN


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How regular a series of calls is: period, the share of gaps that fit it, and the share of calls of the usual size."""

    period_us: int
    regular: float
    same_size: float


def rhythm(starts_us: Sequence[int], sizes: Sequence[int]) -> Rhythm | None:
    """Return the rhythm of calls (starts in any order, bytes sent), None if they are too few or too dense to have one."""
    if len(starts_us) < SIGHTINGS_MIN or max(starts_us) - min(starts_us) < SPAN_MIN_US:
        return None
    starts = sorted(starts_us)
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    period = median(gaps)
    if period < PERIOD_MIN_US:
        return None
    beats = [max(1, round(gap / period)) for gap in gaps]
    fits = [beat <= MISSED_MAX and abs(gap - beat * period) <= JITTER * period for gap, beat in zip(gaps, beats, strict=True)]
    usual = median(sizes)
    same = [abs(size - usual) <= SAME_SIZE * max(usual, 20) for size in sizes]
    return Rhythm(round(period), sum(fits) / len(fits), sum(same) / len(same))


class Beacons:
    """Watches flows for beacons; of at most ``keys_max`` keys those seen least often and longest ago are forgotten first."""

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self.forgotten = 0
        self._keys_max = keys_max
        self._new: OrderedDict[bytes, _Calls] = OrderedDict()
        self._known: OrderedDict[bytes, _Calls] = OrderedDict()

    def __len__(self) -> int:
        return len(self._new) + len(self._known)

    def score(self, flows: FlowBatch) -> list[Finding]:
        """Take a batch of finished flows; return the beacons among their keys."""
        needed = [COLUMN[name] for name in ("tot_bwd_pkts", "totlen_fwd_pkts")]
        if len(flows) == 0 or not flows.known[needed].all():
            return []
        answered = flows.features[:, needed[0]] > 0
        of_kind = ((flows.proto == _TCP) | (flows.proto == _UDP)) & ~np.isin(flows.dport, _LEFT_OUT)
        chosen = np.flatnonzero(answered & of_kind)
        chosen = chosen[_outside(flows.dst[chosen])]
        rows = chosen[np.argsort(flows.start_us[chosen], kind="stable")]
        columns = (flows.sport[rows], flows.start_us[rows], flows.features[rows, needed[1]].astype(np.int64))
        found: list[Finding] = []
        fresh: dict[bytes, tuple[int, _Calls]] = {}
        for row, key, *call in zip(rows.tolist(), _keys(flows, rows), *(column.tolist() for column in columns), strict=True):
            calls = self._calls(key)
            if calls.add(*call):
                found += _judged(flows, row, calls)
            if calls.unjudged and len(calls.starts_us) >= SIGHTINGS_MIN:
                fresh[key] = row, calls
        for row, calls in fresh.values():
            if calls.unjudged:
                found += _judged(flows, row, calls)
        return found

    def _calls(self, key: bytes) -> _Calls:
        calls = self._known.pop(key, None) or self._new.pop(key, None) or _Calls()
        (self._known if len(calls.starts_us) >= _FEW else self._new)[key] = calls
        if len(self) > self._keys_max:
            (self._new or self._known).popitem(last=False)
            self.forgotten += 1
        return calls


def _keys(flows: FlowBatch, rows: npt.NDArray[np.intp]) -> list[bytes]:
    """Return client, server, port and protocol of each row as 35 bytes."""
    packed = np.empty((len(rows), 35), dtype=np.uint8)
    packed[:, :16], packed[:, 16:32] = flows.src[rows], flows.dst[rows]
    packed[:, 32:34] = flows.dport[rows].astype(">u2").view(np.uint8).reshape(-1, 2)
    packed[:, 34] = flows.proto[rows]
    keys: list[bytes] = packed.view("V35").ravel().tolist()
    return keys


def _outside(addresses: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Mark addresses (uint8[n, 16]) that are in none of the networks inside."""
    high, low = np.ascontiguousarray(addresses).view(">u8").astype(np.uint64).reshape(-1, 2).T
    inside = np.zeros(len(addresses), dtype=np.bool_)
    for (high_mask, low_mask), (high_value, low_value) in _PREFIXES:
        inside |= ((high & high_mask) == high_value) & ((low & low_mask) == low_value)
    return ~inside


def _judged(flows: FlowBatch, row: int, calls: _Calls) -> list[Finding]:
    calls.unjudged = 0
    told = rhythm(calls.starts_us, calls.sizes)
    if told is None or told.regular < REGULAR_SHARE or told.same_size < REGULAR_SHARE:
        return []
    source, victim = address_text(flows.src[row]), address_text(flows.dst[row])
    count = len(calls.starts_us)
    finding = Finding(
        engine="statistics",
        type="botnet",
        entity=source,
        victim=victim,
        port=int(flows.dport[row]),
        protocol=int(flows.proto[row]),
        score=min(0.88, 0.76 + 0.04 * (count / SIGHTINGS_MIN - 1) + 0.04 * (told.regular - REGULAR_SHARE)),
        severity=5,
        first_us=min(calls.starts_us),
        last_us=int(flows.end_us[row]),
        count=count,
        spoofable=False,
        explanation=(
            f"Beacon: {source} calls {victim} port {int(flows.dport[row])} every {told.period_us / 1e6:.1f} s, "
            f"{count} times, with about {int(median(calls.sizes))} bytes"
        ),
        details={
            "metric": "beacon",
            "period_us": told.period_us,
            "regular": told.regular,
            "same_size": told.same_size,
            "calls": count,
        },
    )
    return [finding]
