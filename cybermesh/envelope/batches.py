"""One signature for many messages: the producer signs the root of a Merkle tree over their sign bytes, once.

Rules:

- the tree is that of RFC 9162; a leaf is ``SHA-256(0x00 || sign bytes)`` of a message, so it covers all that the message's own
  signature would cover, its domain and its producer included;
- signed is ``"ai.batch.v1" || size u32 || root``, big-endian: with the size, a message has one place in the tree and no other;
- every message carries its place, ``index u32 || size u32 || path``, and is verified by itself, whatever became of the others;
- a message without a place is signed by itself, as the earlier system's are.

The ledger has the same tree for its receipts, layers above this one and as a growing log; the tests compare the two.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from cybermesh.envelope import Code, EnvelopeError

BATCH_DOMAIN = b"ai.batch.v1"
SIZE_MAX = 65_536
PATH_MAX = 16
_PLACE = struct.Struct(">II")
_HASH_BYTES = 32


def leaf_of(signed: bytes) -> bytes:
    """Return the leaf of a message's sign bytes."""
    return hashlib.sha256(b"\x00" + signed).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_and_places(leaves: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """Return the root over 1 to 65,536 leaves, and of each its place with its path."""
    assert 0 < len(leaves) <= SIZE_MAX
    paths: list[list[bytes]] = [[] for _ in leaves]
    level, spans = list(leaves), [[index] for index in range(len(leaves))]
    while len(level) > 1:
        # Pairs from the left; an odd last one goes up as it is, which gives RFC 9162's tree.
        for left in range(0, len(level) - 1, 2):
            for index in spans[left]:
                paths[index].append(level[left + 1])
            for index in spans[left + 1]:
                paths[index].append(level[left])
        level = [_node(*level[at : at + 2]) if at + 1 < len(level) else level[at] for at in range(0, len(level), 2)]
        spans = [[index for span in spans[at : at + 2] for index in span] for at in range(0, len(spans), 2)]
    return level[0], [_PLACE.pack(index, len(leaves)) + b"".join(path) for index, path in enumerate(paths)]


def check_place(place: bytes) -> None:
    """Check the form of a place; one that no tree has is found by ``signed_root``.

    Raises:
        EnvelopeError: STRUCTURE.
    """
    hashes, rest = divmod(len(place) - _PLACE.size, _HASH_BYTES)
    if len(place) < _PLACE.size or rest or hashes > PATH_MAX:
        raise EnvelopeError(Code.STRUCTURE, "batch", f"must be 8 bytes and at most {PATH_MAX} hashes, has {len(place)} bytes")
    index, size = _PLACE.unpack_from(place)
    if not index < size <= SIZE_MAX:
        raise EnvelopeError(Code.STRUCTURE, "batch", f"place {index} of {size}; a batch has at most {SIZE_MAX}")


def signed_root(leaf: bytes, place: bytes) -> bytes | None:
    """Return what the batch's signature covers, None when the path does not fit the place (RFC 9162, 2.1.3.2)."""
    index, size = _PLACE.unpack_from(place)
    last, root = size - 1, leaf
    for start in range(_PLACE.size, len(place), _HASH_BYTES):
        sibling = place[start : start + _HASH_BYTES]
        if last == 0:
            return None
        if index & 1 or index == last:
            root = _node(sibling, root)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            root = _node(root, sibling)
        index, last = index >> 1, last >> 1
    return batch_sign_bytes(size, root) if last == 0 else None


def batch_sign_bytes(size: int, root: bytes) -> bytes:
    """Return what the signature of a batch covers."""
    return BATCH_DOMAIN + size.to_bytes(4, "big") + root
