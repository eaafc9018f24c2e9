"""Signed messages on their way into a validator: verify → mempool journal → mempool → acknowledge.

Rules:

- a message is acknowledged on the bus only when it is in the mempool journal, already committed, or a dead letter;
- two stages work at once, one batch each: signatures are verified in threads while the batch before goes to the journal. The
  order of deliveries is kept, so that of every producer is, too; nonces are looked at in that order;
- who may sign is what the ledger's key ring said after the newest commit;
- what cannot be done for now (store busy, disk slow, mempool full, dead letters not taken) pauses the consumption of messages;
  nothing is dropped for it, and at most three batches are in memory;
- the journal is read back as if it had come over the wire: a database is not trusted to hold what was put there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from cybermesh.bus import Bus, BusError, Delivery, Subscription
from cybermesh.bus.topics import Topics
from cybermesh.consensus.mempool import Admission, PendingTransaction
from cybermesh.envelope import LOCAL_CODES, Code, EnvelopeError
from cybermesh.envelope.nonces import NonceTable
from cybermesh.genesis import Genesis
from cybermesh.keys import KeyRing
from cybermesh.log import logger
from cybermesh.messages import MIB, DeadLetter, TxKind, tx_digest
from cybermesh.roles.application import LedgerApplication, pending
from cybermesh.roles.clock import Clock
from cybermesh.roles.dead_letters import Sampler, claimed_producer, with_count
from cybermesh.roles.patience import Patience
from cybermesh.roles.ring import admission_rules, key_ring
from cybermesh.roles.verification import Checked, Terms, Verifier
from cybermesh.store.records import JournaledTransaction
from cybermesh.store.store import Store
from cybermesh.wire import codec
from cybermesh.wire.admission import Admitted, verify_transaction
from cybermesh.wire.unsigned import make_dead_letter

BATCH_MAX: Final = 1_024
BATCH_BYTES_MAX: Final = 4 * MIB
"""Of a batch; the message that passes it is still part of it."""


class Proposer(Protocol):
    """What the intake needs of the driver of consensus."""

    def submit(self, transaction: PendingTransaction) -> Admission:
        """Offer an admitted transaction; ``FULL`` asks the caller to wait for ``room``."""
        ...

    async def room(self) -> None:
        """Return after the next commit, which may have made room."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the intake of one validator works with; ``name`` stands in dead letters and in the names of tasks.

    ``verify_threads`` is the number of threads that verify; None means one for each core.
    """

    name: str
    group: str
    topics: Topics
    bus: Bus
    store: Store
    clock: Clock
    verify_threads: int | None = None


@dataclass(slots=True)
class MessageCounts:
    """What happened to messages since the start."""

    admitted: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    letters_left_out: int = 0


class Intake:
    """Takes messages from the bus for as long as ``run`` runs."""

    def __init__(self, genesis: Genesis, around: Surroundings, application: LedgerApplication, patience: Patience) -> None:
        self._around = around
        self._application = application
        self._patience = patience
        self._log = logger(role="validator", node=around.name)
        self._rules = admission_rules(genesis)
        self._kinds = around.topics.of_transactions()
        self._nonces = NonceTable()
        self._sampler = Sampler()
        self.ring: KeyRing = key_ring(genesis)
        self.counts = MessageCounts()

    async def run(self, proposer: Proposer) -> None:
        """Take messages in batches of whatever has arrived, so that one flush of the journal serves many of them."""
        around = self._around
        await self._reload(proposer)
        checked = asyncio.Queue[Checked](1)
        with Verifier(around.verify_threads) as verifier:
            async with around.bus.subscribe(tuple(self._kinds), around.group) as deliveries, asyncio.TaskGroup() as group:
                group.create_task(self._verify(verifier, deliveries, checked), name=f"{around.name} verification")
                while True:
                    await self._keep(proposer, deliveries, await checked.get())

    async def _reload(self, proposer: Proposer) -> None:
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
            await self._submit(proposer, pending(entry.payload, message, entry.digest))
        await self._patience.until_done(lambda: self._around.store.mempool.remove(foreign))

    async def _verify(self, verifier: Verifier, deliveries: Subscription, checked: asyncio.Queue[Checked]) -> None:
        """Verify whatever has arrived, batch after batch.

        Raises:
            BusError: the subscription ended, which nobody asked for.
        """
        while batch := await deliveries.take(BATCH_MAX, BATCH_BYTES_MAX):
            terms = Terms(self._kinds, self.ring, self._rules, self._around.clock.wall_ms())
            await checked.put(await verifier.check(batch, terms))
        raise BusError("the subscription of the signed messages ended; a validator must not seem to listen")

    async def _keep(self, proposer: Proposer, deliveries: Subscription, checked: Checked) -> None:
        """Acknowledge a batch once every message of it is journaled, known already, or a dead letter."""
        now_ms = self._around.clock.wall_ms()
        fresh: dict[bytes, Admitted] = {}
        refused: list[tuple[Delivery, EnvelopeError]] = []
        for delivery, outcome in zip(checked.batch, checked.outcomes, strict=True):
            if isinstance(outcome, EnvelopeError):
                refused.append((delivery, outcome))
                continue
            message = outcome.message
            try:
                # Before it is durable, so that a later message of this batch with the same nonce is noticed. Nothing is
                # kept until the batch is in the journal, and a process that dies before forgets the nonces, too.
                self._nonces.take(message.pubkey, message.nonce, message.content_hash, now_ms)
            except EnvelopeError as error:
                refused.append((delivery, error))
                continue
            fresh[outcome.digest] = outcome
        if refused:
            await self._refuse(refused)
        if fresh:
            await self._admit(proposer, fresh.values(), now_ms)
        for delivery in _newest(checked.batch):
            await self._patience.until_done(partial(deliveries.ack, delivery))

    async def _admit(self, proposer: Proposer, fresh: Collection[Admitted], now_ms: int) -> None:
        """Journal messages in one transaction, then offer them to consensus."""
        entries = [JournaledTransaction(digest, payload, now_ms) for payload, digest, _ in fresh]
        await self._patience.until_done(lambda: self._around.store.mempool.add(entries))
        for payload, digest, message in fresh:
            self._application.remember(digest)
            self.counts.admitted += 1
            await self._submit(proposer, pending(payload, message, digest))

    async def _submit(self, proposer: Proposer, transaction: PendingTransaction) -> None:
        if proposer.submit(transaction) is not Admission.FULL:
            return
        with self._patience.waiting("the mempool is full; messages are taken again when blocks have made room"):
            while proposer.submit(transaction) is Admission.FULL:
                await proposer.room()

    async def _refuse(self, refused: Sequence[tuple[Delivery, EnvelopeError]]) -> None:
        """Make dead letters of what is neither a repetition nor in a block already; return when the bus has them."""
        committed = await self._committed(refused)
        now_ms = self._around.clock.wall_ms()
        letters = []
        for delivery, error in refused:
            if error.code is Code.DUPLICATE or self._digest(delivery) in committed:
                self.counts.duplicates += 1
                continue
            self.counts.refused[error.code] += 1
            producer = claimed_producer(self._kinds[delivery.topic], delivery.value, self.ring)
            left_out = self._sampler.take(producer, error.code, now_ms)
            if left_out is None:
                self.counts.letters_left_out += 1
                continue
            fault = with_count(error, left_out)
            self._log.warning(
                "message_refused", topic=delivery.topic, offset=delivery.offset, code=fault.code, reason=fault.text
            )
            place = (delivery.topic, delivery.partition, delivery.offset)
            letters.append(make_dead_letter(place, fault, delivery.value, now_ms, self._around.name))
        topic = self._around.topics.ai_dlq
        if topic and letters:
            await self._send(topic, letters)

    async def _send(self, topic: str, letters: Sequence[DeadLetter]) -> None:
        bus = self._around.bus
        async with asyncio.TaskGroup() as group:
            for letter in letters:
                publish = partial(bus.publish, topic, letter.raw_sha256, codec.encode(letter))
                group.create_task(self._patience.until_done(publish), name=f"{self._around.name} dead letter")

    async def _committed(self, refused: Sequence[tuple[Delivery, EnvelopeError]]) -> frozenset[bytes]:
        """Return which messages that this node would refuse by its clock or its lists are in a block already."""
        digests = [self._digest(delivery) for delivery, error in refused if error.code in LOCAL_CODES]
        if not digests:
            return frozenset()
        return await self._patience.until_done(lambda: self._around.store.mempool.committed(digests))

    def _digest(self, delivery: Delivery) -> bytes:
        kind: TxKind = self._kinds[delivery.topic]
        return tx_digest(bytes((kind,)) + delivery.value)


def _newest(batch: Sequence[Delivery]) -> list[Delivery]:
    """Return the last delivery of each partition: acknowledging it acknowledges those before it."""
    return list({(delivery.topic, delivery.partition): delivery for delivery in batch}.values())
