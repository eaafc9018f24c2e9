"""From a flow's integer state to its identifiers and 79 features: ``features_compute`` for one flow after the other.

Every value comes from the same operations in the same order as there, so it is the same to the last bit. A flow with squares
beyond 64 bits (hostile lengths) is listed and left to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba.core import types

from cybermesh.telemetry import meter_state as layout
from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.kernels import kernel, part, prefetch, record
from cybermesh.telemetry.meter_state import BULK_PACKETS, NOTHING, WIDTH, Flow, Side
from cybermesh.telemetry.packets import ICMP, TCP, UDP

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_HUGE = 1 << 30  # squares of this many times 2**32: ``_variance`` of the reference needs Python's integers
_AHEAD = 4  # rows asked for before they are needed
_LINE = 8

_FORWARD, _BACKWARD = layout.FORWARD, layout.BACKWARD
_START, _FORWARD_SIDE, _LATEST, _PAUSES = (int(c) for c in (Flow.START, Flow.FORWARD_SIDE, Flow.LATEST, Flow.PAUSES))
_IAT_SQ, _IAT_MAX, _IAT_MIN = (int(c) for c in (Flow.IAT_SQ, Flow.IAT_MAX, Flow.IAT_MIN))
_RUN_FORWARD, _RUN_N, _RUN_BYTES, _RUN_FIRST, _RUN_LAST = range(Flow.RUN_FORWARD, Flow.RUN_LAST + 1)
_ACTIVE_N, _IDLE_N = int(Flow.ACTIVE_N), int(Flow.IDLE_N)
_N, _BYTES, _SQ_LOW, _SQ_HIGH, _LEN_MAX, _LEN_MIN = range(Side.N, Side.LEN_MIN + 1)
_FIRST, _LAST, _SIDE_IAT_SQ, _SIDE_IAT_MAX, _SIDE_IAT_MIN = range(Side.FIRST, Side.IAT_MIN + 1)
_PSH, _URG, _DATA, _HEADER, _HEADER_MIN, _WINDOW = range(Side.PSH, Side.WINDOW + 1)
_BULKS, _BULK_N, _BULK_BYTES, _BULK_US = range(Side.BULKS, Side.BULK_US + 1)

_FLAGS = tuple((COLUMN[f"{name}_flag_cnt"], int(Flow[name.upper()])) for name in ("fin", "syn", "rst", "ack", "ece"))
_CWR_OUT, _CWR = COLUMN["cwe_flag_count"], int(Flow.CWR)
_PSH_OUT, _URG_OUT = COLUMN["psh_flag_cnt"], COLUMN["urg_flag_cnt"]
_SRC_PORT, _DST_PORT, _PROTOCOL, _DURATION = (COLUMN[n] for n in ("src_port", "dst_port", "protocol", "flow_duration"))
_RATES = tuple(COLUMN[name] for name in ("flow_byts_s", "flow_pkts_s", "fwd_pkts_s", "bwd_pkts_s"))
_LENGTHS = tuple(COLUMN[f"pkt_len_{name}"] for name in ("max", "min", "mean", "var", "std"))
_SIZE_AVG, _RATIO_OUT = COLUMN["pkt_size_avg"], COLUMN["down_up_ratio"]
_DATA_OUT, _SEG_MIN_OUT = COLUMN["fwd_act_data_pkts"], COLUMN["fwd_seg_size_min"]
_FLOW_IAT = COLUMN["flow_iat_mean"]
_ACTIVE_OUT, _IDLE_OUT = COLUMN["active_mean"], COLUMN["idle_mean"]


def _side_columns(side: str) -> tuple[int, ...]:
    names = (
        f"tot_{side}_pkts", f"totlen_{side}_pkts", f"{side}_pkt_len_max", f"{side}_pkt_len_min", f"{side}_pkt_len_mean",
        f"{side}_pkt_len_std", f"{side}_seg_size_avg", f"{side}_iat_tot", f"{side}_iat_mean", f"{side}_header_len",
        f"init_{side}_win_byts", f"subflow_{side}_pkts", f"subflow_{side}_byts", f"{side}_byts_b_avg", f"{side}_pkts_b_avg",
        f"{side}_blk_rate_avg", f"{side}_psh_flags", f"{side}_urg_flags",
    )  # fmt: skip
    return tuple(COLUMN[name] for name in names)


_FORWARD_OUT, _BACKWARD_OUT = _side_columns("fwd"), _side_columns("bwd")
for _spread_at in ("flow_iat", "fwd_iat", "bwd_iat", "active", "idle"):
    assert [COLUMN[f"{_spread_at}_{name}"] - COLUMN[f"{_spread_at}_mean"] for name in ("std", "max", "min")] == [1, 2, 3]


@part
def _ratio(numerator: int, denominator: int) -> float:
    return np.float64(numerator) / np.float64(denominator) if denominator != 0 else 0.0


@part
def _per_second(amount: int, duration_us: int) -> float:
    return _ratio(amount, duration_us) * 1e6


@part
def _minimum(value: int) -> int:
    return 0 if value == NOTHING else value


@part
def _variance(n: int, total: int, low: int, high: int) -> float:
    """Sample variance; why it is computed like this, is said at the reference."""
    if n <= 1:
        return 0.0
    squares = low + (high << 32)
    whole = total // n
    rest = total - whole * n
    d = squares - whole * (total + rest)
    if d < (1 << 62) // n:
        return np.float64(n * d - rest * rest) / np.float64(n) / np.float64(n - 1)
    far = np.float64(d) - np.float64(rest) * (np.float64(rest) / np.float64(n))
    return far / np.float64(n - 1)


@part
def _spread(out: F64, i: int, at: int, sample: tuple[int, int, int, int, int]) -> None:
    """Fill mean, standard deviation, maximum and minimum, which lie side by side.

    ``sample`` is how many values there are (0 or less: none), their sum, sum of squares, maximum and minimum.
    """
    count, total, squares, high, low = sample
    count = max(count, 0)
    out[i, at] = _ratio(total, count)
    out[i, at + 1] = math.sqrt(_variance(count, total, squares, 0))
    out[i, at + 2] = high
    out[i, at + 3] = _minimum(low)


@part
def _direction(out: F64, i: int, rows: I64, row: np.uint32, base: int, names: tuple[int, ...]) -> None:
    """Fill what exists once for each direction."""
    packets, payload, parts = rows[row, base + _N], rows[row, base + _BYTES], rows[row, _PAUSES] + 1
    total = rows[row, base + _LAST] - rows[row, base + _FIRST]
    variance = _variance(packets, payload, rows[row, base + _SQ_LOW], rows[row, base + _SQ_HIGH])
    out[i, names[0]] = packets
    out[i, names[1]] = payload
    out[i, names[2]] = rows[row, base + _LEN_MAX]
    out[i, names[3]] = _minimum(rows[row, base + _LEN_MIN])
    out[i, names[4]] = out[i, names[6]] = _ratio(payload, packets)
    out[i, names[5]] = math.sqrt(variance)
    out[i, names[7]] = total
    squares, high, low = rows[row, base + _SIDE_IAT_SQ], rows[row, base + _SIDE_IAT_MAX], rows[row, base + _SIDE_IAT_MIN]
    _spread(out, i, names[8], (packets - 1, total, squares, high, low))
    out[i, names[9]] = rows[row, base + _HEADER]
    out[i, names[10]] = rows[row, base + _WINDOW]
    out[i, names[11]] = _ratio(packets, parts)
    out[i, names[12]] = _ratio(payload, parts)
    out[i, names[16]] = rows[row, base + _PSH]
    out[i, names[17]] = rows[row, base + _URG]


@part
def _bulk(out: F64, i: int, rows: I64, row: np.uint32, base: int, names: tuple[int, ...]) -> None:
    """Fill what is known of bulks; a run still open at the end of the flow counts if it is long enough."""
    bulks, number = rows[row, base + _BULKS], rows[row, base + _BULK_N]
    size, lasted = rows[row, base + _BULK_BYTES], rows[row, base + _BULK_US]
    if rows[row, _RUN_N] >= BULK_PACKETS and (rows[row, _RUN_FORWARD] != 0) == (base == _FORWARD):
        bulks += 1
        number += rows[row, _RUN_N]
        size += rows[row, _RUN_BYTES]
        lasted += rows[row, _RUN_LAST] - rows[row, _RUN_FIRST]
    out[i, names[13]] = _ratio(size, bulks)
    out[i, names[14]] = _ratio(number, bulks)
    out[i, names[15]] = _per_second(size, lasted)


@part
def _whole_flow(out: F64, i: int, rows: I64, row: np.uint32) -> None:
    forward, backward = rows[row, _FORWARD + _N], rows[row, _BACKWARD + _N]
    packets, payload = forward + backward, rows[row, _FORWARD + _BYTES] + rows[row, _BACKWARD + _BYTES]
    duration = rows[row, _LATEST]
    out[i, _DURATION] = duration
    out[i, _RATES[0]] = _per_second(payload, duration)
    out[i, _RATES[1]] = _per_second(packets, duration)
    out[i, _RATES[2]] = _per_second(forward, duration)
    out[i, _RATES[3]] = _per_second(backward, duration)
    gaps = (packets - 1, duration, rows[row, _IAT_SQ], rows[row, _IAT_MAX], rows[row, _IAT_MIN])
    _spread(out, i, _FLOW_IAT, gaps)
    low = rows[row, _FORWARD + _SQ_LOW] + rows[row, _BACKWARD + _SQ_LOW]
    high = rows[row, _FORWARD + _SQ_HIGH] + rows[row, _BACKWARD + _SQ_HIGH]
    variance = _variance(packets, payload, low, high)
    out[i, _LENGTHS[0]] = max(rows[row, _FORWARD + _LEN_MAX], rows[row, _BACKWARD + _LEN_MAX])
    out[i, _LENGTHS[1]] = _minimum(min(rows[row, _FORWARD + _LEN_MIN], rows[row, _BACKWARD + _LEN_MIN]))
    out[i, _LENGTHS[2]] = out[i, _SIZE_AVG] = _ratio(payload, packets)
    out[i, _LENGTHS[3]] = variance
    out[i, _LENGTHS[4]] = math.sqrt(variance)
    out[i, _RATIO_OUT] = _ratio(backward, forward)


@part
def _flags(out: F64, i: int, rows: I64, row: np.uint32) -> None:
    for name, column in _FLAGS:
        out[i, name] = rows[row, column]
    out[i, _CWR_OUT] = rows[row, _CWR]
    out[i, _PSH_OUT] = rows[row, _FORWARD + _PSH] + rows[row, _BACKWARD + _PSH]
    out[i, _URG_OUT] = rows[row, _FORWARD + _URG] + rows[row, _BACKWARD + _URG]


@part
def _active_idle(out: F64, i: int, rows: I64, row: np.uint32, at: int, column: int) -> None:
    if rows[row, column] == 0:
        out[i, at] = out[i, at + 1] = out[i, at + 2] = out[i, at + 3] = 0.0
        return
    count, total, squares = rows[row, column], rows[row, column + 1], rows[row, column + 2]
    _spread(out, i, at, (count, total, squares, rows[row, column + 3], rows[row, column + 4]))


class Emitted(NamedTuple):
    """Columns of a ``FlowBatch`` of n flows.

    ``src`` (the forward endpoint) and ``dst`` are uint64[n, 2]; ``ports`` uint16[2, n] are theirs; ``small`` uint8[5, n] is
    family, protocol number, class, ICMP type and code; ``features`` float64[n, 79]; ``huge`` int64[n] is filled from the front
    with the numbers of flows whose features the reference must compute.
    """

    start_us: I64
    end_us: I64
    src: U64
    dst: U64
    ports: U16
    small: U8
    features: F64
    huge: I64


_WIDE, _PAIRS = types.int64[::1], types.uint64[:, ::1]
EMITTED = record(Emitted, _WIDE, _WIDE, _PAIRS, _PAIRS, types.uint16[:, ::1], types.uint8[:, ::1], types.float64[:, ::1], _WIDE)


def new_emitted(count: int) -> Emitted:
    """Return columns for so many flows."""
    return Emitted(
        start_us=np.empty(count, np.int64),
        end_us=np.empty(count, np.int64),
        src=np.empty((count, 2), np.uint64),
        dst=np.empty((count, 2), np.uint64),
        ports=np.empty((2, count), np.uint16),
        small=np.empty((5, count), np.uint8),
        features=np.empty((count, len(NAMES))),
        huge=np.empty(count, np.int64),
    )


@kernel(types.int64(types.int64[:, ::1], types.uint32[::1], EMITTED))
def emit(rows: I64, chosen: U32, out: Emitted) -> int:
    """Fill ``out`` from the flows in ``chosen`` rows of a table, in that order; return how many are huge."""
    features = out.features
    count = 0
    for i in range(len(chosen)):
        if i + _AHEAD < len(chosen):
            following = rows[chosen[i + _AHEAD]]
            for line in range(0, len(following), _LINE):
                prefetch(following, line)
        row = chosen[i]
        out.start_us[i] = rows[row, _START]
        out.end_us[i] = rows[row, _START] + rows[row, _LATEST]
        turned = rows[row, _FORWARD_SIDE]
        ours, others = WIDTH + 2 * turned, WIDTH + 2 - 2 * turned
        out.src[i, 0], out.src[i, 1] = np.uint64(rows[row, ours]), np.uint64(rows[row, ours + 1])
        out.dst[i, 0], out.dst[i, 1] = np.uint64(rows[row, others]), np.uint64(rows[row, others + 1])
        packed = rows[row, WIDTH + 4]
        low, high = packed >> 48 & 0xFFFF, packed >> 32 & 0xFFFF
        klass = packed >> 20 & 15
        out.ports[0, i], out.ports[1, i] = (high, low) if turned else (low, high)
        out.small[0, i], out.small[1, i], out.small[2, i] = packed >> 16 & 15, packed >> 24 & 255, klass
        out.small[3, i], out.small[4, i] = packed >> 8 & 255, packed & 255
        features[i, _SRC_PORT], features[i, _DST_PORT] = out.ports[0, i], out.ports[1, i]
        features[i, _PROTOCOL] = 6 if klass == TCP else 17 if klass == UDP else 1 if klass == ICMP else 0
        _whole_flow(features, i, rows, row)
        _flags(features, i, rows, row)
        _direction(features, i, rows, row, _FORWARD, _FORWARD_OUT)
        _direction(features, i, rows, row, _BACKWARD, _BACKWARD_OUT)
        _bulk(features, i, rows, row, _FORWARD, _FORWARD_OUT)
        _bulk(features, i, rows, row, _BACKWARD, _BACKWARD_OUT)
        features[i, _DATA_OUT] = rows[row, _FORWARD + _DATA]
        features[i, _SEG_MIN_OUT] = _minimum(rows[row, _FORWARD + _HEADER_MIN])
        _active_idle(features, i, rows, row, _ACTIVE_OUT, _ACTIVE_N)
        _active_idle(features, i, rows, row, _IDLE_OUT, _IDLE_N)
        if rows[row, _FORWARD + _SQ_HIGH] + rows[row, _BACKWARD + _SQ_HIGH] >= _HUGE:
            out.huge[count] = i
            count += 1
    return count
