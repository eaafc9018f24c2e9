"""Where the classifier must not be believed: rows another extractor wrote, and rows unlike anything it was trained on.

A model trained on one network answers with full confidence on another, and is wrong there. Three tests stand between a row and
its verdict; a row that fails one is an abstention, with the reason:

- ``contradictions``: arithmetic between features that holds by definition (mean = sum / n). A row that breaks it was not made
  by the definitions the model was trained with;
- ``implausible``: what no ordinary TCP stack sends (a SYN with payload in a flow, packets without ACK that are neither SYN nor
  RST). Scanners do send it, so it says nothing about the extractor; rules and windows judge such rows;
- ``Density``: distance to the training rows of the class the model claims, in units of their local spread.

All of it is numpy on columns: about 1 ms for a thousand rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.features import NAMES

TCP, UDP = 6, 17
Columns = Mapping[str, npt.NDArray[np.float64]]
Mask = npt.NDArray[np.bool_]
_AT = {name: index for index, name in enumerate(NAMES)}
_RELATIVE = 1e-6
_SINGLE_THREAD_PRODUCTS = 200_000  # OpenBLAS stays on one thread below 4 x 65,536 multiplications


class Reason(enum.IntFlag):
    """Why a row is not judged; 0 is judged."""

    SINGLE_PACKET = 1
    UNKNOWN_INPUT = 2
    CONTRADICTION = 4
    IMPLAUSIBLE = 8
    UNFAMILIAR = 16
    FOREIGN_FILE = 32


def single_packet(features: npt.NDArray[np.float64]) -> Mask:
    """Mark flows of one packet, which no training table holds; features float64[n, 79]."""
    marked: Mask = features[:, _AT["tot_fwd_pkts"]] + features[:, _AT["tot_bwd_pkts"]] <= 1
    return marked


def contradictions(features: npt.NDArray[np.float64], known: Mask) -> Mask:
    """Mark rows of float64[n, 79] that break an identity of the definitions; tests of unknown features are left out."""
    return _broken(_IDENTITIES, features, known)


def implausible(features: npt.NDArray[np.float64], known: Mask) -> Mask:
    """Mark rows (of float64[n, 79]) that no ordinary TCP stack produces."""
    return _broken(_PRACTICES, features, known)


def _broken(checks: Sequence[_Check], features: npt.NDArray[np.float64], known: Mask) -> Mask:
    columns = {name: np.ascontiguousarray(features[:, index]) for name, index in _AT.items() if known[index]}
    broken = np.zeros(len(features), dtype=np.bool_)
    for check in checks:
        if all(name in columns for name in check.needs):
            broken |= ~check.holds(columns)
    return broken


@dataclass(frozen=True, slots=True)
class _Check:
    needs: tuple[str, ...]
    holds: Callable[[Columns], Mask]


def _same(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64], absolute: float = 1e-6) -> Mask:
    return np.abs(left - right) <= _RELATIVE * np.abs(right) + absolute


def _product(mean: str, count: str, total: str) -> _Check:
    return _Check((mean, count, total), lambda c: _same(c[mean] * c[count], c[total], 1e-3))


def _rate(rate: str, *parts: str) -> _Check:
    def holds(c: Columns) -> Mask:
        amount = c[parts[0]] if len(parts) == 1 else c[parts[0]] + c[parts[1]]
        duration = c["flow_duration"]
        return _same(c[rate] * duration, np.where(duration > 0, amount * 1e6, 0.0), 1.0)

    return _Check((rate, *parts, "flow_duration"), holds)


def _equal(left: str, right: str) -> _Check:
    return _Check((left, right), lambda c: _same(c[left], c[right]))


def _sum(left: str, right: str, total: str) -> _Check:
    return _Check((left, right, total), lambda c: c[left] + c[right] == c[total])


def _at_most(small: str, large: str) -> _Check:
    return _Check((small, large), lambda c: c[small] <= c[large] * (1 + _RELATIVE) + 1.0)


def _ordered(low: str, middle: str, high: str) -> _Check:
    def holds(c: Columns) -> Mask:
        slack = _RELATIVE * c[high] + 1e-6
        return (c[low] <= c[middle] + slack) & (c[middle] <= c[high] + slack)

    return _Check((low, middle, high), holds)


def _packet_totals(c: Columns) -> Mask:
    packets = c["tot_fwd_pkts"] + c["tot_bwd_pkts"]
    payload = c["totlen_fwd_pkts"] + c["totlen_bwd_pkts"]
    return _same(c["pkt_len_mean"] * packets, payload, 1e-3) & _same(c["pkt_size_avg"] * packets, payload, 1e-3)


def _pooled_variance(c: Columns) -> Mask:
    """The variance over all packets follows from the two directions' counts, means and deviations."""
    forward, backward = c["tot_fwd_pkts"], c["tot_bwd_pkts"]
    packets = forward + backward
    mean = (c["totlen_fwd_pkts"] + c["totlen_bwd_pkts"]) / np.maximum(packets, 1)
    squares = np.zeros_like(mean)
    for count, side in ((forward, "fwd"), (backward, "bwd")):
        offset = c[f"{side}_pkt_len_mean"] - mean
        squares += np.maximum(count - 1, 0) * c[f"{side}_pkt_len_std"] ** 2 + count * offset * offset
    variance = squares / np.maximum(packets - 1, 1)
    return np.abs(c["pkt_len_var"] - variance) <= 1e-4 * variance + 0.1


