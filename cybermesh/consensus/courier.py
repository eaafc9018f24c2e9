"""Proposals travel as digests: a validator fills the payload from its own mempool and asks the proposer for what it lacks.

The replica knows nothing of this: it is handed whole blocks, and so votes only for what it holds. Rules:

* at most one incomplete proposal of each peer is held, the one of the highest round; a newer one replaces it;
* what is missing is asked of the peer that sent the digests, again only while its answers bring something. Whoever does not
  answer gets no vote; a block that others certify meanwhile is fetched from its voters (R11);
* nothing is trusted: a transaction counts only for the digest it has, and the whole payload is checked against the header by
  the replica, like that of any other block;
* what was proposed or completed here is kept for others, the newest few blocks only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.mempool import Mempool
from cybermesh.consensus.types import Block, BlockHash, GetPayload, Payload, Proposal
from cybermesh.messages import tx_digest

KEPT_BLOCKS: Final = 8
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024


@dataclass(slots=True)
class _Incomplete:
    """A proposal and what is known of its payload, by digest."""

    proposal: Proposal
    found: dict[bytes, bytes]

    @property
    def missing(self) -> tuple[bytes, ...]:
        return tuple(digest for digest in self.proposal.digests if digest not in self.found)


class Courier:
    """Between one validator's replica and its peers."""

    def __init__(self, mempool: Mempool) -> None:
        self._mempool = mempool
        self._incomplete: dict[int, _Incomplete] = {}
        self._kept: OrderedDict[BlockHash, dict[bytes, bytes]] = OrderedDict()
        self.fetched = 0

    @property
    def held(self) -> int:
        """How many proposals wait for transactions; never more than peers."""
        return len(self._incomplete)

    def compact(self, block: Block) -> Proposal:
        """Return what is sent instead of the whole block."""
        payload = {tx_digest(transaction): transaction for transaction in block.payload}
        self._keep(block.hash, payload)
        return Proposal(block.header, block.qc, block.tc, tuple(payload), block.signature)

    def take(self, peer: int, proposal: Proposal) -> Block | GetPayload | None:
        """Return the whole block, or what to ask the peer for; None when a proposal of a later round is held already."""
        held = self._incomplete.get(peer)
        if held is not None and held.proposal.header.round > proposal.header.round:
            return None
        found = {}
        kept = self._kept.get(proposal.hash, {})
        for digest in proposal.digests:
            waiting = self._mempool.get(digest)
            transaction = kept.get(digest) if waiting is None else waiting.data
            if transaction is not None:
                found[digest] = transaction
        incomplete = _Incomplete(proposal, found)
        self._incomplete[peer] = incomplete
        return self._conclude(peer, incomplete)

    def fill(self, peer: int, answer: Payload) -> Block | GetPayload | None:
        """Take transactions that were asked for; None when they were not, or bring nothing."""
        incomplete = self._incomplete.get(peer)
        if incomplete is None or incomplete.proposal.hash != answer.block_hash:
            return None
        missing = set(incomplete.missing)
        brought = {digest: each for each in answer.transactions if (digest := tx_digest(each)) in missing}
        if not brought:
            del self._incomplete[peer]
            return None
        self.fetched += len(brought)
        incomplete.found |= brought
        return self._conclude(peer, incomplete)

    def _conclude(self, peer: int, incomplete: _Incomplete) -> Block | GetPayload:
        proposal, missing = incomplete.proposal, incomplete.missing
        if missing:
            return GetPayload(proposal.header.epoch, proposal.hash, missing)
        del self._incomplete[peer]
        payload = tuple(incomplete.found[digest] for digest in proposal.digests)
        self._keep(proposal.hash, incomplete.found)
        return Block(proposal.header, proposal.qc, proposal.tc, payload, proposal.signature)

    def serve(self, request: GetPayload) -> Payload | None:
        """Return what is asked for of a block known here, as much as one answer holds; None when there is nothing to give."""
        kept = self._kept.get(request.block_hash, {})
        given = _fitting([kept[digest] for digest in dict.fromkeys(request.digests) if digest in kept])
        return Payload(request.epoch, request.block_hash, given) if given else None

    def _keep(self, block_hash: BlockHash, payload: dict[bytes, bytes]) -> None:
        if payload:
            self._kept[block_hash] = payload
            self._kept.move_to_end(block_hash)
            if len(self._kept) > KEPT_BLOCKS:
                self._kept.popitem(last=False)


def _fitting(transactions: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return as many as one answer holds, at least one if there is any."""
    size = 0
    for count, transaction in enumerate(transactions):
        size += len(transaction)
        if count and size > ANSWER_BYTES_MAX:
            return tuple(transactions[:count])
    return tuple(transactions)
