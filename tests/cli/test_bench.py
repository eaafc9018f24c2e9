"""The benchmark's captures are what it says they are, and what it measures meters all of them."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cybermesh.cli import bench, bench_admission, bench_capture, bench_detect, bench_logs, bench_worker, main
from cybermesh.cli.bench import _Rates, _result
from cybermesh.cli.bench_cicflowmeter import CicFlowMeter
from cybermesh.cli.output import CommandError
from cybermesh.telemetry import metering
from cybermesh.telemetry.features import COLUMN
from cybermesh.telemetry.sources.logs import LONGEST


def metered(path: Path) -> np.ndarray:
    how = metering.reference()
    meter = how.new_meter(retain=1 << 30)
    with closing(how.open_source(str(path))) as source:
        parts = [meter.add(batch).features for batch in source.batches()]
        assert not source.counters.ended
        assert not source.counters.skipped
    return np.concatenate([*parts, meter.flush().features])


def test_the_usual_capture_has_ten_packets_a_flow_and_every_copy_its_own_flows(tmp_path: Path) -> None:
    template = bench_capture.usual(bench_capture.demo_capture())
    written = bench_capture.write(template, tmp_path / "usual.pcap", 20_000)
    flows = metered(tmp_path / "usual.pcap")
    packets = flows[:, COLUMN["tot_fwd_pkts"]] + flows[:, COLUMN["tot_bwd_pkts"]]
    copies, rest = divmod(written, len(template.at))
    assert (copies, rest) == (-(-20_000 // len(template.at)), 0)
    assert packets.sum() == written
    assert 9 < packets.mean() < 11
    assert len(flows) % copies == 0


def test_the_long_capture_has_flows_of_hundreds_of_packets(tmp_path: Path) -> None:
    template = bench_capture.long_flows(bench_capture.demo_capture())
    written = bench_capture.write(template, tmp_path / "long.pcap", 40_000)
    flows = metered(tmp_path / "long.pcap")
    packets = flows[:, COLUMN["tot_fwd_pkts"]] + flows[:, COLUMN["tot_bwd_pkts"]]
    assert packets.sum() == written
    assert packets.mean() > 200


def test_a_worker_tells_what_it_metered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = bench_capture.write(bench_capture.usual(bench_capture.demo_capture()), tmp_path / "usual.pcap", 10_000)
    for workers in ("1", "2"):
        bench_worker.main(workers, str(tmp_path / "usual.pcap"), 2)
        told = json.loads(capsys.readouterr().out)
        assert told["packets"] == written
        assert told["flows"] == len(metered(tmp_path / "usual.pcap"))
        assert len(told["seconds"]) == 2
        assert 50 < told["peak_rss_mb"] < 4_000


def program(folder: Path, says: str) -> str:
    """Make a program that takes the Python CICFlowMeter's options and writes ``says`` where it is told to."""
    made = folder / "meter"
    made.write_text(f'#!/bin/sh\n[ "$1" = --help ] && exit 0\n[ -s "$2" ] && [ "$3" = -c ] && printf "{says}" >"$4"\n')
    made.chmod(0o755)
    return str(made)


def test_cicflowmeter_is_measured_by_its_rows_and_refused_without(tmp_path: Path) -> None:
    capture = tmp_path / "short.pcap"
    written = bench_capture.write(bench_capture.usual(bench_capture.demo_capture()), capture, 10)
    assert CicFlowMeter(program(tmp_path, "header\\nflow\\n")).packets_per_s(capture, written) > 0
    with pytest.raises(CommandError, match="wrote no flows"):
        CicFlowMeter(program(tmp_path, "header\\n")).packets_per_s(capture, written)
    with pytest.raises(CommandError, match="cannot be measured"):
        CicFlowMeter(str(tmp_path / "missing"))


def test_ratios_are_of_medians_and_unknown_without_the_other_tool() -> None:
    usual = _Rates(packets=4_000_000, warm=[9e6, 1e6, 10e6], process=[3e6], nfstream=[1e5, 3e5], peak_mb=200.4)
    long = _Rates(packets=5_000_000, warm=[12e6], process=[3e6], nfstream=[4e5], peak_mb=210.4)
    result = _result(usual, long)
    assert (result["ratio_warm"], result["ratio_process"], result["ratio_long_flows"]) == (45.0, 15.0, 30.0)
    assert (result["capture_packets"], result["warm_packets_per_s"], result["peak_rss_mb"]) == (4_000_000, 9_000_000, 210)
    alone = _result(_Rates(warm=[1e6]), _Rates())
    assert (alone["nfstream_packets_per_s"], alone["ratio_warm"], alone["ratio_process"]) == (None, None, None)


