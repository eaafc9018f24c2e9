"""Alerts are explained from their evidence, which must replay, and labelled into a table that adapt can learn from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from cybermesh.cli import _application, output
from cybermesh.detect.datasets import read
from cybermesh.telemetry.features import COLUMN

DEMO = Path(output.__file__).parents[1] / "data" / "demo.pcap"


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(_application(arguments[0]), list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alerts") / "alerts.json"
    path.write_text(run("detect", str(DEMO), "--evidence", "-o", "json"))
    return path


def changed(raised: Path, path: Path, change) -> Path:
    alerts = orjson.loads(raised.read_bytes())
    for alert in alerts:
        change(alert)
    path.write_bytes(b"\n".join(orjson.dumps(alert) for alert in alerts))
    return path


def test_every_finding_of_rules_and_classifier_replays(raised: Path) -> None:
    told = json.loads(run("alerts", "explain", str(raised), "--json"))
    assert {alert["type"] for alert in told} >= {"port_scan", "brute_force", "ddos"}
    assert all(not alert["replay"]["differs"] for alert in told)
    engines = Counter(finding["engine"] for alert in told for finding in alert["evidence"]["findings"])
    left = [name for alert in told for name in alert["replay"]["not_replayed"]]
    assert not [name for name in left if name.startswith("classifier")]
    assert engines["classifier"] >= 1
    text = run("alerts", "explain", str(raised), told[0]["id"][:10])
    assert told[0]["id"] in text
    assert "fires when" in text or "look like" in text


def test_evidence_that_was_changed_does_not_replay(raised: Path, tmp_path: Path) -> None:
    def change(alert: dict) -> None:
        for finding in alert["evidence"]["findings"]:
            if finding["engine"] == "classifier":
                kept = {name: finding["values"][name] for name in ("model", "strongest_score")}
                finding["values"] = dict.fromkeys(finding["values"], 1_000) | kept

    told = json.loads(run("alerts", "explain", str(changed(raised, tmp_path / "a.ndjson", change)), "--json", code=1))
    assert any("the model gives" in text for alert in told for text in alert["replay"]["differs"])


def test_labels_become_a_table_that_adapt_reads_and_none_twice(raised: Path, tmp_path: Path) -> None:
    alerts = {alert["type"]: alert for alert in orjson.loads(raised.read_bytes())}
    scan, out = alerts["port_scan"], tmp_path / "labelled.csv"
    arguments = [
        "alerts",
        "label",
        str(raised),
        scan["id"][:12],
        "--as",
        "port_scan",
        "--capture",
        str(DEMO),
        "--out",
        str(out),
    ]
    first = json.loads(run(*arguments, "--json"))
    assert 0 < first["added"] <= 200 <= first["flows"]
    assert json.loads(run(*arguments, "--json"))["added"] == 0
    guesses = [part if part != scan["id"][:12] else alerts["brute_force"]["id"][:12] for part in arguments]
    guesses[guesses.index("port_scan")] = "brute_force"
    run(*guesses)
    dataset = read(out)
    counts = Counter(dataset.labels.tolist())
    assert counts["port_scan"] == first["added"]
    assert counts["brute_force"] >= 40
    assert dataset.known.all()
    assert (dataset.features[dataset.labels == "brute_force", COLUMN["dst_port"]] == 22).all()


def test_what_cannot_be_done_is_one_line(raised: Path, tmp_path: Path) -> None:
    bare = changed(raised, tmp_path / "bare.ndjson", lambda alert: alert.pop("evidence"))
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "t.csv").write_text("a,b\n")
    label = ["label", str(raised), orjson.loads(raised.read_bytes())[0]["id"], "--capture", str(DEMO)]
    for arguments, reason in (
        (["explain", str(bare)], "--evidence"),
        (["explain", str(tmp_path / "no.json")], "no alerts in JSON"),
        (["explain", str(tmp_path / "other.json")], "not what cybermesh detect"),
        (["explain", str(tmp_path / "none.json")], "No such file"),
        (["explain", str(raised), "zz"], "begins with 'zz'"),
        ([*label, "--as", "fruit", "--out", str(tmp_path / "new.csv")], "not one of"),
        ([*label, "--as", "benign", "--out", str(tmp_path / "t.csv")], "another"),
    ):
        with pytest.raises(output.CommandError, match=reason):
            run("alerts", *arguments)
    assert (tmp_path / "t.csv").read_text() == "a,b\n"
