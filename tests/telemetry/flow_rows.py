"""Flows of the meter and of the oracle in one form, to be compared cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cybermesh.telemetry.features import NAMES
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.packets import ICMP, OTHER, TCP, UDP, PacketBatch
from tests.telemetry import oracle

CLASSES = {"other": OTHER, "tcp": TCP, "udp": UDP, "icmp": ICMP}
TOLERANCE = 1e-12  # relative; the rulings ask for 1e-9


@dataclass(order=True)
class Row:
    """A flow: who, when, and its features by name."""

    identity: tuple[object, ...]
    features: list[float]


def mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else bytes(10) + b"\xff\xff" + address


def to_batch(packets: list[oracle.Packet]) -> PacketBatch:
    """Lay packets out in columns."""
    count = len(packets)

    def column(name: str, kind: type) -> np.ndarray:
        return np.array([getattr(p, name) for p in packets], kind)

    ends = {
        name: np.frombuffer(b"".join(mapped(getattr(p, name)) for p in packets), np.uint8).reshape(-1, 16)
        for name in ("src", "dst")
    }
    return PacketBatch(
        ts_us=column("ts", np.int64),
        **ends,
        family=column("family", np.uint8),
        sport=column("sport", np.uint16),
        dport=column("dport", np.uint16),
        proto=column("proto", np.uint8),
        klass=np.array([CLASSES[p.klass] for p in packets], np.uint8),
        icmp_type=column("kind", np.uint8),
        icmp_code=column("code", np.uint8),
        flags=column("flags", np.uint8),
        payload=column("payload", np.int64),
        header=column("header", np.int32),
        window=column("window", np.uint16),
        wire=np.zeros(count, np.uint32),
        payload_at=np.full(count, -1, np.int64),
        payload_captured=np.zeros(count, np.int32),
        data=np.empty(0, np.uint8),
    )


def of_meter(batches: Iterable[FlowBatch]) -> list[Row]:
    """Return the meter's flows, sorted."""
    rows = []
    for flows in batches:
        names = ("start_us", "end_us", "sport", "dport", "proto", "klass", "family", "icmp_type", "icmp_code")
        columns = [getattr(flows, name).tolist() for name in names]
        ends = [[address.tobytes() for address in column] for column in (flows.src, flows.dst)]
        rows += [Row(tuple(who), cells) for *who, cells in zip(*columns, *ends, flows.features.tolist(), strict=True)]
    return sorted(rows)


def of_oracle(flows: list[oracle.Flow]) -> list[Row]:
    """Return the oracle's flows, sorted."""
    rows = []
    for flow in flows:
        packet = flow.packets[0][2]
        kind = oracle.ICMP_REQUEST.get((packet.proto, packet.kind), packet.kind) if packet.klass == "icmp" else 0
        (src, sport), (dst, dport) = flow.forward, flow.backward
        who = (flow.start, flow.latest, sport, dport, packet.proto, CLASSES[packet.klass], packet.family, kind, packet.code)
        values = oracle.features(flow)
        assert set(values) == set(NAMES)
        rows.append(Row((*who, mapped(src), mapped(dst)), [values[name] for name in NAMES]))
    return sorted(rows)


def assert_same(found: list[Row], expected: list[Row]) -> None:
    """Fail with the first flow or cell that differs."""
    assert [row.identity for row in found] == [row.identity for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, a, b in zip(NAMES, ours.features, theirs.features, strict=True):
            assert math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=0), f"{name} of {ours.identity}: {a}, expected {b}"


def metered(batches: Iterable[PacketBatch], **options: int) -> list[FlowBatch]:
    """Run the meter over batches."""
    meter = FlowMeter(**options)
    return [*[meter.add(batch) for batch in batches], meter.flush()]


def pieces(batch: PacketBatch, size: int) -> Iterable[PacketBatch]:
    return (batch.take(slice(start, start + size)) for start in range(0, len(batch), size))
