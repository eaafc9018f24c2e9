"""Structure and sizes of messages: what every field must look like before anything is computed from it.

Rules: lengths of texts are bytes of UTF-8; required fields are not empty; times are not negative; no text has a zero character,
which some databases cannot hold, so that what one validator can store every other one can. The size of the content
(payload, params, proof blob) has its own code and its own place in the order on the wire, so it has its own function.
"""

from __future__ import annotations

from collections.abc import Iterable

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.batches import check_place
from cybermesh.envelope.nonces import NONCE_BYTES
from cybermesh.keys import PUBLIC_BYTES, SIGNATURE_BYTES
from cybermesh.messages import (
    ED25519,
    KIB,
    MIB,
    Ack,
    Anomaly,
    Commit,
    ControlMessage,
    EpochChange,
    Evidence,
    OperatorAction,
    OperatorCommand,
    Policy,
    PolicyAction,
    PolicyUpdate,
    SignedMessage,
)

MESSAGE_MAX = MIB
EPOCH_CHANGE_MAX = 2 * MIB - 64 * KIB  # up to 4,096 headers; the topic takes 2 MB
CONTENT_MAX = 512 * KIB
PROOF_BLOB_MAX = 256 * KIB
ID_MAX = 128
TEXT_MAX = 256
HASH_BYTES = 32
REFS_MAX = 1_000
CUSTODY_MAX = 100
COMMITTEE_MAX = 1_000

_OPERATOR_ACTIONS = frozenset(OperatorAction)
_POLICY_ACTIONS = frozenset(PolicyAction)
_RESULTS = frozenset({"applied", "failed"})


def _fail(place: str, text: str) -> EnvelopeError:
    return EnvelopeError(Code.STRUCTURE, place, text)


def _check_id(place: str, value: str) -> None:
    length = len(value) if value.isascii() else len(value.encode())
    if not 0 < length <= ID_MAX:
        raise _fail(place, f"must be 1 to {ID_MAX} bytes, has {length}")
    _check_no_zero(place, value)


def _check_text(place: str, value: str) -> None:
    length = len(value) if value.isascii() else len(value.encode())
    if length > TEXT_MAX:
        raise _fail(place, f"must be at most {TEXT_MAX} bytes, has {length}")
    _check_no_zero(place, value)


def _check_no_zero(place: str, value: str) -> None:
    if "\0" in value:
        raise _fail(place, "has a zero character")


def _check_name(place: str, value: str) -> None:
    if not value:
        raise _fail(place, "is missing")
    _check_text(place, value)


def _check_length(place: str, value: bytes, length: int) -> None:
    if len(value) != length:
        raise _fail(place, f"must be {length} bytes, has {len(value)}")


def _check_not_negative(place: str, value: int) -> None:
    if value < 0:
        raise _fail(place, "must not be negative")


def _check_signer(message: SignedMessage | ControlMessage) -> None:
    _check_length("producer_id", message.producer_id, PUBLIC_BYTES)
    _check_length("signature", message.signature, SIGNATURE_BYTES)
    _check_length("pubkey", message.pubkey, PUBLIC_BYTES)
    if message.alg != ED25519:
        raise EnvelopeError(Code.ALGORITHM, "alg", f"must be {ED25519}, is {message.alg[:32]!r}")


def _check_stamp(message: SignedMessage) -> None:
    _check_id("id", message.id)
    _check_not_negative("ts", message.ts)
    _check_length("content_hash", message.content_hash, HASH_BYTES)
    _check_length("nonce", message.nonce, NONCE_BYTES)
    _check_signer(message)


def check_structure(message: SignedMessage) -> None:
    """Check every field of a message but the size of its content.

    Raises:
        EnvelopeError: STRUCTURE or ALGORITHM, naming the field.
    """
    _check_stamp(message)
    if not isinstance(message, OperatorCommand) and message.batch:
        check_place(message.batch)
    if isinstance(message, Anomaly):
        _check_name("type", message.type)
        _check_text("source", message.source)
        _check_text("model_version", message.model_version)
        if not 1 <= message.severity <= 10:
            raise _fail("severity", f"must be 1 to 10, is {message.severity}")
        if not 0.0 <= message.confidence <= 1.0:  # false for NaN too
            raise _fail("confidence", f"must be 0 to 1, is {message.confidence}")
    elif isinstance(message, Evidence):
        _check_evidence(message)
    elif isinstance(message, Policy):
        _check_name("action", message.action)
        _check_text("rule", message.rule)
    elif message.action not in _OPERATOR_ACTIONS:
        raise _fail("action", f"unknown: {message.action[:32]!r}; known: {', '.join(OperatorAction)}")
    if not content_of(message):
        raise _fail(_CONTENT_NAMES[type(message)], "is missing")


def _check_evidence(message: Evidence) -> None:
    _check_name("evidence_type", message.evidence_type)
    _check_digests("refs", message.refs, REFS_MAX)
    if len(message.coc) > CUSTODY_MAX:
        raise _fail("coc", f"must be at most {CUSTODY_MAX} entries, has {len(message.coc)}")
    for index, entry in enumerate(message.coc):
        _check_length(f"coc[{index}].ref_hash", entry.ref_hash, HASH_BYTES)
        _check_length(f"coc[{index}].actor_id", entry.actor_id, PUBLIC_BYTES)
        _check_length(f"coc[{index}].signature", entry.signature, SIGNATURE_BYTES)
        _check_not_negative(f"coc[{index}].ts", entry.ts)


