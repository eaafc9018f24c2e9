"""What makes a message trustworthy: nonces, sign bytes, signing, and verification with a code for every fault.

Verification has two parts. The *intrinsic* one (``intrinsic``) needs no clock and no list, gives the same answer on every node
for ever, and decides whether a replica may vote for a block that contains the message. The *local* one (``local``) depends on
``now``, on the key ring and on the nonces seen here; it decides only what this node does with the message.
"""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    """Why a message was refused; one code for each kind of fault."""

    TOO_LARGE = "TOO_LARGE"  # the message as a whole
    MALFORMED = "MALFORMED"  # not this protobuf message
    NON_CANONICAL = "NON_CANONICAL"  # unknown fields, or bytes that encoding the message again would not give
    UNKNOWN_KIND = "UNKNOWN_KIND"  # a transaction whose first byte names no message
    STRUCTURE = "STRUCTURE"  # a field is missing, too long, of the wrong length, or out of range
    ALGORITHM = "ALGORITHM"  # alg is not Ed25519
    STALE = "STALE"  # older than the window (local)
    FUTURE = "FUTURE"  # newer than the window (local)
    CONTENT_TOO_LARGE = "CONTENT_TOO_LARGE"  # payload, params or proof blob
    CONTENT_HASH = "CONTENT_HASH"  # not SHA-256 of the content
    KEY_MISMATCH = "KEY_MISMATCH"  # producer_id is not the key that signed
    SIGNATURE = "SIGNATURE"
    CUSTODY_SIGNATURE = "CUSTODY_SIGNATURE"
    UNKNOWN_PRODUCER = "UNKNOWN_PRODUCER"  # the key may not sign this type (local)
    CONTENT_FORMAT = "CONTENT_FORMAT"  # the content is not a JSON object
    FIELD_MISMATCH = "FIELD_MISMATCH"  # a field outside the signature is not what the signed content says
    DUPLICATE = "DUPLICATE"  # the same message again (local)
    NONCE_REPLAY = "NONCE_REPLAY"  # a used nonce with other content (local)
    TOO_MANY_INSTANCES = "TOO_MANY_INSTANCES"  # of one producer (local)
    NONCES_EXHAUSTED = "NONCES_EXHAUSTED"  # when signing: this instance has used all its counters


LOCAL_CODES = frozenset(
    {Code.STALE, Code.FUTURE, Code.UNKNOWN_PRODUCER, Code.DUPLICATE, Code.NONCE_REPLAY, Code.TOO_MANY_INSTANCES}
)


class EnvelopeError(Exception):
    """A message that is refused: ``code`` for programs, ``text`` for people, ``place`` the field or message meant."""

    def __init__(self, code: Code, place: str, text: str) -> None:
        super().__init__(f"{code}: {place}: {text}")
        self.code = code
        self.place = place
        self.text = text
