"""The audit of a store: execute the stored chain again and compare every row with what it must be.

Rules:

- nothing in the store is believed: a block counts when a quorum of the committee certified it, a row when executing the blocks
  gives it. The first row that was changed, added or removed is named, and the audit ends there;
- columns that only this node knows (``last_voted_round``, ``committed_ms``, when a row was published) cannot be checked, nor
  can tables that no block decides; acks are checked by their signed bodies, snapshots by their certified roots;
- what was cut off the end leaves no trace in the blocks themselves. So rows of any table above the head are looked for, and
  the auditor may name a head that he knows (an old one is enough): a chain that ends before it was truncated;
- bodies below a snapshot may have been pruned. Then the audit starts at that snapshot, whose root is certified, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

from cybermesh.consensus import codec
from cybermesh.consensus.certificates import CertificateVerifier
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import Block, Header, MalformedError, merkle_root
from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import Genesis
from cybermesh.keys import PUBLIC_BYTES, KeyRing, verify
from cybermesh.ledger.encoding import EncodingError
from cybermesh.ledger.snapshot import decode_snapshot
from cybermesh.ledger.state import Applied, InvalidBlock, LedgerBlock, State
from cybermesh.messages import tx_digest
from cybermesh.proof import EpochStep, encode_step
from cybermesh.roles import records
from cybermesh.roles.audit_findings import Finding, FoundError, compare, found
from cybermesh.roles.audit_pruned import PrunedChain
from cybermesh.roles.ring import committee_ring, control_domains
from cybermesh.store.records import (
    CommittedBlock,
    StoredAck,
    StoredBlock,
    StoredDecision,
    StoredEpoch,
    StoredEvidence,
    StoredReceipt,
    StoredSnapshot,
    StoredTransaction,
)
from cybermesh.store.rows import CHAIN, PublishedEvent, Rows, StoredCertificate, difference, key_of
from cybermesh.wire import codec as wire_codec
from cybermesh.wire.admission import verify_transaction
from cybermesh.wire.control import open_ack, open_commit, open_policy

T = TypeVar("T")

PAGE_BLOCKS: Final = 64
HEIGHT: Final = "height"
"""The column that every table of the chain has."""
EPOCH_EVENT: Final = "epoch"


@dataclass(slots=True)
class Report:
    """What was looked at, and the finding, None when everything is as it must be."""

    first_height: int = 0
    last_height: int = 0
    executed_from: int = 0
    blocks: int = 0
    transactions: int = 0
    receipts: int = 0
    state_root: bytes = b""
    finding: Finding | None = None


class AuditError(Exception):
    """The audit cannot begin: the store is empty or lacks what it must start from."""


@dataclass(slots=True)
class _Page:
    """The rows of a range of heights, by height."""

    blocks: list[StoredBlock]
    transactions: dict[int, list[StoredTransaction]] = field(default_factory=dict)
    receipts: dict[int, list[StoredReceipt]] = field(default_factory=dict)
    decisions: dict[int, list[StoredDecision]] = field(default_factory=dict)
    evidence: dict[int, list[StoredEvidence]] = field(default_factory=dict)
    certificates: dict[int, list[StoredCertificate]] = field(default_factory=dict)
    outbox: dict[int, list[PublishedEvent]] = field(default_factory=dict)


class Auditor:
    """Audits one store once.

    Args:
        rows: The store's tables.
        genesis: Of the chain, from a place that the auditor trusts.
        workers: Where signatures of transactions are checked beside the execution; None checks them in line.
        progress: Told the height that was reached.
    """

    def __init__(
        self,
        rows: Rows,
        genesis: Genesis,
        workers: Executor | None = None,
        progress: Callable[[int], None] = lambda _height: None,
    ) -> None:
        self._rows = rows
        self._genesis = genesis
        self._workers = workers
        self._progress = progress
        self._committee = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
        self._verifier = CertificateVerifier(self._committee, verify, self._committee.genesis_cert())
        self._ring, self._domains = _senders(genesis, ()), control_domains(genesis)
        self._state = State.at_genesis(genesis)
        self._parent = self._committee.genesis_hash()
        self._open: list[tuple[Block, Applied]] = []
        self._steps: tuple[EpochStep, ...] = ()
        self._epochs: dict[int, StoredEpoch] = {}
        self._active: dict[str, int] = {}
        self._snapshots: dict[int, StoredSnapshot] = {}
        self.report = Report()

    async def run(self, known_head: tuple[int, bytes] | None = None) -> Report:
        """Audit everything up to the head; ``known_head`` is a height and block hash that the chain must contain.

        Raises:
            AuditError: there is nothing to audit, or nothing to start from.
            StoreUnavailable: the store cannot be read now.
        """
        bounds = await self._rows.bounds()
        if bounds is None:
            raise AuditError("the store holds no block: nothing to audit")
        self._snapshots = {snapshot.height: snapshot for snapshot in await self._rows.all(StoredSnapshot)}
        self._epochs = {row.first_height: row for row in await self._rows.all(StoredEpoch)}
        self._ring = _senders(self._genesis, self._epochs.values())
        try:
            first = await self._start(bounds[0])
            await self._walk(first, bounds[1])
            await self._finish(bounds, known_head)
        except FoundError as fault:
            self.report.finding = fault.finding
        return self.report

    async def _start(self, lowest: int) -> int:
        """Set the state to begin with; return the first height to execute."""
        self.report.first_height = self.report.executed_from = lowest
        if lowest != 1:
            found("blocks", {"height": 1}, "removed", 1, f"the chain begins at height {lowest}")
        pruned = await self._rows.pruned_height()
        if pruned == 0:
            return 1
        height = min((height for height in self._snapshots if height >= pruned), default=None)
        if height is None:
            raise AuditError(f"bodies are pruned up to height {pruned} and there is no snapshot at or above it to start from")
        check = PrunedChain(self._rows, self._genesis, self._verifier)
        frontier, root, self._parent = await check.run(height)
        self._state = self._read_snapshot(self._snapshots[height], root)
        if self._state.log != frontier:
            found("receipts", {"leaf": 0}, "changed", height, f"those up to height {height} are not the log of the snapshot")
        self.report.executed_from = height + 1
        self.report.blocks, self.report.receipts = height, frontier.size
        return height + 1

    def _read_snapshot(self, snapshot: StoredSnapshot, root: bytes) -> State:
        try:
            return decode_snapshot(self._genesis, snapshot.body, root)
        except EncodingError as error:
            found("snapshots", {"height": snapshot.height}, "changed", snapshot.height, str(error))

    async def _walk(self, first: int, last: int) -> None:
        height = first
        while height <= last:
            page = await self._page(height, min(height + PAGE_BLOCKS - 1, last))
            checks = self._check_signatures(page)
            try:
                await self._check_page(page, height)
            except FoundError as fault:
                # A signature is looked at beside the execution; the fault at the lower height is the first one.
                self._await_signatures(checks, fault.finding.height - 1)
                raise
            self._await_signatures(checks, last)
            height += PAGE_BLOCKS
            self._progress(min(height - 1, last))

    async def _check_page(self, page: _Page, height: int) -> None:
        for row in page.blocks:
            if row.height != height:
                found("blocks", {"height": height}, "removed", height, f"the next stored block is {row.height}")
            await self._check_block(row, page)
            height += 1

    async def _page(self, first: int, last: int) -> _Page:
        page = _Page(await self._rows.of_heights(StoredBlock, first, last))
        _by_height(page.transactions, await self._rows.of_heights(StoredTransaction, first, last))
        _by_height(page.receipts, await self._rows.of_heights(StoredReceipt, first, last))
        _by_height(page.decisions, await self._rows.of_heights(StoredDecision, first, last))
        _by_height(page.evidence, await self._rows.of_heights(StoredEvidence, first, last))
        _by_height(page.certificates, await self._rows.of_heights(StoredCertificate, first, last))
        _by_height(page.outbox, await self._rows.of_heights(PublishedEvent, first, last))
        return page

    # Signatures of transactions

    def _check_signatures(self, page: _Page) -> list[tuple[list[StoredTransaction], Future[int] | int]]:
        unbound = self._genesis.wire.accept_unbound_fields
        checks: list[tuple[list[StoredTransaction], Future[int] | int]] = []
        rows = [row for height in sorted(page.transactions) for row in page.transactions[height]]
        for start in range(0, len(rows), 500):
            piece = rows[start : start + 500]
            payloads = [row.payload for row in piece]
            if self._workers is None:
                checks.append((piece, first_unsigned(payloads, unbound)))
            else:
                checks.append((piece, self._workers.submit(first_unsigned, payloads, unbound)))
        return checks

    @staticmethod
    def _await_signatures(checks: list[tuple[list[StoredTransaction], Future[int] | int]], last: int) -> None:
        for piece, check in checks:
            bad = check if isinstance(check, int) else check.result()
            if bad >= 0 and piece[bad].height <= last:
                row = piece[bad]
                found("transactions", key_of(row), "changed", row.height, "payload is not what its producer signed")

    # One block

    async def _check_block(self, row: StoredBlock, page: _Page) -> None:
        height, key = row.height, key_of(row)
        block = self._read_block(row, [entry.payload for entry in page.transactions.get(height, [])])
        if block.header.parent_hash != self._parent:
            found("blocks", key, "changed", height, "it does not follow from the block before it")
        self._check_payload(block, page.transactions.get(height, []), page.receipts.get(height, []))
        fault = self._verifier.proposal_fault(block, block.header.author)
        if fault is not None:
            found("blocks", key, "changed", height, f"frame: {fault}")
        applied = self._state.apply(LedgerBlock(height, block.header.time_ms, block.payload))
        if isinstance(applied, InvalidBlock):
            found("blocks", key, "changed", height, f"no honest validator votes for it: {applied.reason}")
        moment = records.Moment(row.committed_ms, row.last_voted_round)
        expected = records.of_block(block, applied, self._genesis, moment)
        column = difference(row, expected.block)
        if column is not None:
            found("blocks", key, "changed", height, f"column {column}")
        compare(page.transactions.get(height, []), expected.transactions, height)
        compare(page.receipts.get(height, []), expected.receipts, height)
        if applied.state.root != block.header.state_root:
            found("blocks", key, "changed", height, "executing it does not give the state root in its header")
        compare(page.decisions.get(height, []), expected.decisions, height, ignored=("is_active",))
        await self._check_bodies(page.evidence.get(height, []), expected, height)
        self._follow(block, applied, expected)
        self._check_commit(height, page)

    def _read_block(self, row: StoredBlock, payload: Sequence[bytes]) -> Block:
        key = key_of(row)
        try:
            block = dataclasses.replace(codec.decode_block(row.frame), payload=tuple(payload))
        except MalformedError as error:
            found("blocks", key, "changed", row.height, f"column frame: {error}")
        if block.header.height != row.height:
            found("blocks", key, "changed", row.height, f"column frame is of height {block.header.height}")
        for name, value in (("header", block.header.encode()), ("hash", block.header.hash)):
            if getattr(row, name) != value:
                found("blocks", key, "changed", row.height, f"column {name} is not that of the frame")
        return block

    def _check_payload(self, block: Block, stored: list[StoredTransaction], receipts: list[StoredReceipt]) -> None:
        """Name the transaction that is not the ordered one; the receipts say which those were."""
        height = block.height
        for position, row in enumerate(stored):
            if row.position != position:
                found("transactions", {"height": height, "position": position}, "removed", height, "a place is empty")
            if tx_digest(row.payload) != row.digest:
                found("transactions", key_of(row), "changed", height, "digest is not that of the payload")
        if merkle_root([row.payload for row in stored]) == block.header.payload_root:
            return
        subjects = [row.subject for row in receipts if not row.kind.startswith("system")]
        for row, subject in zip(stored, subjects, strict=False):
            if row.digest.hex() != subject:
                found("transactions", key_of(row), "changed", height, "it is not the transaction that was ordered here")
        if len(stored) < len(subjects):
            found("transactions", {"height": height, "position": len(stored)}, "removed", height, "the last ones are missing")
        if stored and len(stored) > len(subjects):
            found("transactions", key_of(stored[len(subjects)]), "added", height, "more than were ordered")
        found("transactions", {"height": height}, "changed", height, "they are not what the header commits to")

    async def _check_bodies(self, stored: list[StoredEvidence], expected: CommittedBlock, height: int) -> None:
        """A body that came again stands once, at the height of its first time."""
        wanted = {row.digest: row for row in reversed(expected.evidence)}
        here = {row.digest for row in stored}
        for digest in [digest for digest in wanted if digest not in here]:
            earlier = await self._rows.evidence_before(digest, height)
            if earlier is not None and difference(earlier, wanted[digest], ("height", "producer", "evidence_id")) is None:
                del wanted[digest]
        compare(sorted(stored, key=lambda row: row.digest), [wanted[digest] for digest in sorted(wanted)], height)

    def _follow(self, block: Block, applied: Applied, expected: CommittedBlock) -> None:
        self._state, self._parent = applied.state, block.hash
        self._open.append((block, applied))
        for decision in expected.decisions:
            if decision.change == "ended":
                self._active.pop(decision.policy_id, None)
            else:
                self._active[decision.policy_id] = decision.decision_seq
        self.report.last_height = block.height
        self.report.blocks += 1
        self.report.transactions += len(block.payload)
        self.report.receipts += len(applied.receipts)
        snapshot = self._snapshots.get(block.height)
        if snapshot is not None:
            if (snapshot.block_hash, snapshot.state_root) != (block.hash, applied.state.root):
                found("snapshots", {"height": block.height}, "changed", block.height, "it is of another block or state")
            self._read_snapshot(snapshot, applied.state.root)

    # One commit

    def _check_commit(self, height: int, page: _Page) -> None:
        stored = page.certificates.get(height, [])
        if not stored:
            return
        key = key_of(stored[0])
        try:
            certificate = codec.decode_quorum_cert(stored[0].body)
        except MalformedError as error:
            found("certificates", key, "changed", height, f"is no certificate: {error}")
        suffix = self._suffix(height)
        last = suffix[-1].hash if suffix else self._parent
        if certificate.parent_hash != last or not certificate.proves_parent:
            found("certificates", key, "changed", height, "it does not prove the commit of this block")
        if not self._verifier.is_valid_quorum_cert(certificate):
            found("certificates", key, "changed", height, "no quorum has signed it")
        committed, self._open = self._open, []
        for position, (block, applied) in enumerate(committed):
            headers = [*(later.header for later, _ in committed[position:]), *suffix]
            evidence = records.Proof(headers, certificate, self._steps)
            self._check_outbox(block, applied, evidence, page)
            self._follow_epoch(block, applied, evidence)

    def _suffix(self, height: int) -> list[Header]:
        """Return the headers behind the last block of an epoch that its certificate needs, kept with the epoch."""
        row = self._epochs.get(height + 1)
        if row is None or self._open[-1][1].next_committee is None:
            return []
        key: dict[str, object] = {"epoch": row.epoch}
        try:
            headers = [Header.decode(header) for header in wire_codec.EPOCH_CHANGE.decode(row.change).headers[1:]]
        except (EnvelopeError, MalformedError) as error:
            found("epochs", key, "changed", height, f"column change: {error}")
        parent = self._parent
        for header in headers:
            if header.parent_hash != parent:
                found("epochs", key, "changed", height, "column change: its headers do not follow each other")
            parent = header.hash
        return headers

    def _follow_epoch(self, block: Block, applied: Applied, evidence: records.Proof) -> None:
        """Go on with the next committee, which the block has named."""
        if applied.next_committee is None:
            return
        step = evidence.step(applied, self._genesis)
        row, epoch = self._epochs.get(block.height + 1), block.header.epoch + 1
        members = b"".join(applied.next_committee)
        if row is None or step is None:
            found("epochs", {"epoch": epoch}, "removed", block.height, "the block names the next committee")
        if (row.epoch, row.committee, row.step) != (epoch, members, encode_step(step)):
            found("epochs", {"epoch": epoch}, "changed", block.height, "it is not the committee that the block names")
        self._steps = (*self._steps, step)
        self._committee = Committee.of(self._genesis.chain_id, applied.next_committee, epoch=epoch)
        certificate = self._committee.genesis_cert(block.hash)
        self._verifier = CertificateVerifier(self._committee, verify, certificate)
        self._parent = self._committee.genesis_hash(block.hash)

    def _check_outbox(self, block: Block, applied: Applied, evidence: records.Proof, page: _Page) -> None:
        stored = {(row.event, row.subject): row for row in page.outbox.get(block.height, [])}
        for event in records.events_of(block, applied, evidence, self._genesis):
            row = stored.pop((event.name, event.subject), None)
            if row is None:
                key: dict[str, object] = {"event": event.name, "subject": event.subject}
                found("outbox", key, "removed", block.height, "the block had it published")
            if row.key != event.key or not self._says(row, event):
                found("outbox", key_of(row), "changed", block.height, "it is not what the block had published")
        for row in stored.values():
            if row.event != EPOCH_EVENT:
                found("outbox", key_of(row), "added", block.height, "the block had no such message published")

    def _says(self, row: PublishedEvent, event: records.Event) -> bool:
        """Return whether the row's message is the event's, but for the sender's own fields, and signed by a validator."""
        is_commit = event.name == records.COMMIT_EVENT
        try:
            message: Any = wire_codec.COMMIT.decode(row.value) if is_commit else wire_codec.POLICY_UPDATE.decode(row.value)
            if message.signature == records.UNSIGNED:
                # Restored from an export: others have published it, and this node never sends it.
                is_sent = row.published_ms is not None
            else:
                opened = open_commit if is_commit else open_policy
                opened(row.value, self._ring, self._domains)
                is_sent = True
        except EnvelopeError:
            return False
        bare = dataclasses.replace(message, producer_id=b"", signature=b"", pubkey=b"", alg=event.message.alg)
        return is_sent and bare == event.message

    # The end

    async def _finish(self, bounds: tuple[int, int], known_head: tuple[int, bytes] | None) -> None:
        last = bounds[1]
        if self._open:
            found("certificates", {"height": last}, "removed", last, "nothing proves the commit of the last blocks")
        for record, (table, _) in CHAIN.items():
            stray: Any = await self._rows.outside(cast("type[Any]", record), bounds[0])
            if stray is not None:
                height: int = getattr(stray, HEIGHT)
                what = "the block it belongs to is gone: the tail was cut off, or the row was put in"
                found(table.name, key_of(stray), "added", height, what)
        await self._check_others(last)
        await self._check_active()
        if known_head is not None:
            await self._check_known(known_head, last)
        self.report.state_root = self._state.root

    async def _check_active(self) -> None:
        marked = await self._rows.active()
        in_force = {record.policy_id for record in self._state.decisions()}
        for name, number in marked.items():
            if name not in in_force or self._active.get(name, number) != number:
                found("decisions", {"decision_seq": number}, "changed", self.report.last_height, "column is_active")
        for name in sorted(in_force - marked.keys()):
            number = self._active.get(name, 0)
            found("decisions", {"decision_seq": number}, "changed", self.report.last_height, "column is_active")

    async def _check_others(self, last: int) -> None:
        for height in sorted(self._snapshots):
            if height > last:
                found("blocks", {"height": last + 1}, "removed", last + 1, f"a snapshot of height {height} was taken")
        for ack in await self._rows.all(StoredAck):
            key: dict[str, object] = {"policy_id": ack.policy_id, "decision_seq": ack.decision_seq, "agent": ack.agent}
            try:
                signed = open_ack(ack.body, self._ring, self._domains)
            except EnvelopeError as error:
                found("acks", key, "changed", ack.height, f"column body: {error}")
            if difference(ack, records.stored_ack(signed, ack.body)) is not None:
                found("acks", key, "changed", ack.height, "it is not what the agent signed")
            if ack.decision_seq > self._state.decision_seq:
                found("blocks", {"height": last + 1}, "removed", last + 1, f"an agent acknowledged decision {ack.decision_seq}")

    async def _check_known(self, known: tuple[int, bytes], last: int) -> None:
        height, block_hash = known
        if height > last:
            found("blocks", {"height": last + 1}, "removed", last + 1, f"the chain is known to reach height {height}")
        stored = await self._rows.of_heights(StoredBlock, height, height)
        if not stored or stored[0].hash != block_hash:
            found("blocks", {"height": height}, "changed", height, f"it is known to be block {block_hash.hex()}")


def first_unsigned(payloads: Sequence[bytes], accept_unbound_fields: bool) -> int:
    """Return the index of the first transaction that is not intrinsically valid, -1 when all are."""
    for index, payload in enumerate(payloads):
        try:
            verify_transaction(payload, accept_unbound_fields=accept_unbound_fields)
        except EnvelopeError:
            return index
    return -1


def _by_height(into: dict[int, list[T]], rows: Sequence[T]) -> None:
    for row in rows:
        into.setdefault(getattr(row, HEIGHT), []).append(row)


def _senders(genesis: Genesis, epochs: Iterable[StoredEpoch]) -> KeyRing:
    """Return who may have signed what a store publishes: a member of any committee, for it catches up on earlier blocks."""
    members = {member.pubkey: member.name for member in genesis.validators}
    for row in epochs:
        keys = (row.committee[start : start + PUBLIC_BYTES] for start in range(0, len(row.committee), PUBLIC_BYTES))
        members = {key: key.hex()[:16] for key in keys} | members
    return committee_ring(genesis, tuple(members.items()))
