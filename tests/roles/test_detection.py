"""A running detector's upkeep: rules reloaded without a restart, broken ones refused, baselines kept over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh.detect.engines.rule_file import shipped_paths
from cybermesh.detect.engines.statistics import WARM
from cybermesh.roles.detection import LOOK_EVERY_S, SAVE_EVERY_S, OpenDetector, open_detector, version_of
from cybermesh.telemetry.windows import Scope
from tests.detect import traffic
from tests.detect.test_detector import windows
from tests.telemetry.packet_batches import batch

T = 1_700_000_000.0
STRICT = b"condition: service in (ftp, smtp, pop3, imap) and login_failures >= 5\n"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    folder = tmp_path / "rules"
    folder.mkdir()
    for path in shipped_paths():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def scanned(opened: OpenDetector, at: float) -> set[str]:
    """The types reported for a scan from an address of its own."""
    source = f"198.51.100.{int(at) % 200}"
    found = opened.pipeline.feed(batch(traffic.ordered(traffic.syn_scan(at, range(1, 60), 0.01, source))), prompt=True)
    return {detection.type for detection in found if detection.entity == source}


def test_changed_rules_are_in_use_after_a_look_and_alerts_go_on(rules: Path) -> None:
    opened = open_detector(rules_dir=rules)
    assert scanned(opened, T) == {"port_scan"}
    before, version = opened.pipeline.rules.digest, version_of(opened.pipeline)
    opened.upkeep.step(0)
    (rules / "scans.yaml").unlink()
    opened.upkeep.step(LOOK_EVERY_S / 2)
    assert opened.pipeline.rules.digest == before  # not yet looked
    opened.upkeep.step(LOOK_EVERY_S)
    assert opened.pipeline.rules.digest != before
    assert version_of(opened.pipeline) == f"rules-{opened.pipeline.rules.digest[:12]}" != version  # what anomalies now carry
    assert opened.upkeep.reloads == 1
    assert scanned(opened, T + 10) == set()


def test_a_broken_rule_file_leaves_the_old_set_running_and_says_where_and_why(rules: Path) -> None:
    opened = open_detector(rules_dir=rules)
    before = opened.pipeline.rules
    opened.upkeep.step(0)
    path = rules / "brute_force.yaml"
    text = path.read_bytes()
    assert STRICT in text
    path.write_bytes(text.replace(STRICT, STRICT.replace(b"login_failures", b"logon_failures")))
    opened.upkeep.step(LOOK_EVERY_S)
    line = text[: text.index(STRICT)].count(b"\n") + 1
    assert f"{path}:{line}: condition: unknown name 'logon_failures'" in opened.upkeep.refused
    assert opened.pipeline.rules is before
    assert scanned(opened, T) == {"port_scan"}
    path.write_bytes(text)
    opened.upkeep.step(2 * LOOK_EVERY_S)
    assert opened.upkeep.refused == ""
    assert opened.upkeep.reloads == 0  # the same rules as before


def test_a_rule_folder_that_vanishes_leaves_the_old_set_running(rules: Path) -> None:
    opened = open_detector(rules_dir=rules)
    for path in rules.iterdir():
        path.unlink()
    opened.upkeep.step(0)
    assert opened.upkeep.refused != ""
    assert scanned(opened, T) == {"port_scan"}


def warm(opened: OpenDetector) -> None:
    for n in range(WARM + 5):
        rows = windows(Scope.DESTINATION, "10.0.0.9", 10 * n, syn=20 + n % 5)
        opened.pipeline.detector.detect(None, [rows])


def test_baselines_are_saved_every_minute_and_read_at_the_next_start(tmp_path: Path) -> None:
    state = tmp_path / "baselines.json"
    first = open_detector(state=state)
    warm(first)
    first.upkeep.step(0)
    assert not state.exists()
    first.upkeep.step(SAVE_EVERY_S)
    assert state.stat().st_mode & 0o777 == 0o600
    spike = [windows(Scope.DESTINATION, "10.0.0.9", 10_000, syn=9000)]
    assert open_detector(state=state).pipeline.detector.detect(None, spike) != []
    assert open_detector().pipeline.detector.detect(None, spike) == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1}', b"\xff"])
def test_damaged_baselines_are_a_cold_start(tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "baselines.json"
    state.write_bytes(content)
    opened = open_detector(state=state)
    warm(opened)
    opened.upkeep.save()
    assert len(state.read_bytes()) > 10


def test_baselines_that_cannot_be_saved_stop_nothing(tmp_path: Path) -> None:
    opened = open_detector(state=tmp_path / "missing" / "baselines.json")
    opened.upkeep.save()
    assert scanned(opened, T) == {"port_scan"}
