"""Fits a model's threshold, confidence and guard to a site's ordinary traffic; the trees stay as they are.

Rules:

- ordinary traffic needs no labels: it is taken for benign. A share of attacks in it below ``fpr_max`` does no harm, since a
  quantile of it sets the threshold;
- without labelled attacks the threshold only rises: how many attacks a lower one would find, nobody has shown;
- the guard learns what the site's ordinary flows look like, so that it no longer abstains on them;
- the site has shown no attack, so a confidence in one stays below what a policy needs. ``adapt`` is the way to more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cybermesh.detect import calibration, density, evaluation
from cybermesh.detect.adaptation import CONFIDENCE_UNSEEN_MAX, FPR_MAX, FPR_SHARE, QUIET_ROWS_MAX, benign_shift
from cybermesh.detect.datasets import BENIGN, Dataset, DatasetError
from cybermesh.detect.engines.classifier import Assessment, Classifier
from cybermesh.detect.guard import single_packet
from cybermesh.detect.modelfile import SITE, Model
from cybermesh.detect.training import typical_ranges
from cybermesh.telemetry.features import COLUMN

BENIGN_ROWS_MIN = 10
LABELLED_ATTACKS_MIN = 20


def calibrate(
    model: Model, onnx: bytes, quiet: Dataset, labelled: Dataset | None = None, *, seed: int, fpr_max: float = FPR_MAX
) -> Model:
    """Return the model with threshold, confidence and guard of a site; ``quiet`` is its ordinary traffic, labels unread.

    ``labelled`` rows, with at least 20 attacks, let the threshold fall too, and set the confidence.

    Raises:
        DatasetError: another extractor's file, too few rows, or one that lacks what the model reads.
    """
    quiet = _usable(quiet, model)
    if len(quiet) < BENIGN_ROWS_MIN:
        raise DatasetError(f"{len(quiet)} usable flows of ordinary traffic; at least {BENIGN_ROWS_MIN} are needed, 500 do well")
    plain = Classifier(replace(model, benign_shift=0.0, temperature=1.0), onnx)
    raw = plain.assess(quiet.features, quiet.known).probabilities
    before = Classifier(model, onnx).assess(quiet.features, quiet.known)
    moved = benign_shift(raw, np.ones(len(raw), dtype=np.bool_), FPR_SHARE * fpr_max)
    warmth, seen = model.temperature, ""
    if labelled is None:
        moved = max(moved, model.benign_shift)
    else:
        labelled = _usable(labelled, model)
        warmth, seen = _warmth(plain, labelled, moved), labelled.digest
    some = quiet.features
    if len(some) > QUIET_ROWS_MAX:
        some = some[np.sort(np.random.default_rng([seed, 4]).choice(len(some), QUIET_ROWS_MAX, replace=False))]
    own = np.zeros(len(some), dtype=np.intp)
    made = replace(
        model,
        name=SITE,
        benign_shift=moved,
        temperature=warmth,
        ceilings={
            name: calibration.ceiling(len(quiet)) if name == BENIGN else min(limit, CONFIDENCE_UNSEEN_MAX)
            for name, limit in model.ceilings.items()
        },
        density=density.extended(model.density, some, own, len(model.classes), seed),
        typical=typical_ranges(quiet.features, model.inputs),
    )
    after = Classifier(made, onnx).assess(quiet.features, quiet.known)
    record: dict[str, Any] = {
        "made_by": "calibrate",
        "base": {"name": model.name, "digest": model.digest, "terms": model.record.get("terms", "not stated")},
        "quiet_sha256": quiet.digest,
        "data_sha256": seen,
        "rows_of_ordinary_traffic": len(quiet),
        "seed": seed,
        "fpr_max": fpr_max,
        "benign_shift": moved,
        "before": _shares(before, model),
        "after": _shares(after, made),
    }
    return replace(made, record=record)


def _usable(dataset: Dataset, model: Model) -> Dataset:
    if dataset.foreign_file:
        raise DatasetError("another extractor wrote these rows; meter the captures again with cybermesh flows")
    if missing := [name for name in model.inputs if not dataset.known[COLUMN[name]]]:
        raise DatasetError(
            f"the model reads {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}, which this table lacks; "
            "cybermesh adapt makes a model without them"
        )
    return dataset.take(~(dataset.foreign | single_packet(dataset.features)))


def _warmth(plain: Classifier, labelled: Dataset, moved: float) -> float:
    """Return the temperature under which the labels are most likely."""
    classes = plain.model.classes
    known = labelled.take(np.isin(labelled.labels, classes))
    if int((known.labels != BENIGN).sum()) < LABELLED_ATTACKS_MIN:
        raise DatasetError(f"at least {LABELLED_ATTACKS_MIN} labelled attacks of types that the model knows are needed")
    truth = np.array([classes.index(name) for name in known.labels.tolist()], dtype=np.intp)
    raw = plain.assess(known.features, known.known).probabilities
    return calibration.temperature(calibration.shift(raw, 0, moved), truth)


def _shares(assessment: Assessment, model: Model) -> dict[str, Any]:
    """Return of ordinary traffic the shares reported and abstained on, with intervals."""
    rows = len(assessment.reasons)
    reported = int((assessment.judged & (assessment.decided != model.classes.index(BENIGN))).sum())
    abstained = rows - int(assessment.judged.sum())
    return {
        "benign_fpr": reported / rows,
        "ood_share": abstained / rows,
        "intervals": {
            "benign_fpr": evaluation.wilson(reported, rows),
            "ood_share": evaluation.wilson(abstained, rows),
        },
    }
