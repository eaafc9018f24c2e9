"""Flow keys of packets, and their hash.

A key is that of ``meter_group`` with the address words as they lie in memory: the order of the two endpoints is another one,
but any order will do. The hash is NH (Black et al., UMAC, CRYPTO 1999) keyed by a secret: two keys collide with a chance of
at most 2**-32, whoever chose them without knowing the secret, so nobody can send flows that all meet in one place of the table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.kernels import part
from cybermesh.telemetry.packets import ICMP

U64 = npt.NDArray[np.uint64]

KEY_WORDS = 5
SECRET_WORDS = 2 * KEY_WORDS

_HALF = np.uint64(0xFFFF_FFFF)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


@part
def request_type(proto: int, kind: int) -> int:
    """Return the ICMP type under which a packet is keyed: a reply belongs to its request."""
    if proto == 1:
        if kind == 0:
            return 8
        if kind == 14 or kind == 16 or kind == 18:
            return kind - 1
    elif proto == 58 and kind == 129:
        return 128
    return kind


@part
def small_word(low: int, high: int, what: tuple[int, int, int], kind: int, code: int) -> np.uint64:
    """Return the key's last word; ``low`` and ``high`` are the endpoints' ports, ``what`` is protocol, class and family."""
    proto, klass, family = what
    if klass == ICMP:
        kind = request_type(proto, kind)
    else:
        kind = code = 0
    packed = low << 48 | high << 32 | proto << 24 | klass << 20 | family << 16 | kind << 8 | code
    return np.uint64(packed)


@part
def hash_key(a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64, e: np.uint64, secret: U64) -> np.uint64:
    """Return 64 bits, of which the upper ones are the best."""
    mixed = np.uint64(0)
    index = 0
    for word in (a, b, c, d, e):
        low = (word + secret[index]) & _HALF
        high = ((word >> np.uint64(32)) + secret[index + 1]) & _HALF
        mixed += low * high
        index += 2
    # NH's guarantee is about the whole sum; one multiplication carries it into the upper bits.
    mixed ^= mixed >> np.uint64(32)
    return mixed * _SPREAD
