"""Calibrated confidence is a frequency, and its measures count what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.detect import calibration

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def overconfident(count: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return two-class probabilities that are too sure, and the truth."""
    generator = np.random.default_rng(seed)
    logit = generator.normal(0, 2, count)
    truth = (generator.random(count) < 1 / (1 + np.exp(-logit))).astype(np.intp)
    sure = 1 / (1 + np.exp(-3 * logit))
    return np.stack([1 - sure, sure], axis=1), truth


def test_temperature_finds_how_much_too_sure_the_scores_are_and_mends_it() -> None:
    probabilities, truth = overconfident(8000)
    found = calibration.temperature(probabilities, truth)
    assert found == pytest.approx(3.0, rel=0.15)
    soft = calibration.soften(probabilities, found)
    right = soft.argmax(axis=1) == truth
    before = calibration.expected_error(probabilities.max(axis=1), right)
    after = calibration.expected_error(soft.max(axis=1), right)
    assert after < 0.02 < before
    assert calibration.brier(soft.max(axis=1), right) < calibration.brier(probabilities.max(axis=1), right)


def test_softening_keeps_the_order_and_sums_to_one() -> None:
    probabilities, _ = overconfident(50)
    soft = calibration.soften(probabilities, 2.0)
    np.testing.assert_allclose(soft.sum(axis=1), 1)
    np.testing.assert_array_equal(soft.argmax(axis=1), probabilities.argmax(axis=1))
    assert calibration.temperature(np.empty((0, 2)), np.empty(0, dtype=np.intp)) == 1.0


@given(SCORES, st.randoms(use_true_random=False))
def test_isotonic_rises_and_keeps_the_overall_frequency(scores: list[float], chance) -> None:
    points = np.array(scores)
    outcomes = np.array([chance.random() < score for score in scores])
    curve = calibration.isotonic(points, outcomes)
    grid = curve(np.linspace(0, 1, 50))
    assert (np.diff(grid) >= -1e-12).all()
    assert ((grid >= 0) & (grid <= 1)).all()


def test_isotonic_and_platt_recover_a_frequency() -> None:
    generator = np.random.default_rng(8)
    scores = generator.random(20_000)
    outcomes = generator.random(20_000) < scores**2
    grid = np.array([0.3, 0.6, 0.9])
    np.testing.assert_allclose(calibration.isotonic(scores, outcomes)(grid), grid**2, atol=0.04)
    logits = generator.normal(0, 1, 20_000)
    drawn = generator.random(20_000) < 1 / (1 + np.exp(-(2 * logits - 1)))
    fitted = calibration.platt(logits, drawn)
    assert (fitted.slope, fitted.offset) == pytest.approx((2, -1), abs=0.1)


def test_platt_stays_finite_on_few_separable_samples() -> None:
    fitted = calibration.platt(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True]))
    values = fitted(np.array([0.0, 0.5, 1.0]))
    assert np.isfinite(values).all()
    assert 0 < values[0] < values[1] < values[2] < 1


@pytest.mark.parametrize("fit", [calibration.isotonic, calibration.platt])
def test_no_samples_are_refused(fit) -> None:
    with pytest.raises(ValueError, match="needs samples"):
        fit(np.empty(0), np.empty(0, dtype=np.bool_))


def test_the_ceiling_is_the_rule_of_succession() -> None:
    assert calibration.ceiling(0) == 0.5
    assert calibration.ceiling(998) == pytest.approx(0.999)


def test_expected_error_of_a_known_table() -> None:
    confidence = np.array([0.95] * 10 + [0.65] * 10)
    right = np.array([True] * 9 + [False] + [True] * 3 + [False] * 7)
    assert calibration.expected_error(confidence, right) == pytest.approx((0.05 + 0.35) / 2)
    assert [b.count for b in calibration.reliability(confidence, right)] == [10, 10]
    assert calibration.expected_error(np.empty(0), np.empty(0, dtype=np.bool_)) == 0
