"""The JSON of a policy or a command, read so that every node gets the same answer.

The strict reader refuses what parsers disagree about, but its own limits on nesting and on the length of numbers are the
interpreter's: they depend on the stack above and on the environment. So both are bounded here first, far below any of those.
"""

from __future__ import annotations

from typing import Final

import orjson

from cybermesh.strictjson import JsonError, load

BYTES_MAX: Final = 512 * 1024
DEPTH_MAX: Final = 16
_NUMBER_MAX: Final = float(1 << 63)


def read_params(data: bytes) -> dict[str, object]:
    """Return the object in ``data``, at most 512 KiB, nested at most 16 deep, with numbers below 2**63.

    Raises:
        JsonError: it is something else.
    """
    try:
        values: list[object] = [orjson.loads(data)]
    except orjson.JSONDecodeError as error:
        raise JsonError("", "not JSON") from error
    for _ in range(DEPTH_MAX):
        values = [inner for value in values for inner in _inside(value)]
        if not values:
            return load(data, BYTES_MAX)
    raise JsonError("", f"nested more than {DEPTH_MAX} deep")


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list):
        return value
    if isinstance(value, int | float) and not -_NUMBER_MAX < value < _NUMBER_MAX:
        raise JsonError("", "a number is out of range")
    return []
