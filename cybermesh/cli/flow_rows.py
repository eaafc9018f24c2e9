"""Flows as text: CSV and JSON lines, in our columns or in CICFlowMeter's.

A feature that the input cannot tell is an empty cell, in JSON null. Infinity and NaN, which only ``--compat`` makes, are
written as Java writes them, in JSON null.

Speed matters here, since formatting 79 numbers costs more than metering them: orjson writes all of a batch's numbers at once
(the shortest text that reads back as the same number), and a whole number loses its ``.0``.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import socket
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import orjson

from cybermesh.telemetry.cic_columns import ORIGINAL_NAMES
from cybermesh.telemetry.features import CIC_NAMES, NAMES
from cybermesh.telemetry.flows import EndReason, FlowBatch

# Before the features; the ports and the class of protocol are among those.
IDENTIFIERS = (
    "flow_id",
    "src_ip",
    "dst_ip",
    "start_us",
    "end_us",
    "ip_protocol",
    "icmp_type",
    "icmp_code",
    "end_reason",
    "single_packet",
)
_CIC_IDENTIFIERS = ("Flow ID", "Src IP", "Src Port", "Dst IP", "Dst Port", "Protocol", "Timestamp")
_CIC_FEATURES = NAMES[3:]  # ports and protocol are identifiers there
_ORIGINAL_IDENTIFIERS = ("Flow ID", "Source IP", "Source Port", "Destination IP", "Destination Port", "Protocol", "Timestamp")
_TWICE = "fwd_header_len"  # stands a second time in the original tables, before this feature:
_BEFORE = _CIC_FEATURES.index("fwd_byts_b_avg")
_LABEL = "NeedManualLabel"  # what the original tool writes

_REASONS = [reason.name.lower() for reason in EndReason]
_JSON_FORMS = {"flow_id": '"%s"', "src_ip": '"%s"', "dst_ip": '"%s"', "end_reason": '"%s"'}
_JSON = "{" + ",".join(f'"{name}":{_JSON_FORMS.get(name, "%s")}' for name in (*IDENTIFIERS, *NAMES)) + "}\n"


def csv_header() -> bytes:
    """Return the header of ``csv_rows``."""
    return _line((*IDENTIFIERS, *NAMES))


def csv_rows(flows: FlowBatch) -> bytes:
    """Return a line for each flow: identifiers, then the 79 features."""
    lines = [
        f"{','.join(map(str, names))},{numbers}\n" for names, numbers in zip(identifiers(flows), _numbers(flows), strict=True)
    ]
    return "".join(lines).encode()


def ndjson_rows(flows: FlowBatch) -> bytes:
    """Return a JSON object for each flow, on a line of its own, with the keys of the CSV's header."""
    lines = []
    for names, numbers in zip(identifiers(flows), _numbers(flows, blank="null", odd="null"), strict=True):
        lines.append(_JSON % (*names[:-1], "true" if names[-1] else "false", *numbers.split(",")))
    return "".join(lines).encode()


def cic_header() -> bytes:
    """Return the header of ``cic_rows``: the names of the corrected data sets of 2022."""
    return _line((*_CIC_IDENTIFIERS, *(CIC_NAMES[name] for name in _CIC_FEATURES)))


def cic_rows(flows: FlowBatch) -> bytes:
    """Return a line for each flow in CICFlowMeter's columns; times are UTC."""
    times = np.datetime_as_string(flows.start_us.astype("datetime64[us]")).tolist()
    lines = [
        f"{src}-{dst}-{sport}-{dport}-{proto},{src},{sport},{dst},{dport},{proto},{time.replace('T', ' ')},{numbers}\n"
        for (src, dst, sport, dport, proto), time, numbers in zip(_ends(flows), times, _numbers(flows, first=3), strict=True)
    ]
    return "".join(lines).encode()


def original_header() -> bytes:
    """Return the header of ``original_rows``: the 85 columns of the tables of 2017 with addresses."""
    names = [ORIGINAL_NAMES[name] for name in _CIC_FEATURES]
    names.insert(_BEFORE, ORIGINAL_NAMES[_TWICE])
    return _line((*_ORIGINAL_IDENTIFIERS, *names, "Label"))


def original_rows(flows: FlowBatch) -> bytes:
    """Return a line for each flow as the original CICFlowMeter writes it; times are UTC, in seconds of a 12-hour clock."""
    lines = []
    for ends, start_us, numbers in zip(_ends(flows), flows.start_us.tolist(), _numbers(flows, first=3), strict=True):
        src, dst, sport, dport, proto = ends
        cells = numbers.split(",")
        cells.insert(_BEFORE, cells[_CIC_FEATURES.index(_TWICE)])
        time = (_EPOCH + datetime.timedelta(microseconds=start_us)).strftime("%d/%m/%Y %I:%M:%S %p")
        flow_id = f"{src}-{dst}-{sport}-{dport}-{proto}"
        lines.append(f"{flow_id},{src},{sport},{dst},{dport},{proto},{time},{','.join(cells)},{_LABEL}\n")
    return "".join(lines).encode()


def _ends(flows: FlowBatch) -> Iterator[tuple[str, str, int, int, int]]:
    """Yield addresses, ports and the feature protocol of each flow."""
    protocol = flows.features[:, 2].astype(np.int64).tolist()
    addresses = _addresses(flows.src, flows.family), _addresses(flows.dst, flows.family)
    return zip(*addresses, flows.sport.tolist(), flows.dport.tolist(), protocol, strict=True)


def identifiers(flows: FlowBatch) -> Iterator[tuple[object, ...]]:
    """Yield the values of ``IDENTIFIERS`` of each flow."""
    return zip(
        [f"{number:016x}" for number in flows.flow_id.tolist()],
        _addresses(flows.src, flows.family),
        _addresses(flows.dst, flows.family),
        *(column.tolist() for column in (flows.start_us, flows.end_us, flows.proto, flows.icmp_type, flows.icmp_code)),
        [_REASONS[reason] for reason in flows.end_reason.tolist()],
        flows.single_packet.astype(np.int64).tolist(),
        strict=True,
    )


def _addresses(addresses: npt.NDArray[np.uint8], family: npt.NDArray[np.uint8]) -> list[str]:
    raw, text = addresses.tobytes(), socket.inet_ntop
    return [
        text(socket.AF_INET, raw[at + 12 : at + 16]) if version == 4 else text(socket.AF_INET6, raw[at : at + 16])
        for at, version in zip(range(0, len(raw), 16), family.tolist(), strict=True)
    ]


def _numbers(flows: FlowBatch, first: int = 0, *, blank: str = "", odd: str = "") -> list[str]:
    """Return the comma-separated features of each row, from the one numbered ``first`` on.

    Args:
        flows: The rows.
        first: Number of the first feature.
        blank: What stands for a feature that is not known.
        odd: What stands for one that is not finite; empty for Java's words.
    """
    features, known = np.ascontiguousarray(flows.features[:, first:]), flows.known[first:]
    if not len(features):
        return []
    text = orjson.dumps(features, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    lines = text.replace(".0,", ",").replace(".0]", "]")[2:-2].split("],[")
    finite = np.isfinite(features).all(axis=1)
    if known.all() and finite.all():
        return lines
    for row in range(len(lines)) if not known.all() else np.nonzero(~finite)[0].tolist():
        cells = zip(lines[row].split(","), features[row].tolist(), known.tolist(), strict=True)
        lines[row] = ",".join(
            (cell if math.isfinite(value) else odd or _java(value)) if told else blank for cell, value, told in cells
        )
    return lines


def _java(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def _line(names: tuple[str, ...]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(names)
    return buffer.getvalue().encode()
