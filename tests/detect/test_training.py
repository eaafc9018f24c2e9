"""Training is deterministic, honest about its inputs, and its export says what the trees say."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from cybermesh.cli import _application, output
from cybermesh.detect import modelcard, training
from cybermesh.detect.datasets import BENIGN, DatasetError, split_by_time
from cybermesh.detect.engines.classifier import Classifier
from cybermesh.detect.modelfile import encode
from cybermesh.telemetry.cic_columns import OTHER_MEANING
from cybermesh.telemetry.features import COLUMN, NAMES
from tests.detect.flow_rows import LABELS, PERTURBATIONS, as_improved, flows, many, synthetic, trained, variant, write_table


def test_a_separable_data_set_is_learned_and_reported() -> None:
    figures = trained().model.record["held_out"]
    assert figures["macro_f1_all"] > 0.98
    assert figures["attack_recall"] > 0.95
    assert figures["benign_fpr"] == 0
    assert figures["ece"] < 0.05
    assert set(trained().model.classes) == {BENIGN, "ddos", "port_scan", "brute_force"}


def test_the_same_rows_and_seed_give_the_same_bytes_and_another_seed_does_not() -> None:
    first, second, other = (training.build(synthetic(), seed) for seed in (5, 5, 6))
    assert first[1] == second[1]
    assert encode(*first) == encode(*second)
    assert first[1] != other[1]


def test_no_address_port_time_identifier_or_other_meaning_is_an_input() -> None:
    inputs = set(trained().model.inputs)
    assert inputs <= set(NAMES)
    assert not inputs & {"src_port", "dst_port", "protocol", "init_fwd_win_byts", "init_bwd_win_byts", "fwd_seg_size_min"}
    assert not inputs & OTHER_MEANING
    assert set(trained().model.density.inputs) <= inputs
    everything = training.model_inputs(np.ones(len(NAMES), dtype=np.bool_))
    assert not set(everything) & {"src_port", "dst_port"}
    assert "subflow_fwd_pkts" in everything  # rows this project metered itself may use them


def test_the_label_cannot_be_told_from_the_ports() -> None:
    shuffled = synthetic().features.copy()
    shuffled[:, [COLUMN["src_port"], COLUMN["dst_port"]]] = 7
    classifier = Classifier(trained().model, trained().onnx)
    before = classifier.assess(synthetic().features, synthetic().known).probabilities
    np.testing.assert_array_equal(before, classifier.assess(shuffled, synthetic().known).probabilities)


def test_the_onnx_model_says_what_lightgbm_says_and_onnxruntime_has_nothing_to_warn_of(capfd) -> None:
    dataset = synthetic()
    inputs = training.model_inputs(dataset.known)
    classes = (BENIGN, *sorted(set(dataset.labels.tolist()) - {BENIGN}))
    truth = np.array([classes.index(name) for name in dataset.labels.tolist()])
    grown = training._grow(dataset.features, truth, inputs, classes, seed=3)
    session = onnxruntime.InferenceSession(training.export(grown), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(1).permutation(dataset.features)[:, [COLUMN[name] for name in inputs]].astype(np.float32)
    for count in (1, 2, len(rows)):
        (served,) = session.run(None, {"features": rows[:count]})
        np.testing.assert_allclose(served, grown.booster.predict(rows[:count].astype(np.float64)), atol=2e-6)
    assert [one.name for one in session.get_outputs()] == ["probabilities"]
    assert "arning" not in "".join(capfd.readouterr())


def test_rows_of_another_extractor_are_refused_and_a_few_of_them_left_out(tmp_path: Path) -> None:
    foreign = np.ones(len(synthetic()), dtype=np.bool_)
    with pytest.raises(DatasetError, match="another extractor"):
        training.usable(replace(synthetic(), foreign=foreign))
    few = np.arange(len(foreign)) < 4
    assert len(training.usable(replace(synthetic(), foreign=few))) == len(foreign) - 4


def test_training_needs_benign_rows_and_an_attack() -> None:
    with pytest.raises(DatasetError, match="at least one attack"):
        training.usable(synthetic().take(synthetic().labels == BENIGN))
    with pytest.raises(DatasetError, match="benign"):
        training.usable(synthetic().take(synthetic().labels != BENIGN))


def test_the_card_names_data_terms_seed_figures_and_limits() -> None:
    card = modelcard.render(trained().model)
    for text in (synthetic().digest, "made by this test", "seed 5", "attack recall", "Where it must not be believed"):
        assert text in card


def test_a_missing_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def without(name: str, *rest):
        if name == "lightgbm":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(training.TrainingError, match=r"pip install 'cybermesh\[train\]'"):
        training.require_extra()


def test_train_then_evaluate_on_the_command_line(tmp_path: Path) -> None:
    kinds = many(60)
    rows, labels = as_improved(flows(kinds, seed=2)), [LABELS[kind] for kind in kinds]
    data = write_table(tmp_path / "flows.csv.gz", variant("improved"), rows, labels)
    runner, app = CliRunner(), _application("train")
    done = runner.invoke(app, ["train", "--data", str(data), "--out", str(tmp_path / "model"), "--seed", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seed"] == 2
    assert (tmp_path / "model" / "MODEL_CARD.md").is_file()
    arguments = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(data)]
    measured = runner.invoke(_application("evaluate"), [*arguments, "--json"])
    figures = json.loads(measured.stdout)
    assert set(figures) == {
        *("rows", "macro_f1", "macro_f1_all", "per_class", "attack_recall", "benign_fpr", "auc", "ece", "ood_share"),
        "intervals",
    }
    assert figures["rows"] == len(kinds)
    assert "port_scan" in runner.invoke(_application("evaluate"), arguments).stdout
    foreign = write_table(tmp_path / "other.csv", variant("improved"), PERTURBATIONS["seconds"](rows), labels)
    other = runner.invoke(
        _application("evaluate"), ["evaluate", "--model", str(tmp_path / "model"), "--data", str(foreign), "--json"]
    )
    assert json.loads(other.stdout)["ood_share"] == 1.0


def test_bad_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(output.CommandError, match="No such file"):
        CliRunner().invoke(_application("evaluate"), ["evaluate", "--data", str(tmp_path / "none.csv")], catch_exceptions=False)


def test_the_split_leaves_rows_of_every_label_for_calibration() -> None:
    fit = split_by_time(synthetic(), training.FIT_SHARE)
    assert {*synthetic().labels[fit]} == {*synthetic().labels[~fit]}
