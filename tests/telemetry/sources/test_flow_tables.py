"""Flows that other meters wrote: CIC tables of every variant, Zeek, Suricata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cybermesh.cli import flow_rows as own
from cybermesh.telemetry import cic_columns
from cybermesh.telemetry.dns import NO_ANSWER, NOERROR, NXDOMAIN, DnsBatch
from cybermesh.telemetry.events import EventBatch, EventKind
from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import Batch, SourceError
from cybermesh.telemetry.sources.choose import open_source

IMPROVED, ORIGINAL, MACHINE_LEARNING, OWN, PYTHON, IDS2018 = cic_columns.VARIANTS


def read(path: Path) -> list[Batch]:
    with contextlib.closing(open_source(str(path))) as source:
        return list(source.batches())


def flows(path: Path) -> FlowBatch:
    (batch,) = read(path)
    assert isinstance(batch, FlowBatch)
    return batch


def table(path: Path, variant: cic_columns.Variant, row: dict[str, float], **more: str) -> Path:
    """Write one flow, with every feature that is not given as 1."""
    if variant.name == IDS2018.name:
        spelling = {name: name.replace("_", " ").title() for name in variant.columns}
    else:
        spelling = variant.columns
    columns = {spelling[name]: str(row.get(name, 1.0)) for name in variant.columns}
    columns = {**more, **columns}
    path.write_text(",".join(f" {name}" for name in columns) + "\r\n" + ",".join(columns.values()) + "\r\n")
    return path


ADDRESSES = {
    IMPROVED.name: ("Src IP", "Dst IP", "Timestamp"),
    ORIGINAL.name: ("Source IP", "Destination IP", "Timestamp"),
    PYTHON.name: ("src_ip", "dst_ip", "timestamp"),
    OWN.name: ("src_ip", "dst_ip", "start_us"),
    IDS2018.name: ("Src IP", "Dst IP", "Timestamp"),
    MACHINE_LEARNING.name: (),
}


@pytest.mark.parametrize("variant", cic_columns.VARIANTS, ids=lambda variant: variant.name.split(" (")[0])
def test_every_variant_is_read_with_its_mask(tmp_path: Path, variant: cic_columns.Variant) -> None:
    row = {"src_port": 40_000, "dst_port": 443, "protocol": 6, "flow_duration": 2_000_000, "tot_fwd_pkts": 3, "tot_bwd_pkts": 1}
    row |= {"flow_pkts_s": 2.0, "fwd_header_len": 60, "bwd_header_len": 20}
    when = "1500000000000000" if variant.name == OWN.name else "2017-07-14 02:40:00"
    names = ADDRESSES[variant.name]
    batch = flows(table(tmp_path / "t.csv", variant, row, **dict(zip(names, ("192.0.2.7", "2001:db8::1", when), strict=False))))
    assert batch.features.shape == (1, 79)
    value = {name: batch.features[0, index] for name, index in COLUMN.items()}
    assert (value["dst_port"], value["flow_duration"], value["tot_fwd_pkts"]) == (443, 2_000_000, 3)
    assert batch.end_us[0] - batch.start_us[0] == 2_000_000
    assert batch.end_reason[0] == EndReason.EXTERNAL
    known = {name for name in NAMES if batch.known[COLUMN[name]]}
    assert known.isdisjoint(variant.other_meaning)
    assert ("src_port" in known) == (variant.name not in {MACHINE_LEARNING.name, IDS2018.name})
    assert ("fwd_pkt_len_max" in known) == (variant.name != PYTHON.name)
    if names:
        assert batch.start_us[0] == 1_500_000_000_000_000
        assert batch.src[0, 12:].tolist() == [192, 0, 2, 7]
        assert batch.dst[0, :4].tolist() == [0x20, 0x01, 0x0D, 0xB8]
    else:
        assert not batch.src.any()


def test_seconds_of_the_python_tool_become_microseconds(tmp_path: Path) -> None:
    row = {"tot_fwd_pkts": 3, "tot_bwd_pkts": 1, "protocol": 6, "dst_port": 80, "src_port": 1, "flow_iat_max": 0.25}
    times = {"timestamp": "2025-09-12 16:19:49", "src_ip": "192.0.2.7", "dst_ip": "192.0.2.8"}
    for duration, expected in ((0.5, 500_000), (500_000.0, 500_000)):
        factor = expected / duration
        path = table(
            tmp_path / "t.csv",
            PYTHON,
            {**row, "flow_duration": duration, "flow_pkts_s": 8.0, "flow_iat_max": 250_000 / factor},
            **times,
        )
        batch = flows(path)
        assert (batch.features[0, COLUMN["flow_duration"]], batch.features[0, COLUMN["flow_iat_max"]]) == (expected, 250_000)


def test_ports_that_the_python_tool_does_not_know_are_none(tmp_path: Path) -> None:
    times = {"timestamp": "2025-09-12 16:19:49", "src_ip": "192.0.2.7", "dst_ip": "192.0.2.8"}
    batch = flows(table(tmp_path / "t.csv", PYTHON, {"src_port": -1, "dst_port": -1, "protocol": 1}, **times))
    assert (batch.sport[0], batch.dport[0], batch.features[0, :3].tolist()) == (0, 0, [0, 0, 1])


def test_known_deviations_are_undone_and_nothing_is_negative_or_infinite(tmp_path: Path) -> None:
    row = {
        "flow_duration": 0,
        "flow_byts_s": float("inf"),
        "flow_pkts_s": -1,
        "init_fwd_win_byts": -1,
        "protocol": 17,
        "idle_min": -5,
    }
    path = table(
        tmp_path / "t.csv",
        ORIGINAL,
        row,
        **{"Source IP": "192.0.2.7", "Destination IP": "192.0.2.8", "Timestamp": "3/7/2017 8:55"},
    )
    batch = flows(path)
    assert (batch.features >= 0).all()
    assert np.isfinite(batch.features).all()
    assert batch.start_us[0] == 1_499_072_100_000_000  # the third of July


def test_an_unknown_header_is_refused_with_the_nearest_variant_and_what_differs(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", IMPROVED, {}, **{"Src IP": "192.0.2.7", "Dst IP": "192.0.2.8", "Timestamp": "2017-07-14"})
    path.write_text(path.read_text().replace("Flow Duration", "Duration"))
    for spec in (str(path), f"csv:{path}"):
        with pytest.raises(SourceError, match=r"improved.*'Flow Duration'.*'Duration'"):
            open_source(spec)


def test_our_own_table_gives_back_the_flows_it_was_made_of(tmp_path: Path) -> None:
    capture = Path(own.__file__).parents[1] / "data" / "demo.pcap"
    meter = FlowMeter(retain=1 << 16)
    for batch in read(capture):
        assert isinstance(batch, PacketBatch)
        meter.add(batch)
    metered = meter.flush()
    (tmp_path / "own.csv").write_bytes(own.csv_header() + own.csv_rows(metered))
    again = [batch for batch in read(tmp_path / "own.csv") if isinstance(batch, FlowBatch)]
    assert len(metered) > 500
    for name in {*FlowBatch.__slots__, "flow_id"} - {"known"}:
        assert np.array_equal(np.concatenate([getattr(batch, name) for batch in again]), getattr(metered, name)), name
    assert all(batch.known.all() for batch in again)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"flow_duration": "x"}, "not a number"),
        ({"dst_port": "70000"}, "port, protocol or time out of range"),
        ({"protocol": "nan"}, "port, protocol or time out of range"),
        ({"src_ip": "host"}, "not an address"),
        ({"start_us": "someday"}, "time cannot be read"),
        ({"start_us": ""}, "time cannot be read"),
        ({"start_us": "9" * 19}, "port, protocol or time out of range"),
        ({"dst_ip": '"a,b"'}, "not an address"),
        ({"dst_ip": '"a,b'}, "wrong number of columns"),
        ({"dst_ip": "1,2"}, "wrong number of columns"),
    ],
)
def test_a_broken_row_is_counted_by_reason_and_the_others_are_read(tmp_path: Path, cells: dict[str, str], reason: str) -> None:
    good = {"src_ip": "192.0.2.7", "dst_ip": '"192.0.2.8"', "start_us": "1500000000000000", **dict.fromkeys(NAMES, "6")}
    lines = [",".join(good), *(",".join({**good, **change}.values()) for change in ({}, cells, {}))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with contextlib.closing(open_source(str(tmp_path / "t.csv"))) as source:
        assert sum(map(len, source.batches())) == 2
        assert source.counters.skipped == {reason: 1}


CONN = {"ts": 1.5, "id.orig_h": "192.0.2.7", "id.orig_p": 40_000, "id.resp_h": "192.0.2.8", "id.resp_p": 22, "proto": "tcp"}
CONN |= {"conn_state": "SF", "duration": 2.0, "orig_pkts": 3, "resp_pkts": 1, "orig_bytes": 30, "resp_bytes": 10}


def written(path: Path, *records: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_zeek_connection_is_a_flow_with_what_follows_from_its_numbers(tmp_path: Path) -> None:
    batch = flows(written(tmp_path / "conn.log", CONN))
    value = {name: batch.features[0, index] for name, index in COLUMN.items() if batch.known[index]}
    assert (batch.start_us[0], batch.end_us[0]) == (1_500_000, 3_500_000)
    assert {"src_port": 40_000, "dst_port": 22, "protocol": 6, "flow_duration": 2_000_000}.items() <= value.items()
    assert {"pkt_len_mean": 10, "fwd_pkt_len_mean": 10, "flow_pkts_s": 2, "flow_byts_s": 20}.items() <= value.items()
    assert value["flow_iat_mean"] == pytest.approx(2_000_000 / 3)
    assert value["down_up_ratio"] == pytest.approx(1 / 3)


def test_a_single_packet_in_zeek_lacks_nothing_and_icmp_has_type_and_code(tmp_path: Path) -> None:
    single = {key: value for key, value in CONN.items() if key not in {"duration", "orig_bytes", "resp_bytes"}}
    ping = {**single, "proto": "icmp", "id.orig_p": 128, "id.resp_p": 0, "id.orig_h": "2001:db8::1", "id.resp_h": "2001:db8::2"}
    sizes = {"orig_pkts": 1, "orig_ip_bytes": 104, "resp_pkts": 0, "resp_ip_bytes": 0}
    query = {**single, **sizes, "proto": "udp", "id.resp_p": 22}
    path = written(tmp_path / "conn.log", {**single, **sizes}, {**ping, **sizes}, query)
    batch = flows(path)
    assert batch.features[:, COLUMN["totlen_fwd_pkts"]].tolist() == [0, 104 - 48, 104 - 28]
    batch = batch.take(np.arange(2))
    assert batch.known[COLUMN["flow_duration"]]
    assert batch.single_packet.all()
    assert (batch.proto.tolist(), batch.icmp_type.tolist(), batch.dport.tolist()) == ([6, 58], [0, 128], [22, 0])
    assert batch.features[:, COLUMN["protocol"]].tolist() == [6, 1]


def test_zeek_in_iso_times_and_another_separator_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dns.log"
    fields = ["ts", "id.orig_h", "id.orig_p", "id.resp_h", "id.resp_p", "proto", "query", "qtype", "rcode"]
    row = ["2026-11-20T21:16:58.000001Z", "192.0.2.7", "5000", "192.0.2.53", "53", "udp", "a.example", "16", "3"]
    path.write_text("#separator \\x7c\n#path|dns\n#fields|" + "|".join(fields) + "\n" + "|".join(row) + "\n")
    (batch,) = read(path)
    assert isinstance(batch, DnsBatch)
    assert (batch.ts_us[0], batch.asked[0], batch.rcode[0]) == (1_795_209_418_000_001, True, NXDOMAIN)
    assert (batch.name[0], batch.name_length[0], batch.qtype[0], batch.port[0]) == ("a.example", 9, 16, 53)


def test_zeek_answers_are_counted_in_both_forms_and_odd_names_are_made_safe(tmp_path: Path) -> None:
    record: dict[str, object] = {"ts": 1.5, "id.orig_h": "192.0.2.7", "id.orig_p": 5000, "id.resp_h": "192.0.2.53"}
    record |= {"_path": "dns", "id.resp_p": 53, "proto": "tcp", "query": "\x1b[2J.Ex\u00e9.", "qtype": 255, "rcode": 0}
    (batch,) = read(written(tmp_path / "dns.log", {**record, "answers": ["192.0.2.1", "192.0.2.2"]}, {**record, "query": "."}))
    assert isinstance(batch, DnsBatch)
    assert batch.name.tolist() == ["\\027[2j.ex\\195\\169", "."]
    assert (batch.answers.tolist(), batch.protocol.tolist()) == ([2, 0], [6, 6])
    fields = [name for name in record if name != "_path"]
    table = tmp_path / "dns.tsv"
    row = "\t".join(str(record[name]) for name in fields[:-3])
    table.write_text(
        "#separator \\x09\n#path\tdns\n#fields\t"
        + "\t".join([*fields[:-3], "query", "answers"])
        + f"\n{row}\tb.example\t192.0.2.1,cname,x\n"
    )
    (batch,) = read(table)
    assert isinstance(batch, DnsBatch)
    assert (batch.answers.tolist(), batch.rcode.tolist(), batch.qtype.tolist()) == ([3], [NO_ANSWER], [0])


def test_the_payload_of_a_lone_packet_is_unknown_where_zeek_does_not_tell_its_length(tmp_path: Path) -> None:
    record = {key: value for key, value in CONN.items() if key not in {"duration", "orig_bytes", "resp_bytes"}}
    batch = flows(written(tmp_path / "conn.log", {**record, "proto": "udp", "orig_pkts": 1, "resp_pkts": 0}))
    assert not batch.known[COLUMN["totlen_fwd_pkts"]]
    assert batch.known[COLUMN["totlen_bwd_pkts"]]
    assert batch.known[COLUMN["flow_duration"]]


def test_zeek_is_recognised_behind_a_damaged_line_and_by_what_only_its_records_have(tmp_path: Path) -> None:
    asked = {**CONN, "proto": "udp", "query": "a.example", "rejected": False}
    del asked["conn_state"]
    unasked = {key: value for key, value in asked.items() if key != "query"}
    path = written(tmp_path / "dns.log", unasked, asked)
    assert [len(batch) for batch in read(path)] == [2]
    bare = {key: value for key, value in CONN.items() if key != "conn_state"}
    path = written(tmp_path / "conn.log", {**CONN, "missed_bytes": 0}, bare)
    path.write_text('"half": 1}\n' + path.read_text())
    with contextlib.closing(open_source(str(path))) as source:
        assert sum(map(len, source.batches())) == 2
        assert source.counters.skipped == {"not a JSON object": 1}


def test_another_log_of_zeek_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "http.log"
    path.write_text("#separator \\x09\n#path\thttp\n#fields\tts\tuid\n1.0\tC1\n")
    with pytest.raises(SourceError, match=r"http\.log.*conn\.log or dns\.log"):
        open_source(f"zeek:{path}")


EVE = {"timestamp": "2026-11-20T21:16:58.000001+0100", "src_ip": "192.0.2.7", "src_port": 4000, "dest_ip": "192.0.2.53"}
EVE |= {"dest_port": 53, "proto": "UDP", "host": "sensor"}


def test_suricata_flows_have_packets_and_times_and_everything_else_is_counted(tmp_path: Path) -> None:
    flow = {
        "pkts_toserver": 4,
        "pkts_toclient": 2,
        "bytes_toserver": 400,
        "start": EVE["timestamp"],
        "end": "2026-11-20T20:17:00.000001Z",
    }
    path = written(tmp_path / "eve.json", {**EVE, "event_type": "stats"}, {**EVE, "event_type": "flow", "flow": flow})
    with contextlib.closing(open_source(str(path))) as source:
        (batch,) = list(source.batches())
        assert source.counters.skipped == {"record of another type": 1}
    assert isinstance(batch, FlowBatch)
    assert (batch.start_us[0], batch.end_us[0]) == (1_795_205_818_000_001, 1_795_205_820_000_001)
    assert batch.features[0, [COLUMN["tot_fwd_pkts"], COLUMN["tot_bwd_pkts"], COLUMN["flow_pkts_s"]]].tolist() == [4, 2, 3]


@pytest.mark.parametrize(
    ("dns", "turned", "expected"),
    [
        ({"type": "query", "rrname": "a.example", "rrtype": "TXT"}, False, ("a.example", NO_ANSWER, 16)),
        (
            {"type": "answer", "rrname": "a.example", "rrtype": "A", "rcode": "NXDOMAIN"},
            True,
            ("a.example", NXDOMAIN, 1),
        ),
        (
            {"type": "answer", "rrname": "a.example", "rrtype": "A", "rcode": "NOERROR"},
            False,
            ("a.example", NOERROR, 1),
        ),
        (
            {"version": 3, "type": "response", "rcode": "NOERROR", "queries": [{"rrname": "b.example", "rrtype": "AAAA"}]},
            False,
            ("b.example", NOERROR, 28),
        ),
        ({"version": 1, "query": [{"rrname": "c.example", "rrtype": "NULL"}]}, False, ("c.example", NO_ANSWER, 10)),
    ],
)
def test_suricata_dns_of_every_version_is_told_from_the_clients_side(
    tmp_path: Path, dns: dict[str, object], turned: bool, expected: tuple[str, int, int]
) -> None:
    ends = {"src_ip": EVE["dest_ip"], "src_port": 53, "dest_ip": EVE["src_ip"], "dest_port": 4000} if turned else {}
    (batch,) = read(written(tmp_path / "eve.json", {**EVE, **ends, "event_type": "dns", "dns": dns}))
    assert isinstance(batch, DnsBatch)
    assert (batch.name[0], batch.rcode[0], batch.qtype[0]) == expected
    assert (batch.client[0, 15], batch.server[0, 15], batch.port[0]) == (7, 53, 53)
    assert batch.asked[0] == (expected[1] == NO_ANSWER)


def test_a_first_record_longer_than_what_formats_are_told_by_is_still_suricatas(tmp_path: Path) -> None:
    path = tmp_path / "eve.json"
    stats = {"timestamp": "2026-11-20T21:16:58.000001+0100", "event_type": "stats", "stats": {"a": "x" * 100_000}}
    path.write_text(json.dumps(stats, separators=(",", ":")) + "\n")
    with contextlib.closing(open_source(str(path))) as source:
        assert list(source.batches()) == []
        assert source.counters.skipped == {"record of another type": 1}


def test_a_suricata_alert_is_an_event(tmp_path: Path) -> None:
    (batch,) = read(
        written(tmp_path / "eve.json", {**EVE, "event_type": "alert", "alert": {"signature": "ET X", "severity": 1}})
    )
    assert isinstance(batch, EventBatch)
    assert (batch.kind[0], batch.text[0], batch.status[0]) == (EventKind.ALERT, "ET X", 1)


@pytest.mark.shared
def test_the_labelled_flows_are_read_whole(shared_data: Path) -> None:
    with contextlib.closing(open_source(str(shared_data / "flows-train.csv.gz"), block=5000)) as source:
        batches = list(source.batches())
        assert (sum(map(len, batches)), source.counters.skipped) == (38_224, {})
    assert all(isinstance(batch, FlowBatch) and batch.src.any(axis=1).all() for batch in batches)
