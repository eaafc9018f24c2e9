"""The ai role on the bus: what it finds goes out in order, whatever the bus does, and a position only after it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from cybermesh.envelope.intrinsic import verify_intrinsic
from cybermesh.envelope.nonces import NonceSource
from cybermesh.keystore import FileCounters
from cybermesh.messages import Anomaly, TxKind
from cybermesh.roles import ai
from cybermesh.roles.ai import AiRole, Parts
from cybermesh.roles.detection import OpenDetector, open_detector
from cybermesh.roles.feeds import SourceFeed
from cybermesh.roles.positions import Nowhere
from cybermesh.telemetry.sources import Source
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.wire.codec import decode_signed
from tests.conftest import ROOT
from tests.roles.site import TOPICS, Site

CAPTURE = str(ROOT / "cybermesh/data/demo.pcap")


def parts(site: Site, counters: FileCounters, detector: OpenDetector, source: Source, marks: Nowhere) -> Parts:
    return Parts(
        genesis=site.genesis,
        key=site.deployment.keys["ai-1"],
        instance="ai-1",
        topics=TOPICS,
        bus=site.bus,
        nonces=NonceSource(counters),
        clock=site.clock,
        feeds=[SourceFeed("demo", lambda _: source, marks)],
        pipeline=detector.pipeline,
    )


async def test_what_could_not_leave_for_long_is_signed_anew_with_the_same_content(
    alone: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ai, "SIGN_ANEW_S", 0.05)
    attempts: list[bytes] = []
    publish = alone.bus.publish

    async def remember(topic: str, key: bytes, value: bytes):  # type: ignore[no-untyped-def]
        if topic == TOPICS.ai_anomalies:
            attempts.append(value)
        return await publish(topic, key, value)

    alone.bus.publish = remember  # type: ignore[method-assign]
    detector = open_detector()
    source = open_source(CAPTURE)
    with FileCounters(tmp_path / "ai.nonces") as counters:
        role = AiRole(parts(alone, counters, detector, source, Nowhere()))
        alone.bus.refused_topics = {TOPICS.ai_anomalies}
        async with asyncio.TaskGroup() as group:
            task = group.create_task(role.run(), name="ai")
            await alone.until(lambda: role.counts.signed_anew >= 2, limit_s=20)
            alone.bus.refused_topics = set()
            await alone.until(role.finished.is_set, limit_s=20)
            task.cancel()
    source.close()
    waited = [decode_signed(TxKind.ANOMALY, raw) for raw in attempts]
    first = [message for message in waited if message.id == waited[0].id]
    assert len({message.nonce for message in first}) >= 3
    assert len({message.content_hash for message in first}) == 1
    for message in first:
        assert verify_intrinsic(message) == message
    assert role.figures()["ai_signed_anew_total"] >= 2


async def test_detections_go_out_in_order_through_a_bus_that_was_away_and_positions_follow(alone: Site, tmp_path: Path) -> None:
    published: list[str] = []
    positions: list[tuple[str, int]] = []

    class Watched(Nowhere):
        def keep(self, name: str, position: str) -> None:
            positions.append((position, len(published)))

    marks = Watched()
    detector = open_detector()
    source = open_source(CAPTURE)
    with FileCounters(tmp_path / "ai.nonces") as counters:
        role = AiRole(
            replace(
                parts(alone, counters, detector, source, marks),
                on_published=lambda found: published.append(found.anomaly_id),
            )
        )
        alone.bus.refused_topics = {TOPICS.ai_evidence}
        async with asyncio.TaskGroup() as group:
            task = group.create_task(role.run(), name="ai")
            await alone.bus.has_refused.wait()
            await alone.until(lambda: role.problem is not None)
            assert published == []
            alone.bus.refused_topics = set()
            await alone.until(role.finished.is_set, limit_s=20)
            task.cancel()
    source.close()
    assert role.problem is None
    anomalies = await alone.records(TOPICS.ai_anomalies, len(published))
    assert len(anomalies) == len(published)
    for partition in {record.partition for record in anomalies}:
        mine = sorted((record for record in anomalies if record.partition == partition), key=lambda record: record.offset)
        sent = [decode_signed(TxKind.ANOMALY, record.value).id for record in mine]
        assert sent == [name for name in published if name in sent]
    assert len(await alone.records(TOPICS.ai_evidence, len(published))) == len(published) >= 3
    assert positions
    assert positions[-1][0]
    assert [count for _, count in positions] == sorted(count for _, count in positions)


async def test_the_messages_of_a_detection_can_share_one_signature(alone: Site, tmp_path: Path) -> None:
    published: list[str | None] = []
    detector = open_detector()
    source = open_source(CAPTURE)
    with FileCounters(tmp_path / "ai.nonces") as counters:
        made = parts(alone, counters, detector, source, Nowhere())
        role = AiRole(replace(made, signs_batches=True, on_published=lambda found: published.append(found.policy_id)))
        async with alone.running(1), asyncio.TaskGroup() as group:
            task = group.create_task(role.run(), name="ai")
            await alone.until(role.finished.is_set, limit_s=20)
            task.cancel()
            sent = 2 * len(published) + sum(policy_id is not None for policy_id in published)
            await alone.until(lambda: 1 in alone.roles and alone.roles[1].messages.admitted == sent)
    source.close()
    assert not alone.roles[1].messages.refused
    (first, *_) = await alone.records(TOPICS.ai_anomalies, 1)
    message = decode_signed(TxKind.ANOMALY, first.value)
    assert isinstance(message, Anomaly)
    assert message.batch
