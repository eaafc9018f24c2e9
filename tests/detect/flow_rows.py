"""Synthetic flows that obey the feature definitions, CIC tables made of them, and what other extractors would have written."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import tempfile
from pathlib import Path

import numpy as np

from cybermesh.detect import datasets, training
from cybermesh.detect.datasets import Dataset
from cybermesh.telemetry.cic_columns import VARIANTS, Variant
from cybermesh.telemetry.features import COLUMN, NAMES

# class: payload bytes forward and backward, packets each way, mean gap in us, protocol
PROFILES = {
    "benign": (60, 400, 8, 9, 40_000, 6),
    "ddos": (20, 0, 30, 2, 300, 6),
    "port_scan": (0, 0, 1, 1, 60, 6),
    "brute_force": (90, 120, 14, 14, 110_000, 6),
}
LABELS = {"benign": "BENIGN", "ddos": "DDoS", "port_scan": "Portscan", "brute_force": "SSH-Patator"}


def flow(kind: str, generator: np.random.Generator) -> np.ndarray:
    """Return one feature vector, computed packet by packet, independently of the meter."""
    size_forward, size_backward, forward, backward, gap, protocol = PROFILES[kind]
    forward = max(1, int(generator.poisson(forward))) if forward > 1 else 1
    backward = max(1, int(generator.poisson(backward))) if backward > 1 else 1
    count = forward + backward
    is_forward = np.r_[True, generator.permutation(np.r_[np.ones(forward - 1, bool), np.zeros(backward, bool)])]
    times = np.r_[0, np.cumsum(np.maximum(1, generator.exponential(gap, count - 1).astype(np.int64)))]
    sizes = np.where(is_forward, generator.poisson(size_forward, count), generator.poisson(size_backward, count))
    first_backward = int(np.argmin(is_forward))
    sizes[0] = sizes[first_backward] = 0  # SYN, SYN+ACK
    of = dict.fromkeys(NAMES, 0.0)
    of.update(src_port=int(generator.integers(1024, 65536)), dst_port=22, protocol=protocol)
    of.update(flow_duration=times[-1], tot_fwd_pkts=forward, tot_bwd_pkts=backward)
    _lengths(of, sizes, is_forward)
    _gaps(of, times, is_forward)
    seconds = times[-1] / 1e6
    of.update(flow_byts_s=sizes.sum() / seconds, flow_pkts_s=count / seconds)
    of.update(fwd_pkts_s=forward / seconds, bwd_pkts_s=backward / seconds, down_up_ratio=backward / forward)
    pushed = sizes > 0
    of.update(fwd_psh_flags=(pushed & is_forward).sum(), bwd_psh_flags=(pushed & ~is_forward).sum(), psh_flag_cnt=pushed.sum())
    of.update(syn_flag_cnt=2, ack_flag_cnt=count - 1, fin_flag_cnt=min(2, count - 1))
    of.update(fwd_header_len=20 * forward, bwd_header_len=20 * backward, fwd_seg_size_min=20)
    of.update(init_fwd_win_byts=29_200, init_bwd_win_byts=28_960, fwd_act_data_pkts=(pushed & is_forward).sum())
    of.update(subflow_fwd_pkts=forward, subflow_bwd_pkts=backward)
    of.update(subflow_fwd_byts=of["totlen_fwd_pkts"], subflow_bwd_byts=of["totlen_bwd_pkts"])
    return np.array([float(of[name]) for name in NAMES])


def _lengths(of: dict, sizes: np.ndarray, is_forward: np.ndarray) -> None:
    for side, chosen in (("fwd", sizes[is_forward]), ("bwd", sizes[~is_forward])):
        spread = chosen.std(ddof=1) if len(chosen) > 1 else 0.0
        of.update(
            {f"totlen_{side}_pkts": chosen.sum(), f"{side}_pkt_len_max": chosen.max(), f"{side}_pkt_len_min": chosen.min()}
        )
        of.update({f"{side}_pkt_len_mean": chosen.mean(), f"{side}_pkt_len_std": spread, f"{side}_seg_size_avg": chosen.mean()})
    of.update(pkt_len_min=sizes.min(), pkt_len_max=sizes.max(), pkt_len_mean=sizes.mean(), pkt_size_avg=sizes.mean())
    of.update(pkt_len_std=sizes.std(ddof=1), pkt_len_var=sizes.var(ddof=1))


def _gaps(of: dict, times: np.ndarray, is_forward: np.ndarray) -> None:
    for prefix, chosen in (("flow", times), ("fwd", times[is_forward]), ("bwd", times[~is_forward])):
        gaps = np.diff(chosen)
        spread = gaps.std(ddof=1) if len(gaps) > 1 else 0.0
        if len(gaps):
            of.update({f"{prefix}_iat_mean": gaps.mean(), f"{prefix}_iat_std": spread})
            of.update({f"{prefix}_iat_max": gaps.max(), f"{prefix}_iat_min": gaps.min()})
        if prefix != "flow":
            of[f"{prefix}_iat_tot"] = gaps.sum()


def flows(kinds: list[str], seed: int = 1) -> np.ndarray:
    """Return float64[n, 79], one row per entry of ``kinds``."""
    generator = np.random.default_rng(seed)
    return np.stack([flow(kind, generator) for kind in kinds])


def many(per_class: int) -> list[str]:
    """Return ``per_class`` of every profile, interleaved."""
    return list(PROFILES) * per_class


def as_improved(features: np.ndarray) -> np.ndarray:
    """Return the vectors as the fixed tool of 2022 writes them: sub-flows as floor(total / packets)."""
    rows = features.copy()
    packets = rows[:, COLUMN["tot_fwd_pkts"]] + rows[:, COLUMN["tot_bwd_pkts"]]
    for total, part in SUBFLOWS.items():
        rows[:, COLUMN[part]] = np.floor(rows[:, COLUMN[total]] / packets)
    return rows


SUBFLOWS = {
    "tot_fwd_pkts": "subflow_fwd_pkts",
    "totlen_fwd_pkts": "subflow_fwd_byts",
    "tot_bwd_pkts": "subflow_bwd_pkts",
    "totlen_bwd_pkts": "subflow_bwd_byts",
}


def variant(part: str) -> Variant:
    """Return the one known variant whose name holds ``part``."""
    (found,) = [candidate for candidate in VARIANTS if part in candidate.name]
    return found


def write_table(path: Path, of: Variant, features: np.ndarray, labels: list[str], header: dict[str, str] | None = None) -> Path:
    """Write rows under a variant's header, with times one second apart; ``.gz`` by the name."""
    columns = dict(of.columns) if header is None else header
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(["Flow ID", "Timestamp", *columns.values(), "Label"])
    for index, (row, label) in enumerate(zip(features, labels, strict=True)):
        minutes, seconds = divmod(index, 60)
        time = f"2017-07-{3 + minutes // 1440:02d} {minutes // 60 % 24:02d}:{minutes % 60:02d}:{seconds:02d}.000001"
        out.writerow([f"f{index}", time, *(repr(float(row[COLUMN[name]])) for name in columns), label])
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- the same traffic, as other extractors write it -------------------------------------------------------------------------