@pytest.mark.netns
def test_live_meters_what_was_sent_and_leaves_no_namespace(
    netns: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del netns
    with pytest.raises(SystemExit) as ended:
        main(["bench", "live", "--packets", "20000", "--rate", "50000", "--dir", str(tmp_path), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sent_packets"] == told["received_packets"] >= 20_000
    assert told["flows"] > 1_900
    assert [told[name] for name in ("kernel_drops", "sender_refused", "sender_dropped")] == [0, 0, 0]
    assert told["sent_packets_per_s"] <= 51_000
    assert not [name for name in Path("/run/netns").iterdir() if f"-{os.getpid()}-" in name.name]
    assert list(tmp_path.iterdir()) == []


def test_live_without_root_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "live", "--packets", "10000", "--dir", str(tmp_path)])
    assert ended.value.code == 1
    assert "needs root" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["raw", "memory"])
async def test_admission_is_measured_as_messages_in_a_second(part: str) -> None:
    rate = await bench_admission.measure(part, 4_000, 2, "")
    assert min(rate.per_s, rate.per_cpu_s) > 100


def test_admission_gives_medians_and_what_share_of_bare_verification_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {("raw", "1"): 1_000.0, ("memory", "1"): 800.0, ("memory", "2"): 1_500.0}
    monkeypatch.setattr(
        bench, "_run", lambda _module, part, _count, cores, _brokers: {"per_s": told[part, cores], "per_cpu_s": 7.0}
    )
    with pytest.raises(SystemExit):
        main(["bench", "admission", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "raw_verify_per_s_1core": 1000,
        "admitted_per_s_1core": 800,
        "admitted_per_s_2cores": 1500,
        "share_of_raw": 0.8,
        "share_of_raw_by_processor_time": 1.0,
        "kafka_admitted_per_s": None,
    }


def test_the_flows_to_judge_are_many_and_all_judged() -> None:
    batches = bench_detect.flows_of(bench_capture.demo_capture(), 12_000)
    assert sum(map(len, batches)) >= 12_000
    assert {len(batch) for batch in batches[:-1]} == {bench_detect.BATCH_ROWS}
    assert len({batch.src[row].tobytes() for batch in batches for row in range(0, len(batch), 50)}) > 20
    ends = np.concatenate([batch.end_us for batch in batches])
    assert (np.diff(ends) >= 0).all()


def test_judging_is_measured_alone_and_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_detect, "_WARM_BATCHES", 1)
    told = bench_detect.measure(bench_capture.demo_capture(), 5_000, 1)
    assert set(told) >= {"classifier_rows_per_s", "pipeline_rows_per_s", "onnx_batch_p99_ms", "model_mb"}
    assert told["with_windows_rows_per_s"] < told["pipeline_rows_per_s"]
    assert 0 < told["model_mb"] <= 1


def test_the_logs_of_the_benchmark_are_what_it_says(tmp_path: Path) -> None:
    found = bench_logs.measure(1_000, rounds=1)
    assert found["lines"] == 1_000
    assert all(isinstance(rate, (int, float)) and rate > 0 for rate in found.values())
    path = bench_logs._write(tmp_path / "failed.log", 50, bench_logs._failed)
    with closing(metering.reference().open_source(f"logs:{path}")) as source:
        assert sum(map(len, source.batches())) == 50
    path = bench_logs._write(tmp_path / "hostile.log", 3, bench_logs._hostile)
    assert {LONGEST - 200 < len(line) <= LONGEST for line in path.read_bytes().splitlines()} == {True}


def test_the_ledger_bench_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.ledger(blocks=3, audited=2, points="5,20", folder=tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert set(told["at_blocks"]) == {"5", "20"}
    assert told["apply_store_ms_per_1000tx"] == told["at_blocks"]["5"]
    assert told["audit_tx_per_s"] > 0
    assert 1_000 < told["proof_bytes"] < 4_096
    assert told["verify_ms"] > 0
    assert not list(tmp_path.iterdir()), "the databases are gone"
