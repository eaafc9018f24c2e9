"""Beacons: a host that calls the same place outside again and again at the same interval, saying about the same.

For each client, server, port and protocol the starts of its last ``SIGHTINGS_MAX`` answered flows are kept. The period is their
median gap; a beacon's gaps are the period or, after missed beats, a small multiple of it, give or take ``JITTER``, and what it
sends has nearly always the same size. Pieces of one long connection (the same client port again) are no new sightings.

Health checks, polls and updates beat as regularly as malware does, so what is found is a low alert, never a policy; time
services, names and everything within one's own networks are left out. A key that has been seen often is forgotten last, so
that a flood of new ones does not push a slow beacon out.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections import OrderedDict, deque
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
_INSIDE = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10", "224.0.0.0/3"),
        *("0.0.0.0/8", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8"),
    )
)


@dataclass(slots=True)
class _Calls:
    sport: int = -1
    starts_us: deque[int] = field(default_factory=lambda: deque(maxlen=SIGHTINGS_MAX))
    sizes: deque[int] = field(default_factory=lambda: deque(maxlen=SIGHTINGS_MAX))


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How regular a series of calls is: period, the share of gaps that fit it, and the share of calls of the usual size."""

    period_us: int
    regular: float
    same_size: float


def rhythm(starts_us: Sequence[int], sizes: Sequence[int]) -> Rhythm | None:
    """Return the rhythm of calls (starts in any order, bytes sent), None if they are too few or too dense to have one."""
    starts = sorted(starts_us)
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    if len(starts) < SIGHTINGS_MIN or starts[-1] - starts[0] < SPAN_MIN_US:
        return None
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
        chosen = _abroad(flows, np.nonzero(answered & of_kind)[0])
        found: list[Finding] = []
        for row in chosen[np.argsort(flows.start_us[chosen], kind="stable")].tolist():
            key = (
                flows.src[row].tobytes()
                + flows.dst[row].tobytes()
                + int(flows.dport[row]).to_bytes(2)
                + bytes([flows.proto[row]])
            )
            calls = self._calls(key)
            if calls.sport == int(flows.sport[row]):
                continue
            calls.sport = int(flows.sport[row])
            calls.starts_us.append(int(flows.start_us[row]))
            calls.sizes.append(int(flows.features[row, needed[1]]))
            if len(calls.starts_us) >= SIGHTINGS_MIN and (finding := _judged(flows, row, calls)) is not None:
                found.append(finding)
        return found

    def _calls(self, key: bytes) -> _Calls:
        calls = self._known.pop(key, None) or self._new.pop(key, None) or _Calls()
        (self._known if len(calls.starts_us) >= _FEW else self._new)[key] = calls
        if len(self) > self._keys_max:
            (self._new or self._known).popitem(last=False)
            self.forgotten += 1
        return calls


def _abroad(flows: FlowBatch, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return those of ``rows`` whose destination is outside; each destination of a batch is looked at once."""
    called = flows.dst[rows].view("V16").ravel().tolist()
    outside = {raw for raw in set(called) if _is_outside(address_text(np.frombuffer(raw, dtype=np.uint8)))}
    return rows[np.array([raw in outside for raw in called], dtype=np.bool_)]


def _judged(flows: FlowBatch, row: int, calls: _Calls) -> Finding | None:
    told = rhythm(calls.starts_us, calls.sizes)
    if told is None or told.regular < REGULAR_SHARE or told.same_size < REGULAR_SHARE:
        return None
    source, victim = address_text(flows.src[row]), address_text(flows.dst[row])
    count = len(calls.starts_us)
    return Finding(
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


def _is_outside(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not any(parsed.version == network.version and parsed in network for network in _INSIDE)
