"""The detector on real captures: the project's own, and those of the development data where it is there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml

from cybermesh import policy
from cybermesh.detect.detector import Detection
from cybermesh.detect.engines.rule_file import load, shipped_paths
from cybermesh.detect.evidence import digest, replay
from cybermesh.detect.pipeline import build, latest
from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.sources.choose import open_source
from tests.conftest import ROOT

RULES = load(shipped_paths(), NAMES)
CASES = yaml.safe_load((ROOT / "tests" / "cases" / "captures.yaml").read_text())
DEMO = ROOT / "cybermesh" / "data" / "demo.pcap"


def detections(path: Path, block: int = 16_384) -> list[Detection]:
    pipeline = build(RULES, meter=FlowMeter(), flow_names=NAMES)
    with contextlib.closing(open_source(str(path), block=block)) as source:
        found = [detection for batch in source.batches() for detection in pipeline.feed(batch)]
    found += pipeline.finish()
    assert {counters.failures for counters in pipeline.detector.counters.values()} == {0}
    return latest(found)


@pytest.mark.shared
def test_every_capture_of_the_development_data_has_an_expectation(shared_data: Path) -> None:
    there = {str(path.relative_to(shared_data)) for path in shared_data.glob("*pcaps/**/*.pcap*")}
    assert there == set(CASES)


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_a_capture_gives_exactly_the_expected_alerts(shared_data: Path, name: str) -> None:
    found = detections(shared_data / name)
    wanted = [(case["type"], case["source"], case["policy"]) for case in CASES[name]]
    told = [
        (detection.type, detection.entity if case["source"] else None, detection.policy is not None)
        for detection, case in zip(found, CASES[name], strict=False)
    ]
    assert len(found) == len(wanted), [detection.explanation for detection in found]
    assert told == wanted
    for detection in found:
        assert replay(detection.evidence, RULES) >= 1 or set(detection.votes) == {"statistics"}
        assert digest(detection.evidence) == detection.evidence_digest
        assert detection.first_us <= detection.decisive_us <= detection.last_us


def test_the_shipped_capture_gives_its_three_attacks_and_harms_nobody_else() -> None:
    labels = json.loads(DEMO.with_suffix(".labels.json").read_text())
    found = {detection.type: detection for detection in detections(DEMO)}
    assert set(found) == {attack["type"] for attack in labels["attacks"]}
    for attack in labels["attacks"]:
        detection = found[attack["type"]]
        assert detection.entity in attack["sources"]
        assert detection.victim in attack["victims"]
        assert detection.port == attack["port"]
        assert attack["first_us"] <= detection.decisive_us <= attack["first_us"] + 5_000_000
        assert detection.policy is not None
        spec = policy.parse(detection.policy)
        if attack["spoofed"]:
            assert spec.action == "rate_limit"
        else:
            assert spec.action == "drop"
            assert not {str(network.network_address) for network in spec.networks()} & set(labels["never_block"])


def test_the_shipped_capture_gives_the_same_detections_in_small_blocks() -> None:
    assert detections(DEMO, 700) == detections(DEMO)
