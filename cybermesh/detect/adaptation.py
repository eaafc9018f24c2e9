"""Teaches a model a site: a few labelled flows of it, its ordinary traffic, and what the model knew before.

Trees that know one network find little on another; with about a hundred labelled flows of the new one they do. Rules:

- the model it starts from is not needed with its training rows: rows drawn around its prototypes (``density.remembered``)
  stand for them with little weight, so that attacks the site has not seen yet are not forgotten;
- ordinary traffic of the site (``quiet``) needs no labels. It is taken for benign, with less weight than what somebody looked
  at; a share below ``fpr_max`` of attacks in it does no harm, because it is a quantile of it that sets the threshold;
- the threshold is set on rows that the trees have not seen (folds), so that at most two fifths of ``fpr_max`` of the
  site's benign rows are reported. Where benign rows are too few to show such a share, their highest score says next to
  nothing; then the threshold is where the scores of both sides, smoothed, leave the fewest mistakes. What the folds cannot
  show is not claimed: confidence is capped by the number of the site's own rows;
- trees choose among few features each, and are many: with a hundred rows a split that is right by chance is as good as one
  that is right, and only many different ones outvote it;
- everything follows from the rows, the model and one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cybermesh.detect import calibration, density, evaluation
from cybermesh.detect.datasets import BENIGN, Dataset, DatasetError
from cybermesh.detect.guard import Density, single_packet
from cybermesh.detect.modelfile import SITE, Model
from cybermesh.detect.training import Grown, Trained, export, important_inputs, matrix, require_extra, typical_ranges, versions
from cybermesh.telemetry.features import COLUMN

FPR_MAX = 0.01
LABELLED_ROWS_MIN = 20
ATTACK_ROWS_MIN = 5
BENIGN_ROWS_MIN = 5
QUIET_ROWS_MAX = 5_000  # more teach nothing new, and weigh down a hundred labelled rows
CONFIDENCE_UNSEEN_MAX = 0.85  # of types that the site has not shown; below what a policy needs
_FOLDS = 5
_ROUNDS = 120
_QUIET_WEIGHT = 0.3
_QUIET_ROWS_FULL = 600  # more than these share the weight of so many
_REMEMBERED_ROWS = 60  # of each class
_REMEMBERED_WEIGHT = 0.05
FPR_SHARE = 0.4  # of what is allowed is aimed at: the folds are few rows, and the next day is another
QUANTILE_ROWS_MIN = 2  # benign rows above the threshold without which a quantile is chance
_MISSED_PER_FALSE = 0.03  # missed attacks that are as bad as ``fpr_max`` of false alarms: what is asked of both
_BLUR = 1.0  # of a score (a log-odds), seen in folds, against the same with all rows
_SHIFT_MIN, _SHIFT_MAX = -4.0, 8.0
_PARAMETERS: dict[str, Any] = {
    "objective": "multiclass",
    "num_leaves": 8,
    "learning_rate": 0.15,
    "min_data_in_leaf": 2,
    "min_sum_hessian_in_leaf": 1e-3,
    # Few rows: small steps, with most rows and few features in turn.
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "feature_fraction": 0.1,
    "max_delta_step": 1.0,
    "lambda_l2": 0.5,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What trees grow from: features float64[n, 79], class indices, weights; the first ``site`` rows are the site's own."""

    features: Floats
    truth: Indices
    weights: Floats
    site: int


def adapt(
    base: Model,
    labelled: Dataset,
    quiet: Dataset | None = None,
    *,
    seed: int,
    fpr_max: float = FPR_MAX,
    progress: Progress = lambda line: None,
) -> Trained:
    """Return a site's model made of ``base``, labelled flows of the site and, better, its ordinary traffic.

    Raises:
        TrainingError: the extra ``train`` is not installed.
        DatasetError: another extractor's file, or too few rows; the text says how many are needed.
    """
    require_extra()
    labelled, quiet = _checked(labelled, quiet)
    known = labelled.known if quiet is None else labelled.known & quiet.known
    inputs = tuple(name for name in base.inputs if known[COLUMN[name]])
    classes = (*base.classes, *sorted({*labelled.labels.tolist()} - {*base.classes}))
    familiar = density.restricted(base.density, inputs)
    rows = _gather(labelled, quiet, familiar, classes, seed)
    progress(f"{len(labelled)} labelled rows, {rows.site - len(labelled)} of ordinary traffic, {len(rows.truth)} to learn from")
    raw = _out_of_fold(rows, inputs, classes, seed)
    truth = rows.truth[: rows.site]
    enough = int((truth == 0).sum()) * FPR_SHARE * fpr_max >= QUANTILE_ROWS_MIN
    moved = benign_shift(raw, truth == 0, FPR_SHARE * fpr_max) if enough else balanced_shift(raw, truth == 0, fpr_max)
    shifted = calibration.shift(raw, 0, moved)
    warmth = calibration.temperature(shifted[: len(labelled)], truth[: len(labelled)])
    progress("growing the delivered trees")
    final = _grow(rows, inputs, classes, seed)
    own = rows.features[: rows.site]
    model = Model(
        name=SITE,
        inputs=inputs,
        classes=classes,
        temperature=warmth,
        thresholds=dict.fromkeys(classes[1:], 0.0),
        ceilings=_ceilings(base, shifted, truth, classes),
        density=density.extended(familiar, own, truth, len(classes), seed),
        important=important_inputs(final),
        typical=typical_ranges(own[truth == 0], inputs),
        benign_shift=moved,
    )
    record = _record(base, labelled, quiet, seed) | {
        "fpr_max": fpr_max,
        "benign_shift": moved,
        "folds": _figures(shifted, truth, len(labelled)),
    }
    return Trained(replace(model, record=record), export(final))


