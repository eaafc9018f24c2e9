"""Where a validator starts: the newest state it has, brought up to the head of its store by executing what is stored above.

The stored chain is not trusted more than anything else on the disk: its head must be certified by a quorum of the committee,
and the state that this node arrives at must be the one in the head's header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cybermesh.consensus import codec
from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.certificates import CertificateVerifier, commits
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.parts import Root
from cybermesh.consensus.sync import ANSWER_BYTES_MAX
from cybermesh.consensus.types import Block, Header, MalformedError, QuorumCert, Round
from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import KEY_BYTES, Genesis
from cybermesh.keys import verify
from cybermesh.ledger.encoding import EncodingError
from cybermesh.ledger.snapshot import decode_snapshot
from cybermesh.ledger.state import State
from cybermesh.roles.application import LedgerApplication
from cybermesh.store import StoreUnavailable
from cybermesh.store.records import StoredBlock, StoredEpoch
from cybermesh.store.store import Store
from cybermesh.wire.codec import EPOCH_CHANGE

PIECE = 256
SERVED_PIECE = 8
RECENT_HEADERS = 512


class RecoveryError(Exception):
    """The stored chain does not lead to the state its headers promise; the text names the height."""


class StoredBlocks:
    """The committed chain as blocks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        """Return consecutive committed blocks from a height on, lowest first.

        Raises:
            RecoveryError: a row is no block.
            StoreUnavailable: the database cannot be read now.
        """
        rows = await self._store.chain.blocks(from_height, count_max)
        if not rows:
            return []
        payloads: dict[int, list[bytes]] = {row.height: [] for row in rows}
        for transaction in await self._store.chain.transactions_between(rows[0].height, rows[-1].height):
            payloads[transaction.height].append(transaction.payload)
        try:
            return [dataclasses.replace(codec.decode_block(row.frame), payload=tuple(payloads[row.height])) for row in rows]
        except MalformedError as error:
            raise RecoveryError(f"heights {rows[0].height} to {rows[-1].height}: a stored block is damaged: {error}") from error


class ServedBlocks:
    """The committed chain for peers that catch up: never more in memory than an answer holds and a few blocks.

    What cannot be read now is not served (``on_failure`` is told); the peer asks another validator.
    """

    def __init__(self, store: Store, on_failure: Callable[[Exception], None]) -> None:
        self._store = store
        self._stored = StoredBlocks(store)
        self._on_failure = on_failure

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        """Return consecutive committed blocks from a height on, lowest first, about as many as one answer holds."""
        found: list[Block] = []
        size = 0
        try:
            while len(found) < count_max and size <= ANSWER_BYTES_MAX:
                piece = await self._stored.blocks(from_height + len(found), min(SERVED_PIECE, count_max - len(found)))
                if not piece or any(b"" in block.payload for block in piece):
                    break  # the end, or bodies that were pruned here: another validator may have them
                found += piece
                size += sum(len(transaction) for block in piece for transaction in block.payload)
        except (StoreUnavailable, RecoveryError) as error:
            self._on_failure(error)
        return found

    async def epoch_end(self, epoch: int) -> tuple[Sequence[Header], QuorumCert] | None:
        """Return the headers and the certificate that prove how an epoch ended, None while it has not."""
        try:
            return next((proof_of(row) for row in await self._store.chain.epochs() if row.epoch == epoch + 1), None)
        except (StoreUnavailable, RecoveryError) as error:
            self._on_failure(error)
            return None


def proof_of(epoch: StoredEpoch) -> tuple[Sequence[Header], QuorumCert]:
    """Return what proves that the epoch before this one has ended.

    Raises:
        RecoveryError: the row is damaged.
    """
    try:
        change = EPOCH_CHANGE.decode(epoch.change)
        return tuple(Header.decode(header) for header in change.headers), codec.decode_quorum_cert(change.certificate)
    except (EnvelopeError, MalformedError) as error:
        raise RecoveryError(f"epoch {epoch.epoch}: the stored change is damaged: {error}") from error