def _extremes(c: Columns) -> Mask:
    forward, backward = c["tot_fwd_pkts"] > 0, c["tot_bwd_pkts"] > 0
    low = np.minimum(np.where(forward, c["fwd_pkt_len_min"], np.inf), np.where(backward, c["bwd_pkt_len_min"], np.inf))
    high = np.maximum(c["fwd_pkt_len_max"], c["bwd_pkt_len_max"])
    holds: Mask = (c["pkt_len_min"] == low) & (c["pkt_len_max"] == high)
    return holds


def _gaps(c: Columns) -> Mask:
    packets = c["tot_fwd_pkts"] + c["tot_bwd_pkts"]
    duration = c["flow_duration"]
    forward = _same(c["fwd_iat_mean"] * np.maximum(c["tot_fwd_pkts"] - 1, 0), c["fwd_iat_tot"], 1.0)
    backward = _same(c["bwd_iat_mean"] * np.maximum(c["tot_bwd_pkts"] - 1, 0), c["bwd_iat_tot"], 1.0)
    return _same(c["flow_iat_mean"] * np.maximum(packets - 1, 0), duration, 1.0) & forward & backward


def _ratio(c: Columns) -> Mask:
    forward = c["tot_fwd_pkts"]
    return _same(c["down_up_ratio"] * forward, np.where(forward > 0, c["tot_bwd_pkts"], 0.0), 1e-3)


def _headers(c: Columns) -> Mask:
    """TCP headers have 20 to 60 bytes, UDP's 8."""
    tcp, udp = c["protocol"] == TCP, c["protocol"] == UDP
    holds = np.ones(len(tcp), dtype=np.bool_)
    for side in ("fwd", "bwd"):
        length, packets = c[f"{side}_header_len"], c[f"tot_{side}_pkts"]
        holds &= ~tcp | ((length >= 20 * packets) & (length <= 60 * packets))
        holds &= ~udp | (length == 8 * packets)
    return holds


def _data_packets(c: Columns) -> Mask:
    """All forward packets carry data exactly when the shortest does."""
    data, forward = c["fwd_act_data_pkts"], c["tot_fwd_pkts"]
    holds: Mask = np.where(c["fwd_pkt_len_min"] > 0, data == forward, (data < forward) | (forward == 0))
    return holds


def _subflows(c: Columns) -> Mask:
    """Totals where no gap exceeds a second, else totals divided by a whole number of at least 2."""
    totals, parts = (c["tot_fwd_pkts"], c["tot_bwd_pkts"]), (c["subflow_fwd_pkts"], c["subflow_bwd_pkts"])
    whole = parts[0] + parts[1]
    count = np.rint((totals[0] + totals[1]) / np.where(whole > 0, whole, np.inf))
    divided = np.where(c["flow_iat_max"] > 1e6, count >= 2, count == 1)
    return divided & _same(parts[0] * count, totals[0]) & _same(parts[1] * count, totals[1])


def _only_tcp(c: Columns) -> Mask:
    """Flags and windows are 0 off TCP."""
    holds: Mask = (c["protocol"] == TCP) | (
        c["syn_flag_cnt"] + c["ack_flag_cnt"] + c["psh_flag_cnt"] + c["rst_flag_cnt"] + c["init_fwd_win_byts"] == 0
    )
    return holds


