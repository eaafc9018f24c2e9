"""From a commit of consensus to what the validator stores and publishes, in one value per block.

A block that was committed together with later ones is proven by the headers up to the last of them and the certificate that
committed it; the store keeps that certificate with the last block.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cybermesh import proof
from cybermesh.bus.topics import Topics
from cybermesh.consensus import codec as consensus_codec
from cybermesh.consensus.committee import FIRST_EPOCH, quorum
from cybermesh.consensus.events import Commit as ConsensusCommit
from cybermesh.consensus.types import Block, Header, QuorumCert
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey
from cybermesh.ledger.receipts import AnomalyEffect, Code, Receipt
from cybermesh.ledger.state import Applied, State
from cybermesh.messages import (
    Ack,
    Commit,
    CommitteeMember,
    EpochChange,
    Evidence,
    PolicyUpdate,
    Rejected,
    TxKind,
)
from cybermesh.roles.ring import control_domains
from cybermesh.store.records import (
    CommittedBlock,
    OutboxEvent,
    StoredAck,
    StoredBlock,
    StoredDecision,
    StoredEpoch,
    StoredEvidence,
    StoredReceipt,
    StoredTransaction,
)
from cybermesh.wire import codec
from cybermesh.wire.admission import read_transaction
from cybermesh.wire.control import seal

COMMIT_EVENT, DECISION_EVENT, EPOCH_EVENT = "commit", "decision", "epoch"
UNSIGNED = bytes(64)
"""Stands for a signature in an outbox row that was restored from an export and is never sent."""


@dataclass(frozen=True, slots=True)
class Author:
    """On whose behalf records are made: genesis, publishing key, topics, and a step for each epoch that has ended."""

    genesis: Genesis
    key: SigningKey
    topics: Topics
    steps: tuple[proof.EpochStep, ...] = ()

    def seal(self, change: EpochChange) -> bytes:
        """Return the encoded message, signed."""
        return codec.encode(seal(change, self.key, control_domains(self.genesis)))


@dataclass(frozen=True, slots=True)
class Moment:
    """What the store keeps beside a block: this node's clock, and a copy of the last voted round."""

    now_ms: int
    last_voted_round: int


def of_commit(commit: ConsensusCommit[State], author: Author, moment: Moment) -> list[CommittedBlock]:
    """Return the records of every block of a commit, oldest first."""
    headers = [entry.block.header for entry in commit.blocks]
    records = []
    for position, entry in enumerate(commit.blocks):
        applied = entry.execution.outcome
        assert isinstance(applied, Applied)
        is_last = position == len(commit.blocks) - 1
        certificate = consensus_codec.encode_quorum_cert(commit.certificate) if is_last else b""
        evidence = Proof([*headers[position:], *commit.suffix], commit.certificate, author.steps)
        rows = of_block(entry.block, applied, author.genesis, moment)
        events = events_of(entry.block, applied, evidence, author.genesis)
        published = tuple(_sealed(event, author) for event in events)
        if applied.next_committee is not None:
            epoch, event = of_epoch(applied, evidence, author.genesis, author.topics, author.seal)
            rows, published = dataclasses.replace(rows, epochs=(epoch,)), (*published, event)
        records.append(dataclasses.replace(rows, certificate=certificate, outbox=published))
    return records


@dataclass(frozen=True, slots=True)
class Proof:
    """What proves a block: its header, those after it, and the certificate of the commit."""

    headers: Sequence[Header]
    certificate: QuorumCert
    steps: Sequence[proof.EpochStep] = ()

    def prove(self, place: proof.Included, genesis: Genesis) -> bytes:
        """Return the proof of a receipt of the first block."""
        steps = self.steps[: self.headers[0].epoch - FIRST_EPOCH]
        return proof.prove(self.headers, self.certificate, place, self.quorum(genesis), steps)

    def step(self, applied: Applied, genesis: Genesis) -> proof.EpochStep | None:
        """Return the step with which the first block ends its epoch, if it does."""
        return proof.committee_step(self.headers, self.certificate, applied, self.quorum(genesis))

    def quorum(self, genesis: Genesis) -> int:
        """Return the quorum of the committee of the headers' epoch."""
        ended = self.headers[0].epoch - FIRST_EPOCH
        change = self.steps[ended - 1].receipt.committee if ended else None
        return quorum(len(genesis.validators) if change is None else len(change.members))


