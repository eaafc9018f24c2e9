"""Announcements of the kernel: whose they are, whatever the bytes."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from cybermesh.enforce.backends.watch import is_foreign

NEWGEN = 10 << 8 | 15


def announcement(kind: int, pid: int) -> bytes:
    attribute = struct.pack("=HH", 8, 2) + pid.to_bytes(4, "big")
    body = struct.pack("=BBH", 0, 0, 0) + struct.pack("=HH", 8, 1) + bytes(4) + attribute
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_only_a_transaction_of_somebody_else_is_foreign() -> None:
    assert is_foreign(announcement(NEWGEN, 7), {8})
    assert not is_foreign(announcement(NEWGEN, 8), {8})
    assert not is_foreign(announcement(NEWGEN - 1, 7), {8})
    assert is_foreign(announcement(NEWGEN, 8) + announcement(NEWGEN, 7), {8})


@given(st.binary(max_size=200))
def test_no_bytes_break_it(datagram: bytes) -> None:
    assert is_foreign(datagram, set()) in (True, False)
