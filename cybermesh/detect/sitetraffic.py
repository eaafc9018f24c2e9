"""A site's flows for learning: a flow table, or a capture that is metered here, so that learning and serving see the same.

A capture has no labels; its flows are presumed to be of one class (benign, for ordinary traffic).
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import numpy as np

from cybermesh.detect.datasets import Dataset, DatasetError, read
from cybermesh.telemetry.cic_columns import OWN
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.telemetry.sources.pcap import is_pcap
from cybermesh.telemetry.sources.pcapng import is_pcapng

_MAGIC_BYTES = 16


def read_presumed(path: Path, presumed: str) -> Dataset:
    """Return the flows of a table or a capture, all taken to be of the class ``presumed``.

    Raises:
        DatasetError: the file cannot be read, or holds no flow.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(_MAGIC_BYTES)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}; name a capture or a flow table") from error
    if not (is_pcap(magic) or is_pcapng(magic)):
        return read(path, presumed=presumed)
    try:
        flows = [batch for batch in metered(path) if len(batch)]
    except SourceError as error:
        raise DatasetError(str(error)) from error
    if not flows:
        raise DatasetError(f"{path}: no flow in it")
    features = np.concatenate([batch.features for batch in flows])
    labels = np.full(len(features), presumed)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Dataset(
        variant=OWN,
        features=features,
        known=flows[0].known,
        labels=labels,
        names=labels,
        order=np.concatenate([batch.start_us for batch in flows]),
        timed=True,
        foreign=np.zeros(len(features), dtype=np.bool_),
        digest=digest,
        skipped={},
    )


def metered(path: Path) -> list[FlowBatch]:
    """Return the flows of a capture.

    Raises:
        SourceError: it is no capture.
    """
    meter = FlowMeter()
    with closing(CaptureSource(str(path))) as source:
        flows = [meter.add(batch) for batch in source.batches()]
    return [*flows, meter.flush()]
