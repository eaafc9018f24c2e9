"""The two messages that nobody signs: flow batches, which a sensor's own bus carries, and dead letters, which are reports."""

from __future__ import annotations

import hashlib

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.messages import KIB, DeadLetter, FlowFeatures

FLOW_SCHEMA = 1
FEATURES = 79
DEAD_LETTER_RAW_MAX = 512 * KIB
_WIDTHS = {
    "start_us": 8,
    "end_us": 8,
    "src": 16,
    "dst": 16,
    "family": 1,
    "sport": 2,
    "dport": 2,
    "proto": 1,
    "klass": 1,
    "icmp_type": 1,
    "icmp_code": 1,
    "end_reason": 1,
    "features": 8 * FEATURES,
}
# One flow takes 690 bytes of columns; the rest is for the tags, the sensor's name and the mask.
FLOWS_MAX = (1024 * KIB - 1024) // sum(_WIDTHS.values())
_TEXT_MAX = 256


def check_flow_features(batch: FlowFeatures) -> None:
    """Check the schema and every column's length; the values are checked by whoever reads them as numbers.

    Raises:
        EnvelopeError: STRUCTURE, naming the column.
    """
    if batch.schema != FLOW_SCHEMA:
        raise EnvelopeError(Code.STRUCTURE, "schema", f"must be {FLOW_SCHEMA}, is {batch.schema}")
    if len(batch.sensor.encode()) > _TEXT_MAX:
        raise EnvelopeError(Code.STRUCTURE, "sensor", f"must be at most {_TEXT_MAX} bytes")
    for name, width in _WIDTHS.items():
        size = len(getattr(batch, name))
        if size != batch.count * width:
            raise EnvelopeError(Code.STRUCTURE, name, f"must be {batch.count} x {width} bytes, has {size}")
    if len(batch.known) != FEATURES or not set(batch.known) <= {0, 1}:
        raise EnvelopeError(Code.STRUCTURE, "known", f"must be {FEATURES} bytes of 0 or 1")


def make_dead_letter(place: tuple[str, int, int], error: EnvelopeError, raw: bytes, time_ms: int, node: str) -> DeadLetter:
    """Return the report of a refused message; ``place`` is topic, partition and offset. Of a long message the head is kept."""
    topic, partition, offset = place
    return DeadLetter(
        topic=topic,
        partition=partition,
        offset=offset,
        code=error.code.value,
        text=f"{error.place}: {error.text}",
        time_ms=time_ms,
        node=node,
        raw=raw[:DEAD_LETTER_RAW_MAX],
        raw_sha256=hashlib.sha256(raw).digest(),
        raw_length=len(raw),
    )


def check_dead_letter(letter: DeadLetter) -> None:
    """Check lengths, and where the whole message is there its hash.

    Raises:
        EnvelopeError: STRUCTURE or CONTENT_HASH, naming the field.
    """
    if not letter.topic or not letter.code:
        raise EnvelopeError(Code.STRUCTURE, "code" if letter.topic else "topic", "is missing")
    if len(letter.raw) != min(letter.raw_length, DEAD_LETTER_RAW_MAX):
        raise EnvelopeError(
            Code.STRUCTURE, "raw", f"must be {min(letter.raw_length, DEAD_LETTER_RAW_MAX)} bytes, has {len(letter.raw)}"
        )
    if len(letter.raw_sha256) != hashlib.sha256().digest_size:
        raise EnvelopeError(Code.STRUCTURE, "raw_sha256", "must be 32 bytes")
    if letter.raw_length <= DEAD_LETTER_RAW_MAX and hashlib.sha256(letter.raw).digest() != letter.raw_sha256:
        raise EnvelopeError(Code.CONTENT_HASH, "raw_sha256", "is not SHA-256 of raw")
