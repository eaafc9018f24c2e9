"""Gives memory back after a restart has built a hundred thousand rules: the allocator keeps what was only passing.

The text of a large transaction and the library's copy of it are half as large as what stays.
"""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Ask the C library to return what is free; one that cannot (musl) is left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
