"""What a validator asks of the ledger, with plain arguments: choose, check and execute a block, and say when time is up.

``roles/validator.py`` wraps these for consensus, which knows nothing of messages. ``choose`` is the honest proposer's: it
executes what it is offered, anomalies before evidence before policies before operators' commands, and leaves out what anybody
could fill blocks with: duplicates, stale messages, strangers. What the governance refuses goes in, since a refusal, too, must
be attributable and provable. ``is_within_limits`` is the cheap question that comes before any signature is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cybermesh.envelope import EnvelopeError
from cybermesh.genesis import Genesis
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.receipts import JUNK
from cybermesh.ledger.state import (
    Applied,
    InvalidBlock,
    LedgerBlock,
    State,
    admit,
    read_messages,
    reduce_message,
    size_fault,
)
from cybermesh.messages import SignedMessage
from cybermesh.wire.admission import read_transaction, verify_transaction


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Choice:
    """An honest proposer's answer: what goes into the block in this order, and what it gives up for good."""

    payload: tuple[bytes, ...]
    refused: tuple[bytes, ...]


def is_valid(genesis: Genesis, transaction: bytes) -> bool:
    """Return whether a transaction is intrinsically valid: signature and all, the same answer for ever."""
    try:
        verify_transaction(transaction, accept_unbound_fields=genesis.wire.accept_unbound_fields)
    except EnvelopeError:
        return False
    return True


def is_within_limits(state: State, block: LedgerBlock) -> bool:
    """Return whether the block keeps the limits that need no signature: size, no transaction twice, little junk."""
    if size_fault(state.genesis, block.transactions) is not None:
        return False
    messages = read_messages(state.genesis, block.transactions)
    if isinstance(messages, InvalidBlock):
        return False
    draft = state.draft(height=block.height, time_ms=block.time_ms)
    junk = sum(admit(draft, message) in JUNK for message in messages)
    return junk <= state.genesis.block_limits.junk


def choose(
    state: State, *, height: int, time_ms: int, candidates: Sequence[bytes], is_time_up: Callable[[], bool] = _never
) -> Choice:
    """Choose a block's payload out of ``candidates`` (oldest first, intrinsically valid).

    Within the proposer's limits of transactions and bytes; at least one transaction fits. What does not fit stays a candidate.
    ``is_time_up`` is asked before each transaction after the first: the caller's clock ends the choice, never its rules.
    """
    limits, draft = state.genesis.block_limits, state.draft(height=height, time_ms=time_ms)
    count_max = min(limits.proposal_transactions, limits.transactions)
    size_max = min(limits.proposal_bytes, limits.size_bytes)
    payload: list[bytes] = []
    admitted, refused = _admitted(state, draft, candidates)
    size = 0
    for raw, message in admitted:
        if len(payload) >= count_max or (payload and is_time_up()):
            break
        if payload and size + len(raw) > size_max:
            continue
        if reduce_message(draft, message).code in JUNK:
            refused.append(raw)
            continue
        payload.append(raw)
        size += len(raw)
    return Choice(tuple(payload), tuple(refused))


def _admitted(state: State, draft: Draft, candidates: Sequence[bytes]) -> tuple[list[tuple[bytes, SignedMessage]], list[bytes]]:
    """Return the candidates that are no junk, in the order of a block, and the others.

    All are asked before any is treated, as when a block is applied: else a command of this block could let in the messages of
    a key that the block itself will not know, and the proposer's own block would be invalid.
    """
    admitted: list[tuple[bytes, SignedMessage]] = []
    refused: list[bytes] = []
    # The first byte is the kind, numbered in the order in which messages refer to each other; the sort keeps arrival order.
    for raw in sorted(dict.fromkeys(candidates), key=lambda transaction: transaction[:1]):
        try:
            message = read_transaction(raw, accept_unbound_fields=state.genesis.wire.accept_unbound_fields)
        except EnvelopeError:
            refused.append(raw)
            continue
        if admit(draft, message) in JUNK:
            refused.append(raw)
        else:
            admitted.append((raw, message))
    return admitted, refused


def execute(state: State, block: LedgerBlock) -> Applied | None:
    """Execute a block; None when it is invalid as such and gets no vote."""
    applied = state.apply(block)
    return applied if isinstance(applied, Applied) else None


def would_admit(state: State, transaction: bytes, now_ms: int) -> SignedMessage | None:
    """Return the message if it would pass the local checks of a block made now on ``state``, else None."""
    try:
        message = read_transaction(transaction, accept_unbound_fields=state.genesis.wire.accept_unbound_fields)
    except EnvelopeError:
        return None
    return message if admit(state.draft(height=0, time_ms=now_ms), message) not in JUNK else None
