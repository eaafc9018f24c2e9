"""The protocol never tests a moment that it trained on, and reports what it cannot gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from cybermesh.cli import _application
from cybermesh.detect import protocol, training
from cybermesh.detect.datasets import split_by_time
from tests.detect.flow_rows import LABELS, as_improved, flows, many, synthetic, variant, write_table


def test_training_and_test_rows_of_a_label_do_not_overlap_in_time() -> None:
    rows = training.usable(synthetic())
    early = split_by_time(rows, training.TRAIN_SHARE)
    for name in np.unique(rows.names):
        own = rows.names == name
        assert rows.order[own & early].max() < rows.order[own & ~early].min()
        assert abs((own & early).sum() / own.sum() - training.TRAIN_SHARE) < 0.01


def test_the_report_has_means_worsts_intervals_and_inputs() -> None:
    told = protocol.run(synthetic(), seeds=2)
    assert told["rows"]["train"] + told["rows"]["test"] == len(synthetic())
    assert told["mean"]["macro_f1_all"] > 0.98
    assert len(told["false_positives"]) == len(told["runs"]) == 2
    assert not {"src_port", "dst_port", "protocol"} & set(told["inputs"])
    scan = told["per_class"]["port_scan"]
    assert scan["recall_interval"][0] < scan["recall"] <= scan["recall_interval"][1] + 1e-9
    assert scan["gated"] == (scan["n"] >= 100)


def test_the_protocol_on_the_command_line(tmp_path: Path) -> None:
    kinds = many(40)
    data = write_table(
        tmp_path / "t.csv", variant("improved"), as_improved(flows(kinds, seed=2)), [LABELS[kind] for kind in kinds]
    )
    arguments = ["evaluate", "--protocol", "--seeds", "1", "--data", str(data)]
    told = json.loads(CliRunner().invoke(_application("evaluate"), [*arguments, "--json"]).stdout)
    assert told["seeds"] == 1
    assert "false positives of" in CliRunner().invoke(_application("evaluate"), arguments).stdout
