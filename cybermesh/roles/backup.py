"""A ledger in one file, and back: what a restored validator needs, and nothing that a thief could vote with.

The file is JSON lines: a head that names the chain, one line per block (frame, transactions, certificate, this node's clock),
the rows that no block decides (acks, labels, lifecycle, audit trail), and an end that counts them and hashes all before it, so
that a copy cut short is no backup. Receipts, decisions, evidence and the outbox are not in it: importing executes every block
again and checks each certificate, so a file that somebody changed is refused at the block where it stops being the chain.
Where the committee changes, the next one is taken from the executed block and checks what follows; so the genesis is all that a
reader trusts, however many epochs later it joins. Safety state is never in it. Outbox rows come back unsigned and as published:
others published them when they were new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import orjson

from cybermesh.bus.topics import Topics
from cybermesh.consensus import codec
from cybermesh.consensus.certificates import CertificateVerifier, commits
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import Block, BlockHash, Header, MalformedError, QuorumCert
from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import Genesis
from cybermesh.keys import verify
from cybermesh.ledger.state import Applied, InvalidBlock, LedgerBlock, State
from cybermesh.messages import Commit, EpochChange, PolicyUpdate
from cybermesh.proof import EpochStep
from cybermesh.roles import records
from cybermesh.roles.recovery import RecoveryError, proof_of
from cybermesh.store.records import CommittedBlock, OutboxEvent, StoredBlock, StoredTransaction
from cybermesh.store.rows import FEEDBACK, StoredCertificate
from cybermesh.store.store import Store
from cybermesh.wire import codec as wire_codec
from cybermesh.wire.admission import verify_transaction

FORMAT: Final = "cybermesh/ledger/1"
PAGE_BLOCKS: Final = 64
M = TypeVar("M", bound=Commit | PolicyUpdate | EpochChange)
_TABLES: Final = {table.name: record for record, table in FEEDBACK.items()}


class BackupError(Exception):
    """A ledger that cannot be exported, or a file that cannot be imported; the text names the line or height."""


@dataclass(frozen=True, slots=True)
class BackupBlock:
    """One block of a backup: as consensus encodes it, with its payload, and the certificate stored with it (may be empty).

    ``suffix`` are the headers that lead from the last block of an epoch to the one its certificate names, if it is another.
    """

    block: Block
    certificate: bytes
    committed_ms: int
    last_voted_round: int
    suffix: tuple[Header, ...] = ()


async def export_lines(store: Store, genesis: Genesis) -> AsyncIterator[bytes]:
    """Yield the lines of a backup, each with its line end.

    Raises:
        BackupError: bodies are pruned, or a stored block is no block.
        StoreUnavailable: the store cannot be read now.
    """
    if await store.rows.pruned_height():
        raise BackupError("bodies of this store are pruned, so its blocks cannot be executed again: export another validator's")
    digest, count = hashlib.sha256(), 0
    head = await store.rows.bounds()
    first = _line({"format": FORMAT, "chain_id": genesis.chain_id.hex(), "blocks": 0 if head is None else head[1]})
    digest.update(first)
    yield first
    suffixes = await _suffixes(store)
    for low in range(1, (head or (0, 0))[1] + 1, PAGE_BLOCKS):
        async for line in _page_lines(store, low, min(low + PAGE_BLOCKS - 1, head[1] if head else 0), suffixes):
            digest.update(line)
            count += 1
            yield line
    for name, record in _TABLES.items():
        rows: list[object] = await store.rows.all(record)
        for row in rows:
            line = _line({"table": name, "row": _plain(row)})
            digest.update(line)
            count += 1
            yield line
    yield _line({"lines": count, "sha256": digest.hexdigest()})


async def _suffixes(store: Store) -> dict[int, list[str]]:
    """Return the headers that the proof of an epoch's end needs besides its last block's, by that block's height."""
    try:
        ends = {row.first_height - 1: proof_of(row)[0] for row in await store.chain.epochs()}
    except RecoveryError as error:
        raise BackupError(str(error)) from error
    return {height: [header.encode().hex() for header in headers[1:]] for height, headers in ends.items() if headers[1:]}


async def _page_lines(store: Store, low: int, high: int, suffixes: dict[int, list[str]]) -> AsyncIterator[bytes]:
    rows = await store.rows.of_heights(StoredBlock, low, high)
    certificates = {row.height: row.body for row in await store.rows.of_heights(StoredCertificate, low, high)}
    payloads: dict[int, list[str]] = {}
    for transaction in await store.rows.of_heights(StoredTransaction, low, high):
        payloads.setdefault(transaction.height, []).append(transaction.payload.hex())
    for row in rows:
        yield _line(
            {
                "height": row.height,
                "frame": row.frame.hex(),
                "transactions": payloads.get(row.height, []),
                "certificate": certificates.get(row.height, b"").hex(),
                "committed_ms": row.committed_ms,
                "last_voted_round": row.last_voted_round,
            }
            | ({"suffix": suffixes[row.height]} if row.height in suffixes else {})
        )


