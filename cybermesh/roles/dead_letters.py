"""Reports of refused messages, for people: to the dead-letter topic, in samples when they come as a flood.

Rules:

- of each producer and code the first letters of a minute are all kept, then one of a hundred; the next one that is kept says
  how many were left out before it, and all are counted;
- a producer is whom the key ring knows; all strangers, and messages that name nobody, count as one. So nobody can make the
  table of counts grow, nor hide behind ever new names;
- a letter that the bus does not take is tried again for ever, and nothing new is taken meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.keys import KeyRing
from cybermesh.messages import TxKind
from cybermesh.wire.codec import decode_signed

WINDOW_MS: Final = 60_000
KEPT_WHOLE_MAX: Final = 100
KEPT_ONE_OF: Final = 100
STRANGER: Final = b""


@dataclass(slots=True)
class _Stream:
    """The letters of one producer and code."""

    began_ms: int
    seen: int = 0
    left_out: int = 0


class Sampler:
    """Decides which letters are kept."""

    def __init__(self) -> None:
        self._streams: dict[tuple[bytes, Code], _Stream] = {}

    def take(self, producer: bytes, code: Code, now_ms: int) -> int | None:
        """Return how many letters were left out since the last one that was kept, or None to leave this one out, too."""
        stream = self._streams.setdefault((producer, code), _Stream(now_ms))
        if not 0 <= now_ms - stream.began_ms < WINDOW_MS:
            stream.began_ms, stream.seen = now_ms, 0
        stream.seen += 1
        if stream.seen > KEPT_WHOLE_MAX and (stream.seen - KEPT_WHOLE_MAX) % KEPT_ONE_OF:
            stream.left_out += 1
            return None
        left_out, stream.left_out = stream.left_out, 0
        return left_out


def claimed_producer(kind: TxKind, raw: bytes, ring: KeyRing) -> bytes:
    """Return the key that a refused message names if the ring knows it, whether it has signed or not; else ``STRANGER``."""
    try:
        pubkey = decode_signed(kind, raw).pubkey
    except EnvelopeError:
        return STRANGER
    return pubkey if ring.holder(pubkey) is not None else STRANGER


def with_count(error: EnvelopeError, left_out: int) -> EnvelopeError:
    """Return the fault as the letter tells it: with the number of letters like it that were left out."""
    if not left_out:
        return error
    return EnvelopeError(error.code, error.place, f"{error.text}; {left_out} like it were left out before")
