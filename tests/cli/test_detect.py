"""``cybermesh detect`` and ``cybermesh rules`` as users call them."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import pytest

from cybermesh import cli
from tests.conftest import ROOT

DEMO = ROOT / "cybermesh" / "data" / "demo.pcap"
KEYS = {"type", "source", "destination", "severity", "confidence", "first", "last", "count", "engines", "explanation", "policy"}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_detect_prints_an_array_with_one_object_per_alert(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("detect", str(DEMO), "--json", "--no-classifier") == 0
    out, err = capsys.readouterr()
    alerts = json.loads(out)
    assert [alert["type"] for alert in alerts] == ["port_scan", "brute_force", "ddos"]
    assert all(alert.keys() >= KEYS for alert in alerts)
    assert all(alert["first"].endswith("Z") and alert["first"] <= alert["last"] for alert in alerts)
    assert alerts[0]["engines"] == {"rules": 0.98}
    assert "packets" in err
    assert "not IP" in err


def test_detect_prints_one_object_a_line_as_ndjson(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("detect", str(DEMO), "-o", "ndjson", "--no-classifier") == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3


def test_what_a_capture_and_a_log_both_show_is_one_alert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = json.loads(DEMO.with_suffix(".labels.json").read_text())
    (attack,) = [attack for attack in labels["attacks"] if attack["type"] == "brute_force"]
    lines = []
    for number in range(60):
        at = datetime.datetime.fromtimestamp(attack["first_us"] / 1e6 + number / 40, datetime.UTC)
        lines.append(
            f"{at.isoformat()} gate sshd[{number}]: Failed password for root from 203.0.113.66 port {number + 1024} ssh2"
        )
    log = tmp_path / "auth.log"
    log.write_text("\n".join(lines) + "\n")
    told = {}
    for inputs in ((DEMO,), (log,), (DEMO, log), (log, DEMO)):
        assert call("detect", *map(str, inputs), "--json", "--no-classifier") == 0
        alerts = json.loads(capsys.readouterr().out)
        told[inputs] = [(alert["type"], alert["source"]) for alert in alerts]
    guesser = ("brute_force", "203.0.113.66")
    assert told[(log,)] == [guesser]
    assert told[(DEMO,)].count(guesser) == 1
    assert sorted(told[(DEMO, log)]) == sorted(told[(log, DEMO)]) == sorted(told[(DEMO,)])


def test_detect_tells_people_what_it_proposes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("detect", str(DEMO), "--no-classifier") == 0
    out = capsys.readouterr().out
    assert "proposes: block 203.0.113.66 for 900 s" in out
    assert "proposes: limit packets to 10.77.1.10 port 80 for 900 s" in out


def test_alerts_fail_the_command_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("detect", str(DEMO), "--json", "--no-classifier", "--fail-on-alert") == 1
    assert json.loads(capsys.readouterr().out)


def test_a_compressed_capture_gives_the_same_alerts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "demo.pcap.gz"
    packed.write_bytes(gzip.compress(DEMO.read_bytes(), 1))
    for path in (DEMO, packed):
        assert call("detect", str(path), "--json", "--no-classifier") == 0
    one, two = capsys.readouterr().out.split("]\n[")
    assert json.loads(one + "]") == json.loads("[" + two)


@pytest.mark.parametrize("content", [None, b"", b"no capture at all, but a text"])
def test_an_input_that_is_no_capture_is_one_clear_error(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pcap"
    if content is not None:
        path.write_bytes(content)
    assert call("detect", str(path), str(DEMO), "--json", "--no-classifier") == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 3  # the other input is still read
    assert [line for line in err.splitlines() if line.startswith("cybermesh:")] == [
        line for line in err.splitlines() if str(path) in line
    ]


def test_a_broken_rule_file_is_a_usage_error_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("- id: x\n  type: nonsense\n")
    assert call("detect", str(DEMO), "--rules", str(tmp_path)) == 2
    assert f"{tmp_path / 'bad.yaml'}:1:" in capsys.readouterr().err


def test_rules_are_listed_tested_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("rules", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"flood-syn", "scan-vertical", "brute-ssh"} <= {rule["id"] for rule in listed}
    assert call("rules", "test") == 0
    assert "0 failed" in capsys.readouterr().err
    assert call("rules", "explain", "brute-ssh") == 0
    assert "short_sessions >= 5" in capsys.readouterr().out
    assert call("rules", "explain", "brute-shh") == 2
    assert "did you mean brute-ssh?" in capsys.readouterr().err


def test_a_rule_whose_example_does_not_hold_fails_the_test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = (ROOT / "cybermesh" / "data" / "rules" / "brute_force.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(shipped.replace("short_sessions >= 5 ", "short_sessions >= 500 ", 1))
    assert call("rules", "test", "--rules", str(tmp_path)) == 1
    assert "brute-ssh: 'a guesser'" in capsys.readouterr().err
