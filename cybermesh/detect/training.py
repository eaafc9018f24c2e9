"""Trains the classifier: boosted trees, calibration, guard, and an honest report, all from one seed.

Rules:

- no address, identifier, time of day or port is an input, nor what the training table defines otherwise than the meter; the
  operating-system and tool fingerprints (first window, shortest header) and the protocol number stay out too: they add nothing
  on the same network and are what misleads on another (the record's ``with_fingerprints`` measures it);
- within each label as the file names it, time decides who trains and who tests: random splits overstate;
- what is calibrated (temperature, thresholds, limits of the guard) is calibrated on rows later than those the trees saw, with
  trees made of the earlier ones; the delivered trees are then grown on all rows with these settings;
- the same rows, seed and library versions give the same bytes on one machine.

Needs the extra ``train`` (LightGBM, onnxmltools); serving needs neither.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cybermesh.detect import calibration, density
from cybermesh.detect.datasets import BENIGN, Dataset, DatasetError, split_by_time
from cybermesh.detect.engines.classifier import Classifier
from cybermesh.detect.evaluation import evaluate
from cybermesh.detect.guard import reasons, single_packet
from cybermesh.detect.modelfile import FORBIDDEN_INPUTS, SHIPPED, Model
from cybermesh.telemetry.features import COLUMN, NAMES

FINGERPRINTS = frozenset({"init_fwd_win_byts", "init_bwd_win_byts", "fwd_seg_size_min", "protocol"})
TRAIN_SHARE = 0.7  # of each label, for the report
FIT_SHARE = 0.78  # of the training rows of each label grow trees for calibration, the later rest calibrates
ROUNDS = 16  # with 20 leaves: 500,000 rows/s on one core; 24 rounds of 31 gain .0001 macro-F1 and cost a third of that
_PARAMETERS: Mapping[str, Any] = {
    "objective": "multiclass",
    "num_leaves": 20,
    "learning_rate": 0.4,
    "min_data_in_leaf": 10,
    # Without a bound on leaf values, boosting of rare classes diverges on a few rows.
    "max_delta_step": 1.0,
    "lambda_l2": 1.0,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.6,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}
_THRESHOLD_MIN, _THRESHOLD_MAX = 0.5, 0.9
_ROWS_FOR_THRESHOLD_MIN = 100
_IMPORTANT = 8
_PACKAGES = ("lightgbm", "onnxmltools", "onnx", "numpy")

Floats = npt.NDArray[np.float64]
Progress = Callable[[str], None]


class TrainingError(Exception):
    """A model cannot be trained from this data, or on this installation; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished model: metadata (with the report in ``record``) and the ONNX bytes."""

    model: Model
    onnx: bytes


@dataclass(frozen=True, slots=True)
class Grown:
    """Trees with what they were grown from; ``booster`` is LightGBM's."""

    booster: Any
    inputs: tuple[str, ...]
    classes: tuple[str, ...]

    def probabilities(self, features: Floats) -> Floats:
        """Return float64[n, classes] of features float64[n, 79]."""
        predicted: Floats = np.asarray(self.booster.predict(matrix(features, self.inputs)), dtype=np.float64)
        return predicted


def train(dataset: Dataset, seed: int, *, terms: str = "", progress: Progress = lambda line: None) -> Trained:
    """Train on all rows of ``dataset`` and report on a split of them by time.

    ``terms`` say under which terms the data may be used; they go into the card.

    Raises:
        TrainingError: the extra ``train`` is not installed.
        DatasetError: another extractor's file, no benign row, or no attack.
    """
    require_extra()
    rows = usable(dataset)
    early = split_by_time(rows, TRAIN_SHARE)
    progress(f"{len(rows)} rows; growing trees on the first {TRAIN_SHARE:.0%} of each label")
    held_out = rows.take(~early)
    measured = evaluate(Classifier(*build(rows.take(early), seed)), held_out)
    record: dict[str, Any] = {
        "rows": len(rows),
        "rows_by_class": {str(name): int((rows.labels == name).sum()) for name in np.unique(rows.labels)},
        "rows_left_out": {**dataset.skipped, "unusable": len(dataset) - len(rows)},
        "variant": dataset.variant,
        "data_sha256": dataset.digest,
        "terms": terms or "not stated",
        "seed": seed,
        "rounds": ROUNDS,
        "parameters": dict(_PARAMETERS),
        "versions": versions(),
        "held_out": measured.to_json(),
    }
    progress("measuring what fingerprints would add, and each day from the others")
    record["with_fingerprints"] = _compare(rows, early, seed)
    record["without_a_day"] = leave_days_out(rows, seed) if dataset.timed else {}
    progress("growing the delivered trees on all rows")
    model, onnx = build(rows, seed)
    return Trained(replace(model, record=record), onnx)


