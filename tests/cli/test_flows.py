"""``cybermesh flows`` as a user meets it."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cybermesh.bus import Delivery
from cybermesh.bus.local import LocalBus
from cybermesh.cli import bench_capture, bench_sender, main
from cybermesh.cli.flow_rows import IDENTIFIERS
from cybermesh.cli.flows import RETAINED_FLOWS, Run
from cybermesh.telemetry import compile_cache, metering
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.flow_messages import from_message
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.wire import codec
from tests.telemetry import frames
from tests.telemetry.sources import captures

REQUEST = frames.ethernet(frames.ipv4(6, frames.tcp(1000, 80, 2, b"")))
ANSWER = frames.ethernet(frames.ipv4(6, frames.tcp(80, 1000, 18, b"abc"), src=frames.V4_B, dst=frames.V4_A))
ARP = frames.ethernet(b"\0\1\x08\0", ethertype=0x0806)
TALK = captures.pcap([(1_000_000, REQUEST), (1_000_300, ANSWER), (1_000_400, ARP)])


def run(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> tuple[int, str, str]:
    """Run the command; return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(["flows", *arguments])
    out, err = capsysbinary.readouterr()
    return int(ended.value.code or 0), out.decode(), err.decode()


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.pcap"
    path.write_bytes(TALK)
    return path


def test_csv_has_identifiers_then_the_79_features(capsysbinary, talk: Path) -> None:
    code, out, err = run(capsysbinary, str(talk))
    assert code == 0
    assert out.splitlines()[0] == ",".join([*IDENTIFIERS, *NAMES])
    (row,) = rows(out)
    told = ("src_ip", "dst_ip", "src_port", "dst_port", "start_us", "end_us", "flow_duration", "end_reason", "single_packet")
    assert [row[name] for name in told] == [
        "10.0.0.1",
        "10.0.0.2",
        "1000",
        "80",
        "1000000",
        "1000300",
        "300",
        "capture_end",
        "0",
    ]
    assert float(row["flow_byts_s"]) == 3 / 300e-6
    assert "1 not IP" in err
    assert "1 flows from 2 packets" in err


def test_numbers_read_back_as_the_same_numbers_and_whole_ones_are_whole(capsysbinary, talk: Path) -> None:
    (row,) = rows(run(capsysbinary, str(talk))[1])
    assert row["pkt_len_std"] == repr(4.5**0.5)
    assert row["down_up_ratio"] == "1"
    assert not [name for name in NAMES if row[name].endswith(".0")]


def test_ndjson_has_the_same_keys_and_values(capsysbinary, talk: Path) -> None:
    (row,) = rows(run(capsysbinary, str(talk))[1])
    (line,) = run(capsysbinary, str(talk), "--format", "ndjson")[1].splitlines()
    flow = json.loads(line)
    assert list(flow) == list(row)
    assert all(float(row[name]) == flow[name] for name in NAMES)
    assert flow["single_packet"] is False


def test_cic_columns_are_those_of_the_corrected_data_sets(capsysbinary, talk: Path) -> None:
    (row,) = rows(run(capsysbinary, str(talk), "--columns", "cic")[1])
    assert row["Flow ID"] == "10.0.0.1-10.0.0.2-1000-80-6"
    assert row["Timestamp"] == "1970-01-01 00:00:01.000000"
    assert row["Total Length of Bwd Packet"] == "3"
    assert len(row) == 7 + 76


def test_several_inputs_are_one_stream_and_a_bad_one_does_not_lose_the_others(capsysbinary, tmp_path: Path) -> None:
    first, bad, second = tmp_path / "1.pcap", tmp_path / "2.pcap", tmp_path / "3.pcap.gz"
    first.write_bytes(captures.pcap([(0, REQUEST)]))
    bad.write_text("no capture at all, just words")
    second.write_bytes(gzip.compress(captures.pcap([(7, ANSWER)])))
    code, out, err = run(capsysbinary, str(first), str(bad), str(second))
    assert code == 1
    (row,) = rows(out)
    assert (row["tot_fwd_pkts"], row["tot_bwd_pkts"]) == ("1", "1")
    assert [line for line in err.splitlines() if line.startswith("cybermesh:")] == [
        f"cybermesh: {bad}: is neither pcap nor pcapng; give a capture, it may be .gz or .zst"
    ]


