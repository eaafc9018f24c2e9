"""A model learns a site from few labelled flows and its ordinary traffic, keeps what it knew, and says what it is sure of."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from cybermesh.cli import _application, output
from cybermesh.detect import adaptation, density, modelcard, modelfile, recalibration
from cybermesh.detect.datasets import BENIGN, Dataset, DatasetError
from cybermesh.detect.engines.classifier import Classifier
from cybermesh.detect.evaluation import evaluate
from cybermesh.detect.training import Trained
from cybermesh.keys import SigningKey
from cybermesh.keystore import save_key
from cybermesh.roles.detection import open_detector
from cybermesh.telemetry.cic_columns import OWN
from cybermesh.telemetry.features import COLUMN, NAMES
from tests.detect import flow_rows
from tests.detect.flow_rows import PERTURBATIONS, flows, trained, variant, write_table

# The same kinds of traffic on another network: other sizes, other pace, and an attack that the first one did not have.
ELSEWHERE = {
    "benign": (300, 900, 20, 22, 4_000, 6),
    "port_scan": (0, 0, 2, 1, 900, 6),
    "brute_force": (40, 60, 30, 28, 9_000, 6),
    "web_attack": (700, 90, 6, 5, 2_000, 6),
    "bulk": (1_300, 0, 150, 60, 250, 6),
}
KNOWN = np.ones(len(NAMES), dtype=np.bool_)


def site(kinds: list[str], seed: int) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_rows, "PROFILES", ELSEWHERE)
        features = flows(kinds, seed=seed)
    names = np.array(kinds)
    nothing = np.zeros(len(kinds), dtype=np.bool_)
    return Dataset(OWN, features, KNOWN, names, names, np.arange(len(kinds)), False, nothing, "00" * 32, {})


def labelled() -> Dataset:
    return site(["benign"] * 40 + ["port_scan", "brute_force", "web_attack"] * 20, seed=11)


def quiet(count: int = 300) -> Dataset:
    return site(["benign"] * count, seed=12)


@functools.cache
def adapted() -> Trained:
    return adaptation.adapt(trained().model, labelled(), quiet(), seed=3)


def test_what_one_network_taught_finds_little_on_another_and_a_hundred_labels_change_that() -> None:
    later = site(["benign"] * 300 + ["port_scan", "brute_force", "web_attack"] * 60, seed=13)
    before = evaluate(Classifier(trained().model, trained().onnx), later)
    after = evaluate(Classifier(adapted().model, adapted().onnx), later)
    assert (before.attack_recall or 0) < 0.8
    assert (after.attack_recall or 0) >= 0.97
    assert (after.benign_fpr or 0) <= 0.01
    assert after.per_class["web_attack"]["recall"] > 0.9
    assert after.ood_share <= 0.05


def test_an_attack_that_the_site_has_not_shown_is_remembered_but_not_trusted_with_a_policy() -> None:
    model = adapted().model
    assert "ddos" in model.classes
    floods = flows(["ddos"] * 40, seed=5)
    assessment = Classifier(model, adapted().onnx).assess(floods, KNOWN)
    assert (np.array(model.classes)[assessment.claimed] == "ddos").mean() > 0.8
    assert model.ceilings["ddos"] <= adaptation.CONFIDENCE_UNSEEN_MAX < 0.9


def test_the_same_rows_model_and_seed_give_the_same_bytes() -> None:
    again = adaptation.adapt(trained().model, labelled(), quiet(), seed=3)
    assert again.onnx == adapted().onnx
    assert again.model.benign_shift == adapted().model.benign_shift


def test_no_address_port_or_time_is_an_input_and_what_the_rows_lack_is_left_out() -> None:
    assert set(adapted().model.inputs) <= set(trained().model.inputs)
    without = KNOWN.copy()
    without[COLUMN["flow_iat_std"]] = False
    model = adaptation.adapt(trained().model, replace(labelled(), known=without), quiet(), seed=1).model
    assert "flow_iat_std" in trained().model.inputs
    assert "flow_iat_std" not in {*model.inputs, *model.density.inputs}


def test_labels_without_ordinary_traffic_do_too() -> None:
    made = adaptation.adapt(trained().model, labelled(), seed=1)
    assert made.model.record["rows_of_ordinary_traffic"] == 0
    assert made.model.record["folds"]["benign_rows"] == 40


@pytest.mark.parametrize(
    ("kinds", "reason"), [(["benign"] * 30, "0 attacks"), (["port_scan"] * 30, "0 benign"), ([], "0 usable")]
)
def test_too_few_rows_say_how_many_are_needed(kinds: list[str], reason: str) -> None:
    rows = site(kinds or ["benign"], seed=1)
    with pytest.raises(DatasetError, match=reason):
        adaptation.adapt(trained().model, rows if kinds else rows.take(np.zeros(1, dtype=np.bool_)), seed=1)


def test_rows_of_another_extractor_teach_nothing() -> None:
    foreign = replace(labelled(), foreign=np.ones(len(labelled()), dtype=np.bool_))
    with pytest.raises(DatasetError, match="another extractor"):
        adaptation.adapt(trained().model, foreign, seed=1)


def test_the_shift_lets_no_more_benign_rows_through_than_allowed() -> None:
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet([4, 1, 1], 1_000)
    benign = np.ones(1_000, dtype=np.bool_)
    for allowed in (0.0, 0.01, 0.1):
        moved = adaptation.benign_shift(probabilities, benign, allowed)
        scores = probabilities * [np.exp(moved), 1, 1]
        share = (scores.argmax(axis=1) != 0).mean()
        assert share <= allowed
        assert share >= allowed - 0.002 or moved == -4.0
    assert adaptation.benign_shift(probabilities, ~benign, 0.01) == 0.0


def test_with_few_benign_rows_the_threshold_balances_both_kinds_of_mistakes() -> None:
    benign = np.arange(60) < 20
    attack = np.where(benign, 0.2, 0.8)[:, None]
    apart = np.concatenate([1 - attack, attack], axis=1)
    margin = np.log(0.8 / 0.2)
    strict, usual, loose = (adaptation.balanced_shift(apart, benign, fpr_max) for fpr_max in (0.001, 0.01, 0.1))
    assert -margin < loose < usual < strict
    assert abs(adaptation.balanced_shift(apart, benign, 0.03)) < 0.05  # both as bad: in the middle
    outlier = apart.copy()
    outlier[0] = [0.001, 0.999]  # one odd benign row does not cost the attacks
    assert adaptation.balanced_shift(outlier, benign, 0.01) < usual + 0.5
    assert adaptation.benign_shift(outlier, benign, 0.01) > usual + 3


def test_remembered_rows_are_like_those_the_prototypes_were_made_of() -> None:
    drawn, truth = density.remembered(trained().model.density, 30, seed=1)
    assert len(drawn) == 30 * len(trained().model.classes)
    unfamiliar = trained().model.density.unfamiliar(drawn, truth)
    assert unfamiliar.mean() < 0.3
    np.testing.assert_allclose(drawn[:, COLUMN["pkt_size_avg"]], drawn[:, COLUMN["pkt_len_mean"]])


def test_calibration_brings_false_alarms_below_the_limit_and_teaches_the_guard() -> None:
    strange = site(["bulk"] * 400, seed=20)
    made = recalibration.calibrate(trained().model, trained().onnx, strange, seed=1)
    later = site(["bulk"] * 400, seed=21)
    later = replace(later, labels=np.full(len(later), BENIGN))
    before = evaluate(Classifier(trained().model, trained().onnx), later)
    after = evaluate(Classifier(made, trained().onnx), later)
    assert before.ood_share + (before.benign_fpr or 0) > 0.5
    assert after.ood_share < 0.1
    assert (after.benign_fpr or 0) <= 0.01
    assert made.benign_shift >= 0
    assert max(limit for name, limit in made.ceilings.items() if name != BENIGN) <= 0.85


def test_calibration_with_labels_sets_the_confidence() -> None:
    made = recalibration.calibrate(trained().model, trained().onnx, quiet(), labelled(), seed=1)
    assert made.record["data_sha256"] == labelled().digest
    few = labelled().take(np.arange(45))
    with pytest.raises(DatasetError, match="at least 20 labelled attacks"):
        recalibration.calibrate(trained().model, trained().onnx, quiet(), few, seed=1)


def test_calibration_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(DatasetError, match="at least 10"):
        recalibration.calibrate(trained().model, trained().onnx, quiet(5), seed=1)
    without = KNOWN.copy()
    without[COLUMN["flow_duration"]] = False
    with pytest.raises(DatasetError, match="flow_duration"):
        recalibration.calibrate(trained().model, trained().onnx, replace(quiet(), known=without), seed=1)


def test_the_cards_say_where_the_model_comes_from_and_how_good_it_is() -> None:
    calibrated = recalibration.calibrate(trained().model, trained().onnx, quiet(), seed=1)
    for model, words in ((adapted().model, ("attack_recall", "web_attack 20")), (calibrated, ("before", "after"))):
        card = modelcard.render(model)
        for text in (*words, "made by this test", "Where it must not be believed", "SHA-256"):
            assert text in card


# --- on the command line --------------------------------------------------------------------------------------------


def table(path: Path, dataset: Dataset) -> Path:
    return write_table(path, variant("CyberMesh"), dataset.features, dataset.labels.tolist())


def run(*arguments: str) -> dict:
    done = CliRunner().invoke(_application(arguments[0]), list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_adapt_calibrate_and_evaluate_on_the_command_line_and_a_changed_model_is_refused(tmp_path: Path) -> None:
    key = SigningKey(b"\x05" * 32)
    save_key(tmp_path / "site.key", key)
    data, ordinary = table(tmp_path / "rows.csv", labelled()), table(tmp_path / "quiet.csv", quiet())
    made = run("adapt", "--data", str(data), "--benign", str(ordinary), "--out", str(tmp_path / "m"), "--json")
    assert made["folds"]["attack_recall"] > 0.9
    shown = run("evaluate", "--model", str(tmp_path / "m"), "--data", str(data), "--json")
    assert shown["attack_recall"] > 0.9
    with pytest.raises(output.CommandError, match="nor signed"):
        run("detect", "--model", str(tmp_path / "m"), "x.pcap")
    options = ["--model", str(tmp_path / "m"), "--out", str(tmp_path / "c"), "--key", str(tmp_path / "site.key"), "--json"]
    assert run("calibrate", "--benign", str(ordinary), *options)["after"]["benign_fpr"] <= 0.01
    capture = str(Path(output.__file__).parents[1] / "data" / "demo.pcap")
    signed = ["detect", "--model", str(tmp_path / "c"), "--site-key", key.public.hex(), capture, "--json"]
    assert run(*signed)
    with pytest.raises(output.CommandError, match="nor signed"):
        run(*["00" * 32 if part == key.public.hex() else part for part in signed])
    text = (tmp_path / "c" / "model.json").read_text()
    (tmp_path / "c" / "model.json").write_text(text.replace('"benign_shift"', '"benign_shifT"'))
    with pytest.raises(output.CommandError, match="nor signed"):
        run(*signed)


def test_the_role_loads_a_sites_model_only_with_the_sites_key(tmp_path: Path) -> None:
    key, other = SigningKey(b"\x05" * 32), SigningKey(b"\x06" * 32)
    modelfile.save(tmp_path / "m", adapted().model, adapted().onnx)
    modelfile.sign(tmp_path / "m", key)
    opened = open_detector(None, tmp_path / "m", key.public.hex())
    (engine,) = [one for one in opened.pipeline.detector.engines if isinstance(one, Classifier)]
    assert engine.knows_site
    assert engine.model.classes == adapted().model.classes
    for wrong in (other.public.hex(), ""):
        with pytest.raises(modelfile.ModelError, match="nor signed"):
            open_detector(None, tmp_path / "m", wrong)
    body = json.loads((tmp_path / "m" / "model.json").read_text())
    del body["sha256"]
    body["definition_hash"] = "00" * 32
    text = orjson.dumps(body, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)
    digest = hashlib.sha256(text).hexdigest()
    whole = orjson.dumps(body | {"sha256": digest}, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)
    (tmp_path / "m" / "model.json").write_bytes(whole)
    modelfile.sign(tmp_path / "m", key)  # even the site's own signature does not make other features the meter's
    with pytest.raises(modelfile.ModelError, match="other feature definitions"):
        open_detector(None, tmp_path / "m", key.public.hex())


def test_rows_of_another_extractor_are_refused_on_the_command_line(tmp_path: Path) -> None:
    rows = replace(labelled(), features=PERTURBATIONS["frame lengths"](labelled().features))
    data = table(tmp_path / "rows.csv", rows)
    with pytest.raises(output.CommandError, match="another extractor"):
        run("adapt", "--data", str(data), "--out", str(tmp_path / "m"))


def test_ordinary_traffic_may_be_a_capture(tmp_path: Path) -> None:
    capture = Path(output.__file__).parents[1] / "data" / "demo.pcap"
    told = run("calibrate", "--benign", str(capture), "--out", str(tmp_path / "m"), "--fpr", "0.2", "--json")
    assert told["rows_of_ordinary_traffic"] > 1_000
