"""The validator role: signed messages in, agreed decisions with their proofs out.

    bus → verify → mempool journal → acknowledge → replica → committed block → store (one transaction) → outbox → bus

A message is acknowledged on the bus only when it is in the mempool journal, already committed, or a dead letter. Whatever
cannot be done for now (store busy, mempool full) pauses the consumption of messages; nothing is dropped for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from cybermesh.bus import Bus, Delivery, Subscription
from cybermesh.bus.topics import Topics, validator_group
from cybermesh.consensus.certificates import Signer
from cybermesh.consensus.codec import encode_evidence
from cybermesh.consensus.committee import Committee, faults
from cybermesh.consensus.driver import Counters, Driver, SafetyFile, Shell, Status
from cybermesh.consensus.events import Commit, SafetyRecord
from cybermesh.consensus.journal import Journal, JournalError, KeyInUseError, MemoryJournal, standing
from cybermesh.consensus.leader import Reputation
from cybermesh.consensus.mempool import Admission, Mempool, PendingTransaction
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.transport import Transport
from cybermesh.consensus.types import Evidence, accused
from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey, verify
from cybermesh.ledger.snapshot import encode_snapshot
from cybermesh.ledger.state import State
from cybermesh.ledger.tables import Tables
from cybermesh.log import logger
from cybermesh.metrics import Figures
from cybermesh.proof import decode_step
from cybermesh.roles import records, recovery
from cybermesh.roles.application import LedgerApplication
from cybermesh.roles.clock import Clock
from cybermesh.roles.intake import Intake, MessageCounts, Surroundings
from cybermesh.roles.patience import Patience
from cybermesh.roles.ring import control_domains, ledger_ring
from cybermesh.store.outbox import OutboxPublisher, PublisherParts, publishes_at_once
from cybermesh.store.records import AuditEntry, StoredEpoch, StoredSnapshot
from cybermesh.store.store import Store
from cybermesh.wire.control import open_ack

SNAPSHOT_EVERY: Final = 1_000
ROOM_S: Final = 1.0
EVIDENCE_WAITING_MAX: Final = 64
EVIDENCE_KEPT_MAX: Final = 100
"""Proofs of equivocation that one start writes down of one validator: the first says it all, and each costs a write."""


@dataclass(frozen=True, slots=True)
class ValidatorParts:
    """What a validator is composed of; ``number`` is its NODE_ID, ``safety_file`` the journal beside its key.

    ``connect`` gives the connections to the others of a committee, for as long as its epoch lasts.
    """

    genesis: Genesis
    key: SigningKey
    number: int
    topics: Topics
    group: str
    bus: Bus
    connect: Callable[[Committee], AbstractAsyncContextManager[Transport]]
    store: Store
    safety_file: Path
    clock: Clock
    on_commit: Callable[[Commit[State]], None] = lambda _commit: None


@dataclass(slots=True)
class Counts:
    """What happened since the start beside the messages that the intake counts."""

    acks: int = 0
    acks_refused: int = 0
    equivocations: int = 0


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


def consensus_figures(counters: Counters, status: Status) -> Figures:
    """Return what consensus tells of itself."""
    return {
        "validator_round": status.round,
        "validator_height_blocks": status.height,
        "validator_mempool_transactions": status.mempool,
        "validator_voting": int(status.problem is None),
        "validator_leader": status.leader,
        "validator_proposals_total": counters.sent["proposal"],
        "validator_votes_total": counters.sent["vote"],
        "validator_timeouts_total": counters.sent["timeout"],
        "validator_blocks_total": counters.blocks,
        "validator_commit_latency_milliseconds_total": counters.commit_latency_ms,
        "validator_consensus_refused_total": counters.refused.total(),
    }


class ValidatorRole:
    """One member of the committee."""

    def __init__(self, parts: ValidatorParts) -> None:
        self._parts = parts
        self._log = logger(role="validator", node=parts.number)
        self._committee = _committee(parts.genesis)
        self._index: int | None = self._committee.index_of(parts.key.public)
        self._mempool = Mempool()
        self._application = LedgerApplication(parts.genesis, parts.clock.monotonic_s)
        self._patience = Patience(self._log)
        name, group = f"validator-{parts.number}", validator_group(str(parts.number), self._committee.n, parts.group)
        around = Surroundings(name, group, parts.topics, parts.bus, parts.store, parts.clock)
        self._intake = Intake(parts.genesis, around, self._application, self._patience)
        self._group = group
        self._domains = control_domains(parts.genesis)
        self._evidence: asyncio.Queue[Evidence] = asyncio.Queue(EVIDENCE_WAITING_MAX)
        self._author = records.Author(parts.genesis, parts.key, parts.topics)
        self._outbox = OutboxPublisher(
            parts.store.outbox,
            parts.bus,
            PublisherParts(self._is_first, parts.clock.wall_ms, random.random, self._outbox_failed),
        )
        self._driver: Driver[State] | None = None
        self._snapshot_height = 0
        self._admits_by: Tables | None = None
        self.counts = Counts()

    def figures(self) -> Figures:
        """Return this role's metrics."""
        found: dict[str, float] = {
            "validator_admitted_total": self.messages.admitted,
            "validator_duplicates_total": self.messages.duplicates,
            "validator_refused_total": self.messages.refused.total(),
            "validator_dead_letters_left_out_total": self.messages.letters_left_out,
            "validator_acks_total": self.counts.acks,
            "validator_equivocations_total": self.counts.equivocations,
        }
        if self._driver is not None:
            status = self.status
            assert status is not None
            found |= consensus_figures(self._driver.counters, status)
        return found

    @property
    def messages(self) -> MessageCounts:
        """What happened to messages since the start."""
        return self._intake.counts

    @property
    def status(self) -> Status | None:
        """Where consensus stands, None before the start; the problem is also what the store or the bus is waited for."""
        if self._driver is None:
            return None
        status = self._driver.status
        has_left = "not in the committee any more" if self._index is None else None
        return replace(status, problem=has_left or status.problem or self._patience.problem)

    async def run(self) -> None:
        """Take part until cancelled.

        Raises:
            RecoveryError: The stored chain is not what a quorum committed.
            KeyInUseError: Another process runs with this key.
            HaltedError: Inside an exception group: this node computes something else than a quorum.
            BlockConflict: Inside an exception group: the store holds another block at a committed height.
        """
        async with AsyncExitStack() as stack:
            journal, signer = await self._memory(stack)
            self._take_seat(await recovery.present_committee(self._parts.store, self._committee))
            root = await recovery.restore(self._parts.store, self._parts.genesis, self._committee, self._application)
            self._snapshot_height = root.height
            self._follow_epochs(await self._parts.store.chain.epochs())
            self._follow_ring(root.state)
            self._log.info("validator_started", index=self._index, height=root.height, votes=signer is not None)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._take_part(root, journal, signer), name=f"validator-{self._parts.number} consensus")
                group.create_task(self._outbox.run(), name=f"validator-{self._parts.number} outbox")
                group.create_task(self._intake.run(self), name=f"validator-{self._parts.number} messages")
                group.create_task(self._keep_evidence(), name=f"validator-{self._parts.number} evidence")
                if self._parts.topics.control_policy_ack:
                    group.create_task(self._consume_acks(), name=f"validator-{self._parts.number} acks")

    async def _take_part(self, root: Root[State], journal: SafetyFile, signer: Signer | None) -> None:
        """Take part in consensus, epoch after epoch, for as long as this node is in the committee."""
        while self._index is not None:
            async with self._parts.connect(self._committee) as transport:
                parts = self._consensus_parts(self._index, signer)
                driver = self._driver = Driver(parts, root, self._shell(journal, transport))
                end = await driver.run()
            root = end.root
            self._take_seat(end.committee)
            self._log.info("epoch_began", epoch=end.committee.epoch, after=root.height, index=self._index)
        self._log.warning("left_committee", epoch=self._committee.epoch)

    def _take_seat(self, committee: Committee) -> None:
        self._committee = committee
        self._index = committee.index_of(self._parts.key.public)

    def submit(self, transaction: PendingTransaction) -> Admission:
        """Offer an admitted transaction, whichever epoch it is."""
        return self._mempool.add(transaction) if self._driver is None else self._driver.submit(transaction)

    async def room(self) -> None:
        """Return after the next commit, or a while later: an epoch may have ended, and with it the driver that tells."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ROOM_S):
                await (asyncio.Event().wait() if self._driver is None else self._driver.room())

    # Start

    async def _memory(self, stack: AsyncExitStack) -> tuple[SafetyFile, Signer | None]:
        """Open the safety file; whatever is wrong with it makes this node an observer, for an old memory votes twice."""
        parts = self._parts
        try:
            journal = stack.enter_context(
                Journal.open(parts.safety_file, chain_id=parts.genesis.chain_id, public_key=parts.key.public)
            )
        except KeyInUseError:
            raise  # not even to observe: two processes would share a store and take each other's messages
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

    def _consensus_parts(self, index: int, signer: Signer | None) -> Parts[State]:
        timing = self._parts.genesis.timing
        return Parts(
            committee=self._committee,
            index=index,
            application=self._application,
            mempool=self._mempool,
            leaders=Reputation(self._committee),
            check=verify,
            signer=signer,
            jitter=random.random,
            timing=Timing(base_ms=timing.base_ms, heartbeat_ms=1000 * timing.heartbeat_s),
        )

    def _shell(self, journal: SafetyFile, transport: Transport) -> Shell[State]:
        return Shell(
            transport=transport,
            journal=journal,
            source=recovery.ServedBlocks(self._parts.store, self._not_served),
            on_commit=self._commit,
            on_evidence=self._accuse,
            wall_ms=self._parts.clock.wall_ms,
        )

    # Acks in

    async def _consume_acks(self) -> None:
        topic = self._parts.topics.control_policy_ack
        async with self._parts.bus.subscribe((topic,), self._group) as deliveries:
            async for delivery in deliveries:
                await self._take_ack(deliveries, delivery)

    async def _take_ack(self, deliveries: Subscription, delivery: Delivery) -> None:
        try:
            ack = open_ack(delivery.value, self._intake.ring, self._domains)
        except EnvelopeError as error:
            self.counts.acks_refused += 1
            self._log.warning("ack_refused", offset=delivery.offset, code=error.code, reason=error.text)
        else:
            row = records.stored_ack(ack, delivery.value)
            self.counts.acks += await self._patience.until_done(lambda: self._parts.store.feedback.add_ack(row))
        await self._patience.until_done(lambda: deliveries.ack(delivery))

    # Commits out

    async def _commit(self, commit: Commit[State]) -> None:
        """Store a commit with all it causes; returns when it is durable."""
        assert self._driver is not None
        moment = records.Moment(self._parts.clock.wall_ms(), self._driver.record.last_voted_round)
        rows = await asyncio.to_thread(records.of_commit, commit, self._author, moment)
        await self._patience.until_done(lambda: self._parts.store.append(rows))
        given_up = self._application.take_given_up()
        if given_up:
            await self._patience.until_done(lambda: self._parts.store.mempool.remove(given_up))
        self._follow_epochs(rows[-1].epochs)
        self._outbox.notify()
        self._parts.on_commit(commit)
        newest = commit.blocks[-1]
        self._follow_ring(newest.execution.state)
        if newest.block.height >= self._snapshot_height + SNAPSHOT_EVERY:
            await self._save_snapshot(newest.block.height, newest.block.hash, newest.execution.state)

    def _follow_epochs(self, epochs: Sequence[StoredEpoch]) -> None:
        """Have the proofs of later epochs carry how they began."""
        steps = tuple(decode_step(epoch.step) for epoch in epochs if epoch.step is not None)
        self._author = replace(self._author, steps=(*self._author.steps, *steps))

    def _follow_ring(self, state: State) -> None:
        """Admit messages by the key ring that operators have changed, from the block on that changed it."""
        tables, before = state.tables, self._admits_by
        if before is None or (tables.producers, tables.operators) != (before.producers, before.operators):
            self._admits_by = tables
            self._intake.ring = ledger_ring(self._parts.genesis, state)

    async def _save_snapshot(self, height: int, block_hash: bytes, state: State) -> None:
        body = await asyncio.to_thread(encode_snapshot, state)
        snapshot = StoredSnapshot(height, block_hash, state.root, body, self._parts.clock.wall_ms())
        await self._patience.until_done(lambda: self._parts.store.node.save_snapshot(snapshot))
        self._snapshot_height = height

    def _is_first(self, height: int) -> bool:
        members = self._committee.n
        return self._index is not None and publishes_at_once(self._index, height, members, faults(members))

    def _not_served(self, error: Exception) -> None:
        self._log.warning("blocks_not_served", reason=str(error))

    def _outbox_failed(self, error: Exception) -> None:
        self._log.warning("outbox_waiting", reason=str(error))

    def _accuse(self, evidence: Evidence) -> None:
        public = self._committee.public_keys[accused(evidence)]
        names = {member.pubkey: member.name for member in self._parts.genesis.validators}
        self._log.error("equivocation", validator=names.get(public, public.hex()), kind=type(evidence).__name__)
        self.counts.equivocations += 1
        if not self._evidence.full():  # else the culprit has given more of it than anybody needs
            self._evidence.put_nowait(evidence)

    async def _keep_evidence(self) -> None:
        """Write proofs of equivocation into the audit trail: signed by the culprit, they convince anybody, and for ever."""
        kept: Counter[int] = Counter()
        while True:
            evidence = await self._evidence.get()
            culprit = accused(evidence)
            kept[culprit] += 1
            if kept[culprit] > EVIDENCE_KEPT_MAX:
                continue
            entry = AuditEntry(
                at_ms=self._parts.clock.wall_ms(),
                actor=f"validator-{self._parts.number}",
                action=f"equivocation {type(evidence).__name__}",
                subject=self._committee.public_keys[culprit].hex(),
                detail=encode_evidence(evidence),
            )
            await self._patience.until_done(partial(self._parts.store.node.add_audit, entry))
