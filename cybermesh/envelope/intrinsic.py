"""Intrinsic verification: what is true of a message by itself, without clock or list, on every node for ever.

Rules:

- it decides whether a replica may vote for a block that contains the message, so nothing here depends on when or where it runs;
- outer fields are hints: what the signature does not cover must equal the signed content, or is refused as FIELD_MISMATCH. With
  ``accept_unbound_fields`` (a genesis setting, for messages of the earlier system) the outer values are discarded instead: the
  content's take their place, and what it does not name stays empty, with the content hash for the id;
- the steps are separate functions because the order on the wire puts local checks between them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

import orjson

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.batches import leaf_of, signed_root
from cybermesh.envelope.signing import custody_sign_bytes, policy_sign_bytes_with_zero, sign_bytes
from cybermesh.envelope.structure import (
    ID_MAX,
    TEXT_MAX,
    check_content_size,
    check_control_structure,
    check_structure,
    content_name,
    content_of,
)
from cybermesh.keys import verify
from cybermesh.messages import Anomaly, ControlMessage, Evidence, OperatorCommand, Policy, PolicyUpdate, SignedMessage

S = TypeVar("S", bound=SignedMessage)

# The outer fields that the content repeats under the same name, with their type and what they are when discarded.
_BOUND: dict[type, tuple[tuple[str, type, object], ...]] = {
    Anomaly: (
        ("id", str, ""),
        ("type", str, ""),
        ("source", str, ""),
        ("severity", int, 0),
        ("confidence", float, 0.0),
        ("model_version", str, ""),
    ),
    Evidence: (("id", str, ""), ("evidence_type", str, "")),
    Policy: (("id", str, ""), ("action", str, ""), ("rule", str, "")),
    OperatorCommand: (("id", str, ""), ("action", str, "")),
}


class _Binding:
    """Compares the bound fields of one class all at once, which is quicker than one by one; it does not name what differs."""

    def __init__(self, bound: tuple[tuple[str, type, object], ...]) -> None:
        names = [name for name, _, _ in bound]
        self._said = operator.itemgetter(*names)
        self._outer = operator.attrgetter(*names)
        self._kinds = [kind for _, kind, _ in bound]

    def agree(self, content: Mapping[str, object], message: SignedMessage) -> bool:
        """Return whether the content names every field with the field's own type and value."""
        try:
            said: tuple[object, ...] = self._said(content)
        except KeyError:
            return False
        # The types, too: True equals 1 and 8.0 equals 8.
        return said == self._outer(message) and list(map(type, said)) == self._kinds


_BINDINGS = {message_class: _Binding(bound) for message_class, bound in _BOUND.items()}


def check_content_hash(message: SignedMessage) -> None:
    """Check that ``content_hash`` is SHA-256 of payload, proof blob or params.

    Raises:
        EnvelopeError: CONTENT_HASH.
    """
    if hashlib.sha256(content_of(message)).digest() != message.content_hash:
        raise EnvelopeError(Code.CONTENT_HASH, "content_hash", f"is not SHA-256 of {content_name(message)}")


def check_signature(message: SignedMessage) -> None:
    """Check the producer's signature and every custody entry's.

    Raises:
        EnvelopeError: KEY_MISMATCH, SIGNATURE or CUSTODY_SIGNATURE.
    """
    if message.producer_id != message.pubkey:
        raise EnvelopeError(Code.KEY_MISMATCH, "producer_id", "is not the key that signed")
    if not _is_signed(message):
        raise EnvelopeError(
            Code.SIGNATURE, "signature", "is not the producer's over domain, ts, producer_id, nonce, content_hash"
        )
    if isinstance(message, Evidence):
        for index, entry in enumerate(message.coc):
            if not verify(entry.actor_id, custody_sign_bytes(entry.ref_hash, entry.actor_id, entry.ts), entry.signature):
                raise EnvelopeError(Code.CUSTODY_SIGNATURE, f"coc[{index}].signature", "is not the actor's")


def _is_signed(message: SignedMessage) -> bool:
    if not isinstance(message, OperatorCommand) and message.batch:
        signed = signed_root(leaf_of(sign_bytes(message)), message.batch)
        return signed is not None and _verify_root(message.pubkey, signed, message.signature)
    if verify(message.pubkey, sign_bytes(message), message.signature):
        return True
    return isinstance(message, Policy) and verify(message.pubkey, policy_sign_bytes_with_zero(message), message.signature)


