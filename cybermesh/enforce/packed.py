"""Rules as bytes: what an agent keeps of a policy, so that a restart parses no JSON and memory holds no rule twice. Pure.

A record is one rule without its policy and its end, which the decision has: match and rate, in 44 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from cybermesh.enforce.rules import Effect, Element, Match, Rate, Rule
from cybermesh.policy import Direction

_RECORD: Final = struct.Struct(">BBB16sBBHH?QII")
_EFFECTS: Final = tuple(Effect)
_DIRECTIONS: Final = tuple(Direction)
_NO_RATE: Final = (0, 0, 0)


class PackedError(ValueError):
    """Bytes that are no packed rules."""


def pack(rules: Iterable[Rule]) -> bytes:
    """Return the records of ``rules``."""
    return b"".join(
        _RECORD.pack(
            _EFFECTS.index(match.effect),
            _DIRECTIONS.index(match.direction),
            match.version,
            match.base.to_bytes(16, "big"),
            match.length,
            match.protocol,
            match.first,
            match.last,
            match.area,
            *(rate or _NO_RATE),
        )
        for _, (match, _, rate) in rules
    )


def unpack(data: bytes, policy_id: str, expires_at_ms: int) -> tuple[Rule, ...]:
    """Return the rules of a policy with their end.

    Raises:
        PackedError: The bytes are no records.
    """
    try:
        return tuple(_rules(data, policy_id, expires_at_ms))
    except (struct.error, IndexError) as fault:
        raise PackedError(f"{policy_id}: {fault}") from fault


def _rules(data: bytes, policy_id: str, expires_at_ms: int) -> Iterator[Rule]:
    for fields in _RECORD.iter_unpack(data):
        effect, direction, version, base, length, protocol, first, last, area, packets, unit_s, burst = fields
        match = Match(
            _EFFECTS[effect], _DIRECTIONS[direction], version, int.from_bytes(base, "big"), length, protocol, first, last, area
        )
        yield Rule(policy_id, Element(match, expires_at_ms, Rate(packets, unit_s, burst) if packets else None))