def benign_shift(probabilities: Floats, benign: npt.NDArray[np.bool_], fpr_max: float) -> float:
    """Return how far benign's log-probability (column 0) has to move so that at most ``fpr_max`` of benign rows are reported.

    Between -4 and 8; without benign rows 0.
    """
    if not benign.any():
        return 0.0
    margins = np.sort(_margins(probabilities[benign]))[::-1]
    allowed = int(np.floor(fpr_max * len(margins)))
    return float(np.clip(margins[allowed] + 1e-6, _SHIFT_MIN, _SHIFT_MAX))


def balanced_shift(probabilities: Floats, benign: npt.NDArray[np.bool_], fpr_max: float) -> float:
    """Return the move of benign's log-probability (column 0) at which missed attacks and false alarms cost least together.

    Each row counts as if its score were blurred by the logistic curve. ``fpr_max`` of the benign rows reported cost as much as
    3 % of the attacks missed. Between -4 and 8; both sides need a row.
    """
    margins = _margins(probabilities)
    moves = np.linspace(_SHIFT_MIN, _SHIFT_MAX, 241)
    above = 1.0 / (1.0 + np.exp((moves[:, None] - margins[None, :]) / _BLUR))
    cost = _MISSED_PER_FALSE / fpr_max * above[:, benign].mean(axis=1) + (1.0 - above[:, ~benign]).mean(axis=1)
    return float(moves[int(np.argmin(cost))])


def _margins(probabilities: Floats) -> Floats:
    """Return float64[n]: by how much the log-probability of the likeliest attack exceeds that of benign (column 0)."""
    logs = np.log(np.clip(probabilities, 1e-12, 1.0))
    margins: Floats = logs[:, 1:].max(axis=1) - logs[:, 0]
    return margins


def _checked(labelled: Dataset, quiet: Dataset | None) -> tuple[Dataset, Dataset | None]:
    """Return what of the rows can be learnt from."""
    kept = []
    for dataset in (labelled, quiet):
        if dataset is not None and dataset.foreign_file:
            raise DatasetError(
                f"{int(dataset.foreign.sum())} of {len(dataset)} rows contradict the feature definitions: another extractor "
                "wrote them; meter the captures again with cybermesh flows"
            )
        kept.append(None if dataset is None else dataset.take(~(dataset.foreign | single_packet(dataset.features))))
    usable, ordinary = kept
    assert usable is not None
    attacks = int((usable.labels != BENIGN).sum())
    benign = len(usable) - attacks + (0 if ordinary is None else len(ordinary))
    if len(usable) < LABELLED_ROWS_MIN or attacks < ATTACK_ROWS_MIN or benign < BENIGN_ROWS_MIN:
        raise DatasetError(
            f"{len(usable)} usable labelled rows with {attacks} attacks, {benign} benign rows with the ordinary traffic; "
            f"needed are {LABELLED_ROWS_MIN}, {ATTACK_ROWS_MIN} and {BENIGN_ROWS_MIN}: label more flows (about 100, of "
            "every attack seen, do well); flows of one packet do not count"
        )
    return usable, ordinary


