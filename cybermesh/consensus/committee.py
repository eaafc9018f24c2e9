"""Who votes, and how many of them are enough.

Any two quorums must share an honest validator (2q - n > f) and the honest ones alone must be able to form one (q ≤ n - f).
``quorum`` is the only place where that number is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.types import COMMITTEE_MAX, ZERO_HASH, BlockHash, QuorumCert, Round

FIRST_EPOCH: Final = 1
_GENESIS_DOMAIN: Final = b"cm/genesis/1"


def faults(n: int) -> int:
    """Return how many of ``n`` validators may be arbitrarily faulty."""
    return (n - 1) // 3


def quorum(n: int) -> int:
    """Return how many of ``n`` validators must sign: n - f."""
    return n - faults(n)


@dataclass(frozen=True, slots=True)
class Committee:
    """The validators of one epoch, numbered in order of their public keys (32 bytes each).

    ``last_block`` is the hash of the block that ended the epoch before, None in the first epoch.
    """

    chain_id: bytes
    epoch: int
    public_keys: tuple[bytes, ...]
    quorum: int
    last_block: bytes | None = None

    @classmethod
    def of(
        cls, chain_id: bytes, public_keys: Iterable[bytes], *, epoch: int = FIRST_EPOCH, last_block: bytes | None = None
    ) -> Committee:
        """Return the committee of these keys, whatever order they come in.

        Raises:
            ValueError: no key, a key twice or of a wrong length, or more than ``COMMITTEE_MAX`` keys.
        """
        keys = tuple(sorted(public_keys))
        if not 1 <= len(keys) <= COMMITTEE_MAX:
            raise ValueError(f"a committee has 1 to {COMMITTEE_MAX} validators, not {len(keys)}")
        if len(set(keys)) != len(keys) or any(len(key) != 32 for key in keys):
            raise ValueError("the validators of a committee have different public keys of 32 bytes")
        return cls(chain_id, epoch, keys, quorum(len(keys)), last_block)

    def successor(self, public_keys: Iterable[bytes], last_block: bytes) -> Committee:
        """Return the committee of the next epoch, which begins after ``last_block``.

        Raises:
            ValueError: like ``of``.
        """
        return Committee.of(self.chain_id, public_keys, epoch=self.epoch + 1, last_block=last_block)

    @property
    def n(self) -> int:
        """Number of validators."""
        return len(self.public_keys)

    @property
    def f(self) -> int:
        """Number of validators that may be faulty."""
        return faults(len(self.public_keys))

    def index_of(self, public_key: bytes) -> int | None:
        """Return the number of the validator with this key, None for a stranger."""
        return self.public_keys.index(public_key) if public_key in self.public_keys else None

    def genesis_hash(self, last_block: bytes | None = None) -> BlockHash:
        """Return the identity of the epoch's root, from the previous epoch's last block (the chain id in the first epoch).

        It is never derived from a certificate: certificates of one block are not unique.
        """
        root = last_block or self.last_block or self.chain_id
        keys = b"".join(self.public_keys)
        return BlockHash(hashlib.sha256(_GENESIS_DOMAIN + root + self.epoch.to_bytes(4, "big") + keys).digest())

    def genesis_cert(self, last_block: bytes | None = None) -> QuorumCert:
        """Return the certificate of the epoch's root: nobody signed it, it is valid only by equality."""
        return QuorumCert(self.epoch, Round(0), self.genesis_hash(last_block), Round(0), ZERO_HASH, ())