def _line(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS) + b"\n"


def _plain(row: Any) -> dict[str, object]:
    values = ((entry.name, getattr(row, entry.name)) for entry in dataclasses.fields(row))
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in values}


def read_backup(lines: Iterable[bytes], genesis: Genesis) -> Iterator[BackupBlock | object]:
    """Yield the blocks and then the other rows of a backup; the end is checked before the iterator ends.

    Raises:
        BackupError: not a backup of this chain, cut short, or changed.
    """
    digest, previous, number = hashlib.sha256(), b"", 0
    for number, line in enumerate(lines, start=1):
        if previous:
            digest.update(previous)
            if number > 2:
                yield _read_line(previous, number - 1)
            else:
                _check_head(previous, genesis)
        previous = line
    end = _object(previous, number)
    if end != {"lines": number - 2, "sha256": digest.hexdigest()}:
        raise BackupError(f"line {number}: the file does not end as it was written; it was cut short or changed")


def _check_head(line: bytes, genesis: Genesis) -> None:
    head = _object(line, 1)
    if head.get("format") != FORMAT:
        raise BackupError(f"line 1: not a ledger export of format {FORMAT}")
    if head.get("chain_id") != genesis.chain_id.hex():
        raise BackupError(f"line 1: is of chain {head.get('chain_id')}, the genesis of {genesis.chain_id.hex()}")


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BackupError(f"line {number}: not JSON: {error}") from error
    if not isinstance(value, dict) or not line.endswith(b"\n"):
        raise BackupError(f"line {number}: not a whole line of an export")
    return value


def _read_line(line: bytes, number: int) -> BackupBlock | object:
    value = _object(line, number)
    try:
        if "table" in value:
            return _read_row(_TABLES[value["table"]], value["row"])
        frame = codec.decode_block(bytes.fromhex(value["frame"]))
        payload = tuple(bytes.fromhex(raw) for raw in value["transactions"])
        certificate = bytes.fromhex(value["certificate"])
        block = dataclasses.replace(frame, payload=payload)
        suffix = tuple(Header.decode(bytes.fromhex(header)) for header in value.get("suffix", ()))
        return BackupBlock(block, certificate, int(value["committed_ms"]), int(value["last_voted_round"]), suffix)
    except (KeyError, TypeError, ValueError, MalformedError) as error:
        raise BackupError(f"line {number}: not a block or row of an export: {error!r}") from error


def _read_row(record: Any, value: dict[str, Any]) -> object:
    hints = typing.get_type_hints(record)
    made: object = record(**{name: bytes.fromhex(given) if hints[name] is bytes else given for name, given in value.items()})
    return made


