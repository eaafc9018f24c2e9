"""Fits the guard's picture of the training data: for each class a few prototypes with their spread, and how far is too far.

Prototypes are k-means centres (Lloyd, seeded, plain numpy) of the log-scaled rows. The limit of each class is set on rows that
are later in time than those the prototypes were made of, so that ordinary drift is not called unfamiliar. A prototype stands
for at least five rows: a model can be passed on where its training rows must not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cybermesh.detect.guard import Density
from cybermesh.telemetry.features import COLUMN

Floats = npt.NDArray[np.float64]

PROTOTYPES_MAX = 64  # of a class
ROWS_PER_PROTOTYPE = 20
ROWS_OF_PROTOTYPE_MIN = 5
_ITERATIONS = 12
_SCALE_MIN = 0.05  # of log(1 + x); keeps nearly constant features from dominating
_SPREAD_MIN = 0.1  # of a scaled feature within a prototype
_SHRINKAGE = 10.0  # rows' worth of the class's own spread that every prototype's spread is mixed with
_SHRINKAGE_SHARE = 0.1
_FEW = 50  # calibration rows below which a class's own quantile means little
_ATTACK_QUANTILE, _ATTACK_MARGIN = 0.998, 1.15
_BENIGN_QUANTILE = 0.985
# Other spellings of features that are already there.
_DUPLICATES = frozenset({"fwd_seg_size_avg", "bwd_seg_size_avg", "pkt_size_avg", "pkt_len_var"})


def fit(features: Floats, truth: npt.NDArray[np.intp], inputs: Sequence[str], classes: int, seed: int) -> Density:
    """Return the density of training rows (float64[n, 79]) with class indices ``truth``; its limits are still infinite."""
    names = tuple(name for name in inputs if name not in _DUPLICATES)
    logs = np.log1p(features[:, [COLUMN[name] for name in names]])
    centre, scale = logs.mean(axis=0), np.maximum(logs.std(axis=0), _SCALE_MIN)
    rows = (logs - centre) / scale
    centres, weights = [], []
    for index in range(classes):
        own = rows[truth == index]
        means, variances = _prototypes(own, np.random.default_rng([seed, index])) if len(own) else (rows[:0], rows[:0])
        centres.append(means)
        weights.append(1.0 / (variances + _SPREAD_MIN**2))
    return Density(names, centre, scale, tuple(centres), tuple(weights), np.full(classes, np.inf))


def with_limits(density: Density, features: Floats, claimed: npt.NDArray[np.intp], benign: int) -> Density:
    """Return the density with limits from later rows and the classes that a model claimed for them."""
    distances = density.distance(features, claimed)
    classes = len(density.centres)
    limits = np.full(classes, np.nan)
    enough = np.zeros(classes, dtype=np.bool_)
    for index in range(classes):
        own = distances[claimed == index]
        if len(own):
            limits[index] = (
                np.quantile(own, _BENIGN_QUANTILE) if index == benign else np.quantile(own, _ATTACK_QUANTILE) * _ATTACK_MARGIN
            )
        enough[index] = len(own) >= _FEW
    usual = float(np.median(limits[enough])) if enough.any() else float(np.nanmax(limits, initial=0.0))
    few = ~enough
    limits[few] = np.minimum(np.nan_to_num(limits[few], nan=usual), 2 * usual)
    return replace(density, limits=limits)


def _prototypes(rows: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Return k-means centres (float64[k, d]) and the variance of each around its centre, without those of very few rows."""
    count = int(np.clip(len(rows) // ROWS_PER_PROTOTYPE, 1, PROTOTYPES_MAX))
    centres = _spread_start(rows, count, generator)
    nearest = np.zeros(len(rows), dtype=np.intp)
    small = rows.astype(np.float32)
    for _ in range(_ITERATIONS):
        moved = _nearest(small, centres)
        if (moved == nearest).all():
            break
        nearest = moved
        for index in range(count):
            own = rows[nearest == index]
            if len(own):
                centres[index] = own.mean(axis=0)
    sizes = np.bincount(nearest, minlength=count)
    whole = rows.var(axis=0)
    variances = np.stack(
        [
            (
                sizes[i] * (((rows[nearest == i] - centres[i]) ** 2).mean(axis=0) if sizes[i] else 0.0)
                + _SHRINKAGE * _SHRINKAGE_SHARE * whole
            )
            / (sizes[i] + _SHRINKAGE)
            for i in range(count)
        ]
    )
    kept = sizes >= min(ROWS_OF_PROTOTYPE_MIN, int(sizes.max()))
    return centres[kept], variances[kept]


def _spread_start(rows: Floats, count: int, generator: np.random.Generator) -> Floats:
    """Return ``count`` rows, each drawn with odds proportional to its squared distance from those before (k-means++)."""
    chosen = [int(generator.integers(len(rows)))]
    squared = ((rows - rows[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        total = squared.sum()
        odds = squared / total if total > 0 else None
        chosen.append(int(generator.choice(len(rows), p=odds)))
        squared = np.minimum(squared, ((rows - rows[chosen[-1]]) ** 2).sum(axis=1))
    return rows[chosen].copy()


def _nearest(rows: npt.NDArray[np.float32], centres: Floats) -> npt.NDArray[np.intp]:
    """Return the index of the nearest centre of each row; float32 is exact enough to choose one, and twice as fast."""
    small = centres.astype(np.float32)
    places: npt.NDArray[np.intp] = ((small**2).sum(axis=1) - 2.0 * (rows @ small.T)).argmin(axis=1)
    return places
