"""The validator role: signed messages in, agreed decisions with their proofs out.

    bus → verify → mempool journal → acknowledge → replica → committed block → store (one transaction) → outbox → bus

A message is acknowledged on the bus only when it is in the mempool journal, already committed, or a dead letter. Whatever
cannot be done for now (store busy, mempool full) pauses the consumption of messages; nothing is dropped for it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cybermesh.bus import Bus, BusError, Delivery, Subscription
from cybermesh.bus.topics import Topics, validator_group
from cybermesh.consensus.certificates import Signer
from cybermesh.consensus.committee import Committee, faults
from cybermesh.consensus.driver import Driver, SafetyFile, Shell, Status
from cybermesh.consensus.events import Commit, SafetyRecord
from cybermesh.consensus.journal import Journal, JournalError, MemoryJournal, standing
from cybermesh.consensus.leader import RoundRobin
from cybermesh.consensus.mempool import Admission, Mempool
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.parts import Parts
from cybermesh.consensus.transport import Transport
from cybermesh.consensus.types import Evidence, accused
from cybermesh.envelope import LOCAL_CODES, Code, EnvelopeError
from cybermesh.envelope.nonces import NonceTable
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey, verify
from cybermesh.ledger.snapshot import encode_snapshot
from cybermesh.ledger.state import State
from cybermesh.log import logger
from cybermesh.messages import TxKind, tx_digest
from cybermesh.metrics import Figures
from cybermesh.roles import records, recovery
from cybermesh.roles.application import LedgerApplication, pending
from cybermesh.roles.clock import Clock
from cybermesh.roles.ring import admission_rules, control_domains, key_ring
from cybermesh.store import StoreUnavailable
from cybermesh.store.outbox import OutboxPublisher, PublisherParts, publishes_at_once
from cybermesh.store.records import JournaledTransaction, StoredAck, StoredSnapshot
from cybermesh.store.store import Store
from cybermesh.wire import codec
from cybermesh.wire.admission import Admitted, read_transaction, verify_on_wire
from cybermesh.wire.control import open_ack
from cybermesh.wire.unsigned import make_dead_letter

T = TypeVar("T")

SNAPSHOT_EVERY = 1_000
BATCH_MAX = 512
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0


@dataclass(frozen=True, slots=True)
class ValidatorParts:
    """What a validator is composed of; ``number`` is its NODE_ID, ``safety_file`` the journal beside its key."""

    genesis: Genesis
    key: SigningKey
    number: int
    topics: Topics
    group: str
    bus: Bus
    transport: Transport
    store: Store
    safety_file: Path
    clock: Clock
    on_commit: Callable[[Commit[State]], None] = lambda _commit: None
    on_given_up: Callable[[Sequence[bytes]], None] = lambda _digests: None


@dataclass(slots=True)
class Counts:
    """What happened to messages since the start."""

    admitted: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    acks: int = 0
    acks_refused: int = 0


def create_safety_file(path: Path, genesis: Genesis, key: SigningKey) -> None:
    """Make the empty memory of a new key, once; a key that has signed before must never get another.

    Raises:
        JournalError: The file exists or cannot be written.
    """
    committee = _committee(genesis)
    fresh = SafetyRecord.fresh(committee.genesis_cert())
    Journal.create(path, chain_id=genesis.chain_id, public_key=key.public, record=fresh)


def safety_file_of(key_file: Path) -> Path:
    """Return where the memory of a key lies: beside it, never in a database or a backup."""
    return key_file.with_suffix(".safety.db")


def _committee(genesis: Genesis) -> Committee:
    return Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))


class NotAMemberError(Exception):
    """The key of this node is not in the committee."""


class ValidatorRole:
    """One member of the committee."""

    def __init__(self, parts: ValidatorParts) -> None:
        self._parts = parts
        self._log = logger(role="validator", node=parts.number)
        self._committee = _committee(parts.genesis)
        index = self._committee.index_of(parts.key.public)
        if index is None:
            raise NotAMemberError(
                f"key {parts.key.public.hex()} belongs to no validator of the genesis; use this node's own key"
            )
        self._index = index
        self._application = LedgerApplication(parts.genesis, parts.on_given_up)
        self._ring = key_ring(parts.genesis)
        self._rules = admission_rules(parts.genesis)
        self._domains = control_domains(parts.genesis)
        self._nonces = NonceTable()
        self._author = records.Author(parts.genesis, parts.key, parts.topics)
        self._outbox = OutboxPublisher(
            parts.store.outbox,
            parts.bus,
            PublisherParts(self._is_first, parts.clock.wall_ms, random.random, self._outbox_failed),
        )
        self._driver: Driver[State] | None = None
        self._snapshot_height = 0
        self.counts = Counts()

    def figures(self) -> Figures:
        """Return this role's metrics."""
        found = {
            "validator_admitted_total": self.counts.admitted,
            "validator_duplicates_total": self.counts.duplicates,
            "validator_refused_total": self.counts.refused.total(),
            "validator_acks_total": self.counts.acks,
        }
        status = self.status
        if status is not None:
            found |= {
                "validator_round": status.round,
                "validator_height_blocks": status.height,
                "validator_mempool_transactions": status.mempool,
                "validator_voting": int(status.problem is None),
            }
        return found

    @property
    def status(self) -> Status | None:
        """Where consensus stands, None before the start."""
        return self._driver.status if self._driver is not None else None

    async def run(self) -> None:
        """Take part until cancelled.

        Raises:
            RecoveryError: The stored chain is not what its headers promise.
            HaltedError: Inside an exception group: this node computes something else than a quorum.
            BlockConflict: Inside an exception group: the store holds another block at a committed height.
        """
        async with AsyncExitStack() as stack:
            journal, signer = await self._memory(stack)
            root = await recovery.restore(self._parts.store, self._parts.genesis, self._committee, self._application)
            self._snapshot_height = root.height
            driver = self._driver = Driver(self._consensus_parts(signer), root, self._shell(journal))
            await self._reload_mempool(driver)
            self._log.info("validator_started", index=self._index, height=root.height, votes=signer is not None)
            async with asyncio.TaskGroup() as group:
                group.create_task(driver.run(), name=f"validator-{self._parts.number} consensus")
                group.create_task(self._outbox.run(), name=f"validator-{self._parts.number} outbox")
                group.create_task(self._consume(driver), name=f"validator-{self._parts.number} messages")
                if self._parts.topics.control_policy_ack:
                    group.create_task(self._consume_acks(), name=f"validator-{self._parts.number} acks")

    # Start

    async def _memory(self, stack: AsyncExitStack) -> tuple[SafetyFile, Signer | None]:
        """Open the safety file; whatever is wrong with it makes this node an observer, for an old memory votes twice."""
        parts = self._parts
        try:
            journal = stack.enter_context(
                Journal.open(parts.safety_file, chain_id=parts.genesis.chain_id, public_key=parts.key.public)
            )
        except JournalError as error:
            self._log.error("observer", reason=str(error))
            return MemoryJournal(SafetyRecord.fresh(self._committee.genesis_cert())), None
        node = parts.store.node
        head = await parts.store.chain.head()
        stale = standing(
            journal.load(),
            stored_boot=await node.last_boot(),
            stored_voted_round=await node.last_voted_round(),
            stored_epoch=head.epoch if head is not None else 0,
        )
        if stale is not None:
            self._log.error("observer", reason=stale)
            return journal, None
        await node.record_boot(journal.boot, parts.clock.wall_ms())
        return journal, parts.key

    def _consensus_parts(self, signer: Signer | None) -> Parts[State]:
        timing = self._parts.genesis.timing
        return Parts(
            committee=self._committee,
            index=self._index,
            application=self._application,
            mempool=Mempool(),
            leaders=RoundRobin(self._committee),
            check=verify,
            signer=signer,
            jitter=random.random,
            timing=Timing(base_ms=timing.base_ms, heartbeat_ms=1000 * timing.heartbeat_s),
        )

    def _shell(self, journal: SafetyFile) -> Shell[State]:
        return Shell(
            transport=self._parts.transport,
            journal=journal,
            source=recovery.StoredBlocks(self._parts.store),
            on_commit=self._commit,
            on_evidence=self._accuse,
            wall_ms=self._parts.clock.wall_ms,
        )

    async def _reload_mempool(self, driver: Driver[State]) -> None:
        """Take up what was accepted before the last stop; its signatures were checked then."""
        for entry in await self._parts.store.mempool.load():
            unbound = self._rules.accept_unbound_fields
            message = read_transaction(entry.payload, accept_unbound_fields=unbound)
            self._application.remember(entry.digest)
            self._nonces.record(message.pubkey, message.nonce, message.content_hash, entry.received_ms)
            driver.submit(pending(entry.payload, message))

    # Messages in

    async def _consume(self, driver: Driver[State]) -> None:
        """Take messages in batches of whatever has arrived, so that one flush of the journal serves many of them."""
        topics = tuple(self._parts.topics.of_transactions())
        arrived: asyncio.Queue[Delivery] = asyncio.Queue(BATCH_MAX)
        async with self._parts.bus.subscribe(topics, self._group()) as deliveries, asyncio.TaskGroup() as group:
            group.create_task(_fill(arrived, deliveries), name=f"validator-{self._parts.number} arrivals")
            while True:
                batch = [await arrived.get()]
                while not arrived.empty():
                    batch.append(arrived.get_nowait())
                await self._take(driver, batch)
                for delivery in _newest(batch):
                    await deliveries.ack(delivery)

    def _group(self) -> str:
        return validator_group(str(self._parts.number), self._committee.n, self._parts.group)

    async def _take(self, driver: Driver[State], batch: Sequence[Delivery]) -> None:
        """Return when every message of the batch is journaled, known already, or a dead letter."""
        now_ms = self._parts.clock.wall_ms()
        kinds = self._parts.topics.of_transactions()
        fresh: dict[bytes, Admitted] = {}
        for delivery in batch:
            kind = kinds[delivery.topic]
            try:
                admitted = verify_on_wire(kind, delivery.value, now_ms, self._ring, self._rules)
                message = admitted.message
                self._nonces.check(message.pubkey, message.nonce, message.content_hash, now_ms)
            except EnvelopeError as error:
                await self._refuse(kind, delivery, error)
            else:
                fresh.setdefault(admitted.transaction.digest, admitted)
        await self._admit(driver, fresh, now_ms)

    async def _admit(self, driver: Driver[State], fresh: Mapping[bytes, Admitted], now_ms: int) -> None:
        """Journal messages in one transaction, then offer them to consensus."""
        if not fresh:
            return
        entries = [JournaledTransaction(digest, entry.transaction.encode(), now_ms) for digest, entry in fresh.items()]
        await self._patiently(lambda: self._parts.store.mempool.add(entries))
        for entry, admitted in zip(entries, fresh.values(), strict=True):
            message = admitted.message
            self._nonces.record(message.pubkey, message.nonce, message.content_hash, now_ms)
            self._application.remember(entry.digest)
            self.counts.admitted += 1
            while driver.submit(pending(entry.payload, message)) is Admission.FULL:
                await driver.room()

    async def _refuse(self, kind: TxKind, delivery: Delivery, error: EnvelopeError) -> None:
        if error.code is Code.DUPLICATE or (error.code in LOCAL_CODES and await self._is_committed(kind, delivery)):
            self.counts.duplicates += 1
            return
        self.counts.refused[error.code] += 1
        self._log.warning("message_refused", topic=delivery.topic, offset=delivery.offset, code=error.code, reason=error.text)
        if self._parts.topics.ai_dlq:
            place = (delivery.topic, delivery.partition, delivery.offset)
            now_ms = self._parts.clock.wall_ms()
            letter = make_dead_letter(place, error, delivery.value, now_ms, f"validator-{self._parts.number}")
            await self._patiently(lambda: self._publish(letter.raw_sha256, codec.encode(letter)))

    async def _publish(self, key: bytes, value: bytes) -> None:
        await self._parts.bus.publish(self._parts.topics.ai_dlq, key, value)

    async def _is_committed(self, kind: TxKind, delivery: Delivery) -> bool:
        digest = tx_digest(bytes((kind,)) + delivery.value)
        return bool(await self._parts.store.mempool.committed([digest]))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what must be durable, again and again while the store or the bus is away; consumption waits meanwhile."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await work()
            except (StoreUnavailable, BusError) as error:
                self._log.warning("waiting", reason=str(error), retry_s=round(pause_s, 2))
                await asyncio.sleep(pause_s * (1 + random.random() / 4))  # noqa: S311 - jitter, not a secret
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _consume_acks(self) -> None:
        topic = self._parts.topics.control_policy_ack
        async with self._parts.bus.subscribe((topic,), self._group()) as deliveries:
            async for delivery in deliveries:
                await self._take_ack(deliveries, delivery)

    async def _take_ack(self, deliveries: Subscription, delivery: Delivery) -> None:
        try:
            ack = open_ack(delivery.value, self._ring, self._domains)
        except EnvelopeError as error:
            self.counts.acks_refused += 1
            self._log.warning("ack_refused", offset=delivery.offset, code=error.code, reason=error.text)
        else:
            row = StoredAck(
                policy_id=ack.policy_id,
                decision_seq=ack.decision_seq,
                agent=ack.pubkey,
                result=ack.result,
                error_code=ack.error_code,
                reason=ack.reason,
                height=ack.height,
                applied_at_ms=ack.applied_at_ms,
                acked_at_ms=ack.acked_at_ms,
                body=delivery.value,
            )
            self.counts.acks += await self._patiently(lambda: self._parts.store.feedback.add_ack(row))
        await deliveries.ack(delivery)

    # Commits out

    async def _commit(self, commit: Commit[State]) -> None:
        """Store a commit with all it causes; returns when it is durable."""
        assert self._driver is not None
        moment = records.Moment(self._parts.clock.wall_ms(), self._driver.record.last_voted_round)
        rows = await asyncio.to_thread(records.of_commit, commit, self._author, moment)
        await self._patiently(lambda: self._parts.store.append(rows))
        given_up = self._application.take_given_up()
        if given_up:
            await self._patiently(lambda: self._parts.store.mempool.remove(given_up))
        self._outbox.notify()
        self._parts.on_commit(commit)
        newest = commit.blocks[-1]
        if newest.block.height >= self._snapshot_height + SNAPSHOT_EVERY:
            await self._save_snapshot(newest.block.height, newest.block.hash, newest.execution.state)

    async def _save_snapshot(self, height: int, block_hash: bytes, state: State) -> None:
        body = await asyncio.to_thread(encode_snapshot, state)
        snapshot = StoredSnapshot(height, block_hash, state.root, body, self._parts.clock.wall_ms())
        await self._patiently(lambda: self._parts.store.node.save_snapshot(snapshot))
        self._snapshot_height = height

    def _is_first(self, height: int) -> bool:
        return publishes_at_once(self._index, height, self._committee.n, faults(self._committee.n))

    def _outbox_failed(self, error: Exception) -> None:
        self._log.warning("outbox_waiting", reason=str(error))

    def _accuse(self, evidence: Evidence) -> None:
        member = self._parts.genesis.committee[accused(evidence)]
        self._log.error("equivocation", validator=member.name, kind=type(evidence).__name__)


async def _fill(arrived: asyncio.Queue[Delivery], deliveries: Subscription) -> None:
    """Hand deliveries over; waits while the batch in work leaves no room."""
    async for delivery in deliveries:
        await arrived.put(delivery)


def _newest(batch: Sequence[Delivery]) -> list[Delivery]:
    """Return the last delivery of each partition: acknowledging it acknowledges those before it."""
    return list({(delivery.topic, delivery.partition): delivery for delivery in batch}.values())
