"""Nonces in the ledger: the same rule as admission's, on block time, and as immutable records of the state.

Per producer and instance a bitmap of the newest 65,536 counters. A counter below it, or a nonce whose own time lies further
back than the windows are kept, is STALE; a counter that is set is a DUPLICATE (bits cannot compare contents). A window that
nothing touched for that long is forgotten: what it could refuse is too old anyway.
"""

from __future__ import annotations

from typing import Final

from cybermesh.envelope.nonces import INSTANCES_MAX, WINDOW_COUNTERS, Nonce
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.receipts import Code
from cybermesh.ledger.records import WindowRecord

_INSTANCE_BYTES: Final = 4


def use_nonce(draft: Draft, producer: bytes, nonce: bytes) -> Code:
    """Mark the nonce as used and return OK, or say why it cannot be and change nothing."""
    parts = Nonce.parse(nonce)
    kept_ms = draft.nonces_kept_ms
    if parts.ts_ms < draft.time_ms - kept_ms:
        return Code.STALE
    key = producer + parts.instance.to_bytes(_INSTANCE_BYTES, "big")
    window = draft.windows.get(key)
    if window is not None and window.used_ms < draft.time_ms - kept_ms:
        draft.drop_window(key)
        window = None
    if window is None:
        if len(draft.windows_of(producer)) >= INSTANCES_MAX and not _forget_idle(draft, producer):
            return Code.TOO_MANY_INSTANCES
        draft.put_window(key, _fresh(parts.counter, draft.time_ms))
        return Code.OK
    if parts.counter < window.floor:
        return Code.STALE
    if _holds(window, parts.counter):
        return Code.DUPLICATE
    draft.put_window(key, _with(window, parts.counter, draft.time_ms))
    return Code.OK


def _forget_idle(draft: Draft, producer: bytes) -> bool:
    """Drop the producer's idle windows; return whether that made room."""
    before = draft.time_ms - draft.nonces_kept_ms
    for key in draft.windows_of(producer):
        window = draft.windows.get(key)
        if window is not None and window.used_ms < before:
            draft.drop_window(key)
    return len(draft.windows_of(producer)) < INSTANCES_MAX


def _fresh(counter: int, now_ms: int) -> WindowRecord:
    return WindowRecord(
        bits=bytes((1 << (counter & 7),)),
        floor=max(0, counter - WINDOW_COUNTERS + 1),
        start=counter & ~7,
        used_ms=now_ms,
    )


def _holds(window: WindowRecord, counter: int) -> bool:
    place = counter - window.start
    return 0 <= place < 8 * len(window.bits) and bool(window.bits[place >> 3] & (1 << (place & 7)))


def _with(window: WindowRecord, counter: int, now_ms: int) -> WindowRecord:
    """Return the window with the counter marked, moved up when the counter is new ground."""
    floor = max(window.floor, counter - WINDOW_COUNTERS + 1)
    start, bits = window.start, bytearray(window.bits)
    first = counter & ~7
    if first < start:
        bits[:0] = bytes((start - first) >> 3)
        start = first
    elif first - start >= 8 * len(bits):
        # A jump beyond everything kept leaves nothing worth keeping; filling the gap with zeros first would cost its length.
        if start + 8 * len(bits) <= floor:
            start, bits = first, bytearray(1)
        else:
            bits.extend(bytes(((first - start) >> 3) + 1 - len(bits)))
    bits[(counter - start) >> 3] |= 1 << (counter & 7)
    stale = max(0, (floor - start) >> 3)
    while not bits[stale]:
        stale += 1
    return WindowRecord(bits=bytes(bits[stale:]), floor=floor, start=start + 8 * stale, used_ms=now_ms)
