"""The state machine: blocks in, receipts and the next state out.

Rules:

- ``apply`` is pure, deterministic and total: integers only, time is block time, no set or map is walked unsorted, and whatever
  a well-formed block holds gives a receipt, never an exception;
- what makes a block as such invalid (size, a digest twice, bytes that are no message, too much that an honest proposer leaves
  out) is told apart: ``InvalidBlock``, and nothing has happened;
- who may sign is judged by the key ring as it stood before the block, so the answer can be had before any signature is checked;
- a state shares everything unchanged with its parent: it costs the block, not the history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import Genesis
from cybermesh.ledger.draft import EMPTY_REGISTERS, Draft
from cybermesh.ledger.index import Index
from cybermesh.ledger.keyring import first_ring
from cybermesh.ledger.lattice import LatticeHash
from cybermesh.ledger.merkle import Frontier, leaf_hash
from cybermesh.ledger.nonces import use_nonce
from cybermesh.ledger.operators import reduce_operator
from cybermesh.ledger.receipts import JUNK, Code, Kind, Receipt
from cybermesh.ledger.records import DecisionRecord, RegistersRecord, RequestRecord, ShieldRecord
from cybermesh.ledger.reports import reduce_anomaly, reduce_evidence
from cybermesh.ledger.requests import Verdict, reduce_policy
from cybermesh.ledger.tables import REGISTERS, Tables
from cybermesh.ledger.timers import release_due_ms, run_timers
from cybermesh.messages import Anomaly, Evidence, OperatorCommand, Policy, SignedMessage, tx_digest
from cybermesh.wire.admission import read_transaction

_ROOT_DOMAIN: Final = b"cm/state/1"


@dataclass(frozen=True, slots=True)
class LedgerBlock:
    """What the ledger is told of a block; ``time_ms`` is block time, ``transactions`` the opaque payload in order."""

    height: int
    time_ms: int
    transactions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class InvalidBlock:
    """The block as such is not acceptable and gets no vote; ``reason`` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Applied:
    """A block's outcome. ``rules`` holds, by decision number, the ``rule_data`` of every decision effect of the block.

    ``log_before`` is the log that the receipts were appended to: with it each of them can be proved at once. ``bodies`` are the
    receipts' bytes, the leaves, made once for everybody who needs them. ``next_committee`` (public keys, ascending) is set when
    the block ends its epoch.
    """

    state: State
    receipts: tuple[Receipt, ...]
    rules: Mapping[int, bytes]
    log_before: Frontier
    bodies: tuple[bytes, ...]
    next_committee: tuple[bytes, ...] | None = None

    @property
    def has_system_receipts(self) -> bool:
        """Whether time caused something in this block."""
        return bool(self.receipts) and self.receipts[-1].is_system


def state_root(log_size: int, log_root: bytes, state_digest: bytes) -> bytes:
    """Return the root that a header carries, from the three parts a proof shows."""
    return hashlib.sha256(_ROOT_DOMAIN + log_size.to_bytes(8, "big") + log_root + state_digest).digest()


@dataclass(frozen=True, slots=True)
class State:
    """The ledger after some block. ``root`` (32 bytes) commits to the receipts' log and to every entry of ``tables``."""

    genesis: Genesis
    tables: Tables
    index: Index = field(repr=False, compare=False)
    lattice: LatticeHash = field(repr=False)
    log: Frontier
    digest: bytes = field(init=False)
    root: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self.lattice.digest())
        object.__setattr__(self, "root", state_root(self.log.size, self.log.root(), self.digest))

    @classmethod
    def at_genesis(cls, genesis: Genesis) -> State:
        """Return the state before the first block: the key ring and the shields of the genesis, an empty log."""
        draft = Draft(genesis, Tables(), Index(), height=0, time_ms=0)
        first_ring(draft, genesis)
        shields = {str(network): ShieldRecord(origin="genesis") for network in genesis.protected_networks}
        shields |= {str(network): ShieldRecord(origin="infrastructure") for network in genesis.infrastructure_networks}
        draft.change_protected(shields)
        return _finished(draft, LatticeHash(), Frontier(), ())

    @property
    def registers(self) -> RegistersRecord:
        """The single values."""
        return self.tables.registers.get(REGISTERS, EMPTY_REGISTERS)

    @property
    def decision_seq(self) -> int:
        """The number of the newest decision effect; the header carries it, so a withheld tail shows."""
        return self.registers.decision_seq

    @property
    def next_due_ms(self) -> int | None:
        """The block time from which a block would hold a system receipt, None when nothing is pending."""
        first = self.index.due.first()
        times = [when for when in (first.due_ms if first else None, self.index.release_ms) if when is not None]
        return min(times, default=None)

    @property
    def committee(self) -> list[tuple[bytes, str]]:
        """Return the public keys and names of the committee that the chain has after this block, by key."""
        return [(key, self.tables.committee[key].name) for key in sorted(self.tables.committee)]

    def decision(self, policy_id: str) -> DecisionRecord | None:
        """Return a decision in force."""
        return self.tables.decisions.get(policy_id)

    def decisions(self) -> list[DecisionRecord]:
        """Return all decisions in force, by id."""
        return [self.tables.decisions[name] for name in sorted(self.tables.decisions)]

    def requests(self) -> list[RequestRecord]:
        """Return all policies that are not decided yet, by id."""
        return [self.tables.requests[name] for name in sorted(self.tables.requests)]

    def draft(self, *, height: int, time_ms: int) -> Draft:
        """Return a working copy for a block; this state stays as it is."""
        return Draft(self.genesis, self.tables, self.index, height=height, time_ms=time_ms)

    def apply(self, block: LedgerBlock) -> Applied | InvalidBlock:
        """Execute a block on this state."""
        fault = size_fault(self.genesis, block.transactions)
        if fault is not None:
            return InvalidBlock(fault)
        messages = read_messages(self.genesis, block.transactions)
        if isinstance(messages, InvalidBlock):
            return messages
        draft = self.draft(height=block.height, time_ms=block.time_ms)
        codes = [admit(draft, message) for message in messages]
        junk = sum(code in JUNK for code in codes)
        if junk > self.genesis.block_limits.junk:
            return InvalidBlock(f"{junk} transactions that an honest proposer leaves out")
        receipts = [
            _transaction_receipt(draft, message, tx_digest(raw), code)
            for raw, message, code in zip(block.transactions, messages, codes, strict=True)
        ]
        receipts += run_timers(draft)
        bodies = tuple(receipt.encode() for receipt in receipts)
        state = _finished(draft, self.lattice, self.log, [leaf_hash(body) for body in bodies])
        return Applied(state, tuple(receipts), draft.published, self.log, bodies, draft.next_committee)


