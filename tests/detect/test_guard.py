"""The guard lets rows of the definitions through, and stops those of other extractors, one packet, or strange traffic."""

from __future__ import annotations

import numpy as np
import pytest

from cybermesh.detect import density, guard
from cybermesh.detect.guard import Reason
from cybermesh.detect.training import model_inputs
from cybermesh.telemetry.features import COLUMN, NAMES
from tests.detect.flow_rows import PERTURBATIONS, PROFILES, flows, many

KNOWN = np.ones(len(NAMES), dtype=np.bool_)
CLEAN = flows(many(60))
TRUTH = np.array([list(PROFILES).index(kind) for kind in many(60)], dtype=np.intp)


def fitted() -> density.Density:
    half = np.arange(len(CLEAN)) < len(CLEAN) // 2
    early = density.fit(CLEAN[half], TRUTH[half], model_inputs(KNOWN), len(PROFILES), seed=1)
    return density.with_limits(early, CLEAN[~half], TRUTH[~half], benign=0)


def test_rows_that_obey_the_definitions_pass() -> None:
    assert not guard.contradictions(CLEAN, KNOWN).any()
    assert not guard.implausible(CLEAN, KNOWN).any()


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_rows_of_another_extractor_are_flagged_wherever_they_differ_visibly(name: str) -> None:
    changed = PERTURBATIONS[name](CLEAN)
    flagged = guard.contradictions(changed, KNOWN) | guard.implausible(changed, KNOWN)
    # A TCP row with another window, or a scan of two empty packets, is what the definitions could have given.
    visible = {"windows": 0.0, "clipped flags": 0.7, "first packet twice": 0.7, "sub-flow totals": 0.0}.get(name, 0.99)
    assert flagged.mean() >= visible


def test_all_perturbations_together_are_flagged() -> None:
    rows = CLEAN
    for perturb in PERTURBATIONS.values():
        rows = perturb(rows)
    assert (guard.contradictions(rows, KNOWN) | guard.implausible(rows, KNOWN)).mean() >= 0.99


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("pkt_len_mean", 1.01),
        ("flow_pkts_s", 1.01),
        ("fwd_iat_tot", 3.0),
        ("down_up_ratio", 1.5),
        ("bwd_pkt_len_std", 1.2),
        ("fwd_header_len", 0.5),
        ("psh_flag_cnt", 3.0),
        ("subflow_fwd_pkts", 0.5),
        ("pkt_len_max", 2.0),
    ],
)
def test_each_identity_notices_its_feature(name: str, factor: float) -> None:
    rows = flows(["benign"] * 20)
    rows[:, COLUMN[name]] *= factor
    assert guard.contradictions(rows, KNOWN).mean() > 0.9


def test_identities_of_unknown_features_are_left_out() -> None:
    rows = CLEAN.copy()
    known = KNOWN.copy()
    for name in ("psh_flag_cnt", "pkt_len_mean"):
        rows[:, COLUMN[name]] = 0
        known[COLUMN[name]] = False
    assert not guard.contradictions(rows, known).any()


def test_the_reasons_say_which_test_failed() -> None:
    familiar = fitted()
    single = CLEAN[:1].copy()
    single[:, COLUMN["tot_bwd_pkts"]] = 0
    single[:, COLUMN["tot_fwd_pkts"]] = 1
    assert guard.reasons(familiar, single, KNOWN, TRUTH[:1])[0] & Reason.SINGLE_PACKET
    unknown = KNOWN.copy()
    unknown[COLUMN["flow_duration"]] = False
    assert (guard.reasons(familiar, CLEAN, unknown, TRUTH) & np.uint8(Reason.UNKNOWN_INPUT)).all()
    late = CLEAN[len(CLEAN) // 2 :], TRUTH[len(CLEAN) // 2 :]
    assert (guard.reasons(familiar, late[0], KNOWN, late[1]) != 0).mean() <= 0.05


def test_a_row_claimed_as_a_class_it_is_nothing_like_is_unfamiliar() -> None:
    familiar = fitted()
    benign = CLEAN[TRUTH == 0]
    as_scan = np.full(len(benign), list(PROFILES).index("port_scan"), dtype=np.intp)
    assert familiar.unfamiliar(benign, as_scan).all()
    assert familiar.unfamiliar(benign, np.zeros(len(benign), dtype=np.intp)).mean() <= 0.05


def test_distance_does_not_depend_on_how_rows_are_batched() -> None:
    familiar = fitted()
    whole = familiar.distance(CLEAN, TRUTH)
    pieces = np.concatenate([familiar.distance(CLEAN[i : i + 7], TRUTH[i : i + 7]) for i in range(0, len(CLEAN), 7)])
    np.testing.assert_allclose(whole, pieces, atol=1e-9)


def test_a_prototype_stands_for_several_rows_and_the_fit_is_deterministic() -> None:
    lone = np.vstack([CLEAN, flows(["benign"], seed=3) * 50])
    truth = np.append(TRUTH, 0)
    first, second = (density.fit(lone, truth, model_inputs(KNOWN), len(PROFILES), seed=4) for _ in range(2))
    standard = first.standardise(lone[-1:])
    assert ((first.centres[0] - standard) ** 2).sum(axis=1).min() > 1.0
    for left, right in zip(first.centres, second.centres, strict=True):
        np.testing.assert_array_equal(left, right)
