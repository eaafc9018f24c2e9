"""The test that a recipe for training has to pass before anybody believes its model: several seeds, later rows, unseen days.

Within each label as the file names it the first 70 % by time train and the rest tests, so no row and no moment is on both
sides of a label. Every figure is the mean of the seeds; classes with few rows get an interval, and no gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cybermesh.detect import evaluation, training
from cybermesh.detect.datasets import BENIGN, Dataset, split_by_time
from cybermesh.detect.engines.classifier import Classifier

SEEDS = 5
_MEANS = ("macro_f1", "macro_f1_all", "attack_recall", "benign_fpr", "auc", "ece", "ood_share")


def run(dataset: Dataset, seeds: int = SEEDS, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train and measure with seeds 0, 1, ... and return the figures as a JSON-able object.

    Raises:
        TrainingError: the extra ``train`` is not installed.
        DatasetError: another extractor's file, no benign row, or no attack.
    """
    training.require_extra()
    usable = training.usable(dataset)
    early = split_by_time(usable, training.TRAIN_SHARE)
    held_out = usable.take(~early)
    runs = []
    for seed in range(seeds):
        progress(f"seed {seed}: training on {int(early.sum()):,} rows, measuring on {len(held_out):,} later ones")
        runs.append(evaluation.evaluate(Classifier(*training.build(usable.take(early), seed)), held_out))
    benign = int((held_out.labels == BENIGN).sum())
    progress("training without each day in turn")
    return {
        "rows": {"train": int(early.sum()), "test": len(held_out), "test_benign": benign},
        "seeds": seeds,
        "mean": {name: _mean([getattr(one, name) for one in runs]) for name in _MEANS},
        "worst": {
            "macro_f1": min((one.macro_f1 or 0.0) for one in runs),
            "attack_recall": min((one.attack_recall or 0.0) for one in runs),
            "false_positives": max(round((one.benign_fpr or 0.0) * benign) for one in runs),
        },
        "false_positives": [round((one.benign_fpr or 0.0) * benign) for one in runs],
        "per_class": {name: _of_class(runs, name) for name in runs[0].per_class},
        "inputs": list(training.model_inputs(usable.known)),
        "without_a_day": training.leave_days_out(usable, 1) if usable.timed else {},
        "runs": [one.to_json() for one in runs],
    }


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _of_class(runs: list[evaluation.Evaluation], name: str) -> dict[str, Any]:
    """Return a class's mean figures, and the interval of one run: the seeds judge the same rows, so they add none."""
    rows = [one.per_class[name] for one in runs if name in one.per_class]
    count = int(rows[0]["n"])
    recall = float(np.mean([row["recall"] for row in rows]))
    return {
        "n": count,
        "precision": float(np.mean([row["precision"] for row in rows])),
        "recall": recall,
        "f1": float(np.mean([row["f1"] for row in rows])),
        "recall_interval": evaluation.wilson(round(recall * count), count),
        "gated": count >= evaluation.ROWS_FOR_MACRO_MIN,
    }
