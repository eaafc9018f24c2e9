"""Every attack of the lab is found in time and every bystander is left alone; from captures, from logs, as one from both."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from cybermesh.detect.detector import Detection
from cybermesh.detect.engines.rule_file import load, shipped_paths
from cybermesh.detect.pipeline import build, latest
from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.telemetry.sources.merged import merged
from tests.conftest import skip_or_fail
from tests.lab.campaign import NETWORK, SERVICES, Campaign, Recorded, missing, play

RULES = load(shipped_paths(), NAMES)
IN_TIME_US = 5_000_000


def played(name: str, campaign: Campaign, out: Path) -> Recorded:
    if lacking := missing(campaign):
        skip_or_fail("netns", f"not installed: {', '.join(lacking)}")
    return play(name, campaign, out)


def reports(paths: Sequence[Path]) -> list[Detection]:
    """What a pipeline reports of these inputs, every revision of it."""
    pipeline = build(RULES, meter=FlowMeter(), flow_names=NAMES)
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(contextlib.closing(open_source(str(path), block=1000))) for path in paths]
        found = [detection for batch in merged(sources, failed) for detection in pipeline.feed(batch, prompt=True)]
    assert failed == []
    return found + pipeline.finish()


def shortcomings(recorded: Recorded, found: Sequence[Detection]) -> list[str]:
    """Attacks that were not found, or late, or under another type or source; bystanders accused or blocked."""
    wrong = []
    attacks: list[dict[str, object]] = recorded.labels["attacks"]  # type: ignore[assignment]
    guilty = {source for attack in attacks for source in attack["sources"]}  # type: ignore[attr-defined]
    for attack in attacks:
        sources, kind = attack["sources"], attack["type"]
        mine = [d for d in found if d.type == kind and (d.entity in sources or (d.spoofable and d.victim in attack["victims"]))]  # type: ignore[operator]
        if not mine:
            wrong.append(f"{attack['name']}: not found")
        elif (late := min(d.decisive_us for d in mine) - int(attack["visible_us"])) > IN_TIME_US:  # type: ignore[call-overload]
            wrong.append(f"{attack['name']}: found {late / 1e6:.1f} s after it was visible")
    forged = {"203.0.113.99", "203.0.113.25"}  # decoys: they may be suspected, but never blocked
    wrong += [
        f"{d.entity} accused: {d.explanation}" for d in latest(found) if d.entity not in guilty | forged and not d.spoofable
    ]
    for detection in latest(found):
        if detection.policy is not None and detection.policy["action"] == "drop":
            target = detection.policy["target"]
            blocked = set(target["ips"]) if isinstance(target, dict) else set()
            wrong += [f"{ip} blocked: {detection.explanation}" for ip in blocked & set(recorded.labels["never_block"])]  # type: ignore[call-overload]
            wrong += [f"{ip} blocked as a decoy" for ip in blocked & forged]
    return wrong


def told_of(recorded: Recorded, name: str, *inputs: Path) -> list[tuple[str, bool]]:
    """The alerts about the source of attack ``name``: their types, and whether that is the attack's."""
    attacks: list[dict[str, object]] = recorded.labels["attacks"]  # type: ignore[assignment]
    (attack,) = [each for each in attacks if each["name"] == name]
    (source,) = attack["sources"]  # type: ignore[misc]
    return [(each.type, each.type == attack["type"]) for each in latest(reports(inputs)) if each.entity == source]


@pytest.mark.netns
def test_every_scan_and_flood_is_found_in_time_and_nobody_else_is_harmed(netns: None, tmp_path: Path) -> None:
    recorded = played("network", NETWORK, tmp_path)
    assert shortcomings(recorded, reports([recorded.capture])) == []


@pytest.mark.netns
def test_every_attack_on_a_service_is_found_in_time_in_captures_in_logs_and_once_in_both(netns: None, tmp_path: Path) -> None:
    recorded = played("services", SERVICES, tmp_path)  # once for all of this: it takes a minute
    assert shortcomings(recorded, reports([recorded.capture])) == []
    for name, log, kind in (("ssh-guesses", "auth.log", "brute_force"), ("web-scan", "access.log", "web_attack")):
        assert told_of(recorded, name, recorded.logs[log]) == [(kind, True)]
        assert told_of(recorded, name, recorded.capture, recorded.logs[log]) == [(kind, True)]
    everything = (recorded.capture, *recorded.logs.values())
    assert shortcomings(recorded, reports(everything)) == []
