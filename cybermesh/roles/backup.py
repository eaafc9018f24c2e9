"""A ledger in one file, and back: what a restored validator needs, and nothing that a thief could vote with.

The file is JSON lines: a head that names the chain, one line per block (frame, transactions, certificate, this node's clock),
the rows that no block decides (acks, labels, lifecycle, audit trail), and an end that counts them and hashes all before it, so
that a copy cut short is no backup. Receipts, decisions, evidence and the outbox are not in it: importing executes every block
again and checks each certificate, so a file that somebody changed is refused at the block where it stops being the chain.
Safety state is never in it. Outbox rows come back unsigned and as published: others published them when they were new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cybermesh.bus.topics import Topics
from cybermesh.consensus import codec
from cybermesh.consensus.certificates import CertificateVerifier
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import Block, BlockHash, MalformedError
from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import Genesis
from cybermesh.keys import verify
from cybermesh.ledger.state import Applied, InvalidBlock, LedgerBlock, State
from cybermesh.roles import records
from cybermesh.store.records import CommittedBlock, OutboxEvent, StoredBlock, StoredTransaction
from cybermesh.store.rows import FEEDBACK, StoredCertificate
from cybermesh.store.store import Store
from cybermesh.wire import codec as wire_codec
from cybermesh.wire.admission import verify_transaction

FORMAT: Final = "cybermesh/ledger/1"
PAGE_BLOCKS: Final = 64
_TABLES: Final = {table.name: record for record, table in FEEDBACK.items()}


class BackupError(Exception):
    """A ledger that cannot be exported, or a file that cannot be imported; the text names the line or height."""


@dataclass(frozen=True, slots=True)
class BackupBlock:
    """One block of a backup: as consensus encodes it, with its payload, and the certificate stored with it (may be empty)."""

    block: Block
    certificate: bytes
    committed_ms: int
    last_voted_round: int


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
    for low in range(1, (head or (0, 0))[1] + 1, PAGE_BLOCKS):
        async for line in _page_lines(store, low, min(low + PAGE_BLOCKS - 1, head[1] if head else 0)):
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


async def _page_lines(store: Store, low: int, high: int) -> AsyncIterator[bytes]:
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
        return BackupBlock(block, certificate, int(value["committed_ms"]), int(value["last_voted_round"]))
    except (KeyError, TypeError, ValueError, MalformedError) as error:
        raise BackupError(f"line {number}: not a block or row of an export: {error!r}") from error


def _read_row(record: Any, value: dict[str, Any]) -> object:
    hints = typing.get_type_hints(record)
    made: object = record(**{name: bytes.fromhex(given) if hints[name] is bytes else given for name, given in value.items()})
    return made


class Replay:
    """Executes blocks from the genesis on, believing nothing but the genesis; what importing and comparing share."""

    def __init__(self, genesis: Genesis) -> None:
        self._genesis = genesis
        self._committee = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
        self._verifier = CertificateVerifier(self._committee, verify, self._committee.genesis_cert())
        self._parent = self._committee.genesis_hash()
        self._open: list[tuple[BackupBlock, Applied]] = []
        self.state = State.at_genesis(genesis)
        self.height = 0

    def execute(self, entry: BackupBlock) -> Applied:
        """Check and execute the next block.

        Raises:
            BackupError: it is not the next block of the chain, or does not give the root in its header.
        """
        block, height = entry.block, self.height + 1
        if block.height != height or block.header.parent_hash != self._parent:
            raise BackupError(f"height {height}: the block does not follow from the one before it")
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
        self._open.append((entry, applied))
        return applied

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
        is_valid = certificate.proves_parent and self._verifier.is_valid_quorum_cert(certificate)
        if not is_valid or certificate.parent_hash != self._parent:
            raise BackupError(f"height {self.height}: the certificate does not prove the commit of this block")
        committed, self._open = self._open, []
        made = []
        for position, (each, applied) in enumerate(committed):
            headers = [later.block.header for later, _ in committed[position:]]
            if applied.next_committee is not None:
                raise BackupError(f"height {self.height}: the committee changes here, and an export cannot follow it yet")
            rows = records.of_block(
                each.block, applied, self._genesis, records.Moment(each.committed_ms, each.last_voted_round)
            )
            events = records.events_of(each.block, applied, records.Proof(headers, certificate), self._genesis)
            outbox = tuple(_unsigned(event) for event in events)
            made.append(dataclasses.replace(rows, certificate=each.certificate, outbox=outbox, mempool_done=()))
        return made

    @property
    def has_open_end(self) -> bool:
        """Whether the newest blocks are not proven by any certificate."""
        return bool(self._open)


def _unsigned(event: records.Event) -> OutboxEvent:
    blank = dataclasses.replace(event.message, producer_id=bytes(32), signature=records.UNSIGNED, pubkey=bytes(32))
    value = wire_codec.encode(blank)
    return OutboxEvent(event.name, event.subject, records.topic_of(event, Topics()), event.key, value)


async def import_lines(
    store: Store, genesis: Genesis, lines: Iterable[bytes], progress: Callable[[int], None] = lambda _height: None
) -> int:
    """Fill an empty store from a backup; return the height it reached.

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
    return replay.height
