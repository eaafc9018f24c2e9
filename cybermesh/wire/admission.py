"""From bytes to a verified message: the intrinsic checks that decide votes, and the whole order of the wire.

Everything here is a pure function of its arguments (signatures may be verified in any thread). The one memory that changes an
answer, the table of nonces, belongs to the caller: ``NonceTable.check`` after ``verify_on_wire``, ``NonceTable.record`` once
the message is durable. What a validator reads four times on the way from a proposal to the rows (admission, choice, limits,
execution) is decoded once: the newest small transactions are remembered as the messages they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.intrinsic import bind_fields, check_content_hash, check_signature
from cybermesh.envelope.local import TIMESTAMP_WINDOW_MS, check_producer, check_timestamp
from cybermesh.envelope.structure import check_content_size
from cybermesh.keys import KeyRing
from cybermesh.messages import SignedMessage, Transaction, TxKind, tx_digest
from cybermesh.wire.codec import decode_signed

REMEMBERED_MAX: Final = 4_096
REMEMBERED_BYTES_MAX: Final = 4_096
"""So many messages are remembered, none with more bytes: some 30 MB at worst, 10 MB of usual ones."""


_KINDS: Final = {bytes((kind,)): kind for kind in TxKind}


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """What genesis says about messages."""

    accept_unbound_fields: bool = False
    timestamp_window_ms: int = TIMESTAMP_WINDOW_MS


class Admitted(NamedTuple):
    """A message that passed: its transaction's bytes and identity, and the value that may be used (``intrinsic.bind_fields``).

    A tuple, because one is made for every message and a frozen dataclass takes twice as long to make.
    """

    payload: bytes
    digest: bytes
    message: SignedMessage


_FIRST_BYTES: Final = {kind: bytes((kind,)) for kind in TxKind}


def split_transaction(payload: bytes) -> Transaction:
    """Return the transaction that consensus ordered as ``payload``.

    Raises:
        EnvelopeError: UNKNOWN_KIND.
    """
    return Transaction(kind_of(payload), payload[1:])


def kind_of(payload: bytes) -> TxKind:
    """Return which message a payload of consensus holds, by its first byte.

    Raises:
        EnvelopeError: UNKNOWN_KIND.
    """
    kind = _KINDS.get(payload[:1])
    if kind is None:
        raise EnvelopeError(Code.UNKNOWN_KIND, "transaction", f"first byte {payload[:1].hex() or 'missing'} names no message")
    return kind


def verify_transaction(payload: bytes, *, accept_unbound_fields: bool = False) -> SignedMessage:
    """Decode a transaction and do every intrinsic check: the same answer on every node for ever.

    Raises:
        EnvelopeError: the first fault found, never with a code of ``LOCAL_CODES``.
    """
    message = _just_decoded(payload)
    check_content_size(message)
    check_content_hash(message)
    check_signature(message)
    return read_transaction(payload, accept_unbound_fields=accept_unbound_fields)


def read_transaction(payload: bytes, *, accept_unbound_fields: bool = False) -> SignedMessage:
    """Decode a transaction of a certified block, whose intrinsic validity is known: hash and signature are not checked again.

    Raises:
        EnvelopeError: it was not valid after all.
    """
    if len(payload) > REMEMBERED_BYTES_MAX:
        return _read(payload, accept_unbound_fields)
    return _remembered(payload, accept_unbound_fields)


def _read(payload: bytes, accept_unbound_fields: bool) -> SignedMessage:
    return bind_fields(_just_decoded(payload), accept_unbound_fields=accept_unbound_fields)


@lru_cache(maxsize=REMEMBERED_MAX)
def _remembered(payload: bytes, accept_unbound_fields: bool) -> SignedMessage:
    """The answer never changes and the message is immutable, so so this stays pure; a fault is found anew each time."""
    return _read(payload, accept_unbound_fields)


@lru_cache(maxsize=16)
def _just_decoded(payload: bytes) -> SignedMessage:
    """Decode; between its decoding and its binding, a message is checked, and then need not be decoded again."""
    return decode_signed(kind_of(payload), payload[1:])


def verify_on_wire(kind: TxKind, raw: bytes, now_ms: int, ring: KeyRing, rules: AdmissionRules) -> Admitted:
    """Verify a received message in the order of the wire, up to its nonce.

    Structure and size, timestamp, content size, content hash, signature, producer, fields. A message refused with a code of
    ``LOCAL_CODES`` may still be intrinsically valid (``verify_transaction`` tells) and is then kept to answer other nodes.

    Raises:
        EnvelopeError: the first fault in that order.
    """
    message = decode_signed(kind, raw)
    check_timestamp(message, now_ms, rules.timestamp_window_ms)
    check_content_size(message)
    check_content_hash(message)
    check_signature(message)
    check_producer(message, ring)
    usable = bind_fields(message, accept_unbound_fields=rules.accept_unbound_fields)
    payload = _FIRST_BYTES[kind] + raw
    return Admitted(payload, tx_digest(payload), usable)
