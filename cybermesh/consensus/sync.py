"""How a replica that misses blocks gets them, and how much of the chain one answer holds.

R11 catch up  a certificate over an unknown block means blocks are missing. They are asked of one validator at a time, from
              the first uncommitted height on: first of those who signed the certificate, of another one when no answer
              comes. The first question waits a moment, since votes often overtake the proposal they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cybermesh.consensus.events import Send, ServeBlocks, ServeEpoch
from cybermesh.consensus.types import Block, BlockHash, Blocks, GetBlocks, Header, Height, QuorumCert, Round

ANSWER_BLOCKS_MAX: Final = 64
ANSWER_BYTES_MAX: Final = 2 * 1024 * 1024
_MUSTER_MS: Final = 500


class CatchUp:
    """The one outstanding question of a replica; times are milliseconds of a clock that never jumps."""

    def __init__(self, n: int, index: int, *, patience_ms: int, delay_ms: int) -> None:
        self._n = n
        self._index = index
        self._patience_ms = patience_ms
        self._delay_ms = delay_ms
        self._turn = 0
        self._wanted: QuorumCert | None = None
        self.next_at: int | None = None
        self.asked: int | None = None

    @property
    def wanted(self) -> BlockHash | None:
        """The block that is missing, None when none is."""
        return None if self._wanted is None else self._wanted.block_hash

    def want(self, certificate: QuorumCert, now_ms: int) -> None:
        """Note that the certified block is missing."""
        if self._wanted is None:
            self.next_at = now_ms + self._delay_ms
        self._wanted = certificate

    def satisfied(self) -> None:
        """Note that nothing is missing."""
        self._wanted = None
        self._turn = 0
        self.next_at = None
        self.asked = None

    def go_on(self, now_ms: int) -> None:
        """Note that an answer brought some of it: ask the same validator for more at once."""
        self._turn -= 1
        self.next_at = now_ms

    def ask(self, now_ms: int, from_height: Height) -> Send | None:
        """Return the question to send now, None if it is not yet time or there is nobody to ask."""
        if self._wanted is None or self.next_at is None or now_ms < self.next_at:
            return None
        signers = [voter for voter, _ in self._wanted.signatures if voter != self._index]
        others = [peer for peer in range(self._n) if peer != self._index and peer not in signers]
        # An own offset spreads the questions of several laggards over the signers.
        offset = self._index % max(1, len(signers))
        peers = signers[offset:] + signers[:offset] + others
        self.next_at = now_ms + self._patience_ms
        if not peers:
            return None
        self.asked = peers[self._turn % len(peers)]
        self._turn += 1
        return Send(self.asked, GetBlocks(self._wanted.epoch, from_height, self._wanted.block_hash))


class Muster:
    """Who has told where it stands since the start (rule R10): asks all, again and again, until a quorum has."""

    def __init__(self, quorum: int, index: int, now_ms: int) -> None:
        self._quorum = quorum
        self._index = index
        self._reports: dict[int, Round] = {}
        self.ask_at = now_ms

    def report(self, validator: int, certified: Round) -> None:
        """Note the highest certified round that a validator knows."""
        self._reports[validator] = certified

    def highest(self, own: Round) -> Round | None:
        """Return the highest certified round of a quorum, this node included, or None before that many have told."""
        self._reports[self._index] = own
        return max(self._reports.values()) if len(self._reports) >= self._quorum else None

    def ask(self, now_ms: int) -> bool:
        """Return whether to ask all now."""
        if now_ms < self.ask_at:
            return False
        self.ask_at = now_ms + _MUSTER_MS
        return True


class PeerLimit:
    """At most one costly answer per peer in ``pause_ms``."""

    def __init__(self, pause_ms: int) -> None:
        self._pause_ms = pause_ms
        self._last: dict[int, int] = {}

    def allows(self, peer: int, now_ms: int) -> bool:
        """Return whether the peer may be answered now, and count it as answered if so."""
        last = self._last.get(peer)
        if last is not None and now_ms - last < self._pause_ms:
            return False
        self._last[peer] = now_ms
        return True


class PeerBudget:
    """At most ``capacity`` favours per peer at once, and one more for every ``refill_ms`` that pass."""

    def __init__(self, capacity: int, refill_ms: int) -> None:
        self._full_ms = capacity * refill_ms
        self._refill_ms = refill_ms
        self._credit_ms: dict[int, tuple[int, int]] = {}

    def allows(self, peer: int, now_ms: int) -> bool:
        """Return whether the peer has a favour left, and count it as done if so."""
        credit_ms, since_ms = self._credit_ms.get(peer, (self._full_ms, now_ms))
        credit_ms = min(self._full_ms, credit_ms + now_ms - since_ms)
        is_allowed = credit_ms >= self._refill_ms
        self._credit_ms[peer] = (credit_ms - self._refill_ms if is_allowed else credit_ms, now_ms)
        return is_allowed


def pack(epoch: int, blocks: Sequence[Block], certificate: QuorumCert) -> Blocks | None:
    """Return as many of the consecutive ``blocks`` as one answer holds; ``certificate`` is over the last of them.

    A block that is left out certifies the one before it. None when not a single block can be given with a certificate.
    """
    size = 0
    for count, block in enumerate(blocks):
        size += sum(len(transaction) for transaction in block.payload)
        if count and (count >= ANSWER_BLOCKS_MAX or size > ANSWER_BYTES_MAX):
            return Blocks(epoch, tuple(blocks[:count]), block.qc)
    if not blocks:
        return None
    return Blocks(epoch, tuple(blocks), certificate)


def splice(epoch: int, request: ServeBlocks, stored: Sequence[Block]) -> Blocks | None:
    """Return the answer to a request, made of what the store gave and of the uncommitted blocks above it.

    The store may be behind the replica: when the two do not touch, the last stored block only certifies the one before it.
    """
    tail = request.tail
    if request.from_height > request.stored_to:
        return pack(epoch, tail, request.certificate)
    if not stored:
        return None
    if tail and tail[0].header.parent_hash == stored[-1].hash:
        return pack(epoch, [*stored, *tail], request.certificate)
    return pack(epoch, stored[:-1], stored[-1].qc)


def lead_on(request: ServeEpoch, stored: Sequence[Block], end: tuple[Sequence[Header], QuorumCert]) -> Blocks | None:
    """Return the answer for a peer of an ended epoch: blocks towards the epoch's last, that one with its proof of commit.

    ``end`` are the headers from the epoch's last block to the parent of the certificate that committed it.
    """
    (last, *above), certificate = end
    for count, block in enumerate(stored, start=1):
        if block.hash == last.hash:
            whole = pack(request.epoch, stored[:count], certificate)
            is_cut = whole is None or len(whole.blocks) < count
            return whole if is_cut or whole is None else Blocks(request.epoch, whole.blocks, certificate, tuple(above))
    return pack(request.epoch, stored[:-1], stored[-1].qc) if stored else None


def with_certificates(answer: Blocks, known: QuorumCert) -> list[tuple[Block, QuorumCert]]:
    """Return each block of an answer with what certifies it: the next block's certificate, or for the last one the answer's.

    ``known`` is the highest certificate that the asker holds itself; it counts where it is over the last block, unless the
    answer's one commits that block.
    """
    end = answer.blocks[-1].hash
    is_commit = bool(answer.headers) or answer.certificate.parent_hash == end
    last = known if known.block_hash == end and not is_commit else answer.certificate
    return list(zip(answer.blocks, [*(block.qc for block in answer.blocks[1:]), last], strict=True))