def frame_lengths(rows: np.ndarray) -> np.ndarray:
    """Whole frames instead of payload: 14 (Ethernet) + 20 (IP) + the L4 header more per packet."""
    out = rows.copy()
    of = {name: out[:, index] for name, index in COLUMN.items()}
    header = np.where(of["protocol"] == 6, 54.0, 42.0)
    for side in ("fwd", "bwd"):
        packets = of[f"tot_{side}_pkts"]
        there = packets > 0
        of[f"totlen_{side}_pkts"] += header * packets
        for name in ("pkt_len_max", "pkt_len_min", "pkt_len_mean", "seg_size_avg"):
            of[f"{side}_{name}"] += np.where(there, header, 0)
    for name in ("pkt_len_min", "pkt_len_max", "pkt_len_mean", "pkt_size_avg"):
        of[name] += header
    seconds = of["flow_duration"] / 1e6
    payload = of["totlen_fwd_pkts"] + of["totlen_bwd_pkts"]
    of["flow_byts_s"][:] = np.divide(payload, seconds, out=np.zeros_like(payload), where=seconds > 0)
    return out


def seconds(rows: np.ndarray) -> np.ndarray:
    """Every duration in seconds instead of microseconds; rates are per second in both."""
    out = rows.copy()
    for name, index in COLUMN.items():
        if "iat" in name or name.startswith(("active", "idle")) or name == "flow_duration":
            out[:, index] /= 1e6
    return out


def clipped_flags(rows: np.ndarray) -> np.ndarray:
    """Flag counts as 0 or 1, and no backward PSH."""
    out = rows.copy()
    for name, index in COLUMN.items():
        if name.endswith(("flag_cnt", "flag_count", "_flags")):
            out[:, index] = np.minimum(out[:, index], 1)
    out[:, COLUMN["bwd_psh_flags"]] = 0
    return out


def first_packet_twice(rows: np.ndarray) -> np.ndarray:
    """The first packet's length enters the statistics over all packets twice (its size: the forward mean stands in)."""
    out = rows.copy()
    of = {name: out[:, index] for name, index in COLUMN.items()}
    packets = of["tot_fwd_pkts"] + of["tot_bwd_pkts"]
    payload = of["totlen_fwd_pkts"] + of["totlen_bwd_pkts"] + of["fwd_pkt_len_mean"]
    of["pkt_len_mean"][:] = payload / (packets + 1)
    of["pkt_size_avg"][:] = payload / packets
    of["pkt_len_var"] *= packets / (packets + 1)
    of["pkt_len_std"][:] = np.sqrt(of["pkt_len_var"])
    return out


def windows(rows: np.ndarray) -> np.ndarray:
    """-1 off TCP, and on TCP some other backward packet's window."""
    out = rows.copy()
    tcp = out[:, COLUMN["protocol"]] == 6
    for name in ("init_fwd_win_byts", "init_bwd_win_byts"):
        out[~tcp, COLUMN[name]] = -1
    out[tcp, COLUMN["init_bwd_win_byts"]] = np.maximum(out[tcp, COLUMN["init_bwd_win_byts"]] - 12, 0)
    return out


def subflow_totals(rows: np.ndarray) -> np.ndarray:
    """Sub-flow columns repeat the totals."""
    out = rows.copy()
    for total, part in SUBFLOWS.items():
        out[:, COLUMN[part]] = out[:, COLUMN[total]]
    return out


PERTURBATIONS = {
    "frame lengths": frame_lengths,
    "seconds": seconds,
    "clipped flags": clipped_flags,
    "first packet twice": first_packet_twice,
    "windows": windows,
    "sub-flow totals": subflow_totals,
}


@functools.cache
def synthetic() -> Dataset:
    """Return 800 labelled flows of four classes, read from a table of the fixed tool."""
    kinds = many(200)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "flows.csv"
        write_table(path, variant("improved"), as_improved(flows(kinds)), [LABELS[kind] for kind in kinds])
        return datasets.read(path)


@functools.cache
def trained() -> training.Trained:
    """Return a model of ``synthetic``; about two seconds, once."""
    return training.train(synthetic(), seed=5, terms="made by this test")