@lru_cache(maxsize=4_096)
def _verify_root(public: bytes, signed: bytes, signature: bytes) -> bool:
    """Verify a batch's signature once for all its messages; remembering an answer that never changes keeps this pure."""
    return verify(public, signed, signature)


def read_content(message: SignedMessage) -> dict[str, object]:
    """Return the content as a JSON object.

    Raises:
        EnvelopeError: CONTENT_FORMAT.
    """
    try:
        content = orjson.loads(content_of(message))
    except orjson.JSONDecodeError as error:
        raise EnvelopeError(Code.CONTENT_FORMAT, content_name(message), f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise EnvelopeError(Code.CONTENT_FORMAT, content_name(message), "is not a JSON object")
    return content


def _said(content: dict[str, object], name: str, kind: type) -> object | None:
    """Return what the content says of a field if it has the field's type, else None; integers count as floats."""
    value = content.get(name)
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else None


def bind_fields(message: S, *, accept_unbound_fields: bool = False) -> S:
    """Compare the outer fields with the signed content and return the message that may be used.

    Raises:
        EnvelopeError: CONTENT_FORMAT, or FIELD_MISMATCH naming the first field that differs.
    """
    content = read_content(message)
    if accept_unbound_fields:
        return _taken_from_content(message, content)
    if not _BINDINGS[type(message)].agree(content, message):
        for name, kind, _ in _BOUND[type(message)]:
            said = _said(content, name, kind)
            if said is None or said != getattr(message, name):
                raise _mismatch(message, name, "says otherwise" if name in content else "does not name it")
    if isinstance(message, Evidence):
        if content.get("refs") != [ref.hex() for ref in message.refs]:
            raise _mismatch(message, "refs", "says otherwise" if "refs" in content else "does not name them")
        # The custody entries carry signatures of their own; a blob that lists those also fixes which entries there are.
        if "coc" in content and content["coc"] != [entry.signature.hex() for entry in message.coc]:
            raise _mismatch(message, "coc", "lists other entries")
    return message


def _mismatch(message: SignedMessage, name: str, text: str) -> EnvelopeError:
    return EnvelopeError(Code.FIELD_MISMATCH, name, f"the signed {content_name(message)} {text}")


def _taken_from_content(message: S, content: dict[str, object]) -> S:
    fields: dict[str, object] = {}
    for name, kind, empty in _BOUND[type(message)]:
        said = _said(content, name, kind)
        fields[name] = said if said is not None and _fits(name, said) else empty
    fields["id"] = fields["id"] or message.content_hash.hex()
    if isinstance(message, Evidence):
        if content.get("refs") != [ref.hex() for ref in message.refs]:
            fields["refs"] = ()
        if content.get("coc") != [entry.signature.hex() for entry in message.coc]:
            fields["coc"] = ()
    return dataclasses.replace(message, **fields)  # type: ignore[arg-type]  # names and types are those of _BOUND


def _fits(name: str, value: object) -> bool:
    """Return whether a value of the content may stand in the outer field: the limits of ``structure``."""
    if isinstance(value, str):
        return "\0" not in value and len(value.encode()) <= (ID_MAX if name == "id" else TEXT_MAX)
    if isinstance(value, float):
        return 0.0 <= value <= 1.0
    return isinstance(value, int) and 1 <= value <= 10


def verify_intrinsic(message: S, *, accept_unbound_fields: bool = False) -> S:
    """Do every intrinsic check and return the message that may be used (see ``bind_fields``).

    Raises:
        EnvelopeError: the first fault found, never with a code of ``LOCAL_CODES``.
    """
    check_structure(message)
    check_content_size(message)
    check_content_hash(message)
    check_signature(message)
    return bind_fields(message, accept_unbound_fields=accept_unbound_fields)


def verify_control(message: ControlMessage, cleared: bytes, domain: bytes) -> None:
    """Check a control message by itself; ``cleared`` is its serialisation with signature, pubkey and alg cleared.

    Raises:
        EnvelopeError: the first fault found.
    """
    check_control_structure(message)
    if isinstance(message, PolicyUpdate) and hashlib.sha256(message.rule_data).digest() != message.rule_hash:
        raise EnvelopeError(Code.CONTENT_HASH, "rule_hash", "is not SHA-256 of rule_data")
    if message.producer_id != message.pubkey:
        raise EnvelopeError(Code.KEY_MISMATCH, "producer_id", "is not the key that signed")
    if not verify(message.pubkey, domain + cleared, message.signature):
        raise EnvelopeError(
            Code.SIGNATURE, "signature", f"is not the sender's over {domain.decode(errors='replace')} and the message"
        )