def test_truncated_capture_is_told_and_is_no_failure(capsysbinary, tmp_path: Path) -> None:
    path = tmp_path / "cut.pcap"
    path.write_bytes(TALK[:-3])
    code, out, err = run(capsysbinary, str(path))
    assert code == 0
    assert len(rows(out)) == 1
    assert "truncated: the record at byte" in err


def test_out_writes_a_file_and_never_over_an_input(capsysbinary, talk: Path, tmp_path: Path) -> None:
    target = tmp_path / "flows.csv"
    assert run(capsysbinary, str(talk), "--out", str(target))[:2] == (0, "")
    assert len(rows(target.read_text())) == 1
    assert run(capsysbinary, str(talk), "--out", str(talk))[0] == 2
    assert talk.read_bytes() == TALK
    code, _, err = run(capsysbinary, str(talk), "--out", str(tmp_path / "no" / "file"))
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["/nonexistent"], 1),
        (["x", "--format", "ndjson", "--columns", "cic"], 2),
        (["x", "--to", "kafka", "--compat", "cicflowmeter"], 2),
        (["x", "--block", "0"], 2),
    ],
)
def test_wrong_use_and_missing_input_have_their_exit_codes(capsysbinary, arguments: list[str], code: int) -> None:
    got, out, err = run(capsysbinary, *arguments)
    assert (got, out) == (code, "")
    assert "Traceback" not in err


