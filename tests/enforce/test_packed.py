"""Packed rules: what goes in comes out, and bytes that are none are refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.enforce.packed import PackedError, pack, unpack
from cybermesh.enforce.rules import Rule
from tests.enforce.test_reconcile import limit_areas, plain_areas, points, port_areas

RECORD_BYTES = 44
RULES = st.lists(st.one_of(points, plain_areas, port_areas, limit_areas), max_size=5).map(
    lambda found: tuple(Rule("p", element) for element in found)
)


@given(RULES)
def test_rules_come_back_as_they_were_with_the_end_they_are_given(rules: tuple[Rule, ...]) -> None:
    back = unpack(pack(rules), "p", 77)
    assert back == tuple(rule._replace(element=rule.element._replace(expires_at_ms=77)) for rule in rules)


@given(st.binary(max_size=120))
def test_any_bytes_are_rules_or_one_error(data: bytes) -> None:
    with contextlib.suppress(PackedError):
        assert len(unpack(data, "p", 0)) == len(data) // RECORD_BYTES


def test_half_a_record_is_refused() -> None:
    with pytest.raises(PackedError, match="p: "):
        unpack(b"x", "p", 0)
