"""Every cell that ``cybermesh flows`` prints, in each of its forms, against the plain telling of the definitions."""

from __future__ import annotations

import csv
import datetime
import io
import ipaddress
import json
import math
from pathlib import Path

import pytest

from cybermesh.cli import main
from cybermesh.telemetry.features import CIC_NAMES, NAMES
from tests.conftest import ROOT
from tests.telemetry import oracle

# One or two of each sort: tunnels, fragments, IPv6 with extension headers, ICMP, resets, bulk transfers, another byte order.
SHARED = ("zeek__gre-within-gre.pcap", "zeek__vxlan-encapsulated-http.pcap", "pcapplusplus__ip6_fragments.pcap")
SHARED += ("tcpdump__bigtcp-ipv6-hbh.pcap", "slips__test12-icmp-portscan.pcap", "zeek__ssh.pcap", "nDPI__http_ipv6.pcap")
SHARED += ("pcapplusplus__nanosecs_big_endian.pcap", "pcapplusplus__sll.pcap", "zeek__irc-dcc-send.pcapng")
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def printed(capsysbinary: pytest.CaptureFixture[bytes], path: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["flows", str(path), *options])
    assert not ended.value.code
    return capsysbinary.readouterr().out.decode()


def expected(path: Path) -> list[dict[str, object]]:
    """The flows of a capture as the command should print them, in order of start and ends."""
    packets = [oracle.decode(*record) for record in oracle.read_capture(path.read_bytes())]
    rows = []
    for flow in oracle.meter([packet for packet in packets if packet is not None]):
        first = flow.packets[0][2]
        (src, sport), (dst, dport) = flow.forward, flow.backward
        request = oracle.ICMP_REQUEST.get((first.proto, first.kind), first.kind) if first.klass == "icmp" else 0
        values = oracle.features(flow)
        identity = {"src_ip": str(ipaddress.ip_address(src)), "dst_ip": str(ipaddress.ip_address(dst))}
        identity |= {"start_us": flow.start, "end_us": flow.latest, "ip_protocol": first.proto}  # type: ignore[dict-item]
        identity |= {"icmp_type": request, "icmp_code": first.code if first.klass == "icmp" else 0}  # type: ignore[dict-item]
        identity |= {"single_packet": int(len(flow.packets) == 1)}  # type: ignore[dict-item]
        assert (sport, dport) == (values["src_port"], values["dst_port"])
        rows.append(identity | values)
    return sorted(rows, key=order)


def order(row: dict[str, object]) -> tuple[object, ...]:
    names = ("start_us", "end_us", "src_ip", "dst_ip", "src_port", "dst_port", "ip_protocol", "icmp_type", "icmp_code")
    return tuple(str(row[name]) if name.endswith("_ip") else int(float(str(row[name]))) for name in names)


def assert_cells(found: list[dict[str, object]], wanted: list[dict[str, object]]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(sorted(found, key=order), wanted, strict=True):
        for name, value in theirs.items():
            if name.endswith("_ip"):
                assert ours[name] == value, name
            else:
                assert math.isclose(float(str(ours[name])), float(value), rel_tol=1e-12), (name, ours)  # type: ignore[arg-type]


def compare(capsysbinary: pytest.CaptureFixture[bytes], path: Path) -> None:
    wanted = expected(path)
    table = list(csv.DictReader(io.StringIO(printed(capsysbinary, path))))
    assert_cells(table, wanted)  # type: ignore[arg-type]
    assert len({row["flow_id"] for row in table}) == len(table)
    lines = [json.loads(line) for line in printed(capsysbinary, path, "--format", "ndjson").splitlines()]
    assert [line["flow_id"] for line in lines] == [row["flow_id"] for row in table]
    assert_cells([line | {"single_packet": int(line["single_packet"])} for line in lines], wanted)
    for ours, theirs in zip(table, csv.DictReader(io.StringIO(printed(capsysbinary, path, "--columns", "cic"))), strict=True):
        ends = [ours[name] for name in ("src_ip", "dst_ip", "src_port", "dst_port", "protocol")]
        assert theirs["Flow ID"] == "-".join(ends)
        assert [theirs[name] for name in ("Src IP", "Dst IP", "Src Port", "Dst Port", "Protocol")] == ends
        assert {name: theirs[CIC_NAMES[name]] for name in NAMES} == {name: ours[name] for name in NAMES}
        moment = datetime.datetime.fromisoformat(f"{theirs['Timestamp']}+00:00")
        assert (moment - EPOCH) // datetime.timedelta(microseconds=1) == int(ours["start_us"])


def test_the_shipped_capture_is_printed_as_defined(capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    path = tmp_path / "begin.pcap"
    path.write_bytes((ROOT / "cybermesh/data/demo.pcap").read_bytes()[:250_000])  # ends inside a record
    compare(capsysbinary, path)


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED)
def test_captures_of_every_sort_are_printed_as_defined(
    capsysbinary: pytest.CaptureFixture[bytes], shared_data: Path, name: str
) -> None:
    compare(capsysbinary, shared_data / "pcaps" / name)
