"""The definitions' form, exact statistics, and the identities that hold for every flow."""

from __future__ import annotations

import re
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.features import CIC_NAMES, COLUMN, DEFINITION_HASH, FEATURES, NAMES, UNITS
from cybermesh.telemetry.features_compute import _variance
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.sources.choose import open_source


def test_names_are_79_and_the_digest_is_of_their_order() -> None:
    assert len(NAMES) == len(set(NAMES)) == len(set(CIC_NAMES.values())) == len(UNITS) == 79
    assert NAMES[0] == "src_port"
    assert NAMES[78] == "idle_min"
    assert re.fullmatch("[0-9a-f]{64}", DEFINITION_HASH)


@pytest.mark.shared
def test_names_and_cic_names_are_those_of_the_specification(shared_data: Path) -> None:
    lines = (shared_data.parent / "spec" / "features.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if re.match(r"\| \d+ \|", line)]
    assert [(row[1], row[2]) for row in rows] == [(feature.name, feature.cic) for feature in FEATURES]


@given(
    st.lists(st.one_of(st.integers(0, 70_000), st.integers(1459, 1461), st.integers(0, 2**32 - 1)), max_size=30),
    st.integers(1, 50),
)
def test_variance_is_exact_to_the_last_digits(values: list[int], repeat: int) -> None:
    values = values * repeat
    low, high = sum(v * v % 2**32 for v in values), sum(v * v >> 32 for v in values)
    found = _variance(*(np.array([number], np.int64) for number in (len(values), sum(values), low, high)))[0]
    n = len(values)
    exact = Fraction(n * sum(v * v for v in values) - sum(values) ** 2, n * (n - 1)) if n > 1 else Fraction(0)
    assert found == pytest.approx(float(exact), rel=1e-13, abs=0)


@pytest.mark.shared
def test_identities_hold_for_every_flow_of_every_capture(shared_data: Path) -> None:
    total = 0
    for path in sorted((shared_data / "pcaps").glob("*.pcap*")):
        meter = FlowMeter()
        with closing(open_source(str(path))) as source:
            batches = [meter.add(batch) for batch in source.batches()]
        for flows in [*batches, meter.flush()]:
            total += len(flows)
            check_identities({name: flows.features[:, index] for name, index in COLUMN.items()}, flows.features)
    assert total > 5000


def check_identities(f: dict[str, np.ndarray], everything: np.ndarray) -> None:
    assert np.isfinite(everything).all()
    assert (everything >= 0).all()
    forward, backward, duration = f["tot_fwd_pkts"], f["tot_bwd_pkts"], f["flow_duration"]
    packets, payload = forward + backward, f["totlen_fwd_pkts"] + f["totlen_bwd_pkts"]

    def same(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> None:
        where = np.ones(len(a), bool) if where is None else where
        np.testing.assert_allclose(a[where], b[where], rtol=1e-9, atol=0)

    assert (packets > 0).all()
    same(f["pkt_len_mean"], payload / packets)
    same(f["pkt_size_avg"], payload / packets)
    same(f["fwd_seg_size_avg"], f["fwd_pkt_len_mean"])
    same(f["bwd_seg_size_avg"], f["bwd_pkt_len_mean"])
    same(f["pkt_len_var"], f["pkt_len_std"] ** 2)
    lasting = duration > 0
    same(f["flow_byts_s"] * duration / 1e6, payload, lasting)
    same(f["flow_pkts_s"] * duration / 1e6, packets, lasting)
    assert (f["flow_byts_s"][~lasting] == 0).all()
    same(f["flow_iat_mean"] * (packets - 1), duration)
    same(f["fwd_iat_tot"], f["fwd_iat_mean"] * np.maximum(forward - 1, 0))
    same(f["bwd_iat_tot"], f["bwd_iat_mean"] * np.maximum(backward - 1, 0))
    same(f["down_up_ratio"] * forward, np.where(forward > 0, backward, 0))
    for flag in ("psh", "urg"):
        same(f[f"{flag}_flag_cnt"], f[f"fwd_{flag}_flags"] + f[f"bwd_{flag}_flags"])
    udp, tcp = f["protocol"] == 17, f["protocol"] == 6
    same(f["fwd_header_len"], 8 * forward, udp)
    assert (f["fwd_seg_size_min"][udp] == 8).all()
    for name in ("init_fwd_win_byts", "init_bwd_win_byts", "syn_flag_cnt", "ack_flag_cnt", "psh_flag_cnt", "urg_flag_cnt"):
        assert (f[name][~tcp] == 0).all()
    never_idle = f["idle_max"] == 0
    assert (f["active_max"][never_idle] == 0).all()
    assert (f["idle_min"][~never_idle] > 5e6).all()
    for name in ("flow_iat", "fwd_iat", "bwd_iat", "fwd_pkt_len", "bwd_pkt_len", "pkt_len", "active", "idle"):
        assert (f[f"{name}_min"] <= f[f"{name}_mean"] * (1 + 1e-12)).all()
        assert (f[f"{name}_mean"] <= f[f"{name}_max"] * (1 + 1e-12)).all()
