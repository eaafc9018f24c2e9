"""Signed messages on their way into a validator: verify → mempool journal → mempool → acknowledge.

Rules:

- a message is acknowledged on the bus only when it is in the mempool journal, already committed, or a dead letter;
- who may sign is what the ledger's key ring said after the newest commit;
- what cannot be done for now (store busy, mempool full) pauses the consumption of messages; nothing is dropped for it;
- the journal is read back as if it had come over the wire: a database is not trusted to hold what was put there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cybermesh.bus import Bus, Delivery, Subscription
from cybermesh.bus.topics import Topics
from cybermesh.consensus.driver import Driver
from cybermesh.consensus.mempool import Admission, PendingTransaction
from cybermesh.envelope import LOCAL_CODES, Code, EnvelopeError
from cybermesh.envelope.nonces import NonceTable
from cybermesh.genesis import Genesis
from cybermesh.ledger.state import State
from cybermesh.log import logger
from cybermesh.messages import TxKind, tx_digest
from cybermesh.roles.application import LedgerApplication, pending
from cybermesh.roles.clock import Clock
from cybermesh.roles.patience import Patience
from cybermesh.roles.ring import admission_rules, key_ring
from cybermesh.store.records import JournaledTransaction
from cybermesh.store.store import Store
from cybermesh.wire import codec
from cybermesh.wire.admission import Admitted, verify_on_wire, verify_transaction
from cybermesh.wire.unsigned import make_dead_letter

BATCH_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the intake of one validator works with; ``name`` stands in dead letters and in the names of tasks."""

    name: str
    group: str
    topics: Topics
    bus: Bus
    store: Store
    clock: Clock


@dataclass(slots=True)
class MessageCounts:
    """What happened to messages since the start."""

    admitted: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Intake:
    """Takes messages from the bus for as long as ``run`` runs."""

    def __init__(self, genesis: Genesis, around: Surroundings, application: LedgerApplication, patience: Patience) -> None:
        self._around = around
        self._application = application
        self._patience = patience
        self._log = logger(role="validator", node=around.name)
        self._rules = admission_rules(genesis)
        self._nonces = NonceTable()
        self.ring = key_ring(genesis)
        self.counts = MessageCounts()

    async def run(self, driver: Driver[State]) -> None:
        """Take messages in batches of whatever has arrived, so that one flush of the journal serves many of them."""
        around = self._around
        await self._reload(driver)
        arrived: asyncio.Queue[Delivery] = asyncio.Queue(BATCH_MAX)
        topics = tuple(around.topics.of_transactions())
        async with around.bus.subscribe(topics, around.group) as deliveries, asyncio.TaskGroup() as group:
            group.create_task(_fill(arrived, deliveries), name=f"{around.name} arrivals")
            while True:
                batch = [await arrived.get()]
                while not arrived.empty():
                    batch.append(arrived.get_nowait())
                await self._take(driver, batch)
                for delivery in _newest(batch):
                    await deliveries.ack(delivery)

    async def _reload(self, driver: Driver[State]) -> None:
        """Take up what was accepted before the last stop, and strike out what nobody can have accepted."""
        foreign = []
        for entry in await self._patience.until_done(self._around.store.mempool.load):
            try:
                if tx_digest(entry.payload) != entry.digest:
                    raise EnvelopeError(Code.MALFORMED, "journal", "is not what its digest names")
                message = verify_transaction(entry.payload, accept_unbound_fields=self._rules.accept_unbound_fields)
            except EnvelopeError as error:
                self._log.error("journal_entry_refused", digest=entry.digest.hex(), code=error.code, reason=error.text)
                foreign.append(entry.digest)
                continue
            self._application.remember(entry.digest)
            self._nonces.record(message.pubkey, message.nonce, message.content_hash, entry.received_ms)
            await _submit(driver, pending(entry.payload, message))
        await self._patience.until_done(lambda: self._around.store.mempool.remove(foreign))

    async def _take(self, driver: Driver[State], batch: Sequence[Delivery]) -> None:
        """Return when every message of the batch is journaled, known already, or a dead letter."""
        now_ms = self._around.clock.wall_ms()
        kinds = self._around.topics.of_transactions()
        fresh: dict[bytes, Admitted] = {}
        for delivery in batch:
            kind = kinds[delivery.topic]
            try:
                admitted = verify_on_wire(kind, delivery.value, now_ms, self.ring, self._rules)
                message = admitted.message
                self._nonces.check(message.pubkey, message.nonce, message.content_hash, now_ms)
            except EnvelopeError as error:
                await self._refuse(kind, delivery, error)
            else:
                # Before it is durable, so that a later message of this batch with the same nonce is noticed. Nothing is
                # taken until the batch is in the journal, and a process that dies before forgets the nonces, too.
                self._nonces.record(message.pubkey, message.nonce, message.content_hash, now_ms)
                fresh[admitted.transaction.digest] = admitted
        await self._admit(driver, fresh, now_ms)

    async def _admit(self, driver: Driver[State], fresh: Mapping[bytes, Admitted], now_ms: int) -> None:
        """Journal messages in one transaction, then offer them to consensus."""
        if not fresh:
            return
        entries = [JournaledTransaction(digest, entry.transaction.encode(), now_ms) for digest, entry in fresh.items()]
        await self._patience.until_done(lambda: self._around.store.mempool.add(entries))
        for entry, admitted in zip(entries, fresh.values(), strict=True):
            self._application.remember(entry.digest)
            self.counts.admitted += 1
            await _submit(driver, pending(entry.payload, admitted.message))

    async def _refuse(self, kind: TxKind, delivery: Delivery, error: EnvelopeError) -> None:
        if error.code is Code.DUPLICATE or (error.code in LOCAL_CODES and await self._is_committed(kind, delivery)):
            self.counts.duplicates += 1
            return
        self.counts.refused[error.code] += 1
        self._log.warning("message_refused", topic=delivery.topic, offset=delivery.offset, code=error.code, reason=error.text)
        dead_letters = self._around.topics.ai_dlq
        if dead_letters:
            place = (delivery.topic, delivery.partition, delivery.offset)
            letter = make_dead_letter(place, error, delivery.value, self._around.clock.wall_ms(), self._around.name)
            bus, value = self._around.bus, codec.encode(letter)
            await self._patience.until_done(lambda: bus.publish(dead_letters, letter.raw_sha256, value))

    async def _is_committed(self, kind: TxKind, delivery: Delivery) -> bool:
        digest = tx_digest(bytes((kind,)) + delivery.value)
        return bool(await self._patience.until_done(lambda: self._around.store.mempool.committed([digest])))


async def _submit(driver: Driver[State], transaction: PendingTransaction) -> None:
    while driver.submit(transaction) is Admission.FULL:
        await driver.room()


async def _fill(arrived: asyncio.Queue[Delivery], deliveries: Subscription) -> None:
    """Hand deliveries over; waits while the batch in work leaves no room."""
    async for delivery in deliveries:
        await arrived.put(delivery)


def _newest(batch: Sequence[Delivery]) -> list[Delivery]:
    """Return the last delivery of each partition: acknowledging it acknowledges those before it."""
    return list({(delivery.topic, delivery.partition): delivery for delivery in batch}.values())
