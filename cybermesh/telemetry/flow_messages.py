"""Flows as messages of the topic ``telemetry.features.v1``, and back.

A message's structure was checked by the codec; its numbers are checked here, row by row: what cannot be a flow is counted by
reason and left out, and the rest of the message is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from cybermesh.messages import FlowFeatures
from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.flow_rows import TIME_MAX_US
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.packets import ICMP
from cybermesh.wire.unsigned import FLOW_SCHEMA, FLOWS_MAX

NOT_FINITE = "feature not finite"
ODD_TIME = "time out of range"
ODD_CODE = "address family, class or end reason out of range"

_SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "start_us": ("<i8", ()),
    "end_us": ("<i8", ()),
    "src": ("u1", (16,)),
    "dst": ("u1", (16,)),
    "sport": ("<u2", ()),
    "dport": ("<u2", ()),
    "features": ("<f8", (len(NAMES),)),
    **dict.fromkeys(("family", "proto", "klass", "icmp_type", "icmp_code", "end_reason"), ("u1", ())),
}
_COLUMNS = tuple(field.name for field in fields(FlowBatch) if field.name != "known")


def to_messages(flows: FlowBatch, sensor: str, most: int = FLOWS_MAX) -> Iterator[FlowFeatures]:
    """Yield the flows in messages of at most ``most`` (1 to ``FLOWS_MAX``), in their order; none for no flows."""
    for at in range(0, len(flows), min(max(most, 1), FLOWS_MAX)):
        part = flows.take(slice(at, at + min(max(most, 1), FLOWS_MAX)))
        columns = {name: np.ascontiguousarray(getattr(part, name), dtype=kind).tobytes() for name, (kind, _) in _SHAPES.items()}
        yield FlowFeatures(
            schema=FLOW_SCHEMA, sensor=sensor, count=len(part), known=part.known.astype(np.uint8).tobytes(), **columns
        )


def from_message(message: FlowFeatures, counters: Counters) -> FlowBatch:
    """Return the flows of a message that ``wire.codec`` read, counting those left out; unknown features are 0."""
    columns = {
        name: np.frombuffer(getattr(message, name), kind).reshape(message.count, *shape).astype(kind[-2:])
        for name, (kind, shape) in _SHAPES.items()
    }
    known = np.frombuffer(message.known, np.uint8).astype(np.bool_)
    columns["features"][:, ~known] = 0.0
    flows = FlowBatch(**{name: columns[name] for name in _COLUMNS}, known=known)
    counters.packets += len(flows)
    sound = np.ones(len(flows), np.bool_)
    for reason, passes in (
        (NOT_FINITE, np.isfinite(flows.features).all(axis=1)),
        (ODD_TIME, _in_order(flows)),
        (ODD_CODE, np.isin(flows.family, (4, 6)) & (flows.klass <= ICMP) & (flows.end_reason <= max(EndReason))),
    ):
        counters.skip(reason, int((sound & ~passes).sum()))
        sound &= passes
    counters.metered += int(sound.sum())
    return flows if sound.all() else flows.take(np.nonzero(sound)[0])


def _in_order(flows: FlowBatch) -> npt.NDArray[np.bool_]:
    """Return where both times can be some and the end is not before the start."""
    in_order: npt.NDArray[np.bool_] = (
        (flows.start_us > -TIME_MAX_US) & (flows.end_us < TIME_MAX_US) & (flows.end_us >= flows.start_us)
    )
    return in_order
