"""The agent role: proven decisions in, firewall rules and signed acks out.

A decision is acknowledged on the bus only when what became of it is in the agent's database; its ack is published from there,
again and again until the bus has it. The quorum proof is checked against the genesis; nothing else in a message is believed.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cybermesh import proof
from cybermesh.bus import Bus, BusError, Delivery, Subscription
from cybermesh.bus.topics import Topics, agent_group
from cybermesh.enforce import guard
from cybermesh.enforce.acks import Outcome, Place
from cybermesh.enforce.backends import Backend
from cybermesh.enforce.decisions import EpochUnknownError, ProofError, Proven
from cybermesh.enforce.enforcer import Enforcer, Ports
from cybermesh.enforce.state import State, StateError
from cybermesh.envelope import EnvelopeError
from cybermesh.envelope.nonces import NonceSource
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey
from cybermesh.log import logger
from cybermesh.messages import Ack, EpochChange, PolicyAction, PolicyUpdate
from cybermesh.metrics import Figures
from cybermesh.roles.clock import Clock
from cybermesh.roles.ring import control_domains, key_ring
from cybermesh.wire import codec
from cybermesh.wire.control import open_policy, seal

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
        self._ring = key_ring(parts.genesis)
        self._domains = control_domains(parts.genesis)
        self._verifier = proof.Verifier(parts.genesis)
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
        for outcome in await self._handle(updates) if updates else ():
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
            update = open_policy(delivery.value, self._ring, self._domains)
        except EnvelopeError as error:
            self.refused[error.code] += 1
            self._log.warning("decision_refused", offset=delivery.offset, code=error.code, reason=error.text)
            return None
        if isinstance(update, EpochChange):
            # No committee of this version can change (the ledger answers NOT_READY), so this one proves nothing.
            self.refused["EPOCH_CHANGE"] += 1
            return None
        return update

    async def _handle(self, updates: list[PolicyUpdate]) -> list[Outcome]:
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await self.enforcer.handle(updates)
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
            kind = EpochUnknownError if error.step is proof.Step.EPOCH else ProofError
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


async def _read_ahead(deliveries: Subscription, waiting: asyncio.Queue[Delivery | None]) -> None:
    """Put deliveries into a bounded queue, and None when there will be no more; a full queue makes the bus wait."""
    async for delivery in deliveries:
        await waiting.put(delivery)
    await waiting.put(None)
