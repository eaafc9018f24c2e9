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
_COPIES = {"fwd_seg_size_avg": "fwd_pkt_len_mean", "bwd_seg_size_avg": "bwd_pkt_len_mean", "pkt_size_avg": "pkt_len_mean"}
_DUPLICATES = frozenset({*_COPIES, "pkt_len_var"})
_LONE_SPREAD = 0.5  # of a scaled feature around a site's only row of a class
_SITE_MARGIN = 2.5


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


# --- a site's rows beside those of the model it starts from -------------------------------------------------------------------


def restricted(density: Density, inputs: Sequence[str]) -> Density:
    """Return the density over those of its features that are also in ``inputs``."""
    kept = [index for index, name in enumerate(density.inputs) if name in inputs]
    return Density(
        tuple(density.inputs[index] for index in kept),
        density.centre[kept],
        density.scale[kept],
        tuple(centres[:, kept] for centres in density.centres),
        tuple(weights[:, kept] for weights in density.weights),
        density.limits,
    )


def remembered(density: Density, rows_each: int, seed: int) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Draw rows like those a density was made of: float64[n, 79] around its prototypes, and their class indices.

    This is how a model keeps what it knew while it learns a site, without the rows it was trained on. Features that are no
    input of the density are 0, but for other spellings of those that are.
    """
    generator = np.random.default_rng([seed, 1])
    drawn, classes = [], []
    columns = [COLUMN[name] for name in density.inputs]
    for index, (centres, weights) in enumerate(zip(density.centres, density.weights, strict=True)):
        if not len(centres):
            continue
        chosen = generator.integers(0, len(centres), rows_each)
        spread = np.sqrt(np.maximum(1.0 / weights[chosen] - _SPREAD_MIN**2, 0.0))
        standard = centres[chosen] + spread * generator.standard_normal(spread.shape)
        rows = np.zeros((rows_each, len(COLUMN)))
        rows[:, columns] = np.expm1(np.maximum(standard * density.scale + density.centre, 0.0))
        for copy, original in _COPIES.items():
            rows[:, COLUMN[copy]] = rows[:, COLUMN[original]]
        rows[:, COLUMN["pkt_len_var"]] = rows[:, COLUMN["pkt_len_std"]] ** 2
        drawn.append(rows)
        classes += [index] * rows_each
    return np.concatenate(drawn), np.array(classes, dtype=np.intp)


def extended(density: Density, features: Floats, truth: npt.NDArray[np.intp], classes: int, seed: int) -> Density:
    """Return the density with prototypes of a site's rows added, for ``classes`` classes, and its limits widened for them.

    The site's rows are few, so each of a class with fewer than ``_FEW`` is a prototype, spread a little wider than the gaps
    between them; a row is familiar up to two and a half times the largest such gap, or as many
    spreads. The features are scaled as the density scales them.
    """
    rows = density.standardise(features)
    nothing = np.empty((0, rows.shape[1]))
    centres, weights, limits = [], [], []
    for index in range(classes):
        known = index < len(density.centres)
        centres.append(density.centres[index] if known else nothing)
        weights.append(density.weights[index] if known else nothing)
        limits.append(float(density.limits[index]) if known else 0.0)
        own = rows[truth == index]
        if len(own):
            made, spread, reach = _site_prototypes(own, np.random.default_rng([seed, index]))
            centres[index] = np.concatenate([centres[index], made])
            weights[index] = np.concatenate([weights[index], 1.0 / (spread + _SPREAD_MIN**2)])
            limits[index] = max(limits[index], reach)
    return replace(density, centres=tuple(centres), weights=tuple(weights), limits=np.array(limits))


def _site_prototypes(rows: Floats, generator: np.random.Generator) -> tuple[Floats, Floats, float]:
    """Return prototypes of a site's rows of one class, their variances, and how far a row may be from the nearest."""
    if len(rows) >= _FEW:
        half = generator.permutation(len(rows)) < len(rows) // 2
        early, spread = _prototypes(rows[half], generator)
        held_out = _distances(rows[~half], early, spread)
        return *_prototypes(rows, generator), float(np.quantile(held_out, _BENIGN_QUANTILE)) * _ATTACK_MARGIN
    if len(rows) == 1:
        return rows, np.full_like(rows, _LONE_SPREAD**2), _SITE_MARGIN
    gaps = ((rows[:, None, :] - rows[None, :, :]) ** 2).sum(axis=2)
    np.fill_diagonal(gaps, np.inf)
    nearby = ((rows - rows[gaps.argmin(axis=1)]) ** 2).mean(axis=0)
    spread = np.broadcast_to(nearby + _LONE_SPREAD**2, rows.shape).copy()
    apart = np.array([_distances(rows[i : i + 1], np.delete(rows, i, 0), spread[1:])[0] for i in range(len(rows))])
    return rows.copy(), spread, max(float(apart.max()), 1.0) * _SITE_MARGIN


def _distances(rows: Floats, centres: Floats, spread: Floats) -> Floats:
    """Return float64[n]: root mean squared distance to the nearest prototype, as ``Density.distance`` measures it."""
    squared = ((rows[:, None, :] - centres[None, :, :]) ** 2 / (spread + _SPREAD_MIN**2)[None, :, :]).mean(axis=2)
    nearest: Floats = np.sqrt(squared.min(axis=1))
    return nearest