async def present_committee(store: Store, first: Committee) -> Committee:
    """Return the committee of the newest epoch that the store knows; ``first`` is that of the genesis.

    Raises:
        RecoveryError: a stored epoch is damaged, or does not follow from the one before.
        StoreUnavailable: the database cannot be read now.
    """
    committee = first
    for row in await store.chain.epochs():
        if row.epoch == committee.epoch:
            continue
        headers, certificate = proof_of(row)
        verifier = CertificateVerifier(committee, verify, committee.genesis_cert())
        is_proven = commits(headers[0], headers[1:], certificate) and verifier.is_valid_quorum_cert(certificate)
        if row.epoch != committee.epoch + 1 or not is_proven:
            raise RecoveryError(f"epoch {row.epoch}: no quorum ended the one before; restore the store, or start empty")
        keys = [row.committee[at : at + KEY_BYTES] for at in range(0, len(row.committee), KEY_BYTES)]
        committee = committee.successor(keys, headers[0].hash)
    return committee


async def restore(store: Store, genesis: Genesis, committee: Committee, application: LedgerApplication) -> Root[State]:
    """Return the root to start from; ``committee`` is the one that the store's chain has come to.

    Raises:
        RecoveryError: The stored chain is damaged, or not the one that a quorum committed.
    """
    head = await store.chain.head()
    if head is None:
        return Root.genesis(committee, State.at_genesis(genesis))
    height, state = await _newest_state(store, genesis)
    source = StoredBlocks(store)
    while height < head.height:
        for block in await source.blocks(height + 1, PIECE):
            if block.height != height + 1:
                raise RecoveryError(f"height {height + 1}: the stored block is missing; restore the store, or start empty")
            state = _execute(application, state, block)
            height = block.height
    headers = [block.header for block in await source.blocks(max(1, head.height - RECENT_HEADERS), RECENT_HEADERS + 1)]
    tip = headers[-1]
    if state.root != tip.state_root:
        raise RecoveryError(f"height {head.height}: the stored chain does not lead to the state in its head's header")
    if tip.hash == committee.last_block:
        certificate = committee.genesis_cert()
        return Root(certificate.block_hash, Round(0), tip.height, tip.time_ms, state, certificate)
    recent = tuple(header for header in headers if header.epoch == committee.epoch)
    certificate = await _certificate_of(store, head, committee)
    return Root(tip.hash, tip.round, tip.height, tip.time_ms, state, certificate, recent)


async def _certificate_of(store: Store, head: StoredBlock, committee: Committee) -> QuorumCert:
    """Return the certificate that committed the head of the chain."""
    certificate = _certificate(await store.chain.certificate(head.height))
    verifier = CertificateVerifier(committee, verify, committee.genesis_cert())
    is_certified = certificate is not None and certificate.proves_parent and verifier.is_valid_quorum_cert(certificate)
    if certificate is None or not is_certified or head.hash != certificate.parent_hash:
        raise RecoveryError(f"height {head.height}: no quorum committed the stored head; restore the store, or start empty")
    return certificate


def _certificate(stored: tuple[int, bytes] | None) -> QuorumCert | None:
    try:
        return None if stored is None else codec.decode_quorum_cert(stored[1])
    except MalformedError:
        return None


async def _newest_state(store: Store, genesis: Genesis) -> tuple[int, State]:
    snapshot = await store.node.newest_snapshot()
    if snapshot is None:
        return 0, State.at_genesis(genesis)
    try:
        return snapshot.height, decode_snapshot(genesis, snapshot.body, snapshot.state_root)
    except EncodingError as error:
        raise RecoveryError(f"snapshot at height {snapshot.height}: {error}") from error


def _execute(application: LedgerApplication, state: State, block: Block) -> State:
    context = BlockContext(block.header.epoch, block.height, block.header.time_ms)
    executed = application.execute(state, context, block.payload)
    if executed is None or executed.state_root != block.header.state_root:
        raise RecoveryError(f"height {block.height}: executing the stored block does not give the root in its header")
    return executed.state
