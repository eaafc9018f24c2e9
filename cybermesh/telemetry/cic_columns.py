"""How the published CIC flow tables spell the columns that hold the 79 features, and how to tell the tables apart.

Six families of headers are in use (features specification, sections 1 to 3). They differ in spelling, in which columns exist,
and in what some numbers mean. A header is recognised when every column of a variant is there; further columns are ignored.
Names compare without surrounding blanks, which real files have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.features import CIC_NAMES, COLUMN, NAMES

_RATES = ("flow_byts_s", "flow_pkts_s", "fwd_pkts_s", "bwd_pkts_s")
_TCP = 6
_PART_MIN = 0.9
_INDISPENSABLE = ("flow_duration", "tot_fwd_pkts", "tot_bwd_pkts", "totlen_fwd_pkts", "totlen_bwd_pkts")

# Where the original tables (2017, 2019) spell a column otherwise than the corrected ones (2022).
_ORIGINAL = {
    "src_port": "Source Port",
    "dst_port": "Destination Port",
    "tot_fwd_pkts": "Total Fwd Packets",
    "tot_bwd_pkts": "Total Backward Packets",
    "totlen_fwd_pkts": "Total Length of Fwd Packets",
    "totlen_bwd_pkts": "Total Length of Bwd Packets",
    "pkt_len_min": "Min Packet Length",
    "pkt_len_max": "Max Packet Length",
    "cwe_flag_count": "CWE Flag Count",
    "fwd_seg_size_avg": "Avg Fwd Segment Size",
    "bwd_seg_size_avg": "Avg Bwd Segment Size",
    "fwd_byts_b_avg": "Fwd Avg Bytes/Bulk",
    "fwd_pkts_b_avg": "Fwd Avg Packets/Bulk",
    "fwd_blk_rate_avg": "Fwd Avg Bulk Rate",
    "bwd_byts_b_avg": "Bwd Avg Bytes/Bulk",
    "bwd_pkts_b_avg": "Bwd Avg Packets/Bulk",
    "bwd_blk_rate_avg": "Bwd Avg Bulk Rate",
    "init_fwd_win_byts": "Init_Win_bytes_forward",
    "init_bwd_win_byts": "Init_Win_bytes_backward",
    "fwd_act_data_pkts": "act_data_pkt_fwd",
    "fwd_seg_size_min": "min_seg_size_forward",
}
ORIGINAL_NAMES = CIC_NAMES | _ORIGINAL

# Columns that every CIC tool fills by another rule than this project's (features specification, sections 7 and 8); the last one
# is our finding: where the first packet carries data, the 2022 tables count one packet fewer.
OTHER_MEANING = frozenset(
    {
        "subflow_fwd_pkts",
        "subflow_fwd_byts",
        "subflow_bwd_pkts",
        "subflow_bwd_byts",
        "init_bwd_win_byts",
        "fwd_act_data_pkts",
    }
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One family of headers: ``columns[feature]`` is the spelling; a feature without one is unknown in it.

    ``other_meaning`` are the features whose column does not hold what this project defines. ``exact`` is false where the
    spelling is only compared after ``abbreviated``. ``addresses`` are the columns of source and destination.
    """

    name: str
    columns: dict[str, str]
    time: str | None
    other_meaning: frozenset[str] = OTHER_MEANING
    exact: bool = True
    addresses: tuple[str, str] | None = None

    def places(self, header: Sequence[str]) -> dict[str, int]:
        """Return the index in ``header`` of every feature that is there; the first of two equal names counts."""
        names = [name.strip() if self.exact else abbreviated(name) for name in header]
        first = {name: index for index, name in reversed(list(enumerate(names)))}
        return {feature: first[column] for feature, column in self.columns.items() if column in first}


def abbreviated(name: str) -> str:
    """Return the form in which the 2018 table's spelling of a feature is this project's name."""
    return name.strip().lower().replace(" ", "_").replace("/", "_")