def of_epoch(
    applied: Applied, evidence: Proof, genesis: Genesis, topics: Topics, seal_it: Callable[[EpochChange], bytes]
) -> tuple[StoredEpoch, OutboxEvent]:
    """Return what says that a committee has taken over after this block: the row, and the message to agents and auditors."""
    assert applied.next_committee is not None
    header, step = evidence.headers[0], evidence.step(applied, genesis)
    kept = None if step is None else proof.encode_step(step)
    names = {member.pubkey: member.name for member in genesis.validators} | dict(applied.state.committee)
    epoch, members = header.epoch + 1, sorted(applied.next_committee)
    change = EpochChange(
        epoch=epoch,
        last_height=header.height,
        headers=tuple(each.encode() for each in evidence.headers),
        certificate=consensus_codec.encode_quorum_cert(evidence.certificate),
        committee=tuple(CommitteeMember(names.get(key, key.hex()[:16]), key) for key in members),
        timestamp=header.time_ms // 1000,
        producer_id=b"",
        signature=b"",
        pubkey=b"",
        step=kept or b"",
    )
    sealed = seal_it(change)
    stored = StoredEpoch(epoch, header.height + 1, b"".join(members), sealed, kept)
    return stored, OutboxEvent(EPOCH_EVENT, epoch, topics.control_policy, str(epoch).encode(), sealed)


def of_block(block: Block, applied: Applied, genesis: Genesis, moment: Moment) -> CommittedBlock:
    """Return the rows that follow from a block and its outcome alone, the same on every node but for the moment.

    The certificate and the outbox are not among them; they belong to the commit.
    """
    header, first_leaf = block.header, applied.log_before.size
    # The ledger has named every transaction in its receipt, in the block's order: nothing is hashed again.
    digests = [bytes.fromhex(receipt.id) for receipt in applied.receipts[: len(block.payload)]]
    frame = consensus_codec.encode_block(dataclasses.replace(block, payload=()))
    return CommittedBlock(
        block=StoredBlock(
            height=header.height,
            hash=header.hash,
            epoch=header.epoch,
            round=header.round,
            time_ms=header.time_ms,
            author=header.author,
            header=header.encode(),
            frame=frame,
            state_root=header.state_root,
            decision_seq=header.decision_seq,
            transaction_count=len(block.payload),
            first_leaf=first_leaf,
            receipt_count=len(applied.receipts),
            last_voted_round=moment.last_voted_round,
            committed_ms=moment.now_ms,
        ),
        certificate=b"",
        transactions=tuple(
            [
                StoredTransaction(header.height, position, digest, raw)
                for position, (digest, raw) in enumerate(zip(digests, block.payload, strict=True))
            ]
        ),
        receipts=tuple(
            [
                stored_receipt(receipt, leaf, body)
                for leaf, (receipt, body) in enumerate(zip(applied.receipts, applied.bodies, strict=True), first_leaf)
            ]
        ),
        decisions=tuple(
            [
                decision
                for leaf, receipt in enumerate(applied.receipts, first_leaf)
                for decision in stored_decisions(receipt, leaf, applied.rules)
            ]
        ),
        evidence=tuple(_bodies(block.payload, header, genesis)),
        mempool_done=tuple(digests),
    )


def stored_ack(ack: Ack, body: bytes) -> StoredAck:
    """Return an agent's verified ack as a row; ``body`` is the message as it came."""
    return StoredAck(
        policy_id=ack.policy_id,
        decision_seq=ack.decision_seq,
        agent=ack.pubkey,
        result=ack.result,
        error_code=ack.error_code,
        reason=ack.reason,
        height=ack.height,
        applied_at_ms=ack.applied_at_ms,
        acked_at_ms=ack.acked_at_ms,
        body=body,
    )


def stored_receipt(receipt: Receipt, leaf: int, body: bytes) -> StoredReceipt:
    """Return a receipt, whose bytes are ``body``, as a row."""
    return StoredReceipt(leaf, receipt.height, receipt.kind.value, receipt.id, receipt.code.value, body)


