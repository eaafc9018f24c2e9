"""Where a validator starts: the newest state it has, brought up to the head of its store by executing what is stored above.

The stored chain is not trusted more than anything else on the disk: its head must be certified by a quorum of the committee,
and the state that this node arrives at must be the one in the head's header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cybermesh.consensus import codec
from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.certificates import CertificateVerifier
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.parts import Root
from cybermesh.consensus.sync import ANSWER_BYTES_MAX
from cybermesh.consensus.types import Block, MalformedError, QuorumCert
from cybermesh.genesis import Genesis
from cybermesh.keys import verify
from cybermesh.ledger.encoding import EncodingError
from cybermesh.ledger.snapshot import decode_snapshot
from cybermesh.ledger.state import State
from cybermesh.roles.application import LedgerApplication
from cybermesh.store import StoreUnavailable
from cybermesh.store.store import Store

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


async def restore(store: Store, genesis: Genesis, committee: Committee, application: LedgerApplication) -> Root[State]:
    """Return the root to start from.

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
    recent = tuple(block.header for block in await source.blocks(max(1, head.height - RECENT_HEADERS), RECENT_HEADERS + 1))
    tip = recent[-1]
    certificate = _certificate(await store.chain.certificate(head.height))
    verifier = CertificateVerifier(committee, verify, committee.genesis_cert())
    is_certified = certificate is not None and certificate.proves_parent and verifier.is_valid_quorum_cert(certificate)
    if certificate is None or not is_certified or not tip.hash == head.hash == certificate.parent_hash:
        raise RecoveryError(f"height {head.height}: no quorum committed the stored head; restore the store, or start empty")
    if state.root != tip.state_root:
        raise RecoveryError(f"height {head.height}: the stored chain does not lead to the state in its head's header")
    return Root(tip.hash, tip.round, tip.height, tip.time_ms, state, certificate, recent)


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