def _variants() -> tuple[Variant, ...]:
    own = {feature: feature for feature in NAMES}
    return (
        Variant(IMPROVED, CIC_NAMES, "Timestamp", addresses=("Src IP", "Dst IP")),
        Variant(
            "CIC with addresses (2017 and 2019, 85 or 88 columns)",
            ORIGINAL_NAMES,
            "Timestamp",
            addresses=("Source IP", "Destination IP"),
        ),
        Variant(
            "CIC-IDS2017 MachineLearningCVE (79 columns)",
            {feature: column for feature, column in ORIGINAL_NAMES.items() if feature not in {"src_port", "protocol"}},
            None,
        ),
        Variant(
            OWN,
            own,
            "start_us",
            other_meaning=frozenset(),
            addresses=("src_ip", "dst_ip"),
        ),
        Variant(
            PYTHON,
            own | {"cwe_flag_count": "cwr_flag_count"},
            "timestamp",
            addresses=("src_ip", "dst_ip"),
        ),
        Variant(
            "CSE-CIC-IDS2018 (80 columns)",
            {feature: feature for feature in own if feature != "src_port"},
            "Timestamp",
            exact=False,
            addresses=("Src IP", "Dst IP"),  # one of its ten files has them
        ),
    )


IMPROVED = "CIC improved (2022, 91 columns)"
OWN = "CyberMesh flows (the 79 features under their own names)"
PYTHON = "Python cicflowmeter (82 columns)"
VARIANTS = _variants()


def recognise(header: Sequence[str]) -> Variant | None:
    """Return the variant all of whose columns are in ``header``, or None."""
    return next((variant for variant in VARIANTS if len(variant.places(header)) == len(variant.columns)), None)


def recognise_partly(header: Sequence[str]) -> Variant | None:
    """Return the variant of a header that lacks a few columns: at least nine in ten are there, and all that flows are told by.

    Ports, protocol and whatever else is missing are unknown features then.
    """
    variant = nearest(header)
    there = variant.places(header)
    enough = len(there) >= _PART_MIN * len(variant.columns)
    return variant if enough and all(name in there for name in _INDISPENSABLE) else None


def nearest(header: Sequence[str]) -> Variant:
    """Return the variant with the largest share of its columns in ``header``."""
    return max(VARIANTS, key=lambda variant: len(variant.places(header)) / len(variant.columns))


def explain_unknown(header: Sequence[str]) -> str:
    """Say which variant an unknown header is nearest to, and by which columns they differ."""
    variant = nearest(header)
    places = variant.places(header)
    missing = [column for feature, column in variant.columns.items() if feature not in places]
    used = set(places.values())
    extra = [name.strip() for index, name in enumerate(header) if index not in used]
    return (
        f"not a known flow table; nearest: {variant.name}, without its columns {_shorten(missing)}, "
        f"and with {_shorten(extra)} that it does not have"
    )


def _shorten(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def clean(
    raw: npt.NDArray[np.float64], present: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Undo the tools' known deviations in float64[n, 79], of which the columns ``present`` (bool[79]) were read.

    Returns:
        The values, and bool[n]: rows in which something was still negative or not finite, which is no value of any
        definition; it is 0 now.
    """
    values = raw.copy()
    still = values[:, COLUMN["flow_duration"]] == 0
    for name in _RATES:
        column = values[:, COLUMN[name]]
        column[still & ((column == -1) | ~np.isfinite(column))] = 0.0
    foreign = np.zeros(len(values), dtype=np.bool_)
    if present[COLUMN["protocol"]]:
        tcp = values[:, COLUMN["protocol"]] == _TCP
        for side in ("fwd", "bwd"):
            lengths, packets = values[:, COLUMN[f"{side}_header_len"]], values[:, COLUMN[f"tot_{side}_pkts"]]
            missing = np.where(tcp, 20.0, 8.0) * packets - lengths
            overflowed = np.isfinite(missing) & (missing > 0) & (lengths != 0)
            lengths[overflowed] += 65536.0 * np.ceil(missing[overflowed] / 65536.0)
    bad = ~np.isfinite(values) | (values < 0)
    foreign |= bad.any(axis=1)
    values[bad] = 0.0
    return values, foreign
