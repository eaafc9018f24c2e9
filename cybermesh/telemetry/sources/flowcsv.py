"""Flow tables as a source: the CIC family of CSV files, and this project's own.

Rules:

- the header decides the variant (``cic_columns``); an unknown one is refused with the nearest and the columns that differ;
- what a variant does not have, or means otherwise, is masked, and so is a feature's empty cell; known deviations of the tools
  are undone, so no number is ever negative or infinite;
- times become microseconds: some versions of the Python tool write seconds, which their own rates give away;
- times of day without a zone are UTC; day comes before month, as in all published tables.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.cic_columns import OWN, PYTHON, Variant, clean, explain_unknown, recognise
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.event_rows import NOWHERE, packed
from cybermesh.telemetry.features import COLUMN, NAMES, UNITS
from cybermesh.telemetry.flow_rows import TIME_MAX_US, Ends, Times, flow_batch
from cybermesh.telemetry.flows import EndReason
from cybermesh.telemetry.sources import Batch, SourceError

WRONG_WIDTH = "wrong number of columns"
NOT_A_NUMBER = "not a number"
NO_TIME = "time cannot be read"
NO_ADDRESS = "not an address"
OUT_OF_RANGE = "port, protocol or time out of range"

# The Python tool counts whole frames where others count payload, IP headers for TCP's, and divides by n, not n - 1 (features
# specification, section 6); its CWR count is that of forward URG, and its idle and bulk limits are other ones.
_PYTHON_MEANS_OTHERWISE = frozenset(
    {
        *(f"totlen_{side}_pkts" for side in ("fwd", "bwd")),
        *(f"{side}_pkt_len_{part}" for side in ("fwd", "bwd") for part in ("max", "min", "mean", "std")),
        *(f"pkt_len_{part}" for part in ("min", "max", "mean", "std", "var")),
        *(f"{side}_{part}" for side in ("fwd", "bwd") for part in ("header_len", "iat_std", "seg_size_avg")),
        *(f"{side}_{part}_avg" for side in ("fwd", "bwd") for part in ("byts_b", "pkts_b", "blk_rate")),
        *("flow_byts_s", "flow_iat_std", "pkt_size_avg", "fwd_seg_size_min", "cwe_flag_count", "ece_flag_cnt"),
        *(f"{kind}_{part}" for kind in ("active", "idle") for part in ("mean", "std", "max", "min")),
    }
)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_DAY_FIRST = re.compile(r"(\d\d?)/(\d\d?)/(\d{4}) +(\d\d?):(\d\d)(?::(\d\d))?(?: ([AP])M)?", re.ASCII)
_REASONS = {reason.name.lower(): int(reason) for reason in EndReason}
_TIMES = np.array([UNITS[name] == "us" for name in NAMES])
_IN_SECONDS_BELOW = 1e3  # rate x duration / packets is 1 in seconds, a million in microseconds
_PORT, _PORTS = COLUMN["src_port"], 1 << 16


class _Layout(NamedTuple):
    """Where a header has what."""

    header: bytes
    width: int
    variant: Variant
    features: tuple[tuple[int, int], ...]  # (feature, column)
    known: npt.NDArray[np.bool_]
    time: int | None
    addresses: tuple[int, int] | None
    more: Mapping[str, int]  # columns of this project's own tables


class _Row(NamedTuple):
    ends: Ends
    start_us: int
    duration_us: int | None
    reason: int
    blank: tuple[int, ...] = ()  # features without a value


class FlowCsvDecoder:
    """Rows of a flow table to flows."""

    def __init__(self) -> None:
        self._layout: _Layout | None = None
        self._scale: float | None = None  # of the times, once rows have shown it

    def begin(self, name: str, beginning: bytes, modified_s: float | None) -> None:
        """Recognise the header.

        Raises:
            SourceError: It is of no known variant.
        """
        del modified_s
        header = beginning.partition(b"\n")[0].rstrip(b"\r")
        columns = [cell.decode("utf-8", "replace") for cell in _quoted(header.removeprefix(codecs.BOM_UTF8))]
        variant = recognise(columns)
        if variant is None:
            raise SourceError(f"{name}: {explain_unknown(columns)}; give a flow table of the CIC family")
        self._layout = _layout(header, columns, variant)
        self._scale = None

    def decode(self, lines: Sequence[bytes], counters: Counters) -> list[Batch]:
        """Return the flows of the rows; broken rows are counted by reason."""
        layout = self._layout
        assert layout is not None, "begin comes first"
        rows: list[_Row] = []
        values: list[list[float]] = []
        for line in lines:
            line = line.rstrip(b"\r")
            if not line or line == layout.header:  # also where files were joined
                continue
            counters.packets += 1
            row = _row(layout, line)
            if isinstance(row, str):
                counters.skip(row)
            else:
                rows.append(row[0])
                values.append(row[1])
        counters.metered += len(rows)
        ends = [*(number for number in range(1, len(rows)) if rows[number].blank != rows[number - 1].blank), len(rows)]
        return [
            self._flows(layout, rows[start:end], values[start:end])
            for start, end in zip([0, *ends], ends, strict=False)
            if start < end
        ]

    def _flows(self, layout: _Layout, rows: list[_Row], values: list[list[float]]) -> Batch:
        """Return rows with the same empty cells as flows."""
        raw = np.zeros((len(rows), len(NAMES)))
        raw[:, [feature for feature, _ in layout.features]] = values
        present = np.zeros(len(NAMES), np.bool_)
        present[[feature for feature, _ in layout.features]] = True
        present[list(rows[0].blank)] = False
        features, _ = clean(raw, present)
        if self._scale is None:
            self._scale = _scale(features)
        if self._scale is not None:
            features[:, _TIMES] *= self._scale
        np.minimum(features, 1e18, out=features)
        start_us = np.array([row.start_us for row in rows], np.int64)
        duration_us = np.minimum(features[:, COLUMN["flow_duration"]], TIME_MAX_US).astype(np.int64)
        told = [row.duration_us for row in rows]
        if None not in told:
            duration_us = np.array(told, np.int64)
        reasons = np.array([row.reason for row in rows], np.uint8)
        return flow_batch(
            [row.ends for row in rows], Times(start_us, start_us + duration_us, reasons), features, layout.known & present
        )


def _layout(header: bytes, columns: Sequence[str], variant: Variant) -> _Layout:
    places = variant.places(columns)
    names = [column.strip() for column in columns]
    at = {name: index for index, name in reversed(list(enumerate(names)))}
    masked = variant.other_meaning | (_PYTHON_MEANS_OTHERWISE if variant.name == PYTHON else frozenset())
    pair = variant.addresses
    if not variant.exact and "Src Port" in at:
        places["src_port"] = at["Src Port"]
    return _Layout(
        header=header,
        width=len(columns),
        variant=variant,
        features=tuple((COLUMN[name], places[name]) for name in NAMES if name in places),
        known=np.array([name in places and name not in masked for name in NAMES]),
        time=at.get(variant.time) if variant.time is not None else None,
        addresses=(at[pair[0]], at[pair[1]]) if pair is not None and pair[0] in at and pair[1] in at else None,
        more={name: at[name] for name in ("end_us", "ip_protocol", "icmp_type", "icmp_code", "end_reason") if name in at}
        if variant.name == OWN
        else {},
    )


def _row(layout: _Layout, line: bytes) -> tuple[_Row, list[float]] | str:
    """Return a row's ends and numbers, or why it has none."""
    cells = line.split(b",") if b'"' not in line else _quoted(line)
    if len(cells) != layout.width:
        return WRONG_WIDTH
    blank: tuple[int, ...] = ()
    when = b"" if layout.time is None else cells[layout.time]
    try:
        if b"" in cells:
            blank = tuple(feature for feature, column in layout.features if not cells[column])
            cells = [cell or b"0" for cell in cells]
        values = [float(cells[column]) for _, column in layout.features]
        more = {name: cells[column] for name, column in layout.more.items()}
        numbers = {name: int(cell) for name, cell in more.items() if name != "end_reason"}
    except ValueError:
        return NOT_A_NUMBER
    start_us = 0 if layout.time is None else _microseconds(when)
    if start_us is None:
        return NO_TIME
    src, dst = NOWHERE, NOWHERE
    if layout.addresses is not None:
        found = [packed(cells[column].decode("ascii", "replace").strip()) for column in layout.addresses]
        if found[0] is None or found[1] is None:
            return NO_ADDRESS
        src, dst = found[0], found[1]
    row = _checked(layout, src, dst, start_us, (values, numbers, more.get("end_reason", b"external")))
    return row if isinstance(row, str) or not blank else (row[0]._replace(blank=blank), row[1])


