"""Signatures for the simulator: keyed hashes, a hundred times cheaper than Ed25519 and as hard to forge from inside.

Whoever verifies looks the secret up, which no replica can do: it only ever sees the ``sign`` of its own key.
"""

from __future__ import annotations

import hashlib

from cybermesh.consensus.certificates import SignatureCheck, Signer
from cybermesh.keys import SigningKey, verify


class Token:
    """One validator's key."""

    def __init__(self, name: bytes) -> None:
        self._secret = hashlib.sha256(b"secret" + name).digest()
        self.public = hashlib.sha256(b"public" + name).digest()

    def sign(self, message: bytes) -> bytes:
        """Return the 64 bytes that stand for a signature."""
        return hashlib.blake2b(message, key=self._secret, digest_size=64).digest()


class TokenCheck:
    """Verifies the tokens of a set of keys."""

    def __init__(self, tokens: list[Token]) -> None:
        self._by_public = {token.public: token for token in tokens}

    def __call__(self, public_key: bytes, message: bytes, signature: bytes, /) -> bool:
        """Return whether the key's holder made the signature."""
        token = self._by_public.get(public_key)
        return token is not None and token.sign(message) == signature


def make_keys(n: int, *, is_real: bool) -> tuple[dict[bytes, Signer], SignatureCheck]:
    """Return ``n`` signers by public key and the check that goes with them: tokens, or real Ed25519."""
    names = [index.to_bytes(32, "big") for index in range(n)]
    if is_real:
        keys = [SigningKey(hashlib.sha256(b"seed" + name).digest()) for name in names]
        return {key.public: key for key in keys}, verify
    tokens = [Token(name) for name in names]
    return {token.public: token for token in tokens}, TokenCheck(tokens)
