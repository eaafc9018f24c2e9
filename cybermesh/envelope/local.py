"""Local verification: what depends on this node's clock, key ring and memory. Time is an argument.

A message that fails here and passes the intrinsic checks stays available, so that a block which contains it can be voted on.
"""

from __future__ import annotations

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.nonces import NonceTable
from cybermesh.keys import KeyRing
from cybermesh.messages import (
    Ack,
    Anomaly,
    Commit,
    ControlMessage,
    EpochChange,
    Evidence,
    MessageType,
    OperatorCommand,
    Policy,
    PolicyUpdate,
    SignedMessage,
)

TIMESTAMP_WINDOW_MS = 300_000

_TYPES: dict[type, MessageType] = {
    Anomaly: MessageType.ANOMALY,
    Evidence: MessageType.EVIDENCE,
    Policy: MessageType.POLICY,
    OperatorCommand: MessageType.OPERATOR,
    Commit: MessageType.COMMIT,
    PolicyUpdate: MessageType.POLICY_UPDATE,
    EpochChange: MessageType.EPOCH_CHANGE,
    Ack: MessageType.ACK,
}


def check_timestamp(message: SignedMessage, now_ms: int, window_ms: int = TIMESTAMP_WINDOW_MS) -> None:
    """Check that ``ts`` is within the window around ``now_ms``, its ends included.

    Raises:
        EnvelopeError: STALE or FUTURE.
    """
    age_ms = now_ms - message.ts * 1000
    if age_ms > window_ms:
        raise EnvelopeError(Code.STALE, "ts", f"is {age_ms} ms past; at most {window_ms} are accepted")
    if age_ms < -window_ms:
        raise EnvelopeError(Code.FUTURE, "ts", f"is {-age_ms} ms ahead; at most {window_ms} are accepted")


def check_producer(message: SignedMessage | ControlMessage, ring: KeyRing) -> None:
    """Check that the key ring lets the signer sign this type.

    Raises:
        EnvelopeError: UNKNOWN_PRODUCER.
    """
    message_type = _TYPES[type(message)]
    if not ring.allows(message.pubkey, message_type):
        holder = ring.holder(message.pubkey)
        who = f"{holder.name} may not sign" if holder else f"key {message.pubkey.hex()} is not registered for"
        raise EnvelopeError(Code.UNKNOWN_PRODUCER, "pubkey", f"{who} {message_type}")


def verify_local(message: SignedMessage, now_ms: int, ring: KeyRing, nonces: NonceTable) -> None:
    """Do every local check; the nonce is not recorded (``NonceTable.record``, once the message is durable).

    Raises:
        EnvelopeError: with a code of ``LOCAL_CODES``.
    """
    check_timestamp(message, now_ms)
    check_producer(message, ring)
    nonces.check(message.pubkey, message.nonce, message.content_hash, now_ms)
