"""Ed25519 keys and the ring that says which public key may sign which message type.

Rules:

- signing and verification go through PyNaCl (libsodium), whose answer is the same on every node: it refuses small-order and
  non-canonical keys and signatures;
- ``verify`` never raises on bytes from outside: what is not a valid signature is False;
- a private key never shows in ``repr``, errors or comparisons. Files are ``keystore``'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import nacl.bindings
import nacl.exceptions

from cybermesh.messages import MessageType

SEED_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64


class SigningKey:
    """A private Ed25519 key; made of a 32-byte seed from a good source of randomness."""

    __slots__ = ("_secret", "public")

    def __init__(self, seed: bytes) -> None:
        assert len(seed) == SEED_BYTES
        self.public, self._secret = nacl.bindings.crypto_sign_seed_keypair(seed)

    @property
    def seed(self) -> bytes:
        """The 32 bytes the key was made of; for whoever stores it."""
        return self._secret[:SEED_BYTES]

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of ``message``; the same message always gives the same signature."""
        return nacl.bindings.crypto_sign(message, self._secret)[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()})"


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Return whether ``signature`` is ``public``'s signature of ``message``; wrong lengths are False."""
    if len(public) != PUBLIC_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        nacl.bindings.crypto_sign_open(signature + message, public)
    except nacl.exceptions.BadSignatureError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Whose key it is and what it may sign."""

    name: str
    public: bytes
    may_sign: frozenset[MessageType]


class KeyRing:
    """An immutable set of key holders; changes give a new ring.

    Raises:
        ValueError: the same key belongs to two holders.
    """

    __slots__ = ("_holders",)

    def __init__(self, holders: Iterable[KeyHolder] = ()) -> None:
        by_key: dict[bytes, KeyHolder] = {}
        for holder in holders:
            if holder.public in by_key:
                raise ValueError(f"{holder.name} and {by_key[holder.public].name} share the key {holder.public.hex()}")
            by_key[holder.public] = holder
        self._holders: Mapping[bytes, KeyHolder] = by_key

    def allows(self, public: bytes, message_type: MessageType) -> bool:
        """Return whether ``public`` may sign messages of this type."""
        holder = self._holders.get(public)
        return holder is not None and message_type in holder.may_sign

    def holder(self, public: bytes) -> KeyHolder | None:
        """Return whose key it is, or None."""
        return self._holders.get(public)

    def with_holder(self, holder: KeyHolder) -> KeyRing:
        """Return a ring in which ``holder`` has the rights given, and no others for the same key."""
        return KeyRing((*self.without(holder.public), holder))

    def without(self, public: bytes) -> KeyRing:
        """Return a ring in which ``public`` may sign nothing."""
        return KeyRing(holder for holder in self if holder.public != public)

    def __iter__(self) -> Iterator[KeyHolder]:
        return iter(self._holders.values())

    def __len__(self) -> int:
        return len(self._holders)