def test_parquet_has_typed_columns_in_bounded_row_groups(capsysbinary, talk: Path, tmp_path: Path, monkeypatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("cybermesh.cli.flow_sinks.ROW_GROUP", 2)
    target = tmp_path / "flows.parquet"
    path = tmp_path / "many.pcap"
    requests = [frames.ethernet(frames.ipv4(6, frames.tcp(1000 + n, 80, 2, b"x" * n))) for n in range(5)]
    path.write_bytes(captures.pcap([(n, request) for n, request in enumerate(requests)]))
    assert run(capsysbinary, str(path), "--format", "parquet", "--out", str(target))[:2] == (0, "")
    file = parquet.ParquetFile(target)
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [2, 2, 1]
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    assert list(kinds) == [*IDENTIFIERS, *NAMES]
    told = ("single_packet", "start_us", "src_port", "pkt_len_std", "subflow_fwd_pkts", "totlen_fwd_pkts")
    assert [kinds[name] for name in told] == ["bool", "int64", "int64", "double", "double", "int64"]
    read = file.read().to_pylist()
    for flow, row in zip(read, rows(run(capsysbinary, str(path))[1]), strict=True):
        assert all(float(row[name]) == flow[name] for name in NAMES)
        assert [flow[name] for name in ("flow_id", "src_ip", "end_reason")] == [row["flow_id"], "10.0.0.1", "capture_end"]
    assert read[0]["single_packet"] is True


def test_parquet_without_pyarrow_is_one_clear_line(capsysbinary, talk: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, out, err = run(capsysbinary, str(talk), "--format", "parquet")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "cybermesh: --format parquet needs pyarrow: pip install 'cybermesh[parquet]', or use --format csv"
    ]


def test_what_an_input_cannot_tell_is_empty_and_reads_back_as_unknown(capsysbinary, tmp_path: Path) -> None:
    record = {"ts": 1.5, "id.orig_h": "192.0.2.7", "id.orig_p": 5000, "id.resp_h": "192.0.2.9", "id.resp_p": 22, "proto": "tcp"}
    record |= {"_path": "conn", "conn_state": "SF", "orig_pkts": 5, "resp_pkts": 4, "orig_bytes": 7, "resp_bytes": 8}
    path, table = tmp_path / "conn.log", tmp_path / "conn.csv"
    path.write_text(json.dumps(record | {"duration": 2.0}) + "\n" + json.dumps(record) + "\n")
    text = run(capsysbinary, str(path))[1]
    with_duration, without = rows(text)
    assert (with_duration["flow_duration"], without["flow_duration"], without["syn_flag_cnt"]) == ("2000000", "", "")
    lines = run(capsysbinary, str(path), "--format", "ndjson")[1].splitlines()
    assert [json.loads(line)["flow_duration"] for line in lines] == [2_000_000, None]
    table.write_text(text)
    assert run(capsysbinary, str(table))[1] == text


def test_what_was_read_is_called_what_it_is(capsysbinary, talk: Path, tmp_path: Path) -> None:
    assert " flows from 2 packets in " in run(capsysbinary, str(talk), "--out", str(tmp_path / "flows.csv"))[2]
    assert " flows from 1 rows in " in run(capsysbinary, str(tmp_path / "flows.csv"))[2]
    assert " flows from 3 packets and records in " in run(capsysbinary, str(talk), str(tmp_path / "flows.csv"))[2]


def test_compat_writes_the_table_of_2017_which_reads_back(capsysbinary, tmp_path: Path) -> None:
    path, table = tmp_path / "one.pcap", tmp_path / "one.csv"
    path.write_bytes(captures.pcap([(1_500_000_000_000_000, REQUEST)]))
    code, out, _ = run(capsysbinary, str(path), "--compat", "cicflowmeter", "--columns", "cic")
    header, line = (text.split(",") for text in out.splitlines())
    assert (code, len(header), len(line)) == (0, 85, 85)
    told = dict(zip(header, line, strict=True))
    assert told["Flow Bytes/s"] == "NaN"
    assert told["Flow Packets/s"] == "Infinity"
    assert (told["Timestamp"], told["Label"]) == ("14/07/2017 02:40:00 AM", "NeedManualLabel")
    assert header.count("Fwd Header Length") == 2
    table.write_text(out)
    (row,) = rows(run(capsysbinary, str(table))[1])
    assert (row["src_ip"], row["start_us"], row["flow_byts_s"]) == ("10.0.0.1", "1500000000000000", "0")
    assert json.loads(run(capsysbinary, str(path), "--compat", "cicflowmeter", "--format", "ndjson")[1])["flow_pkts_s"] is None


def test_flows_are_published_as_messages_that_are_acknowledged(capsysbinary, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "many.pcap"
    requests = [frames.ethernet(frames.ipv4(6, frames.tcp(1000 + n, 80, 2, b"x" * n))) for n in range(25)]
    path.write_bytes(captures.pcap([(n, request) for n, request in enumerate(requests)]))
    monkeypatch.setenv("CYBERMESH_BUS__PATH", str(tmp_path / "bus.db"))
    monkeypatch.setenv("TELEMETRY_BATCH_SIZE", "10")
    code, out, err = run(capsysbinary, str(path), "--to", "local", "--sensor", "gate")
    assert (code, out) == (0, "")
    assert "25 flows in 3 messages acknowledged by telemetry.features.v1" in err

    async def deliveries() -> list[Delivery]:
        async with (
            LocalBus(tmp_path / "bus.db", lambda: 0) as bus,
            bus.subscribe(["telemetry.features.v1"], "test") as subscription,
            asyncio.timeout(20),
        ):
            return [await anext(aiter(subscription)) for _ in range(3)]

    counters = Counters()
    found = asyncio.run(deliveries())
    assert {delivery.key for delivery in found} == {b"gate"}
    flows = [from_message(codec.decode_flow_features(delivery.value), counters) for delivery in found]
    assert [len(batch) for batch in flows] == [10, 10, 5]
    assert counters.metered == 25
    table = rows(run(capsysbinary, str(path))[1])
    assert [[float(row[name]) for name in NAMES] for row in table] == [
        row for batch in flows for row in batch.features.tolist()
    ]


def test_a_bus_that_cannot_be_reached_is_one_clear_line(capsysbinary, talk: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CYBERMESH_BUS__PATH", str(tmp_path / "file" / "bus.db"))
    code, out, err = run(capsysbinary, str(talk), "--to", "local")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    monkeypatch.setenv("TOPIC_TELEMETRY_FEATURES", "")
    assert run(capsysbinary, str(talk), "--to", "local")[0] == 2


@pytest.mark.parametrize("form", ["csv", "ndjson"])
def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path, form: str) -> None:
    path = tmp_path / "many.pcap"
    requests = [frames.ethernet(frames.ipv4(6, frames.tcp(n, 80, 2, b""))) for n in range(4000)]
    path.write_bytes(captures.pcap([(n, request) for n, request in enumerate(requests)]))
    command = f"{sys.executable} -c 'from cybermesh.cli import main; main()' flows {path} --format {form} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert not [line for line in done.stderr.splitlines() if "Error" in line or "cybermesh:" in line]


class Interrupted(CaptureSource):
    """A capture during which somebody presses Ctrl-C."""

    def batches(self) -> Iterator[PacketBatch]:
        yield from super().batches()
        raise KeyboardInterrupt


@pytest.mark.parametrize("stream", [True, False])
def test_ctrl_c_on_a_stream_gives_the_flows_that_were_open_and_on_a_file_just_stops(talk: Path, stream: bool) -> None:
    meter = metering.reference().new_meter(retain=RETAINED_FLOWS)
    run = Run(["-" if stream else str(talk)], 100, meter, lambda spec, block: Interrupted(str(talk), block=block))
    with contextlib.nullcontext() if stream else pytest.raises(KeyboardInterrupt):
        assert sum(map(len, run.flows())) == run.totals.flows == 1


def test_block_size_changes_no_byte_of_the_output(capsysbinary, tmp_path: Path) -> None:
    path = tmp_path / "many.pcap"
    talk = [(n * 1000, [REQUEST, ANSWER, ARP][n % 3]) for n in range(500)]
    path.write_bytes(captures.pcap(talk))
    first = run(capsysbinary, str(path))[1]
    assert run(capsysbinary, str(path), "--block", "7")[1] == first


def test_neither_threads_nor_a_split_change_a_byte_of_a_long_capture(capsysbinary, tmp_path: Path) -> None:
    whole, first, second = (tmp_path / f"{name}.pcap" for name in ("whole", "first", "second"))
    metering.compiled()
    bench_capture.write(bench_capture.usual(bench_capture.demo_capture()), whole, 300_000)
    assert whole.stat().st_size >= metering.LONG_BYTES
    assert metering.choose([str(whole)]).name == ("compiled" if compile_cache.is_compiled() else "reference")
    data, border = whole.read_bytes(), int(bench_sender.load(whole).at[123_456]) - 16
    first.write_bytes(data[:border])
    second.write_bytes(data[:24] + data[border:])
    expected = run(capsysbinary, str(whole))[1]
    assert expected.count("\n") > 25_000
    assert run(capsysbinary, str(whole), "--workers", "2")[1] == expected
    assert sorted(run(capsysbinary, str(first), str(second), "--workers", "2")[1].splitlines()) == sorted(expected.splitlines())


def test_short_captures_do_not_pay_for_heavy_imports() -> None:
    program = (
        "import sys, cybermesh.cli.flows, cybermesh.cli.flow_rows, cybermesh.telemetry.meter;"
        "import cybermesh.telemetry.sources.choose;"
        "print(*sorted({'numba', 'pandas', 'onnxruntime', 'sqlalchemy', 'scipy', 'zstandard', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.shared
def test_every_shared_capture_gives_rows_or_says_why_not(capsysbinary, shared_data: Path) -> None:
    for path in sorted((shared_data / "pcaps").glob("*.pcap*")):
        code, out, err = run(capsysbinary, str(path))
        assert code == 0, path.name
        assert "Traceback" not in err
        assert out.startswith("flow_id,"), path.name
        assert rows(out) or "skipped" in err, path.name
