"""From a flow's integer state to its 79 features: the only place where floats appear.

Sums are exact integers up to here, so a mean is one rounding away from the truth, and a variance is computed from exact
deviations (below), never as the difference of two large floats. No value: 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.meter_state import BACKWARD, BULK_PACKETS, FORWARD, NOTHING, Flow, Side
from cybermesh.telemetry.packets import ICMP, TCP, UDP

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

_PROTOCOL = np.zeros(256, np.int64)
_PROTOCOL[[TCP, UDP, ICMP]] = (6, 17, 1)


class _Sample(NamedTuple):
    """What is known of some values of each flow."""

    number: I64
    total: I64
    squares: I64  # sum of the squares
    high: I64
    low: I64


def compute_features(
    state: I64, sport: npt.NDArray[np.uint16], dport: npt.NDArray[np.uint16], klass: npt.NDArray[np.uint8]
) -> F64:
    """Return float64[n_flows, 79] in the order of ``features.NAMES``; every value is finite.

    Args:
        state: int64[meter_state.WIDTH, n_flows].
        sport: Port of each forward endpoint.
        dport: Port of each backward endpoint.
        klass: Traffic class of each flow.
    """
    table = np.zeros((len(NAMES), state.shape[1]))
    out = {name: table[index] for name, index in COLUMN.items()}
    forward, backward = state[FORWARD:BACKWARD].copy(), state[BACKWARD:].copy()
    _close_runs(state, forward, backward)
    out["src_port"][:], out["dst_port"][:], out["protocol"][:] = sport, dport, _PROTOCOL[klass]
    _whole_flow(out, state, forward, backward)
    _flags(out, state, forward, backward)
    for side, columns in (("fwd", forward), ("bwd", backward)):
        _direction(out, side, columns, state[Flow.PAUSES] + 1)
    out["fwd_act_data_pkts"][:] = forward[Side.DATA]
    out["fwd_seg_size_min"][:] = _minimum(forward[Side.HEADER_MIN])
    out["down_up_ratio"][:] = _ratio(backward[Side.N], forward[Side.N])
    _active_idle(out, state)
    return np.ascontiguousarray(table.T)


def _whole_flow(out: dict[str, F64], state: I64, forward: I64, backward: I64) -> None:
    both = forward + backward
    packets, payload, duration = both[Side.N], both[Side.BYTES], state[Flow.LATEST]
    out["flow_duration"][:] = duration
    out["flow_byts_s"][:] = _per_second(payload, duration)
    out["flow_pkts_s"][:] = _per_second(packets, duration)
    out["fwd_pkts_s"][:] = _per_second(forward[Side.N], duration)
    out["bwd_pkts_s"][:] = _per_second(backward[Side.N], duration)
    gaps = _Sample(packets - 1, duration, state[Flow.IAT_SQ], state[Flow.IAT_MAX], state[Flow.IAT_MIN])
    _spread(out, "flow_iat", gaps)
    out["pkt_len_max"][:] = np.maximum(forward[Side.LEN_MAX], backward[Side.LEN_MAX])
    out["pkt_len_min"][:] = _minimum(np.minimum(forward[Side.LEN_MIN], backward[Side.LEN_MIN]))
    out["pkt_len_mean"][:] = out["pkt_size_avg"][:] = _ratio(payload, packets)
    out["pkt_len_var"][:] = _variance(packets, payload, both[Side.SQ_LOW], both[Side.SQ_HIGH])
    out["pkt_len_std"][:] = np.sqrt(out["pkt_len_var"])


def _flags(out: dict[str, F64], state: I64, forward: I64, backward: I64) -> None:
    for name, flag in (("fin", Flow.FIN), ("syn", Flow.SYN), ("rst", Flow.RST), ("ack", Flow.ACK), ("ece", Flow.ECE)):
        out[f"{name}_flag_cnt"][:] = state[flag]
    out["cwe_flag_count"][:] = state[Flow.CWR]
    for name, column in (("psh", Side.PSH), ("urg", Side.URG)):
        out[f"fwd_{name}_flags"][:] = forward[column]
        out[f"bwd_{name}_flags"][:] = backward[column]
        out[f"{name}_flag_cnt"][:] = forward[column] + backward[column]


def _direction(out: dict[str, F64], side: str, columns: I64, parts: I64) -> None:
    """Fill what exists once for each direction; ``parts`` is the number of sub-flows."""
    packets, payload = columns[Side.N], columns[Side.BYTES]
    out[f"tot_{side}_pkts"][:] = packets
    out[f"totlen_{side}_pkts"][:] = payload
    out[f"{side}_pkt_len_max"][:] = columns[Side.LEN_MAX]
    out[f"{side}_pkt_len_min"][:] = _minimum(columns[Side.LEN_MIN])
    out[f"{side}_pkt_len_mean"][:] = out[f"{side}_seg_size_avg"][:] = _ratio(payload, packets)
    out[f"{side}_pkt_len_std"][:] = np.sqrt(_variance(packets, payload, columns[Side.SQ_LOW], columns[Side.SQ_HIGH]))
    total = columns[Side.LAST] - columns[Side.FIRST]
    out[f"{side}_iat_tot"][:] = total
    gaps = _Sample(packets - 1, total, columns[Side.IAT_SQ], columns[Side.IAT_MAX], columns[Side.IAT_MIN])
    _spread(out, f"{side}_iat", gaps)
    out[f"{side}_header_len"][:] = columns[Side.HEADER]
    out[f"init_{side}_win_byts"][:] = columns[Side.WINDOW]
    out[f"subflow_{side}_pkts"][:] = _ratio(packets, parts)
    out[f"subflow_{side}_byts"][:] = _ratio(payload, parts)
    out[f"{side}_byts_b_avg"][:] = _ratio(columns[Side.BULK_BYTES], columns[Side.BULKS])
    out[f"{side}_pkts_b_avg"][:] = _ratio(columns[Side.BULK_N], columns[Side.BULKS])
    out[f"{side}_blk_rate_avg"][:] = _per_second(columns[Side.BULK_BYTES], columns[Side.BULK_US])


def _active_idle(out: dict[str, F64], state: I64) -> None:
    for name in ("ACTIVE", "IDLE"):
        _spread(out, name.lower(), _Sample(*(state[Flow[f"{name}_{part}"]] for part in ("N", "SUM", "SQ", "MAX", "MIN"))))


def _close_runs(state: I64, forward: I64, backward: I64) -> None:
    """Count the run that was still open at the end of the flow, if it is long enough to be a bulk."""
    bulk = state[Flow.RUN_N] >= BULK_PACKETS
    for columns, is_forward in ((forward, 1), (backward, 0)):
        ours = bulk & (state[Flow.RUN_FORWARD] == is_forward)
        columns[Side.BULKS] += ours
        columns[Side.BULK_N] += np.where(ours, state[Flow.RUN_N], 0)
        columns[Side.BULK_BYTES] += np.where(ours, state[Flow.RUN_BYTES], 0)
        columns[Side.BULK_US] += np.where(ours, state[Flow.RUN_LAST] - state[Flow.RUN_FIRST], 0)


def _spread(out: dict[str, F64], name: str, sample: _Sample) -> None:
    """Fill mean, standard deviation, maximum and minimum of a sample (``number`` of 0 or less: no value)."""
    count = np.maximum(sample.number, 0)
    out[f"{name}_mean"][:] = _ratio(sample.total, count)
    out[f"{name}_std"][:] = np.sqrt(_variance(count, sample.total, sample.squares, np.zeros_like(sample.squares)))
    out[f"{name}_max"][:] = sample.high
    out[f"{name}_min"][:] = _minimum(sample.low)


def _minimum(column: I64) -> I64:
    return np.where(column == NOTHING, 0, column)


def _ratio(numerator: I64, denominator: I64) -> F64:
    """Divide; 0 where the denominator is 0."""
    result = np.zeros(len(numerator))
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result


def _per_second(amount: I64, duration_us: I64) -> F64:
    """Return ``amount`` per second; 0 where the duration is 0."""
    return _ratio(amount, duration_us) * 1e6


def _variance(count: I64, total: I64, low: I64, high: I64) -> F64:
    """Sample variance of ``count`` values from their sum and the sum of their squares (``low + high * 2**32``); 0 below two.

    With ``total = a·count + rest`` the integer ``d = Σ(x - a)²`` is exact in 64 bits, and the variance is
    ``(count·d - rest²) / (count·(count - 1))``: nothing large cancels, and equal values give exactly 0.
    """
    result = np.zeros(len(count))
    rows = np.flatnonzero(count > 1)
    huge = high[rows] >= 1 << 30
    for row in rows[huge].tolist():  # squares beyond 64 bits, from hostile lengths: in Python's integers
        number, sum_, squares = int(count[row]), int(total[row]), int(low[row]) + (int(high[row]) << 32)
        result[row] = (number * squares - sum_ * sum_) / (number * (number - 1))
    rows = rows[~huge]
    n, s, q = count[rows], total[rows], low[rows] + (high[rows] << 32)
    whole, rest = s // n, s % n
    d = q - whole * (s + rest)
    exact = d < (1 << 62) // n
    product = np.where(exact, n * np.where(exact, d, 0) - rest * rest, 0)
    close = product / n
    far = d - rest * (rest / n)
    result[rows] = np.where(exact, close, far) / (n - 1)
    return result