def model_inputs(known: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the features that a model may read from a source with these known columns, in vector order."""
    out = FORBIDDEN_INPUTS | FINGERPRINTS
    return tuple(name for name in NAMES if known[COLUMN[name]] and name not in out)


def require_extra() -> None:
    """Check that the libraries of the extra ``train`` are there.

    Raises:
        TrainingError: one is missing; the text says how to install them.
    """
    for package in ("lightgbm", "onnx", "onnxmltools"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise TrainingError(f"training needs {package}: pip install 'cybermesh[train]'") from error


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what trees come out."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}


def usable(dataset: Dataset) -> Dataset:
    """Return the rows that can be trained on.

    Raises:
        DatasetError: another extractor's file, no benign row, or no attack.
    """
    if dataset.foreign_file:
        raise DatasetError(
            f"{int(dataset.foreign.sum())} of {len(dataset)} rows contradict the feature definitions: another extractor wrote "
            "them; meter the captures again with cybermesh flows"
        )
    rows = dataset.take(~(dataset.foreign | single_packet(dataset.features)))
    present = set(rows.labels.tolist())
    if BENIGN not in present or len(present) < 2:
        raise DatasetError(f"training needs benign rows and at least one attack; there are {sorted(present) or 'none'}")
    return rows


def build(dataset: Dataset, seed: int) -> tuple[Model, bytes]:
    """Return a complete model of these rows, without a record."""
    inputs = model_inputs(dataset.known)
    classes = (BENIGN, *sorted(set(dataset.labels.tolist()) - {BENIGN}))
    truth = np.array([classes.index(name) for name in dataset.labels.tolist()], dtype=np.intp)
    fit = split_by_time(dataset, FIT_SHARE)
    # A label of one row has no earlier part; it trains, and nothing of it calibrates.
    fit |= np.isin(truth, [i for i in range(len(classes)) if not fit[truth == i].any()])
    early = _grow(dataset.features[fit], truth[fit], inputs, classes, seed)
    familiar = density.fit(dataset.features[fit], truth[fit], inputs, len(classes), seed)
    later, later_truth = dataset.features[~fit], truth[~fit]
    raw = early.probabilities(later)
    familiar = density.with_limits(familiar, later, raw.argmax(axis=1), benign=0)
    warmth = calibration.temperature(raw, later_truth)
    soft = calibration.soften(raw, warmth)
    judged = reasons(familiar, later, dataset.known, raw.argmax(axis=1)) == 0
    thresholds = _thresholds(soft[judged], later_truth[judged], truth, classes)
    final = _grow(dataset.features, truth, inputs, classes, seed)
    everywhere = density.fit(dataset.features, truth, inputs, len(classes), seed)
    model = Model(
        name=SHIPPED,
        inputs=inputs,
        classes=classes,
        temperature=warmth,
        thresholds=thresholds,
        ceilings=_ceilings(soft[judged], thresholds, classes),
        density=replace(everywhere, limits=familiar.limits),
        important=important_inputs(final),
        typical=typical_ranges(dataset.features[truth == 0], inputs),
    )
    return model, export(final)


def _grow(features: Floats, truth: npt.NDArray[np.intp], inputs: tuple[str, ...], classes: tuple[str, ...], seed: int) -> Grown:
    import lightgbm

    table = lightgbm.Dataset(matrix(features, inputs), label=truth, feature_name=list(inputs), free_raw_data=True)
    parameters = dict(_PARAMETERS) | {"num_class": len(classes), "seed": seed}
    return Grown(lightgbm.train(parameters, table, num_boost_round=ROUNDS), inputs, classes)


def matrix(features: Floats, inputs: Iterable[str]) -> Floats:
    """Return the inputs rounded to float32, which is what the ONNX model compares with."""
    rounded: Floats = features[:, [COLUMN[name] for name in inputs]].astype(np.float32).astype(np.float64)
    return rounded


def _thresholds(
    soft: Floats, truth: npt.NDArray[np.intp], all_truth: npt.NDArray[np.intp], classes: tuple[str, ...]
) -> dict[str, float]:
    """Return for each attack the score above which no benign calibration row lay, between .5 and .9; .9 for rare attacks."""
    thresholds = {}
    benign = soft[truth == 0]
    for index, name in enumerate(classes[1:], start=1):
        highest = float(benign[:, index].max(initial=0.0))
        rare = int((all_truth == index).sum()) < _ROWS_FOR_THRESHOLD_MIN
        thresholds[name] = _THRESHOLD_MAX if rare else float(np.clip(highest, _THRESHOLD_MIN, _THRESHOLD_MAX))
    return thresholds


def _ceilings(soft: Floats, thresholds: Mapping[str, float], classes: tuple[str, ...]) -> dict[str, float]:
    claimed = soft.argmax(axis=1)
    return {
        name: calibration.ceiling(int(((claimed == index) & (soft[:, index] >= thresholds.get(name, 0.0))).sum()))
        for index, name in enumerate(classes)
    }


def typical_ranges(benign: Floats, inputs: Iterable[str]) -> dict[str, tuple[float, float, float]]:
    """Return the 5 %, 50 % and 95 % quantiles of each input over benign rows."""
    typical = {}
    for name in inputs:
        low, middle, high = np.quantile(benign[:, COLUMN[name]], [0.05, 0.5, 0.95])
        typical[name] = (float(low), float(middle), float(high))
    return typical


def important_inputs(grown: Grown) -> dict[str, tuple[str, ...]]:
    """Return for each class the inputs whose splits gained most in its trees."""
    gains = np.zeros((len(grown.classes), len(grown.inputs)))
    for tree in grown.booster.dump_model()["tree_info"]:
        stack = [tree["tree_structure"]]
        while stack:
            node = stack.pop()
            if "split_feature" in node:
                gains[tree["tree_index"] % len(grown.classes), node["split_feature"]] += node["split_gain"]
                stack += [node["left_child"], node["right_child"]]
    return {
        name: tuple(grown.inputs[i] for i in np.argsort(-gains[index], kind="stable")[:_IMPORTANT])
        for index, name in enumerate(grown.classes)
    }


def export(grown: Grown) -> bytes:
    """Return the trees as ONNX: from ``features`` float32[n, inputs] to ``probabilities`` float32[n, classes].

    The converter also declares a label output, with a shape that makes onnxruntime warn at every batch; it is taken out.
    """
    import onnx
    from onnxmltools import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    shape = [("features", FloatTensorType([None, len(grown.inputs)]))]
    converted = convert_lightgbm(grown.booster, name=SHIPPED, initial_types=shape, zipmap=False)
    graph = converted.graph
    outputs = [output for output in graph.output if output.name == "probabilities"]
    needed, kept = {"probabilities"}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.output[:]
    graph.output.extend(outputs)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    shape_out = graph.output[0].type.tensor_type.shape
    shape_out.dim[0].dim_param = "rows"
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    onnx.checker.check_model(converted)
    return bytes(converted.SerializeToString(deterministic=True))


def _compare(dataset: Dataset, early: npt.NDArray[np.bool_], seed: int) -> dict[str, dict[str, float | int]]:
    """Measure the bare trees on the same split with and without the fingerprints: macro-F1, attack recall, false positives."""
    plain = model_inputs(dataset.known)
    extra = tuple(name for name in NAMES if name in plain or (name in FINGERPRINTS and dataset.known[COLUMN[name]]))
    return {"without": _bare(dataset, early, plain, seed), "with": _bare(dataset, early, extra, seed)}


def _bare(dataset: Dataset, train_rows: npt.NDArray[np.bool_], inputs: tuple[str, ...], seed: int) -> dict[str, float | int]:
    classes = (BENIGN, *sorted(set(dataset.labels[train_rows].tolist()) - {BENIGN}))
    known = np.isin(dataset.labels, classes)
    truth = np.array([classes.index(name) if name in classes else -1 for name in dataset.labels.tolist()])
    grown = _grow(dataset.features[train_rows & known], truth[train_rows & known], inputs, classes, seed)
    test = ~train_rows
    claimed = grown.probabilities(dataset.features[test]).argmax(axis=1)
    attack = truth[test] != 0
    return {
        "accuracy": float((claimed == truth[test]).mean()),
        "attack_recall": float((claimed[attack] != 0).mean()) if attack.any() else 0.0,
        "false_positives": int((claimed[~attack] != 0).sum()),
        "benign": int((~attack).sum()),
    }


def leave_days_out(dataset: Dataset, seed: int) -> dict[str, dict[str, float | int | None]]:
    """Train without each day in turn and measure on it: what attacks never seen before look like to the model."""
    days = np.datetime_as_string(dataset.order.astype("datetime64[us]").astype("datetime64[D]"))
    result: dict[str, dict[str, float | int | None]] = {}
    for day in np.unique(days):
        there = days == day
        rest = set(dataset.labels[~there].tolist())
        if BENIGN not in rest or len(rest) < 2:
            continue
        figures = evaluate(Classifier(*build(dataset.take(~there), seed)), dataset.take(there))
        result[str(day)] = {
            "rows": figures.rows,
            "attack_recall": figures.attack_recall,
            "benign_fpr": figures.benign_fpr,
            "ood_share": figures.ood_share,
        }
    return result
