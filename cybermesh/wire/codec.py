"""Messages to protobuf bytes and back.

Rules:

- a decoder returns a value of ``messages`` whose structure has been checked, or raises EnvelopeError; protobuf types do not
  leave this package;
- unknown fields are refused: nothing vouches for them, and a relay could add or hide content in them;
- ``control.*`` messages must come in the one canonical encoding, because their signature is checked over it;
- a class of ``messages`` has the names of its protobuf message, so one table serves all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Generic, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.structure import EPOCH_CHANGE_MAX, MESSAGE_MAX, check_control_structure, check_structure
from cybermesh.messages import (
    Ack,
    Anomaly,
    Commit,
    CommitteeMember,
    ControlMessage,
    CustodyEntry,
    DeadLetter,
    EpochChange,
    Evidence,
    FlowFeatures,
    OperatorCommand,
    Policy,
    PolicyUpdate,
    Rejected,
    SignedMessage,
    TxKind,
)
from cybermesh.wire import ai_pb2, control_pb2, dead_letter_pb2, telemetry_pb2
from cybermesh.wire.unsigned import check_dead_letter, check_flow_features

T = TypeVar("T")
AnyMessage = SignedMessage | ControlMessage | FlowFeatures | DeadLetter
_FIRST_EPOCH_CHANGE_FIELD = 200


class _Layout(Generic[T]):
    """How a class and a protobuf message correspond; ``repeated`` maps a field to the class of its entries (None: scalar)."""

    def __init__(
        self, value_class: type[T], wire_class: type[Message], size_max: int, repeated: dict[str, type | None] | None = None
    ) -> None:
        self.name = value_class.__name__
        self.size_max = size_max
        self._names = [entry.name for entry in fields(cast(type, value_class)) if entry.init]
        self._read = operator.attrgetter(*self._names)
        self._value_class = value_class
        self._wire_class = wire_class
        self._repeated = [(self._names.index(name), entry) for name, entry in (repeated or {}).items()]

    def to_value(self, message: Message) -> T:
        if not self._repeated:
            return self._value_class(*self._read(message))
        values = list(self._read(message))
        for index, entry_class in self._repeated:
            values[index] = tuple(values[index] if entry_class is None else map(_ENTRIES[entry_class], values[index]))
        return self._value_class(*values)

    def to_wire(self, value: T) -> Message:
        given = {name: getattr(value, name) for name in self._names}
        for index, entry_class in self._repeated:
            if entry_class is not None:
                name = self._names[index]
                names = [entry.name for entry in fields(entry_class)]
                given[name] = [{key: getattr(entry, key) for key in names} for entry in given[name]]
        return self._wire_class(**given)

    def parse(self, raw: bytes) -> Message:
        """Parse bytes of at most ``size_max`` that hold this message and nothing else."""
        if len(raw) > self.size_max:
            raise EnvelopeError(Code.TOO_LARGE, self.name, f"must be at most {self.size_max} bytes, has {len(raw)}")
        try:
            message = self._wire_class.FromString(raw)
        except DecodeError as error:
            raise EnvelopeError(Code.MALFORMED, self.name, f"{len(raw)} bytes are not this message: {error}") from error
        size = message.ByteSize()
        message.DiscardUnknownFields()
        if message.ByteSize() != size:
            raise EnvelopeError(Code.NON_CANONICAL, self.name, "has unknown fields")
        return message


_ENTRIES: dict[type, Callable[..., object]] = {
    CustodyEntry: lambda entry: CustodyEntry(entry.ref_hash, entry.actor_id, entry.ts, entry.signature),
    Rejected: lambda entry: Rejected(entry.tx_digest, entry.code),
    CommitteeMember: lambda entry: CommitteeMember(entry.name, entry.pubkey),
}

_ANOMALY = _Layout(Anomaly, ai_pb2.AnomalyEvent, MESSAGE_MAX)
_EVIDENCE = _Layout(Evidence, ai_pb2.EvidenceEvent, MESSAGE_MAX, {"refs": None, "coc": CustodyEntry})
_POLICY = _Layout(Policy, ai_pb2.PolicyEvent, MESSAGE_MAX)
_OPERATOR = _Layout(OperatorCommand, control_pb2.OperatorCommand, MESSAGE_MAX)
_COMMIT = _Layout(Commit, control_pb2.CommitEvent, MESSAGE_MAX, {"anomaly_ids": None, "rejected": Rejected})
_POLICY_UPDATE = _Layout(PolicyUpdate, control_pb2.PolicyUpdateEvent, MESSAGE_MAX)
_EPOCH_CHANGE = _Layout(EpochChange, control_pb2.EpochChange, EPOCH_CHANGE_MAX, {"headers": None, "committee": CommitteeMember})
_ACK = _Layout(Ack, control_pb2.PolicyAckEvent, MESSAGE_MAX)
_FLOW_FEATURES = _Layout(FlowFeatures, telemetry_pb2.FlowFeatures, MESSAGE_MAX)
_DEAD_LETTER = _Layout(DeadLetter, dead_letter_pb2.DeadLetter, MESSAGE_MAX)

_LAYOUTS: dict[type, _Layout[object]] = {
    Anomaly: cast("_Layout[object]", _ANOMALY),
    Evidence: cast("_Layout[object]", _EVIDENCE),
    Policy: cast("_Layout[object]", _POLICY),
    OperatorCommand: cast("_Layout[object]", _OPERATOR),
    Commit: cast("_Layout[object]", _COMMIT),
    PolicyUpdate: cast("_Layout[object]", _POLICY_UPDATE),
    EpochChange: cast("_Layout[object]", _EPOCH_CHANGE),
    Ack: cast("_Layout[object]", _ACK),
    FlowFeatures: cast("_Layout[object]", _FLOW_FEATURES),
    DeadLetter: cast("_Layout[object]", _DEAD_LETTER),
}
_SIGNED: dict[TxKind, _Layout[Anomaly] | _Layout[Evidence] | _Layout[Policy] | _Layout[OperatorCommand]] = {
    TxKind.ANOMALY: _ANOMALY,
    TxKind.EVIDENCE: _EVIDENCE,
    TxKind.POLICY: _POLICY,
    TxKind.OPERATOR: _OPERATOR,
}


def encode(message: AnyMessage) -> bytes:
    """Return the canonical protobuf bytes of a message."""
    return _LAYOUTS[type(message)].to_wire(message).SerializeToString(deterministic=True)


def encode_cleared(message: ControlMessage) -> bytes:
    """Return what a control message's signature covers after the domain."""
    wire = _LAYOUTS[type(message)].to_wire(message)
    for name in ("signature", "pubkey", "alg"):
        wire.ClearField(name)
    return wire.SerializeToString(deterministic=True)


