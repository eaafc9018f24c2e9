"""Composes the detector: rules, statistics and the classifier over one meter and one set of windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cybermesh.detect.engines import Engine
from cybermesh.detect.engines.classifier import open_classifier
from cybermesh.detect.engines.rule_file import load, shipped_paths
from cybermesh.detect.modelfile import ModelError
from cybermesh.detect.pipeline import Meter, Pipeline, build
from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.meter import FlowMeter


@dataclass(frozen=True, slots=True)
class OpenDetector:
    """A detector, the version its anomalies carry, and why it has no classifier (empty when it has one)."""

    pipeline: Pipeline
    version: str
    without_classifier: str


def open_detector(
    rules_dir: Path | None = None, model_dir: Path | None = None, site_key: str = "", *, meter: Meter | None = None
) -> OpenDetector:
    """Return a detector with the rules and the model of these directories, or with those shipped.

    Args:
        rules_dir: Where the rule files are.
        model_dir: Where the model is.
        site_key: A model of the site's own is loaded when this key (public, in hex) has signed it.
        meter: Meters packets; by default the reference, which is right for short captures.

    Raises:
        RuleError: A rule file is not usable.
        ModelError: ``model_dir`` was named and its model is refused; the shipped one may be missing.
    """
    rules = load(shipped_paths() if rules_dir is None else sorted((*rules_dir.glob("*.yaml"), *rules_dir.glob("*.yml"))), NAMES)
    engines: list[Engine] = []
    reason = ""
    try:
        engines.append(open_classifier(model_dir, site_key=bytes.fromhex(site_key) or None))
    except ModelError as error:
        if model_dir is not None:
            raise
        reason = str(error)
    pipeline = build(rules, meter=meter if meter is not None else FlowMeter(), flow_names=NAMES, more_engines=engines)
    return OpenDetector(pipeline, f"rules-{rules.digest[:12]}", reason)
