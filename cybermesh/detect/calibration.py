"""Confidence that can be read as a frequency: of the claims made with confidence .9, nine in ten are right.

Boosted trees are over-confident. What corrects them is fitted on rows that the trees have not seen and that are later in time:

- ``temperature``: one number for all classes, for a multi-class model;
- ``isotonic``: any rising curve, for one score and many samples; ``platt``: a logistic curve, for few samples;
- ``ceiling``: k rows without a mistake do not show certainty, so no confidence exceeds 1 - 1/(k + 2) (rule of succession).

The measures of the result are here too: expected calibration error and Brier score. Everything is deterministic numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_TINY = 1e-7
_TEMPERATURES = np.geomspace(0.25, 8.0, 101)


def soften(probabilities: Floats, temperature: float) -> Floats:
    """Return float64[n, k] with the log-probabilities divided by ``temperature``; 1 leaves them as they are."""
    logs = np.log(np.clip(probabilities, _TINY, 1.0)) / temperature
    powers = np.exp(logs - logs.max(axis=1, keepdims=True))
    softened: Floats = powers / powers.sum(axis=1, keepdims=True)
    return softened


def shift(probabilities: Floats, column: int, amount: float) -> Floats:
    """Return float64[n, k] with ``amount`` added to the log-probability of one column; each row still sums to 1."""
    if amount == 0.0:
        return probabilities
    shifted = probabilities.copy()
    shifted[:, column] *= np.exp(amount)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def temperature(probabilities: Floats, truth: npt.NDArray[np.intp]) -> float:
    """Return the temperature (0.25-8) under which ``truth`` (class index per row) is most likely; 1 without rows."""
    if not len(truth):
        return 1.0
    rows = np.arange(len(truth))
    losses = [-np.log(soften(probabilities, t)[rows, truth] + _TINY).mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def ceiling(samples: int) -> float:
    """Return the highest confidence that ``samples`` held-out rows can support."""
    return 1.0 - 1.0 / (samples + 2)


@dataclass(frozen=True, slots=True)
class Isotonic:
    """A rising step curve through blocks of samples: scores up to ``edges[i]`` have the frequency ``values[i]``."""

    edges: Floats
    values: Floats

    def __call__(self, scores: Floats) -> Floats:
        """Return the calibrated frequency of each score, interpolated between blocks."""
        return np.interp(scores, self.edges, self.values)


def isotonic(scores: Floats, correct: npt.NDArray[np.bool_]) -> Isotonic:
    """Fit by pooling adjacent violators.

    Raises:
        ValueError: no samples.
    """
    if not len(scores):
        raise ValueError("isotonic calibration needs samples")
    order = np.argsort(scores, kind="stable")
    blocks: list[tuple[float, float, float]] = []  # sum of outcomes, count, sum of scores
    for score, outcome in zip(scores[order], correct[order].astype(np.float64), strict=True):
        block = (float(outcome), 1.0, float(score))
        while blocks and blocks[-1][0] / blocks[-1][1] >= block[0] / block[1]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    table = np.array(blocks)
    return Isotonic(edges=table[:, 2] / table[:, 1], values=table[:, 0] / table[:, 1])


@dataclass(frozen=True, slots=True)
class Platt:
    """The logistic curve 1 / (1 + exp(-(slope * score + offset)))."""

    slope: float
    offset: float

    def __call__(self, scores: Floats) -> Floats:
        """Return the calibrated frequency of each score."""
        return 1.0 / (1.0 + np.exp(-(self.slope * scores + self.offset)))


def platt(scores: Floats, correct: npt.NDArray[np.bool_]) -> Platt:
    """Fit by Newton's method with Platt's smoothed targets (Lin, Lin, Weng 2007), which keep separable samples finite.

    Raises:
        ValueError: no samples.
    """
    if not len(scores):
        raise ValueError("Platt calibration needs samples")
    positives = int(correct.sum())
    negatives = len(correct) - positives
    targets = np.where(correct, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    design = np.stack([scores, np.ones_like(scores)], axis=1)
    weights = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    for _ in range(50):
        fitted = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -500, 500)))
        slope = design.T @ (fitted - targets)
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        weights = weights - np.clip(step, -10, 10)
        if np.abs(step).max() < 1e-9:
            break
    return Platt(slope=float(weights[0]), offset=float(weights[1]))


@dataclass(frozen=True, slots=True)
class Bin:
    """Claims of similar confidence: how many, their mean confidence, and the share that was right."""

    count: int
    confidence: float
    frequency: float


def reliability(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int = 15) -> list[Bin]:
    """Return the non-empty bins of equal width from 0 to 1."""
    places = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    return [
        Bin(int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean()))
        for place in range(bins)
        if (inside := places == place).any()
    ]


def expected_error(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """Return the expected calibration error: mean gap of confidence and frequency, weighted by bin; 0 without rows."""
    gaps = [b.count * abs(b.confidence - b.frequency) for b in reliability(confidence, correct, bins)]
    return sum(gaps) / len(confidence) if gaps else 0.0


def brier(confidence: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the mean squared gap of confidence and outcome; 0 without rows."""
    return float(np.mean((confidence - correct) ** 2)) if len(confidence) else 0.0