def _flags_fit(c: Columns) -> Mask:
    packets = c["tot_fwd_pkts"] + c["tot_bwd_pkts"]
    most = np.maximum(np.maximum(c["syn_flag_cnt"], c["ack_flag_cnt"]), np.maximum(c["fin_flag_cnt"], c["psh_flag_cnt"]))
    return (most <= packets) & (c["fwd_psh_flags"] <= c["tot_fwd_pkts"]) & (c["bwd_psh_flags"] <= c["tot_bwd_pkts"])


def _idle(c: Columns) -> Mask:
    """Idle periods are the gaps above 5 s, so the longest of both is the same."""
    holds: Mask = np.where(c["flow_iat_max"] > 5e6, c["idle_max"] == c["flow_iat_max"], c["idle_max"] == 0)
    return holds


def _acknowledged(c: Columns) -> Mask:
    """Every packet of a TCP connection but the first SYN, and some RSTs, carries ACK."""
    packets = c["tot_fwd_pkts"] + c["tot_bwd_pkts"]
    holds: Mask = (c["protocol"] != TCP) | (c["ack_flag_cnt"] + c["syn_flag_cnt"] + c["rst_flag_cnt"] >= packets)
    return holds


def _empty_syn(c: Columns) -> Mask:
    """A SYN carries no data (but with TCP Fast Open, which is rare), so the shortest packet of its flow has none."""
    holds: Mask = (c["syn_flag_cnt"] == 0) | (c["pkt_len_min"] == 0)
    return holds


_COUNTS = ("tot_fwd_pkts", "tot_bwd_pkts")
_TOTALS = ("totlen_fwd_pkts", "totlen_bwd_pkts")
_SPREADS = ("fwd_pkt_len_mean", "fwd_pkt_len_std", "bwd_pkt_len_mean", "bwd_pkt_len_std")
_IDENTITIES = (
    _Check((*_COUNTS, *_TOTALS, "pkt_len_mean", "pkt_size_avg"), _packet_totals),
    _product("fwd_pkt_len_mean", "tot_fwd_pkts", "totlen_fwd_pkts"),
    _product("bwd_pkt_len_mean", "tot_bwd_pkts", "totlen_bwd_pkts"),
    _equal("fwd_seg_size_avg", "fwd_pkt_len_mean"),
    _equal("bwd_seg_size_avg", "bwd_pkt_len_mean"),
    _rate("flow_pkts_s", "tot_fwd_pkts", "tot_bwd_pkts"),
    _rate("flow_byts_s", "totlen_fwd_pkts", "totlen_bwd_pkts"),
    _rate("fwd_pkts_s", "tot_fwd_pkts"),
    _rate("bwd_pkts_s", "tot_bwd_pkts"),
    _Check((*_COUNTS, "flow_duration", "flow_iat_mean", "fwd_iat_mean", "fwd_iat_tot", "bwd_iat_mean", "bwd_iat_tot"), _gaps),
    _at_most("flow_iat_max", "flow_duration"),
    _at_most("fwd_iat_tot", "flow_duration"),
    _at_most("bwd_iat_tot", "flow_duration"),
    _at_most("active_max", "flow_duration"),
    _ordered("pkt_len_min", "pkt_len_mean", "pkt_len_max"),
    _ordered("fwd_pkt_len_min", "fwd_pkt_len_mean", "fwd_pkt_len_max"),
    _ordered("bwd_pkt_len_min", "bwd_pkt_len_mean", "bwd_pkt_len_max"),
    _Check(("pkt_len_std", "pkt_len_var"), lambda c: _same(c["pkt_len_std"] ** 2, c["pkt_len_var"], 1e-3)),
    _Check((*_COUNTS, *_TOTALS, *_SPREADS, "pkt_len_var"), _pooled_variance),
    _Check(
        (*_COUNTS, "pkt_len_min", "pkt_len_max", *(f"{s}_pkt_len_{m}" for s in ("fwd", "bwd") for m in ("min", "max"))),
        _extremes,
    ),
    _sum("fwd_psh_flags", "bwd_psh_flags", "psh_flag_cnt"),
    _sum("fwd_urg_flags", "bwd_urg_flags", "urg_flag_cnt"),
    _Check(
        (*_COUNTS, "syn_flag_cnt", "ack_flag_cnt", "fin_flag_cnt", "psh_flag_cnt", "fwd_psh_flags", "bwd_psh_flags"),
        _flags_fit,
    ),
    _Check(("down_up_ratio", *_COUNTS), _ratio),
    _Check(("protocol", *_COUNTS, "fwd_header_len", "bwd_header_len"), _headers),
    _Check(("fwd_act_data_pkts", "tot_fwd_pkts", "fwd_pkt_len_min"), _data_packets),
    _Check((*_COUNTS, "flow_iat_max", "subflow_fwd_pkts", "subflow_bwd_pkts"), _subflows),
    _Check(("protocol", "syn_flag_cnt", "ack_flag_cnt", "psh_flag_cnt", "rst_flag_cnt", "init_fwd_win_byts"), _only_tcp),
    _Check(("flow_iat_max", "idle_max"), _idle),
)
_PRACTICES = (
    _Check(("protocol", *_COUNTS, "ack_flag_cnt", "syn_flag_cnt", "rst_flag_cnt"), _acknowledged),
    _Check(("syn_flag_cnt", "pkt_len_min"), _empty_syn),
)


