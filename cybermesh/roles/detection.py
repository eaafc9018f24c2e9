"""Composes the detector: rules, statistics and the classifier over one meter and one set of windows; and keeps it up to date.

Rule files may change while the role runs. ``Upkeep.step`` looks at their names, sizes and times every few seconds; what changed
is read whole, and only a set without a fault replaces the old one: a fault is logged once with file, line and reason. The
statistics engine's baselines are saved every minute, and read again at the next start, so that a restart is not a cold start.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import orjson

from cybermesh.detect.detector import Detection
from cybermesh.detect.engines import Engine
from cybermesh.detect.engines.classifier import open_classifier
from cybermesh.detect.engines.rule_file import RuleError, load, shipped_paths
from cybermesh.detect.engines.statistics import StateError, StatisticsEngine
from cybermesh.detect.modelfile import ModelError
from cybermesh.detect.pipeline import Meter, Pipeline, build
from cybermesh.log import logger
from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.meter import FlowMeter

LOOK_EVERY_S = 2.0
SAVE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class OpenDetector:
    """A detector, and why it has no classifier (empty when it has one)."""

    pipeline: Pipeline
    without_classifier: str
    upkeep: Upkeep


def version_of(pipeline: Pipeline) -> str:
    """Return the version an anomaly carries: that of the rules in use now, which may have been reloaded."""
    return f"rules-{pipeline.rules.digest[:12]}"


class Upkeep:
    """What a running detector needs from outside; every method is called between two batches, in the same thread."""

    def __init__(self, pipeline: Pipeline, statistics: StatisticsEngine, rules_dir: Path | None, state: Path | None) -> None:
        self.reloads = 0
        self.refused = ""  # why the newest rule files are not in use, empty when they are
        self._pipeline = pipeline
        self._statistics = statistics
        self._rules_dir = rules_dir
        self._state = state
        self._seen = _stamps(rules_dir)
        self._looked_s = self._saved_s = float("-inf")
        self._log = logger(role="ai")

    def step(self, now_s: float) -> list[Detection]:
        """Look at the rule files and save the baselines if it is time; return what a change of rules brought to an end."""
        found: list[Detection] = []
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            found = self._look()
        if now_s - self._saved_s >= SAVE_EVERY_S:
            if self._saved_s > float("-inf"):
                self.save()
            self._saved_s = now_s
        return found

    def save(self) -> None:
        """Write the baselines, whole or not at all."""
        if self._state is None:
            return
        new = self._state.with_name(self._state.name + ".new")
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(orjson.dumps(self._statistics.to_state()))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._state)
        except OSError as error:
            self._log.warning("baselines_not_saved", path=str(self._state), reason=str(error))

    def _look(self) -> list[Detection]:
        stamps = _stamps(self._rules_dir)
        if stamps == self._seen:
            return []
        self._seen = stamps
        try:
            rules = load(_rule_files(self._rules_dir), NAMES)
            if not rules.rules:
                raise RuleError(str(self._rules_dir), 1, "no rules there; a detector without any would be blind")
        except (RuleError, OSError) as error:
            self.refused = str(error)
            self._log.error("rules_refused", reason=self.refused, in_use=self._pipeline.rules.digest[:12])
            return []
        self.refused = ""
        if rules.digest == self._pipeline.rules.digest:
            return []
        self.reloads += 1
        self._log.info("rules_reloaded", rules=len(rules.rules), digest=rules.digest[:12])
        return self._pipeline.replace_rules(rules)


def _rule_files(rules_dir: Path | None) -> list[Path]:
    return shipped_paths() if rules_dir is None else sorted((*rules_dir.glob("*.yaml"), *rules_dir.glob("*.yml")))


def _stamps(rules_dir: Path | None) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether rule files changed: names, sizes, times and inodes; shipped ones do not change."""
    stamps = {}
    for path in [] if rules_dir is None else _rule_files(rules_dir):
        with contextlib.suppress(OSError):  # gone since it was listed
            told = path.stat()
            stamps[path.name] = (told.st_mtime_ns, told.st_size, told.st_ino)
    return stamps


def _baselines(state: Path | None) -> StatisticsEngine:
    """Return the engine with its saved baselines; without good ones it starts cold, and says so."""
    if state is None or not state.exists():
        return StatisticsEngine()
    try:
        saved = orjson.loads(state.read_bytes())
        return StatisticsEngine.from_state(saved if isinstance(saved, dict) else {})
    except (OSError, orjson.JSONDecodeError, StateError) as error:
        logger(role="ai").warning("baselines_refused", path=str(state), reason=str(error))
        return StatisticsEngine()


def open_detector(
    rules_dir: Path | None = None,
    model_dir: Path | None = None,
    site_key: str = "",
    *,
    meter: Meter | None = None,
    state: Path | None = None,
) -> OpenDetector:
    """Return a detector with the rules and the model of these directories, or with those shipped.

    Args:
        rules_dir: Where the rule files are.
        model_dir: Where the model is.
        site_key: A model of the site's own is loaded when this key (public, in hex) has signed it.
        meter: Meters packets; by default the reference, which is right for short captures.
        state: The file in which baselines are kept; by default they are not.

    Raises:
        RuleError: A rule file is not usable.
        ModelError: ``model_dir`` was named and its model is refused; the shipped one may be missing.
    """
    rules = load(_rule_files(rules_dir), NAMES)
    engines: list[Engine] = []
    reason = ""
    try:
        engines.append(open_classifier(model_dir, site_key=bytes.fromhex(site_key) or None))
    except ModelError as error:
        if model_dir is not None:
            raise
        reason = str(error)
    statistics = _baselines(state)
    metered = meter if meter is not None else FlowMeter()
    pipeline = build(rules, meter=metered, flow_names=NAMES, more_engines=engines, statistics=statistics)
    upkeep = Upkeep(pipeline, statistics, rules_dir, state)
    return OpenDetector(pipeline, reason, upkeep)