def _checked(
    layout: _Layout, src: bytes, dst: bytes, start_us: int, rest: tuple[list[float], Mapping[str, int], bytes]
) -> tuple[_Row, list[float]] | str:
    """Return the row if its small numbers are what they must be."""
    values, numbers, reason = rest
    by_feature = dict(zip((feature for feature, _ in layout.features), values, strict=True))
    small = [by_feature.get(COLUMN[name], 0.0) for name in ("src_port", "dst_port", "protocol")]
    small[:2] = [0.0 if value == -1 else value for value in small[:2]]  # the Python tool's way to say: none
    if not all(0 <= value < limit and value == int(value) for value, limit in zip(small, (_PORTS, _PORTS, 256), strict=True)):
        return OUT_OF_RANGE
    sport, dport, protocol = map(int, small)
    icmp = numbers.get("icmp_type", 0), numbers.get("icmp_code", 0)
    protocol = numbers.get("ip_protocol", protocol)
    end_us = numbers.get("end_us")
    if not all(0 <= number < 256 for number in (*icmp, protocol)) or not -TIME_MAX_US < start_us < TIME_MAX_US:
        return OUT_OF_RANGE
    if end_us is not None and not 0 <= end_us - start_us < TIME_MAX_US:
        return OUT_OF_RANGE
    ends = Ends(src, dst, sport, dport, protocol, *icmp)
    code = _REASONS.get(reason.decode("ascii", "replace"), int(EndReason.EXTERNAL))
    return _Row(ends, start_us, None if end_us is None else end_us - start_us, code), values