class Replay:
    """Executes blocks from the genesis on, believing nothing but the genesis; what importing and comparing share.

    ``committee`` is the one that the chain has come to.
    """

    def __init__(self, genesis: Genesis) -> None:
        self._genesis = genesis
        self._former: set[bytes] = set()
        self._begin(Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators)))
        self._steps: tuple[EpochStep, ...] = ()
        self._open: list[tuple[BackupBlock, Applied]] = []
        self.state = State.at_genesis(genesis)
        self.height = 0

    def _begin(self, committee: Committee) -> None:
        """Go on with the committee of an epoch."""
        self.committee = committee
        self._signed: set[int] = set()
        self._verifier = CertificateVerifier(committee, verify, committee.genesis_cert())
        self._parent = committee.genesis_hash()

    def execute(self, entry: BackupBlock) -> Applied:
        """Check and execute the next block.

        Raises:
            BackupError: it is not the next block of the chain, or does not give the root in its header.
        """
        block, height = entry.block, self.height + 1
        is_next = (block.height, block.header.parent_hash) == (height, self._parent)
        if not is_next or block.header.epoch != self.committee.epoch:
            raise BackupError(f"height {height}: the block does not follow from the one before it")
        if self._open and self._open[-1][1].next_committee is not None:
            raise BackupError(f"height {height}: the epoch ended with the block before, and no certificate proves that")
        fault = self._verifier.proposal_fault(block, block.header.author)
        if fault is not None:
            raise BackupError(f"height {height}: {fault}")
        try:
            for raw in block.payload:
                verify_transaction(raw, accept_unbound_fields=self._genesis.wire.accept_unbound_fields)
        except EnvelopeError as error:
            raise BackupError(f"height {height}: a transaction is not what its producer signed: {error}") from error
        applied = self.state.apply(LedgerBlock(height, block.header.time_ms, block.payload))
        if isinstance(applied, InvalidBlock) or applied.state.root != block.header.state_root:
            raise BackupError(f"height {height}: executing the block does not give the root in its header")
        self.state, self.height, self._parent = applied.state, height, BlockHash(block.hash)
        self._signed |= {block.header.author} | {voter for voter, _ in block.qc.signatures}
        self._open.append((entry, applied))
        return applied

    def has_signed(self, public_key: bytes) -> bool:
        """Return whether the chain shows that a validator of this key was here before: in an earlier epoch, or by its word."""
        index = self.committee.index_of(public_key)
        return public_key in self._former or index in self._signed

    def voted_round(self, public_key: bytes, qc: QuorumCert) -> int:
        """Return the round of a certificate of this epoch if a validator of this key signed it, else 0."""
        index = self.committee.index_of(public_key)
        return qc.round if any(voter == index for voter, _ in qc.signatures) else 0

    def take_commit(self) -> list[CommittedBlock]:
        """Return the rows of the blocks that a certificate now proves; empty while none does.

        Raises:
            BackupError: the newest block's certificate proves something else.
        """
        entry, _ = self._open[-1]
        if not entry.certificate:
            return []
        try:
            certificate = codec.decode_quorum_cert(entry.certificate)
        except MalformedError as error:
            raise BackupError(f"height {self.height}: {error}") from error
        is_proven = commits(entry.block.header, entry.suffix, certificate) and (not entry.suffix or self._is_at_end)
        if not is_proven or not self._verifier.is_valid_quorum_cert(certificate):
            raise BackupError(f"height {self.height}: the certificate does not prove the commit of this block")
        committed, self._open = self._open, []
        headers = [*(each.block.header for each, _ in committed), *entry.suffix]
        return [
            self._rows(each, applied, records.Proof(headers[position:], certificate, self._steps))
            for position, (each, applied) in enumerate(committed)
        ]

    @property
    def _is_at_end(self) -> bool:
        return self._open[-1][1].next_committee is not None

    def _rows(self, entry: BackupBlock, applied: Applied, evidence: records.Proof) -> CommittedBlock:
        """Return what a validator stored of a block; goes on with the next committee when the block ends its epoch."""
        moment = records.Moment(entry.committed_ms, entry.last_voted_round)
        rows = records.of_block(entry.block, applied, self._genesis, moment)
        outbox = tuple(_unsigned(event) for event in records.events_of(entry.block, applied, evidence, self._genesis))
        rows = dataclasses.replace(rows, certificate=entry.certificate, mempool_done=())
        if applied.next_committee is None:
            return dataclasses.replace(rows, outbox=outbox)
        epoch, event = records.of_epoch(
            applied, evidence, self._genesis, Topics(), lambda change: wire_codec.encode(_blank(change))
        )
        step = evidence.step(applied, self._genesis)
        self._steps = self._steps if step is None else (*self._steps, step)
        self._former |= set(self.committee.public_keys)
        self._begin(self.committee.successor(applied.next_committee, entry.block.hash))
        return dataclasses.replace(rows, outbox=(*outbox, event), epochs=(epoch,))

    @property
    def has_open_end(self) -> bool:
        """Whether the newest blocks are not proven by any certificate."""
        return bool(self._open)


def _unsigned(event: records.Event) -> OutboxEvent:
    value = wire_codec.encode(_blank(event.message))
    return OutboxEvent(event.name, event.subject, records.topic_of(event, Topics()), event.key, value)


def _blank(message: M) -> M:
    return dataclasses.replace(message, producer_id=bytes(32), signature=records.UNSIGNED, pubkey=bytes(32))


async def import_lines(
    store: Store,
    genesis: Genesis,
    lines: Iterable[bytes],
    progress: Callable[[int], None] = lambda _height: None,
    *,
    voter: bytes | None = None,
) -> Replay:
    """Fill an empty store from a backup; return what its blocks lead to.

    ``voter`` is this node's public key when the file is another validator's: what its writer noted of its own votes is then
    replaced by the votes of this key that the chain shows.

    Blocks are written in commits of some dozens. An import that fails leaves an honest beginning of the chain in the store,
    which must be made empty before another try.

    Raises:
        BackupError: the store is not empty, or the file is not this chain.
        StoreError: the store refuses.
    """
    if await store.rows.bounds() is not None:
        raise BackupError("the store holds blocks already: import into an empty one")
    replay = Replay(genesis)
    waiting: list[CommittedBlock] = []
    for entry in read_backup(lines, genesis):
        if isinstance(entry, BackupBlock):
            if voter is not None:
                entry = dataclasses.replace(entry, last_voted_round=replay.voted_round(voter, entry.block.qc))
            replay.execute(entry)
            waiting += replay.take_commit()
        if waiting and (len(waiting) >= PAGE_BLOCKS or not isinstance(entry, BackupBlock)):
            await store.append(waiting, is_published=True)
            waiting = []
            progress(replay.height)
        if not isinstance(entry, BackupBlock):
            await store.rows.restore(entry)
    if replay.has_open_end:
        raise BackupError(f"height {replay.height}: no certificate proves the last blocks of the file")
    await store.append(waiting, is_published=True)
    return replay
