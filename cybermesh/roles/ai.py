"""The ai role: telemetry in, signed detections out, and what became of them.

Every input that goes on for ever is read by a task of its own, files with an end one after the other in the order of the
settings, so that a capture in parts is one capture. They take turns in scoring, a batch at a time in a worker thread, because
windows and meter see all of them. A bounded hand-over holds what is waiting to be signed and published, and reading waits while
it is full. Anomaly, evidence and policy of a detection are published in this order under the attacking entity as key.
A position is kept, or a message of the bus acknowledged, only after everything found up to it was published.

An input that fails ends no other: /ready names it, and it is opened again, after a pause that grows to a minute.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from cybermesh.bus import Bus, BusError, Delivery
from cybermesh.bus.topics import Topics
from cybermesh.detect.detector import Detection
from cybermesh.detect.pipeline import Pipeline
from cybermesh.envelope import EnvelopeError
from cybermesh.envelope.nonces import NonceSource
from cybermesh.envelope.signing import (
    AiMessage,
    AnomalyContent,
    EvidenceContent,
    PolicyContent,
    Stamp,
    sign,
    sign_anomaly,
    sign_batch,
    sign_custody,
    sign_evidence,
    sign_policy,
)
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey
from cybermesh.log import logger
from cybermesh.messages import SignedMessage, Transaction, TxKind
from cybermesh.metrics import Figures
from cybermesh.roles.clock import Clock
from cybermesh.roles.detection import Upkeep, version_of
from cybermesh.roles.feeds import Feed, Given, in_thread
from cybermesh.roles.patience import Patience
from cybermesh.roles.ring import control_domains, key_ring
from cybermesh.telemetry.sources import Batch, SourceError, newest_us
from cybermesh.wire import codec
from cybermesh.wire.control import open_ack, open_commit

HAND_OVER_MAX = 256
OPEN_ANOMALIES_MAX = 100_000
SIGN_ANEW_S = 120.0  # well within the five minutes after which validators refuse a message
REOPEN_FIRST_S = 1.0
REOPEN_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Published:
    """A detection that is on the bus; ``read_at_s`` is when its decisive packet was read (monotonic).

    ``policy_digest`` identifies the proposed policy's transaction.
    """

    detection: Detection
    anomaly_id: str
    policy_id: str | None
    policy_digest: bytes | None
    read_at_s: float


@dataclass(frozen=True, slots=True)
class Parts:
    """What the role is composed of; ``instance`` names this process in its consumer group.

    ``feeds`` are read side by side; ``reopen_first_s`` is the first pause before one that failed is opened again.
    With ``signs_batches`` the messages of a detection share one signature.
    """

    genesis: Genesis
    key: SigningKey
    instance: str
    topics: Topics
    bus: Bus
    nonces: NonceSource
    clock: Clock
    feeds: Sequence[Feed]
    pipeline: Pipeline
    upkeep: Upkeep | None = None
    signs_batches: bool = False
    on_published: Callable[[Published], None] = lambda _published: None
    reopen_first_s: float = REOPEN_FIRST_S


@dataclass(slots=True)
class Counts:
    """What the role has done since its start; ``feedback`` counts how published anomalies fared."""

    packets: int = 0
    flows: int = 0
    anomalies: int = 0
    policies: int = 0
    signed_anew: int = 0
    feedback: dict[str, int] = field(
        default_factory=lambda: {"committed": 0, "rejected": 0, "applied": 0, "failed": 0, "refused": 0}
    )


class AiRole:
    """One sensor's detector on the bus."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._log = logger(role="ai", instance=parts.instance)
        self._found: asyncio.Queue[tuple[Detection, float] | asyncio.Event] = asyncio.Queue(HAND_OVER_MAX)
        self._scoring = asyncio.Lock()
        self._failing: dict[str, str] = {}
        self._skipped: dict[str, Counter[str]] = {}
        self._open: dict[str, None] = {}
        self._ring = key_ring(parts.genesis)
        self._domains = control_domains(parts.genesis)
        self._read = _ReadTimes()
        self._patience = Patience(self._log)
        self.counts = Counts()
        self.finished = asyncio.Event()

    async def run(self) -> None:
        """Read every input, publish what is found, and follow what becomes of it until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="ai feedback")
            group.create_task(self._publish_all(), name="ai publish")
            await self._read_all()

    @property
    def problem(self) -> str | None:
        """What publishing waits for, or which inputs cannot be read; None when all is well."""
        found = [self._patience.problem, *(f"{name}: {reason}" for name, reason in list(self._failing.items()))]
        return "; ".join(filter(None, found)) or None

    def figures(self) -> Figures:
        """Return this role's metrics."""
        return {
            "ai_packets_total": self.counts.packets,
            "ai_flows_total": self.counts.flows,
            "ai_anomalies_total": self.counts.anomalies,
            "ai_policies_total": self.counts.policies,
            "ai_signed_anew_total": self.counts.signed_anew,
            "ai_feedback_refused_total": self.counts.feedback["refused"],
            "ai_inputs_failing": len(self._failing),
            "ai_records_skipped_total": sum(sum(reasons.values()) for reasons in self._skipped.values()),
            "ai_packets_lost_total": sum(feed.counters.lost for feed in self._parts.feeds),
        }

    async def _read_all(self) -> None:
        finite = [feed for feed in self._parts.feeds if not feed.is_endless]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_in_turn(finite), name="ai files")
            for feed in self._parts.feeds:
                if feed.is_endless:
                    group.create_task(self._read_on(feed), name=f"ai input {feed.name}")
        await self._hand_over(await in_thread(self._score_rest))
        self.finished.set()

    async def _read_in_turn(self, feeds: Sequence[Feed]) -> None:
        """Read inputs with an end one after the other, as one stream; those that fail once more when the others are read."""
        left, pause_s = list(feeds), self._parts.reopen_first_s
        while left := [feed for feed in left if not await self._read_once(feed)]:
            pause_s = await _pause(pause_s)

    async def _read_on(self, feed: Feed) -> None:
        """Read an input without an end; one that ends all the same, or fails, again and again."""
        pause_s = self._parts.reopen_first_s
        while True:
            before = feed.counters.packets
            if await self._read_once(feed):
                self._fail(feed, feed.counters.ended or "has ended")
            if feed.counters.packets != before:  # it worked meanwhile
                pause_s = self._parts.reopen_first_s
            pause_s = await _pause(pause_s)

    async def _read_once(self, feed: Feed) -> bool:
        """Read an input to its end; return False if it cannot be read."""
        try:
            async with feed.batches() as batches:
                self._failing.pop(feed.name, None)
                async for given in batches:
                    await self._take(feed, given)
        except (SourceError, BusError) as error:
            self._fail(feed, str(error))
            return False
        self._tell_skipped(feed)
        self._log.info("source_ended", source=feed.name, records=feed.counters.packets, reason=feed.counters.ended)
        return True

    def _fail(self, feed: Feed, reason: str) -> None:
        if self._failing.get(feed.name) != reason:
            self._log.warning("source_failed", source=feed.name, reason=reason)
        self._failing[feed.name] = reason

    async def _take(self, feed: Feed, given: Given) -> None:
        """Score a batch; return when what it showed is published and the input's mark has moved behind it."""
        async with self._scoring:
            found = await in_thread(lambda: self._score(given.batch, prompt=feed.is_endless))
        await self._hand_over(found)
        await given.done()
        if feed.counters.skipped != self._skipped.get(feed.name):
            self._tell_skipped(feed)

    def _tell_skipped(self, feed: Feed) -> None:
        """Log each reason for leaving records out once for an input; the figures have the counts."""
        known = self._skipped.get(feed.name, Counter())
        for reason in feed.counters.skipped.keys() - known.keys():
            self._log.warning("records_skipped", source=feed.name, reason=reason)
        self._skipped[feed.name] = known | feed.counters.skipped

    async def _hand_over(self, found: Sequence[tuple[Detection, float]]) -> None:
        """Give detections to the publisher; return when the last is published."""
        if found:
            for each in found:
                await self._found.put(each)
            published = asyncio.Event()
            await self._found.put(published)
            await published.wait()

    def _score(self, batch: Batch, *, prompt: bool) -> list[tuple[Detection, float]]:
        """Score one batch, in the worker thread."""
        self._read.add(batch, self._parts.clock.monotonic_s())
        self.counts.packets += len(batch)
        upkeep = self._parts.upkeep
        ended = upkeep.step(self._parts.clock.monotonic_s()) if upkeep is not None else []
        return self._timed([*ended, *self._parts.pipeline.feed(batch, prompt=prompt)])

    def _score_rest(self) -> list[tuple[Detection, float]]:
        found = self._parts.pipeline.finish()
        if self._parts.upkeep is not None:
            self._parts.upkeep.save()
        return self._timed(found)

    def _timed(self, detections: Sequence[Detection]) -> list[tuple[Detection, float]]:
        self.counts.flows = self._parts.pipeline.flows
        return [(detection, self._read.when(detection.decisive_us)) for detection in detections]

    async def _publish_all(self) -> None:
        while True:
            found = await self._found.get()
            if isinstance(found, asyncio.Event):
                found.set()
            else:
                await self._publish(*found)

    async def _publish(self, detection: Detection, read_at_s: float) -> None:
        anomaly_id, evidence_id = str(uuid.uuid4()), str(uuid.uuid4())
        policy_id = str(uuid.uuid4()) if detection.policy is not None else None
        policy_digest: bytes | None = None
        reference = bytes.fromhex(detection.evidence_digest)
        stamp = self._stamp()
        evidence = EvidenceContent(
            evidence_id,
            detection.type,
            (reference,),
            {"anomaly_id": anomaly_id, "evidence": detection.evidence},
            (sign_custody(reference, stamp.ts, self._parts.key),),
        )
        messages: list[AiMessage] = [
            sign_anomaly(_anomaly(detection, anomaly_id, version_of(self._parts.pipeline)), stamp),
            sign_evidence(evidence, self._stamp()),
        ]
        if policy_id is not None and detection.policy is not None:
            policy = PolicyContent(
                policy_id,
                str(detection.policy["action"]),
                str(detection.policy["rule_type"]),
                anomaly_id,
                evidence_id,
                {**detection.policy, "policy_id": policy_id},
            )
            messages.append(sign_policy(policy, self._stamp()))
            self.counts.policies += 1
        if self._parts.signs_batches:
            messages = sign_batch(messages, [self._stamp() for _ in messages])
        for kind, message in zip((TxKind.ANOMALY, TxKind.EVIDENCE, TxKind.POLICY), messages, strict=False):
            sent = await self._send(kind, detection.entity, message)
            if kind is TxKind.POLICY:
                policy_digest = Transaction(kind, sent).digest
        self.counts.anomalies += 1
        self._remember(anomaly_id)
        self._log.info(
            "detection_published",
            anomaly_id=anomaly_id,
            policy_id=policy_id,
            type=detection.type,
            severity=detection.severity,
            confidence=round(detection.confidence, 3),
            count=detection.count,
        )
        self._parts.on_published(Published(detection, anomaly_id, policy_id, policy_digest, read_at_s))

    def _stamp(self) -> Stamp:
        now_ms = self._parts.clock.wall_ms()
        return Stamp(self._parts.key, now_ms // 1000, self._parts.nonces.next(now_ms))

    async def _send(self, kind: TxKind, entity: str, message: SignedMessage) -> bytes:
        """Publish a message and return its bytes; what could not leave for two minutes is signed anew, or it would be stale."""
        topic = self._parts.topics.of_kind(kind)
        while True:
            if self._parts.clock.wall_ms() > 1000 * (message.ts + SIGN_ANEW_S):  # it waited for those before it
                self.counts.signed_anew += 1
                message = sign(message, self._stamp())
            value = codec.encode(message)
            if not topic:
                return value
            publish = partial(self._parts.bus.publish, topic, entity.encode(), value)
            try:
                async with asyncio.timeout(SIGN_ANEW_S):
                    await self._patience.until_done(publish)
                return value
            except TimeoutError:
                self.counts.signed_anew += 1
                message = sign(message, self._stamp())

    def _remember(self, anomaly_id: str) -> None:
        """Keep the newest anomalies whose fate is open; the oldest leave when there are too many."""
        self._open[anomaly_id] = None
        if len(self._open) > OPEN_ANOMALIES_MAX:
            del self._open[next(iter(self._open))]

    async def _follow(self) -> None:
        """Count what became of our anomalies; a commit says that a message was valid, not that it was right."""
        topics = [name for name in (self._parts.topics.control_commits, self._parts.topics.control_policy_ack) if name]
        group = f"cybermesh-ai-{self._parts.instance}"
        async with self._parts.bus.subscribe(topics, group) as deliveries:
            async for delivery in deliveries:
                self._count_feedback(delivery)
                await self._patience.until_done(partial(deliveries.ack, delivery))

    def _count_feedback(self, delivery: Delivery) -> None:
        ring, domains = self._ring, self._domains
        feedback = self.counts.feedback
        try:
            if delivery.topic == self._parts.topics.control_commits:
                commit = open_commit(delivery.value, ring, domains)
                for anomaly_id in commit.anomaly_ids:
                    if anomaly_id in self._open:
                        del self._open[anomaly_id]
                        feedback["committed"] += 1
            else:
                ack = open_ack(delivery.value, ring, domains)
                feedback["applied" if ack.result == "applied" else "failed"] += 1
        except EnvelopeError as error:
            feedback["refused"] += 1
            self._log.warning("feedback_refused", topic=delivery.topic, offset=delivery.offset, reason=str(error))


async def _pause(pause_s: float) -> float:
    """Wait; return how long to wait the next time."""
    await asyncio.sleep(pause_s * (1 + random.random() / 4))  # noqa: S311 - jitter, not a secret
    return min(2 * pause_s, REOPEN_MAX_S)


class _ReadTimes:
    """When the packets up to a packet time were read; the newest blocks only, which is all that a verdict can be about."""

    def __init__(self, blocks_max: int = 4096) -> None:
        self._blocks: deque[tuple[int, float]] = deque(maxlen=blocks_max)

    def add(self, batch: Batch, now_s: float) -> None:
        newest = newest_us(batch)
        if newest is not None:
            previous_us = self._blocks[-1][0] if self._blocks else newest
            self._blocks.append((max(newest, previous_us), now_s))

    def when(self, packet_us: int) -> float:
        """Return when the block that holds this packet time was read."""
        found = self._blocks[-1][1] if self._blocks else 0.0
        for newest, read_s in reversed(self._blocks):
            if newest < packet_us:
                break
            found = read_s
        return found


def _anomaly(detection: Detection, anomaly_id: str, model_version: str) -> AnomalyContent:
    """Return what the anomaly says; the source is the attacking entity, details are what people want to see first."""
    return AnomalyContent(
        id=anomaly_id,
        type=detection.type,
        source=detection.entity,
        entity=detection.entity,
        severity=detection.severity,
        confidence=detection.confidence,
        model_version=model_version,
        details={
            "victim": detection.victim,
            "port": detection.port,
            "first_us": detection.first_us,
            "last_us": detection.last_us,
            "count": detection.count,
            "votes": dict(detection.votes),
            "explanation": detection.explanation,
            "alert_id": detection.alert_id,
            "revision": detection.revision,
        },
    )
