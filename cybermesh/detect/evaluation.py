"""How good a classifier is on labelled flows, with the uncertainty of every figure.

Rules:

- a row the guard abstains on counts as not reported in ``attack_recall`` and ``benign_fpr``, and as one in ``ood_share``;
- per-class figures and macro-F1 are the model's classes for **all** rows, so the guard cannot flatter them;
- shares come with Wilson intervals, macro-F1 with a bootstrap over the confusion table, AUC with Hanley and McNeil's; all 95 %;
- priors of a labelled table are artificial: recall and false-positive rate carry over to a site, precision does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cybermesh.detect import calibration
from cybermesh.detect.datasets import BENIGN, Dataset, is_foreign_file
from cybermesh.detect.engines.classifier import Assessment, Classifier
from cybermesh.detect.guard import Reason

ROWS_FOR_MACRO_MIN = 100
_Z = 1.959963984540054  # two-sided 95 %
_RESAMPLES = 400
_SEED = 20_17

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one run; shares are 0-1, None where there is no row to compute them from."""

    rows: int
    macro_f1: float | None
    macro_f1_all: float
    per_class: dict[str, dict[str, float | int]]
    attack_recall: float | None
    benign_fpr: float | None
    auc: float | None
    ece: float
    ood_share: float
    intervals: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON-able object, in the order of the fields."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a classifier said of n labelled rows: all that figures and plots need.

    ``scores`` (float64[n]) is one less the probability of benign, ``confidence`` that of ``predicted``. ``abstained`` marks
    what the guard refuses and what another extractor wrote, or everything where the whole file is another extractor's.
    ``reasons`` counts abstentions by reason; ``skipped`` rows that were left out of the file.
    """

    labels: npt.NDArray[np.str_]
    predicted: npt.NDArray[np.str_]
    scores: Floats
    confidence: Floats
    abstained: npt.NDArray[np.bool_]
    reasons: dict[str, int]
    skipped: dict[str, int]

    @property
    def attack(self) -> npt.NDArray[np.bool_]:
        """Mark of rows that are an attack, bool[n]."""
        marked: npt.NDArray[np.bool_] = self.labels != BENIGN
        return marked

    @property
    def reported(self) -> npt.NDArray[np.bool_]:
        """Mark of rows reported as some attack, bool[n]."""
        marked: npt.NDArray[np.bool_] = (self.predicted != BENIGN) & ~self.abstained
        return marked


def measure(classifier: Classifier, pieces: Iterable[Dataset]) -> Measured:
    """Let a classifier judge the pieces of a file in turn; only what ``Measured`` holds is kept of each."""
    classes = np.array(classifier.model.classes)
    benign = classifier.model.classes.index(BENIGN)
    kept: list[tuple[npt.NDArray[np.str_], npt.NDArray[np.str_], Floats, Floats, npt.NDArray[np.bool_]]] = []
    reasons: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    foreign = odd = 0
    for piece in pieces:
        assessment = classifier.assess(piece.features, piece.known)
        scores = 1.0 - assessment.probabilities[:, benign]
        refused = ~assessment.judged | piece.foreign
        kept.append((piece.labels, classes[assessment.decided], scores, assessment.confidence, refused))
        reasons.update(_reasons(assessment, piece))
        skipped.update(piece.skipped)
        foreign, odd = foreign + int(piece.foreign.sum()), odd + piece.odd
    labels, predicted, all_scores, confidence, abstained = (np.concatenate(column) for column in zip(*kept, strict=True))
    if is_foreign_file(foreign, odd, len(labels)):
        abstained = np.ones(len(labels), dtype=np.bool_)
        reasons["foreign_file"] = len(labels)
    return Measured(labels, predicted, all_scores, confidence, abstained, dict(reasons), dict(skipped))


def evaluate(classifier: Classifier, dataset: Dataset) -> Evaluation:
    """Measure a classifier on a data set; classes of the data that the model does not know count as missed."""
    return figures(measure(classifier, [dataset]))


def figures(measured: Measured) -> Evaluation:
    """Return the figures of what a classifier said, with their intervals."""
    attack, reported, predicted, labels = measured.attack, measured.reported, measured.predicted, measured.labels
    names = [BENIGN, *sorted({*np.unique(labels).tolist(), *np.unique(predicted).tolist()} - {BENIGN})]
    table = confusion(labels, predicted, names)
    judged = ~measured.abstained
    area = roc_auc(measured.scores, attack)
    large = [name for name in names if (labels == name).sum() >= ROWS_FOR_MACRO_MIN]
    present = [name for name in names if (labels == name).any()]
    intervals = _class_intervals(table, names)
    intervals["ood_share"] = wilson(int(measured.abstained.sum()), len(labels))
    if attack.any():
        intervals["attack_recall"] = wilson(int(reported[attack].sum()), int(attack.sum()))
    if not attack.all():
        intervals["benign_fpr"] = wilson(int(reported[~attack].sum()), int((~attack).sum()))
    if area is not None:
        intervals["auc"] = auc_interval(area, int(attack.sum()), int((~attack).sum()))
    for key, chosen in (("macro_f1", large), ("macro_f1_all", present)):
        if chosen:
            intervals[key] = macro_f1_interval(table, [names.index(name) for name in chosen])
    return Evaluation(
        rows=len(labels),
        macro_f1=macro_f1(table, [names.index(name) for name in large]) if large else None,
        macro_f1_all=macro_f1(table, [names.index(name) for name in present]),
        per_class=_per_class(table, names),
        attack_recall=float(reported[attack].mean()) if attack.any() else None,
        benign_fpr=float(reported[~attack].mean()) if not attack.all() else None,
        auc=area,
        ece=calibration.expected_error(measured.confidence[judged], (predicted == labels)[judged]),
        ood_share=float(measured.abstained.mean()),
        intervals=intervals,
    )


def _reasons(assessment: Assessment, dataset: Dataset) -> dict[str, int]:
    """Count abstentions by reason; a row can have several."""
    counts = {
        (reason.name or "").lower(): int((assessment.reasons & np.uint8(reason)).astype(np.bool_).sum()) for reason in Reason
    }
    counts["contradiction"] = max(counts["contradiction"], int(dataset.foreign.sum()))
    return {name: count for name, count in counts.items() if count}


def confusion(truth: npt.NDArray[np.str_], predicted: npt.NDArray[np.str_], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return int64[k, k]: rows are the true classes, columns the predicted ones, both in the order of ``names``."""
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    for column, name in enumerate(names):
        claimed = truth[predicted == name]
        table[:, column] = [int((claimed == other).sum()) for other in names]
    return table


