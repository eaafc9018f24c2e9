"""Builds flow batches from what other meters report: few numbers, and a mask for all that cannot be known from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import packets
from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.flows import EndReason, FlowBatch

TIME_MAX_US = 1 << 53  # the year 2255; beyond it sums of times could overflow
COUNT_MAX = 1 << 53

_CLASS = np.zeros(256, np.uint8)
for _proto, _klass in ((6, packets.TCP), (17, packets.UDP), (1, packets.ICMP), (58, packets.ICMP)):
    _CLASS[_proto] = _klass
_FEATURE_PROTOCOL = np.zeros(256)  # of the feature: ICMP is one number for both versions, what has no ports is 0
for _proto, _number in ((6, 6), (17, 17), (1, 1), (58, 1)):
    _FEATURE_PROTOCOL[_proto] = _number
_MAPPED = np.array([0] * 10 + [0xFF, 0xFF], np.uint8)


class Ends(NamedTuple):
    """Whose flow it is; addresses are 16 bytes, ``proto`` the IP protocol number, ports 0 where there are none."""

    src: bytes
    dst: bytes
    sport: int
    dport: int
    proto: int
    icmp_type: int = 0
    icmp_code: int = 0


class Counted(NamedTuple):
    """What another meter counted; None for what it did not. Bytes are of L4 payload."""

    start_us: int
    duration_us: int | None
    fwd_packets: int | None
    bwd_packets: int | None
    fwd_bytes: int | None = None
    bwd_bytes: int | None = None

    @property
    def is_sound(self) -> bool:
        """Whether these can be counts of a flow at all."""
        return -TIME_MAX_US < self.start_us < TIME_MAX_US and all(value is None or 0 <= value < COUNT_MAX for value in self[1:])

    @property
    def lacking(self) -> tuple[bool, ...]:
        """Which values are missing: flows that lack the same have the same mask."""
        return tuple(value is None for value in self[1:])


@dataclass(frozen=True, slots=True)
class Times:
    """When n flows began and ended, and why, as columns."""

    start_us: npt.NDArray[np.int64]
    end_us: npt.NDArray[np.int64]
    end_reason: npt.NDArray[np.uint8] | None = None  # None: EXTERNAL


def flow_batch(
    ends: Sequence[Ends], times: Times, features: npt.NDArray[np.float64], known: npt.NDArray[np.bool_]
) -> FlowBatch:
    """Return n flows as a batch; ``features`` is float64[n, 79], and is made 0 where ``known`` (bool[79]) is false."""
    src, dst, sport, dport, proto, icmp_type, icmp_code = zip(*ends, strict=True) if ends else [()] * 7
    protocol = np.array(proto, np.uint8)
    klass = _CLASS[protocol]
    with_ports = (klass == packets.TCP) | (klass == packets.UDP)
    source = np.frombuffer(b"".join(src), np.uint8).reshape(-1, 16)
    features[:, ~known] = 0.0
    n = len(ends)
    return FlowBatch(
        start_us=times.start_us,
        end_us=times.end_us,
        src=source,
        dst=np.frombuffer(b"".join(dst), np.uint8).reshape(-1, 16),
        family=np.where((source[:, :12] == _MAPPED).all(axis=1), 4, 6).astype(np.uint8),
        sport=np.where(with_ports, np.array(sport, np.uint16), 0).astype(np.uint16),
        dport=np.where(with_ports, np.array(dport, np.uint16), 0).astype(np.uint16),
        proto=protocol,
        klass=klass,
        icmp_type=np.array(icmp_type, np.uint8),
        icmp_code=np.array(icmp_code, np.uint8),
        end_reason=times.end_reason if times.end_reason is not None else np.full(n, EndReason.EXTERNAL, np.uint8),
        features=features,
        known=known,
    )


def no_flows() -> FlowBatch:
    """Return an empty batch."""
    nothing = np.zeros(0, np.int64)
    return flow_batch([], Times(nothing, nothing), np.zeros((0, len(NAMES))), np.ones(len(NAMES), np.bool_))


def counted_flows(ends: Sequence[Ends], counted: Sequence[Counted]) -> FlowBatch:
    """Return flows of which only a few numbers are known, the same ones of all (``Counted.lacking``), with what follows."""
    raw = [[0 if value is None else value for value in row] for row in counted]
    given = dict(zip(Counted._fields, np.array(raw, np.int64).reshape(-1, 6).T, strict=True))
    lacking = {name for name, is_lacking in zip(Counted._fields[1:], counted[0].lacking, strict=True) if is_lacking}
    features, known = np.zeros((len(counted), len(NAMES))), np.zeros(len(NAMES), np.bool_)
    features[:, COLUMN["src_port"]] = [end.sport for end in ends]
    features[:, COLUMN["dst_port"]] = [end.dport for end in ends]
    features[:, COLUMN["protocol"]] = _FEATURE_PROTOCOL[[end.proto for end in ends]]
    known[[COLUMN[name] for name in ("src_port", "dst_port", "protocol")]] = True
    for names, needed, compute in _DERIVED:
        if lacking.isdisjoint(needed):
            for name in names:
                features[:, COLUMN[name]] = compute(*(given[part] for part in needed))
                known[COLUMN[name]] = True
    times = Times(given["start_us"], given["start_us"] + given["duration_us"])
    return flow_batch(ends, times, features, known)


_I64 = npt.NDArray[np.int64]
_F64 = npt.NDArray[np.float64]


def _ratio(above: _I64, below: _I64) -> _F64:
    """Return the quotient, 0 where there is none."""
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)


def _rate(amount: _I64, duration_us: _I64) -> _F64:
    return _ratio(amount * 1_000_000, duration_us) if (amount < COUNT_MAX >> 20).all() else 1e6 * _ratio(amount, duration_us)


# Features, what they are made of, and how.
_DERIVED: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[..., _I64 | _F64]], ...] = (
    (("flow_duration",), ("duration_us",), lambda us: us),
    (("tot_fwd_pkts",), ("fwd_packets",), lambda n: n),
    (("tot_bwd_pkts",), ("bwd_packets",), lambda n: n),
    (("totlen_fwd_pkts",), ("fwd_bytes",), lambda n: n),
    (("totlen_bwd_pkts",), ("bwd_bytes",), lambda n: n),
    (("fwd_pkt_len_mean", "fwd_seg_size_avg"), ("fwd_bytes", "fwd_packets"), _ratio),
    (("bwd_pkt_len_mean", "bwd_seg_size_avg"), ("bwd_bytes", "bwd_packets"), _ratio),
    (("pkt_len_mean", "pkt_size_avg"), Counted._fields[2:], lambda f, b, fb, bb: _ratio(fb + bb, f + b)),
    (("down_up_ratio",), ("bwd_packets", "fwd_packets"), _ratio),
    (("fwd_pkts_s",), ("fwd_packets", "duration_us"), _rate),
    (("bwd_pkts_s",), ("bwd_packets", "duration_us"), _rate),
    (("flow_pkts_s",), ("fwd_packets", "bwd_packets", "duration_us"), lambda f, b, us: _rate(f + b, us)),
    (("flow_byts_s",), ("fwd_bytes", "bwd_bytes", "duration_us"), lambda f, b, us: _rate(f + b, us)),
    (("flow_iat_mean",), ("duration_us", "fwd_packets", "bwd_packets"), lambda us, f, b: _ratio(us, f + b - 1)),
)