def _gather(labelled: Dataset, quiet: Dataset | None, familiar: Density, classes: tuple[str, ...], seed: int) -> _Rows:
    place = {name: index for index, name in enumerate(classes)}
    features = [labelled.features]
    truth = [np.array([place[name] for name in labelled.labels.tolist()], dtype=np.intp)]
    weights = [np.ones(len(labelled))]
    if quiet is not None:
        chosen = np.arange(len(quiet))
        if len(quiet) > QUIET_ROWS_MAX:
            chosen = np.sort(np.random.default_rng([seed, 2]).choice(len(quiet), QUIET_ROWS_MAX, replace=False))
        features.append(quiet.features[chosen])
        truth.append(np.zeros(len(chosen), dtype=np.intp))
        weights.append(np.full(len(chosen), _QUIET_WEIGHT * min(1.0, _QUIET_ROWS_FULL / max(len(chosen), 1))))
    site = sum(len(part) for part in truth)
    drawn, drawn_truth = density.remembered(familiar, _REMEMBERED_ROWS, seed)
    features.append(drawn)
    truth.append(drawn_truth)
    weights.append(np.full(len(drawn), _REMEMBERED_WEIGHT))
    return _Rows(np.concatenate(features), np.concatenate(truth), np.concatenate(weights), site)


def _out_of_fold(rows: _Rows, inputs: tuple[str, ...], classes: tuple[str, ...], seed: int) -> Floats:
    """Return the probabilities of the site's rows, each from trees that have not seen it."""
    generator = np.random.default_rng([seed, 3])
    fold = np.full(len(rows.truth), -1)
    for index in np.unique(rows.truth[: rows.site]):
        own = np.flatnonzero(rows.truth[: rows.site] == index)
        fold[generator.permutation(own)] = np.arange(len(own)) % _FOLDS
    result = np.empty((rows.site, len(classes)))
    for number in range(_FOLDS):
        out = fold == number
        if out.any():
            kept = _Rows(rows.features[~out], rows.truth[~out], rows.weights[~out], 0)
            result[out[: rows.site]] = _grow(kept, inputs, classes, seed).probabilities(rows.features[out])
    return result


def _grow(rows: _Rows, inputs: tuple[str, ...], classes: tuple[str, ...], seed: int) -> Grown:
    import lightgbm

    table = lightgbm.Dataset(
        matrix(rows.features, inputs), label=rows.truth, weight=rows.weights, feature_name=list(inputs), free_raw_data=True
    )
    parameters = _PARAMETERS | {"num_class": len(classes), "seed": seed}
    return Grown(lightgbm.train(parameters, table, num_boost_round=_ROUNDS), inputs, classes)


def _ceilings(base: Model, shifted: Floats, truth: Indices, classes: tuple[str, ...]) -> dict[str, float]:
    """Return the confidence that the site's own rows support; types it has not shown keep what they had, below a policy's."""
    claimed = shifted.argmax(axis=1)
    return {
        name: calibration.ceiling(int((claimed == index).sum()))
        if (truth == index).any()
        else min(base.ceilings.get(name, 0.5), CONFIDENCE_UNSEEN_MAX)
        for index, name in enumerate(classes)
    }


def _figures(shifted: Floats, truth: Indices, labelled: int) -> dict[str, Any]:
    """Return what the folds say: of labelled rows the share reported, of benign ones (ordinary traffic too) likewise."""
    reported, attack = shifted.argmax(axis=1) != 0, truth != 0
    found, raised = int(reported[attack].sum()), int(reported[~attack].sum())
    return {
        "labelled": labelled,
        "attack_rows": int(attack.sum()),
        "benign_rows": int((~attack).sum()),
        "attack_recall": found / max(int(attack.sum()), 1),
        "benign_fpr": raised / max(int((~attack).sum()), 1),
        "auc": evaluation.roc_auc(1.0 - shifted[:, 0], attack),
        "intervals": {
            "attack_recall": evaluation.wilson(found, int(attack.sum())),
            "benign_fpr": evaluation.wilson(raised, int((~attack).sum())),
        },
    }


def _record(base: Model, labelled: Dataset, quiet: Dataset | None, seed: int) -> dict[str, Any]:
    return {
        "made_by": "adapt",
        "base": {"name": base.name, "digest": base.digest, "terms": base.record.get("terms", "not stated")},
        "data_sha256": labelled.digest,
        "quiet_sha256": None if quiet is None else quiet.digest,
        "variant": labelled.variant,
        "rows": len(labelled),
        "rows_by_class": {str(name): int((labelled.labels == name).sum()) for name in np.unique(labelled.labels)},
        "rows_of_ordinary_traffic": 0 if quiet is None else min(len(quiet), QUIET_ROWS_MAX),
        "rows_left_out": labelled.skipped,
        "seed": seed,
        "rounds": _ROUNDS,
        "parameters": dict(_PARAMETERS),
        "versions": versions(),
    }