def f1_scores(table: npt.NDArray[np.int64]) -> Floats:
    """Return float64[k]: F1 of each class of a confusion table; 0 for one that neither occurs nor is predicted."""
    hits = np.diag(table).astype(np.float64)
    total = table.sum(axis=0) + table.sum(axis=1)
    scores: Floats = 2 * hits / np.maximum(total, 1)
    return scores


def macro_f1(table: npt.NDArray[np.int64], chosen: Sequence[int]) -> float:
    """Return the mean F1 over the classes with these indices."""
    return float(f1_scores(table)[list(chosen)].mean())


def macro_f1_interval(table: npt.NDArray[np.int64], chosen: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the macro-F1; rows are drawn anew within each true class."""
    generator = np.random.default_rng(_SEED)
    draws = []
    for _ in range(_RESAMPLES):
        drawn = np.stack([generator.multinomial(row.sum(), row / max(row.sum(), 1)) if row.sum() else row for row in table])
        draws.append(macro_f1(drawn, chosen))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of ``hits`` of ``total``; (0, 1) when there is nothing to count."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = hits / total, _Z * _Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * float(np.sqrt(share * (1 - share) / total + z2 / (4 * total * total)))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def roc_auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float | None:
    """Return the chance that an attack scores above a benign row, ties counted half; None without both kinds."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[place][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95 % interval of an AUC (Hanley and McNeil 1982)."""
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    half = _Z * float(np.sqrt(max(variance, 0.0) / (positives * negatives)))
    return max(area - half, 0.0), min(area + half, 1.0)


def _per_class(table: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, dict[str, float | int]]:
    hits, claimed, there = np.diag(table), table.sum(axis=0), table.sum(axis=1)
    f1 = f1_scores(table)
    return {
        name: {
            "precision": float(hits[i] / max(claimed[i], 1)),
            "recall": float(hits[i] / max(there[i], 1)),
            "f1": float(f1[i]),
            "n": int(there[i]),
        }
        for i, name in enumerate(names)
    }


def _class_intervals(table: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    intervals = {}
    for i, name in enumerate(names):
        hits = int(table[i, i])
        intervals[f"{name}.recall"] = wilson(hits, int(table[i].sum()))
        intervals[f"{name}.precision"] = wilson(hits, int(table[:, i].sum()))
    return intervals