def size_fault(genesis: Genesis, transactions: Sequence[bytes]) -> str | None:
    """Return what is wrong with a payload before anything of it is read, None when nothing is."""
    limits = genesis.block_limits
    if len(transactions) > limits.transactions:
        return f"{len(transactions)} transactions, more than {limits.transactions}"
    size = sum(map(len, transactions))
    if size > limits.size_bytes:
        return f"{size} bytes of transactions, more than {limits.size_bytes}"
    return "a transaction twice" if len(set(transactions)) != len(transactions) else None


def read_messages(genesis: Genesis, transactions: Sequence[bytes]) -> list[SignedMessage] | InvalidBlock:
    """Decode a payload whose signatures are somebody else's business."""
    unbound = genesis.wire.accept_unbound_fields
    messages = []
    for index, raw in enumerate(transactions):
        try:
            messages.append(read_transaction(raw, accept_unbound_fields=unbound))
        except EnvelopeError as error:
            return InvalidBlock(f"transaction {index}: {error}")
    return messages


_TYPES: Final[dict[type, tuple[Kind, str]]] = {
    Anomaly: (Kind.ANOMALY, "anomaly"),
    Evidence: (Kind.EVIDENCE, "evidence"),
    Policy: (Kind.POLICY, "policy"),
    OperatorCommand: (Kind.OPERATOR, ""),
}


def admit(draft: Draft, message: SignedMessage) -> Code:
    """Repeat admission's local checks on block time and state; OK uses up the message's nonce."""
    kind = _TYPES[type(message)][1]
    if kind:
        producer = draft.producers.get(message.producer_id)
        is_known = producer is not None and kind in producer.message_types
    else:
        is_known = message.producer_id in draft.operators
    if not is_known:
        return Code.UNKNOWN_PRODUCER
    if abs(draft.time_ms - 1_000 * message.ts) > draft.genesis.wire.timestamp_window_ms:
        return Code.STALE
    return use_nonce(draft, message.producer_id, message.nonce)


def reduce_message(draft: Draft, message: SignedMessage) -> Verdict:
    """Treat an admitted message of any kind."""
    match message:
        case Anomaly():
            return reduce_anomaly(draft, message)
        case Evidence():
            return reduce_evidence(draft, message)
        case Policy():
            return reduce_policy(draft, message)
        case OperatorCommand():
            return reduce_operator(draft, message)


def _transaction_receipt(draft: Draft, message: SignedMessage, digest: bytes, code: Code) -> Receipt:
    verdict = reduce_message(draft, message) if code is Code.OK else Verdict(code)
    return Receipt(
        code=verdict.code,
        detail=verdict.detail,
        effects=verdict.effects,
        height=draft.height,
        id=digest.hex(),
        kind=_TYPES[type(message)][0],
    )


def _finished(draft: Draft, lattice: LatticeHash, log: Frontier, leaves: Sequence[bytes]) -> State:
    parts = draft.finish(release_due_ms(draft))
    return State(draft.genesis, parts.tables, parts.index, lattice.updated(parts.removed, parts.added), log.append(leaves))
