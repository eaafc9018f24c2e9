"""What ``cybermesh bench detect`` measures: how fast flows are judged, by the classifier alone and by the whole detector.

The flows are those of the capture that the package ships, copied with new addresses until there are enough; they are
metered before the clock starts. Everything runs on one thread, and its processor time is what counts: other work on the machine
makes a wall clock say what it likes. ``wall_rows_per_s`` is what that clock said.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cybermesh.detect.detector import Detector
    from cybermesh.detect.pipeline import Pipeline
    from cybermesh.telemetry.flows import FlowBatch

BATCH_ROWS = 1_000
_WARM_BATCHES = 20


def flows_of(capture: Path, rows: int) -> list[FlowBatch]:
    """Return at least ``rows`` flows in batches of 1,000, in order of time: those of a capture, over and over.

    Every copy has source addresses of its own and comes after the one before.
    """
    from cybermesh.detect.sitetraffic import metered
    from cybermesh.telemetry.flows import FlowBatch

    parts = [batch for batch in metered(capture) if len(batch)]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in FlowBatch.__slots__ if name != "known"}
    one = FlowBatch(**columns, known=parts[0].known)
    copies = -(-rows // len(one))
    many = one.take(np.tile(np.argsort(one.end_us, kind="stable"), copies))
    number = np.repeat(np.arange(copies), len(one))
    many.src[:, 13] += number.astype(np.uint8)
    for times in (many.start_us, many.end_us):
        times += number * int(one.end_us.max() - one.start_us.min() + 1)
    return [many.take(slice(start, start + BATCH_ROWS)) for start in range(0, len(many), BATCH_ROWS)]


def measure(capture: Path, rows: int, rounds: int) -> dict[str, float]:
    """Return rows per second (medians of rounds), milliseconds and megabytes; see the command for what is timed."""
    from cybermesh.detect.engines.classifier import open_classifier
    from cybermesh.detect.modelfile import METADATA, ONNX, shipped_directory

    batches = flows_of(capture, rows)
    count = sum(map(len, batches))
    classifier = open_classifier()
    for batch in batches[:_WARM_BATCHES]:
        classifier.assess(batch.features, batch.known)
    alone, engines, whole, single, wall = [], [], [], [], []
    for _ in range(rounds):
        began, taken = time.perf_counter(), []
        for batch in batches:
            before = time.thread_time()
            classifier.assess(batch.features, batch.known)
            taken.append(time.thread_time() - before)
        wall.append(count / (time.perf_counter() - began))
        single += [seconds for seconds, batch in zip(taken, batches, strict=True) if len(batch) == BATCH_ROWS]
        alone.append(count / sum(taken))
        engines.append(count / _seconds(batches, functools.partial(_judge, _pipeline().detector)))
        whole.append(count / _seconds(batches, _pipeline().feed))
    size = sum((shipped_directory() / name).stat().st_size for name in (ONNX, METADATA))
    return {
        "classifier_rows_per_s": round(float(np.median(alone))),
        "pipeline_rows_per_s": round(float(np.median(engines))),
        "with_windows_rows_per_s": round(float(np.median(whole))),
        "onnx_batch_p99_ms": round(float(np.quantile(single, 0.99)) * 1e3, 3),
        "model_mb": round(size / 1e6, 3),
        "wall_rows_per_s": round(float(np.median(wall))),
    }


def _judge(detector: Detector, batch: FlowBatch) -> None:
    detector.detect(batch, ())


def _seconds(batches: list[FlowBatch], judge: Callable[[FlowBatch], object]) -> float:
    began = time.thread_time()
    for batch in batches:
        judge(batch)
    return time.thread_time() - began


def _pipeline() -> Pipeline:
    from cybermesh.detect.engines.classifier import open_classifier
    from cybermesh.detect.engines.rule_file import load, shipped_paths
    from cybermesh.detect.pipeline import Decision, build
    from cybermesh.telemetry.features import NAMES

    classifier = open_classifier()
    decision = Decision(model_digest=classifier.model.digest)
    return build(load(shipped_paths(), NAMES), flow_names=NAMES, more_engines=(classifier,), decision=decision)
