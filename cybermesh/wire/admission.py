"""From bytes to a verified message: the intrinsic checks that decide votes, and the whole order of the wire.

Everything here is a pure function of its arguments (signatures may be verified in any thread). The one memory, the table of
nonces, belongs to the caller: ``NonceTable.check`` after ``verify_on_wire``, ``NonceTable.record`` once the message is durable.
"""

from __future__ import annotations

from dataclasses import dataclass

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.intrinsic import bind_fields, check_content_hash, check_signature
from cybermesh.envelope.local import TIMESTAMP_WINDOW_MS, check_producer, check_timestamp
from cybermesh.envelope.structure import check_content_size
from cybermesh.keys import KeyRing
from cybermesh.messages import SignedMessage, Transaction, TxKind
from cybermesh.wire.codec import decode_signed


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """What genesis says about messages."""

    accept_unbound_fields: bool = False
    timestamp_window_ms: int = TIMESTAMP_WINDOW_MS


@dataclass(frozen=True, slots=True)
class Admitted:
    """A message that passed: its transaction, and the value that may be used (see ``intrinsic.bind_fields``)."""

    transaction: Transaction
    message: SignedMessage


def split_transaction(payload: bytes) -> Transaction:
    """Return the transaction that consensus ordered as ``payload``.

    Raises:
        EnvelopeError: UNKNOWN_KIND.
    """
    try:
        kind = TxKind(payload[0])
    except (IndexError, ValueError):
        raise EnvelopeError(
            Code.UNKNOWN_KIND, "transaction", f"first byte {payload[:1].hex() or 'missing'} names no message"
        ) from None
    return Transaction(kind, payload[1:])


def verify_transaction(payload: bytes, *, accept_unbound_fields: bool = False) -> SignedMessage:
    """Decode a transaction and do every intrinsic check: the same answer on every node for ever.

    Raises:
        EnvelopeError: the first fault found, never with a code of ``LOCAL_CODES``.
    """
    transaction = split_transaction(payload)
    message = decode_signed(transaction.kind, transaction.body)
    check_content_size(message)
    check_content_hash(message)
    check_signature(message)
    return bind_fields(message, accept_unbound_fields=accept_unbound_fields)


def read_transaction(payload: bytes, *, accept_unbound_fields: bool = False) -> SignedMessage:
    """Decode a transaction of a certified block, whose intrinsic validity is known: hash and signature are not checked again.

    Raises:
        EnvelopeError: it was not valid after all.
    """
    transaction = split_transaction(payload)
    return bind_fields(decode_signed(transaction.kind, transaction.body), accept_unbound_fields=accept_unbound_fields)


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
    return Admitted(Transaction(kind, raw), bind_fields(message, accept_unbound_fields=rules.accept_unbound_fields))
