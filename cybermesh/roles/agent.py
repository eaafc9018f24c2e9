"""The agent role: proven decisions in, firewall rules and signed acks out.

A decision is acknowledged on the bus only when what became of it is in the agent's database; its ack is published from there,
again and again until the bus has it. The quorum proof is checked against the genesis and the changes of the committee that
proofs have shown since; nothing else in a message is believed.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cybermesh import proof
from cybermesh.bus import Bus, BusError, Delivery, Subscription
from cybermesh.bus.topics import Topics, agent_group
from cybermesh.enforce import guard
from cybermesh.enforce.acks import Outcome, Place
from cybermesh.enforce.backends import Backend
from cybermesh.enforce.decisions import EpochUnknownError, ProofError, Proven
from cybermesh.enforce.enforcer import Enforcer, Ports
from cybermesh.enforce.state import State, StateError
from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.nonces import NonceSource
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey
from cybermesh.log import logger
from cybermesh.messages import Ack, EpochChange, PolicyAction, PolicyUpdate
from cybermesh.metrics import Figures
from cybermesh.roles.clock import Clock
from cybermesh.roles.ring import committee_ring, control_domains
from cybermesh.wire import codec
from cybermesh.wire.control import open_policy, seal

T = TypeVar("T")

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0
BATCH_MAX = 1_000


@dataclass(frozen=True, slots=True)
class AgentParts:
    """What an agent is composed of; ``look`` reads what the local guard protects beside the fixed networks."""

    genesis: Genesis
    key: SigningKey
    name: str
    topics: Topics
    bus: Bus
    state: State
    backend: Backend
    nonces: NonceSource
    clock: Clock
    look: Callable[[], guard.Protected]
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None
    limits: guard.Limits = field(default_factory=guard.Limits)


class AgentRole:
    """One enforcement point."""

    def __init__(self, parts: AgentParts) -> None:
        self._parts = parts
        self._log = logger(role="agent", name=parts.name)
        self._domains = control_domains(parts.genesis)
        self._verifier = proof.Verifier(parts.genesis)
        self._restore_epochs()
        self._ring = committee_ring(parts.genesis, self._verifier.members)
        self._epochs_kept = self._verifier.epoch
        self._is_open = False
        ports = Ports(self._prove, self._seal, parts.look, parts.clock.wall_ms)
        place = Place(scope=parts.name, instance=parts.name, limits=parts.limits)
        self.enforcer = Enforcer(parts.state, parts.backend, ports, place)
        self.refused: Counter[str] = Counter()
        self.acks_published = 0

    async def run(self) -> None:
        """Enforce until cancelled; what is installed stays and ends by its own timeouts."""
        await self.open()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reconcile(), name=f"{self._parts.name} reconcile")
            group.create_task(self.enforcer.listen(), name=f"{self._parts.name} firewall changes")
            group.create_task(self._consume(), name=f"{self._parts.name} decisions")
            if self._parts.topics.control_policy_ack:
                group.create_task(self._publish_acks(), name=f"{self._parts.name} acks")

    async def open(self) -> None:
        """Bring the firewall to what is decided; ``run`` does it where it has not been done."""
        if self._is_open:
            return
        self._is_open = True
        found = await self.enforcer.open()
        self._log.info("agent_started", backend=self._parts.backend.name, drift=found.drift, problem=found.problem)

    async def _reconcile(self) -> None:
        """Tick and reconcile for ever; a database that is away stops neither expiry in the kernel nor the next try."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                await self.enforcer.run()
            except StateError as error:
                self._log.error("state_unavailable", reason=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _consume(self) -> None:
        """Handle what has come meanwhile as one batch: a burst costs one transaction per batch, not one per decision."""
        topic = self._parts.topics.control_policy
        waiting: asyncio.Queue[Delivery | None] = asyncio.Queue(maxsize=BATCH_MAX)
        async with (
            self._parts.bus.subscribe((topic,), agent_group(self._parts.name)) as deliveries,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(_read_ahead(deliveries, waiting), name=f"{self._parts.name} reading ahead")
            while (first := await waiting.get()) is not None:
                batch = [first]
                while len(batch) < BATCH_MAX and not waiting.empty():
                    following = waiting.get_nowait()
                    if following is None:
                        waiting.put_nowait(None)
                        break
                    batch.append(following)
                await self._take(batch)
                # The last of a partition stands for those before it.
                for delivery in {item.partition: item for item in batch}.values():
                    await deliveries.ack(delivery)

    async def _take(self, batch: list[Delivery]) -> None:
        """Return when what became of the messages is durable, or they were refused for what they are."""
        updates = await asyncio.to_thread(lambda: [item for delivery in batch if (item := self._read(delivery)) is not None])
        outcomes = await self._patiently(lambda: self.enforcer.handle(updates)) if updates else []
        if self._verifier.epoch != self._epochs_kept:
            outcomes = [*outcomes, *await self._begin_epoch()]
        for outcome in outcomes:
            self._log.info(
                "decision_handled",
                policy_id=outcome.policy_id,
                decision_seq=outcome.decision_seq,
                result=outcome.result,
                code=outcome.code,
            )
            self._parts.on_outcome(outcome)

    def _read(self, delivery: Delivery) -> PolicyUpdate | None:
        try:
            update = self._open(delivery.value)
        except EnvelopeError as error:
            self.refused[error.code] += 1
            self._log.warning("decision_refused", offset=delivery.offset, code=error.code, reason=error.text)
            return None
        if isinstance(update, EpochChange):
            self._learn(update)
            return None
        return update

    def _open(self, raw: bytes) -> PolicyUpdate | EpochChange:
        """Read a message and check that a member of the newest committee sent it, of the one that it proves itself if need be.

        Raises:
            EnvelopeError: the first fault found.
        """
        try:
            message = open_policy(raw, self._ring, self._domains)
        except EnvelopeError as error:
            if error.code is not Code.UNKNOWN_PRODUCER or not self._learn(_unchecked(raw)):
                raise
        else:
            if isinstance(message, EpochChange) or not self._learn(message):
                return message
        return open_policy(raw, self._ring, self._domains)

    def _learn(self, message: PolicyUpdate | EpochChange) -> bool:
        """Return whether the message proves a committee that was not known; who delivers a proof does not matter."""
        before = self._verifier.epoch
        if message.epoch <= before:
            return False
        try:
            if isinstance(message, PolicyUpdate):
                self._verifier.proof(message.proof)
            elif message.epoch == before + 1:
                self._verifier.learn(proof.decode_step(message.step))
        except proof.ProofError as error:
            self._log.warning("epoch_not_proven", epoch=message.epoch, step=error.step.value, reason=error.reason)
            self.refused[f"EPOCH_{error.step.value}"] += 1
        if self._verifier.epoch == before:
            return False
        self._ring = committee_ring(self._parts.genesis, self._verifier.members)
        self._log.info("epoch_began", epoch=self._verifier.epoch, members=len(self._verifier.members))
        return True

    async def _begin_epoch(self) -> list[Outcome]:
        """Keep the committees learned, and try again what had come before its committee was known."""
        steps = [proof.encode_step(step) for step in self._verifier.steps]
        await self._patiently(lambda: asyncio.to_thread(self._parts.state.keep_epochs, steps))
        self._epochs_kept = self._verifier.epoch
        return await self._patiently(self.enforcer.release_parked)

    def _restore_epochs(self) -> None:
        try:
            for step in self._parts.state.epochs():
                self._verifier.learn(proof.decode_step(step))
        except (ValueError, proof.ProofError) as error:
            raise StateError(f"the kept changes of the committee do not follow from this genesis: {error}") from error

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work, again and again while the agent's database is away."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await work()
            except StateError as error:
                self._log.error("state_unavailable", reason=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _publish_acks(self) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            await self.enforcer.acks_ready.wait()
            try:
                await self._publish_pending()
                pause_s = RETRY_FIRST_S
            except (BusError, StateError) as error:
                self._log.warning("acks_waiting", reason=str(error), retry_s=round(pause_s, 2))
                await asyncio.sleep(pause_s * (1 + random.random() / 4))  # noqa: S311 - jitter, not a secret
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _publish_pending(self) -> None:
        """Publish what waits; what the bus has is forgotten in one transaction, also when a later one fails."""
        done: list[int] = []
        try:
            for ack in await self.enforcer.pending_acks(BATCH_MAX):
                await self._parts.bus.publish(self._parts.topics.control_policy_ack, ack.policy_id.encode(), ack.body)
                done.append(ack.id)
        finally:
            if done:
                await self.enforcer.acks_published(done)
                self.acks_published += len(done)

    def figures(self) -> Figures:
        """Return this role's metrics."""
        return {"agent_acks_published_total": self.acks_published, "agent_refused_total": self.refused.total()}

    def _prove(self, update: PolicyUpdate) -> Proven:
        """Return what the update's proof proves, in the enforcer's words."""
        try:
            proven, effect = self._verifier.update(update)
        except proof.ProofError as error:
            is_unknown = error.step is proof.Step.EPOCH and update.epoch > self._verifier.epoch
            kind = EpochUnknownError if is_unknown else ProofError
            raise kind(error.step.value, error.reason) from error
        return Proven(
            policy_id=effect.policy_id,
            action=PolicyAction(update.action),
            rule_hash=effect.rule_hash,
            expires_at_ms=effect.expires_at_ms,
            decision_seq=effect.decision_seq,
            epoch=proven.header.epoch,
            height=proven.header.height,
            block_time_ms=proven.header.time_ms,
            reference=proven.header.hash.hex(),
        )

    def _seal(self, ack: Ack) -> bytes:
        nonce = self._parts.nonces.next(self._parts.clock.wall_ms())
        return codec.encode(seal(replace(ack, nonce=nonce), self._parts.key, self._domains))


def _unchecked(raw: bytes) -> PolicyUpdate | EpochChange:
    """Return a message whose sender is not checked; it has been read before."""
    return codec.EPOCH_CHANGE.decode(raw) if codec.is_epoch_change(raw) else codec.POLICY_UPDATE.decode(raw)


async def _read_ahead(deliveries: Subscription, waiting: asyncio.Queue[Delivery | None]) -> None:
    """Put deliveries into a bounded queue, and None when there will be no more; a full queue makes the bus wait."""
    async for delivery in deliveries:
        await waiting.put(delivery)
    await waiting.put(None)