def stored_decisions(receipt: Receipt, leaf: int, rules: Mapping[int, bytes]) -> list[StoredDecision]:
    """Return the decisions of a receipt as rows; ``rules`` holds the rule of each, by its number."""
    return [
        StoredDecision(
            decision_seq=effect.decision_seq,
            height=receipt.height,
            leaf=leaf,
            policy_id=effect.policy_id,
            request_id=effect.request_id,
            change=effect.change.value,
            action=effect.action,
            rule_type=effect.rule_type,
            rule_data=rules[effect.decision_seq],
            rule_hash=effect.rule_hash,
            opened_at_ms=effect.opened_at_ms,
            expires_at_ms=effect.expires_at_ms,
            why=effect.why.value,
            ending=effect.ending.value,
            reporters=tuple(key.hex() for key in effect.reporters),
            approvers=tuple(key.hex() for key in effect.approvers),
        )
        for effect in receipt.decisions
    ]


def _bodies(payload: Sequence[bytes], header: Header, genesis: Genesis) -> list[StoredEvidence]:
    """Return the bodies of the evidence in a block; the ledger's state knows only their hashes."""
    found = []
    for raw in payload:
        if raw[0] == TxKind.EVIDENCE:
            message = read_transaction(raw, accept_unbound_fields=genesis.wire.accept_unbound_fields)
            assert isinstance(message, Evidence)
            found.append(
                StoredEvidence(message.content_hash, message.id, message.producer_id, header.height, message.proof_blob)
            )
    return found


@dataclass(frozen=True, slots=True)
class Event:
    """A message that a block has published, before a validator signs it; ``name`` and ``subject`` are the outbox's."""

    name: str
    subject: int
    key: bytes
    message: Commit | PolicyUpdate


def events_of(block: Block, applied: Applied, evidence: Proof, genesis: Genesis) -> list[Event]:
    """Return what a block has published: one commit event if it did anything, and one update per decision effect."""
    if not applied.receipts:
        return []
    header = block.header
    commit = _commit_event(header, block.payload, applied, evidence)
    events = [Event(COMMIT_EVENT, header.height, str(header.height).encode(), commit)]
    places = proof.Places(applied)
    for position, receipt in enumerate(applied.receipts):
        if not receipt.decisions:
            continue
        proven = evidence.prove(places.at(position), genesis)
        for effect in receipt.decisions:
            update = proof.update_of(header, effect, applied.rules[effect.decision_seq], proven)
            events.append(Event(DECISION_EVENT, effect.decision_seq, effect.policy_id.encode(), update))
    return events


def topic_of(event: Event, topics: Topics) -> str:
    """Return where an event is published."""
    return topics.control_commits if event.name == COMMIT_EVENT else topics.control_policy


def _sealed(event: Event, author: Author) -> OutboxEvent:
    value = codec.encode(seal(event.message, author.key, control_domains(author.genesis)))
    return OutboxEvent(event.name, event.subject, topic_of(event, author.topics), event.key, value)


def _commit_event(header: Header, payload: Sequence[bytes], applied: Applied, evidence: Proof) -> Commit:
    kinds = Counter([raw[0] for raw in payload])
    anomalies = [effect.id for receipt in applied.receipts for effect in receipt.effects if isinstance(effect, AnomalyEffect)]
    return Commit(
        height=header.height,
        block_hash=header.hash,
        state_root=header.state_root,
        tx_count=len(payload),
        anomaly_count=kinds[TxKind.ANOMALY],
        evidence_count=kinds[TxKind.EVIDENCE],
        policy_count=kinds[TxKind.POLICY],
        timestamp=header.time_ms // 1000,
        producer_id=b"",
        signature=b"",
        pubkey=b"",
        anomaly_ids=tuple(anomalies),
        rejected=tuple(
            Rejected(bytes.fromhex(receipt.id), receipt.code.value)
            for receipt in applied.receipts
            if not receipt.is_system and receipt.code is not Code.OK
        ),
        proof=_commit_proof(evidence),
    )


def _commit_proof(evidence: Proof) -> bytes:
    """Return what shows that a quorum committed the block: the headers from it on and the certificate, canonical JSON."""
    certificate = evidence.certificate
    body = {
        "headers": [header.encode().hex() for header in evidence.headers],
        "certificate": consensus_codec.encode_quorum_cert(certificate).hex(),
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