def decode_signed(kind: TxKind, raw: bytes) -> SignedMessage:
    """Read a message of the ``ai.*`` topics or an operator command; its structure is checked, its content's size is not.

    Raises:
        EnvelopeError: TOO_LARGE, MALFORMED, NON_CANONICAL (unknown fields), STRUCTURE or ALGORITHM.
    """
    layout = _SIGNED[kind]
    message = layout.to_value(layout.parse(raw))
    check_structure(message)
    return message


@dataclass(frozen=True, slots=True)
class ControlCodec(Generic[T]):
    """Reads one control message; instances are COMMIT, POLICY_UPDATE, EPOCH_CHANGE and ACK."""

    layout: _Layout[T]

    def decode(self, raw: bytes) -> T:
        """Read canonical bytes; structure and sizes are checked, the signature is not (``wire.control``).

        Raises:
            EnvelopeError: TOO_LARGE, MALFORMED, NON_CANONICAL, STRUCTURE, ALGORITHM or CONTENT_TOO_LARGE.
        """
        parsed = self.layout.parse(raw)
        if parsed.SerializeToString(deterministic=True) != raw:
            raise EnvelopeError(Code.NON_CANONICAL, self.layout.name, "is not in the one canonical encoding")
        message = self.layout.to_value(parsed)
        check_control_structure(cast(ControlMessage, message))
        return message


COMMIT = ControlCodec(_COMMIT)
POLICY_UPDATE = ControlCodec(_POLICY_UPDATE)
EPOCH_CHANGE = ControlCodec(_EPOCH_CHANGE)
ACK = ControlCodec(_ACK)


def is_epoch_change(raw: bytes) -> bool:
    """Return whether a record of ``control.policy.v1`` holds an EpochChange and not a PolicyUpdate, by its first tag."""
    tag = shift = 0
    for byte in raw[:5]:
        tag |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return tag >> 3 >= _FIRST_EPOCH_CHANGE_FIELD
    return False


def decode_flow_features(raw: bytes) -> FlowFeatures:
    """Read a batch of flows; every column has the length that ``count`` says.

    Raises:
        EnvelopeError: TOO_LARGE, MALFORMED, NON_CANONICAL or STRUCTURE.
    """
    message = _FLOW_FEATURES.to_value(_FLOW_FEATURES.parse(raw))
    check_flow_features(message)
    return message


def decode_dead_letter(raw: bytes) -> DeadLetter:
    """Read a dead letter.

    Raises:
        EnvelopeError: TOO_LARGE, MALFORMED, NON_CANONICAL or STRUCTURE.
    """
    message = _DEAD_LETTER.to_value(_DEAD_LETTER.parse(raw))
    check_dead_letter(message)
    return message