def _check_digests(place: str, digests: tuple[bytes, ...], count_max: int) -> None:
    if len(digests) > count_max:
        raise _fail(place, f"must be at most {count_max}, has {len(digests)}")
    for index, digest in enumerate(digests):
        if len(digest) != HASH_BYTES:
            raise _fail(f"{place}[{index}]", f"must be {HASH_BYTES} bytes, has {len(digest)}")


_CONTENT_NAMES: dict[type, str] = {Anomaly: "payload", Evidence: "proof_blob", Policy: "params", OperatorCommand: "params"}


def content_name(message: SignedMessage) -> str:
    """Return the name of the field that ``content_hash`` covers."""
    return _CONTENT_NAMES[type(message)]


def content_of(message: SignedMessage) -> bytes:
    """Return the bytes that ``content_hash`` covers."""
    if isinstance(message, Anomaly):
        return message.payload
    return message.proof_blob if isinstance(message, Evidence) else message.params


def check_content_size(message: SignedMessage) -> None:
    """Check the size of payload, proof blob or params.

    Raises:
        EnvelopeError: CONTENT_TOO_LARGE.
    """
    size_max = PROOF_BLOB_MAX if isinstance(message, Evidence) else CONTENT_MAX
    size = len(content_of(message))
    if size > size_max:
        raise EnvelopeError(Code.CONTENT_TOO_LARGE, content_name(message), f"must be at most {size_max} bytes, has {size}")


def check_control_structure(message: ControlMessage) -> None:
    """Check every field of a control message, content sizes included.

    Raises:
        EnvelopeError: STRUCTURE, ALGORITHM or CONTENT_TOO_LARGE, naming the field.
    """
    _check_signer(message)
    match message:
        case Commit():
            _check_commit(message)
        case PolicyUpdate():
            _check_policy_update(message)
        case EpochChange():
            _check_epoch_change(message)
        case Ack():
            _check_ack(message)


def _check_numbers(message: ControlMessage, names: Iterable[str]) -> None:
    for name in names:
        _check_not_negative(name, getattr(message, name))


def _check_texts(message: ControlMessage, names: Iterable[str]) -> None:
    for name in names:
        _check_text(name, getattr(message, name))


def _check_commit(message: Commit) -> None:
    _check_numbers(message, ("height", "timestamp"))
    _check_length("block_hash", message.block_hash, HASH_BYTES)
    _check_length("state_root", message.state_root, HASH_BYTES)
    for index, anomaly_id in enumerate(message.anomaly_ids):
        _check_id(f"anomaly_ids[{index}]", anomaly_id)
    for index, rejected in enumerate(message.rejected):
        _check_length(f"rejected[{index}].tx_digest", rejected.tx_digest, HASH_BYTES)
        _check_name(f"rejected[{index}].code", rejected.code)


def _check_policy_update(message: PolicyUpdate) -> None:
    _check_id("policy_id", message.policy_id)
    if message.action not in _POLICY_ACTIONS:
        raise _fail("action", f"unknown: {message.action[:32]!r}; known: {', '.join(PolicyAction)}")
    _check_texts(message, ("rule_type", "rollback_policy_id"))
    _check_length("rule_hash", message.rule_hash, HASH_BYTES)
    if len(message.rule_data) > CONTENT_MAX:
        raise EnvelopeError(
            Code.CONTENT_TOO_LARGE, "rule_data", f"must be at most {CONTENT_MAX} bytes, has {len(message.rule_data)}"
        )
    numbers = ("timestamp", "effective_height", "expiration_height", "decision_seq", "expires_at_ms", "epoch")
    _check_numbers(message, numbers)


def _check_epoch_change(message: EpochChange) -> None:
    _check_numbers(message, ("epoch", "last_height", "timestamp"))
    if not message.headers or not message.certificate:
        raise _fail("headers" if not message.headers else "certificate", "is missing")
    if not 0 < len(message.committee) <= COMMITTEE_MAX:
        raise _fail("committee", f"must have 1 to {COMMITTEE_MAX} members, has {len(message.committee)}")
    for index, member in enumerate(message.committee):
        _check_name(f"committee[{index}].name", member.name)
        _check_length(f"committee[{index}].pubkey", member.pubkey, PUBLIC_BYTES)


_ACK_TEXTS = (
    "scope_identifier",
    "tenant",
    "region",
    "reason",
    "error_code",
    "qc_reference",
    "controller_instance",
    "trace_id",
    "source_event_id",
    "sentinel_event_id",
    "ack_event_id",
    "request_id",
    "command_id",
    "workflow_id",
)


def _check_ack(message: Ack) -> None:
    _check_id("policy_id", message.policy_id)
    _check_texts(message, _ACK_TEXTS)
    if message.result not in _RESULTS:
        raise _fail("result", f"must be applied or failed, is {message.result[:32]!r}")
    _check_length("rule_hash", message.rule_hash, HASH_BYTES)
    _check_length("nonce", message.nonce, NONCE_BYTES)
    _check_numbers(message, ("applied_at", "acked_at", "applied_at_ms", "acked_at_ms", "height", "decision_seq"))
