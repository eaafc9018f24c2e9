"""Pictures of how good a classifier is: reliability, confusion, ROC; each with its uncertainty.

matplotlib is imported only here and only when something is drawn, on its file backend, so no display is needed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from cybermesh.detect import calibration, evaluation
from cybermesh.detect.datasets import BENIGN
from cybermesh.detect.evaluation import Measured

_SIZE = (6.0, 5.0)  # inches
_DPI = 110
_RATES = np.linspace(0.0, 1.0, 201)
_DRAWS = 100


class PlotError(Exception):
    """Nothing can be drawn; the text says why and what to do."""


def draw(measured: Measured, directory: Path) -> list[Path]:
    """Write ``reliability.png``, ``confusion.png`` and, where there are attacks and benign rows, ``roc.png``; return the paths.

    Raises:
        PlotError: matplotlib is not installed, or the directory cannot be written.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'cybermesh[train]'") from error
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pictures = {"reliability.png": _reliability, "confusion.png": _confusion}
    if 0 < int(measured.attack.sum()) < len(measured.labels):
        pictures["roc.png"] = _roc
    made = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            figure, axes = pyplot.subplots(figsize=_SIZE, dpi=_DPI, layout="constrained")
            picture(axes, measured)
            figure.savefig(directory / name)
            pyplot.close(figure)
            made.append(directory / name)
    except OSError as error:
        raise PlotError(f"{directory}: {error.strerror or error}; name a directory that can be written") from error
    return made


def _reliability(axes: Any, measured: Measured) -> None:
    """Confidence against the share that was right, of the rows judged, with intervals."""
    judged = ~measured.abstained
    confidence, correct = measured.confidence[judged], (measured.predicted == measured.labels)[judged]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="as claimed")
    bins = calibration.reliability(confidence, correct)
    if bins:
        ends = np.array([evaluation.wilson(round(one.frequency * one.count), one.count) for one in bins])
        centre = np.array([one.frequency for one in bins])
        errors = np.abs(np.stack([centre - ends[:, 0], ends[:, 1] - centre]))
        axes.errorbar([one.confidence for one in bins], centre, yerr=errors, fmt="o-", capsize=3, label="measured, 95 %")
        for one in bins:
            axes.annotate(
                f"{one.count:,}", (one.confidence, one.frequency), textcoords="offset points", xytext=(4, -12), fontsize=7
            )
    error = calibration.expected_error(confidence, correct)
    axes.set(xlabel="confidence", ylabel="share that was right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"Reliability: {int(judged.sum()):,} rows judged, calibration error {error:.4f}", fontsize=10)
    axes.legend(loc="upper left")


def _confusion(axes: Any, measured: Measured) -> None:
    """What rows of each class were taken for; shares of a row as shade, counts as text."""
    names = [BENIGN, *sorted({*np.unique(measured.labels).tolist(), *np.unique(measured.predicted).tolist()} - {BENIGN})]
    table = evaluation.confusion(measured.labels, measured.predicted, names)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(table > 0):
        shade = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{table[row, column]:,}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="taken for", ylabel="is")
    axes.set_title(f"Confusion: all {len(measured.labels):,} rows, abstentions too", fontsize=10)


def _roc(axes: Any, measured: Measured) -> None:
    """Recall of attacks against false positives, with the band that drawing the rows anew gives."""
    positive, negative = measured.scores[measured.attack], measured.scores[~measured.attack]
    generator = np.random.default_rng(1)
    drawn = [
        _recall_at(generator.choice(positive, len(positive)), generator.choice(negative, len(negative))) for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    area = evaluation.roc_auc(measured.scores, measured.attack) or 0.0
    ends = evaluation.auc_interval(area, len(positive), len(negative))
    axes.fill_between(_RATES, low, high, alpha=0.25, step="post", label="95 %")
    axes.step(_RATES, _recall_at(positive, negative), where="post", label=f"AUC {area:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]")
    reported = measured.reported
    axes.plot(
        reported[~measured.attack].mean(),
        reported[measured.attack].mean(),
        "o",
        color="black",
        label="as decided, with the guard",
    )
    axes.set(xlabel="benign rows reported", ylabel="attack rows reported", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(f"ROC: {len(positive):,} attack and {len(negative):,} benign rows", fontsize=10)
    axes.legend(loc="lower right")


def _recall_at(positive: evaluation.Floats, negative: evaluation.Floats) -> evaluation.Floats:
    """Return the share of attacks above the threshold that leaves each of the rates of benign rows above it."""
    falling = np.sort(negative)[::-1]
    allowed = np.minimum((_RATES * len(falling)).astype(np.intp), len(falling) - 1)
    above = len(positive) - np.searchsorted(np.sort(positive), falling[allowed], side="right")
    recall: evaluation.Floats = above / len(positive)
    recall[-1] = 1.0
    return recall