@dataclass(frozen=True, slots=True)
class Density:
    """How familiar a row is: its distance to prototypes of the training rows of one class.

    Rows are taken as log(1 + x), centred and scaled; ``centres[c]`` and ``weights[c]`` (float64[k, d], the latter inverse
    variances) are class c's prototypes; ``limits`` (float64[classes]) the distance above which a row is unfamiliar.
    ``inputs`` names the d features.
    """

    inputs: tuple[str, ...]
    centre: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    centres: tuple[npt.NDArray[np.float64], ...]
    weights: tuple[npt.NDArray[np.float64], ...]
    limits: npt.NDArray[np.float64]

    def standardise(self, features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return float64[n, d] of features float64[n, 79]."""
        columns = [_AT[name] for name in self.inputs]
        standard: npt.NDArray[np.float64] = (np.log1p(features[:, columns]) - self.centre) / self.scale
        return standard

    def distance(self, features: npt.NDArray[np.float64], claimed: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """Return float64[n]: root mean squared distance to the nearest prototype of each row's claimed class."""
        rows = self.standardise(features)
        squared = rows * rows
        distances = np.full(len(rows), np.inf)
        for index in np.unique(claimed):
            chosen = claimed == index
            centres, weights = self.centres[index], self.weights[index]
            if len(centres):
                nearest = _nearest(rows[chosen], squared[chosen], centres, weights)
                distances[chosen] = np.sqrt(np.maximum(nearest, 0.0) / rows.shape[1])
        return distances

    def unfamiliar(self, features: npt.NDArray[np.float64], claimed: npt.NDArray[np.intp]) -> Mask:
        """Mark rows farther from their claimed class than its limit."""
        marked: Mask = self.distance(features, claimed) > self.limits[claimed]
        return marked


def _nearest(
    rows: npt.NDArray[np.float64],
    squared: npt.NDArray[np.float64],
    centres: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return float64[n]: the smallest weighted squared distance of each row to a prototype.

    Multiplied in pieces so small that BLAS does not start threads for them: these would compete with the other roles of the
    host, and waiting for them costs more than the product.
    """
    scaled, constant = (centres * weights).T, (centres * centres * weights).sum(axis=1)
    piece = max(1, _SINGLE_THREAD_PRODUCTS // weights.size)
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), piece):
        some = slice(start, start + piece)
        nearest[some] = (squared[some] @ weights.T - 2.0 * (rows[some] @ scaled) + constant).min(axis=1)
    return nearest


def reasons(
    density: Density, features: npt.NDArray[np.float64], known: Mask, claimed: npt.NDArray[np.intp]
) -> npt.NDArray[np.uint8]:
    """Return uint8[n] of ``Reason`` bits for rows that a model gave the classes ``claimed``; 0 means judged.

    A batch in which an input of the guard is unknown is not judged at all.
    """
    result = np.where(single_packet(features), np.uint8(Reason.SINGLE_PACKET), np.uint8(0))
    if not all(known[_AT[name]] for name in density.inputs):
        return result | np.uint8(Reason.UNKNOWN_INPUT)
    for marked, reason in (
        (contradictions(features, known), Reason.CONTRADICTION),
        (implausible(features, known), Reason.IMPLAUSIBLE),
        (density.unfamiliar(features, claimed), Reason.UNFAMILIAR),
    ):
        result[marked] |= np.uint8(reason)
    return result
