"""Flows as text: CSV and JSON lines, in our columns or in CICFlowMeter's.

Speed matters here, since formatting 79 numbers costs more than metering them: orjson writes all of a batch's numbers at once
(the shortest text that reads back as the same number), and a whole number loses its ``.0``.
"""

from __future__ import annotations

import csv
import io
import socket
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import orjson

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

_REASONS = [reason.name.lower() for reason in EndReason]
_JSON_FORMS = {"flow_id": '"%s"', "src_ip": '"%s"', "dst_ip": '"%s"', "end_reason": '"%s"'}
_JSON = "{" + ",".join(f'"{name}":{_JSON_FORMS.get(name, "%s")}' for name in (*IDENTIFIERS, *NAMES)) + "}\n"


def csv_header() -> bytes:
    """Return the header of ``csv_rows``."""
    return _line((*IDENTIFIERS, *NAMES))


def csv_rows(flows: FlowBatch) -> bytes:
    """Return a line for each flow: identifiers, then the 79 features."""
    lines = [
        f"{','.join(map(str, names))},{numbers}\n"
        for names, numbers in zip(_names(flows), _numbers(flows.features), strict=True)
    ]
    return "".join(lines).encode()


def ndjson_rows(flows: FlowBatch) -> bytes:
    """Return a JSON object for each flow, on a line of its own, with the keys of the CSV's header."""
    lines = []
    for names, numbers in zip(_names(flows), _numbers(flows.features), strict=True):
        lines.append(_JSON % (*names[:-1], "true" if names[-1] else "false", *numbers.split(",")))
    return "".join(lines).encode()


def cic_header() -> bytes:
    """Return the header of ``cic_rows``: the names of the corrected data sets of 2022."""
    return _line((*_CIC_IDENTIFIERS, *(CIC_NAMES[name] for name in _CIC_FEATURES)))


def cic_rows(flows: FlowBatch) -> bytes:
    """Return a line for each flow in CICFlowMeter's columns; times are UTC."""
    times = np.datetime_as_string(flows.start_us.astype("datetime64[us]")).tolist()
    protocol = flows.features[:, 2].astype(np.int64).tolist()
    ends = zip(_addresses(flows.src, flows.family), _addresses(flows.dst, flows.family), strict=True)
    ports = zip(flows.sport.tolist(), flows.dport.tolist(), protocol, times, _numbers(flows.features[:, 3:]), strict=True)
    lines = [
        f"{src}-{dst}-{sport}-{dport}-{proto},{src},{sport},{dst},{dport},{proto},{time.replace('T', ' ')},{numbers}\n"
        for (src, dst), (sport, dport, proto, time, numbers) in zip(ends, ports, strict=True)
    ]
    return "".join(lines).encode()


def _names(flows: FlowBatch) -> Iterator[tuple[object, ...]]:
    """Yield the identifiers of each flow."""
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


def _numbers(features: npt.NDArray[np.float64]) -> list[str]:
    """Return the comma-separated numbers of each row."""
    if not len(features):
        return []
    text = orjson.dumps(np.ascontiguousarray(features), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return text.replace(".0,", ",").replace(".0]", "]")[2:-2].split("],[")


def _line(names: tuple[str, ...]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(names)
    return buffer.getvalue().encode()