def _quoted(line: bytes) -> list[bytes]:
    """Split a row with quotes; what is not closed on the line is not a row."""
    try:
        return [cell.encode() for cell in next(csv.reader([line.decode("utf-8", "replace")], strict=True), [])]
    except csv.Error:  # a quote that is not closed, a carriage return, a zero byte
        return []


@functools.lru_cache(maxsize=4096)
def _microseconds(cell: bytes) -> int | None:
    """Return a time cell as microseconds since 1970; a plain number is that already."""
    text = cell.decode("ascii", "replace").strip()
    try:
        if text.lstrip("-").isdecimal():
            return int(text[:20])
        match = _DAY_FIRST.fullmatch(text)
        if match is None:
            moment = datetime.datetime.fromisoformat(text)
        else:
            day, month, year, hour, minute = map(int, match.groups()[:5])
            hour = hour % 12 + 12 * (match[7] == "P") if match[7] else hour
            moment = datetime.datetime(year, month, day, hour, minute, int(match[6] or 0), tzinfo=datetime.UTC)
    except ValueError:
        return None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
    return (moment - _EPOCH) // _MICROSECOND


def _scale(features: npt.NDArray[np.float64]) -> float | None:
    """Return what makes the times microseconds; None where no row has both a duration and a rate."""
    packets = features[:, COLUMN["tot_fwd_pkts"]] + features[:, COLUMN["tot_bwd_pkts"]]
    product = features[:, COLUMN["flow_pkts_s"]] * features[:, COLUMN["flow_duration"]]
    rows = (packets > 0) & (product > 0)
    if not rows.any():
        return None
    return 1e6 if float(np.median(product[rows] / packets[rows])) < _IN_SECONDS_BELOW else 1.0
