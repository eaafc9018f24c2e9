"""Where a validator starts: the newest state it has, brought up to the head of its store by executing what is stored above.

The stored chain is not trusted more than anything else on the disk: each block executed here must give the root in its header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cybermesh.consensus import codec
from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.parts import Root
from cybermesh.consensus.types import Block
from cybermesh.genesis import Genesis
from cybermesh.ledger.encoding import EncodingError
from cybermesh.ledger.snapshot import decode_snapshot
from cybermesh.ledger.state import State
from cybermesh.roles.application import LedgerApplication
from cybermesh.store.store import Store

PIECE = 256
RECENT_HEADERS = 512


class RecoveryError(Exception):
    """The stored chain does not lead to the state its headers promise; the text names the height."""


class StoredBlocks:
    """The committed chain as blocks, for peers that catch up and for this node's own start."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        """Return consecutive committed blocks from a height on, lowest first."""
        rows = await self._store.chain.blocks(from_height, count_max)
        if not rows:
            return []
        payloads: dict[int, list[bytes]] = {row.height: [] for row in rows}
        for transaction in await self._store.chain.transactions_between(rows[0].height, rows[-1].height):
            payloads[transaction.height].append(transaction.payload)
        return [dataclasses.replace(codec.decode_block(row.frame), payload=tuple(payloads[row.height])) for row in rows]


async def restore(store: Store, genesis: Genesis, committee: Committee, application: LedgerApplication) -> Root[State]:
    """Return the root to start from.

    Raises:
        RecoveryError: A snapshot or a block in the store is not what its header says.
    """
    head = await store.chain.head()
    if head is None:
        return Root.genesis(committee, State.at_genesis(genesis))
    height, state = await _newest_state(store, genesis)
    source = StoredBlocks(store)
    while height < head.height:
        for block in await source.blocks(height + 1, PIECE):
            state = _execute(application, state, block)
            height = block.height
    recent = tuple(block.header for block in await source.blocks(max(1, head.height - RECENT_HEADERS), RECENT_HEADERS + 1))
    tip = recent[-1]
    stored = await store.chain.certificate(head.height)
    if stored is None or tip.hash != head.hash:
        raise RecoveryError(f"height {head.height}: the store has no certificate for its head; restore it, or start empty")
    certificate = codec.decode_quorum_cert(stored[1])
    return Root(tip.hash, tip.round, tip.height, tip.time_ms, state, certificate, recent)


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
