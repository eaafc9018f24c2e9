"""The values of the protocol, and the bytes that signatures and proofs are made of.

Rules of this file:
* A value is immutable and carries no behaviour beyond its own encoding.
* Whatever is hashed or signed is fixed-width big-endian behind a domain; protobuf is never hashed, it is not canonical.
* A header is 248 bytes. It commits to every byte of the payload in order, to the state after the block, to the certificate
  it extends and to who signed that certificate, so one certificate over it proves all of them.
* A certificate's digest covers what is certified and not which signatures certify it: two valid ones for a block are alike.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NewType

Round = NewType("Round", int)
Height = NewType("Height", int)
BlockHash = NewType("BlockHash", bytes)

PROTOCOL_VERSION: Final = 1
COMMITTEE_MAX: Final = 64
"""Bits of ``Header.parent_signers``, hence the largest committee."""
ZERO_HASH: Final = BlockHash(bytes(32))
NO_CERT: Final = bytes(32)
"""What a header holds in ``tc_digest`` when the block carries no timeout certificate."""

_BLOCK_DOMAIN: Final = b"cm/block/1"
_QC_DOMAIN: Final = b"cm/qc/1"
_TC_DOMAIN: Final = b"cm/tc/1"
_HEADER: Final = struct.Struct(">H32sIQQHQ32sQQ32s32s32s32sQ")
_QC: Final = struct.Struct(">IQ32sQ32s")
_TC: Final = struct.Struct(">IQ")
_TC_ENTRY: Final = struct.Struct(">HQ")
HEADER_BYTES: Final = _HEADER.size


class MalformedError(ValueError):
    """Bytes from outside that are not the value they claim to be; the text says which part is wrong."""


@dataclass(frozen=True, slots=True)
class Header:
    """What is certified about a block. Digests are 32 bytes; ``time_ms`` is milliseconds since 1970.

    ``parent_signers`` has bit i set when validator i signed the certificate that the block extends; ``state_root`` and
    ``decision_seq`` are those after the block.
    """

    version: int
    chain_id: bytes
    epoch: int
    round: Round
    height: Height
    author: int
    time_ms: int
    parent_hash: BlockHash
    parent_round: Round
    parent_signers: int
    qc_digest: bytes
    tc_digest: bytes
    payload_root: bytes
    state_root: bytes
    decision_seq: int
    hash: BlockHash = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hash", BlockHash(hashlib.sha256(_BLOCK_DOMAIN + self.encode()).digest()))

    def encode(self) -> bytes:
        """Return the 248 bytes a decision proof carries.

        Raises:
            MalformedError: a field does not fit its width.
        """
        if any(len(digest) != 32 for digest in self._digests()):
            raise MalformedError("header: every digest has 32 bytes")
        try:
            return _HEADER.pack(
                self.version, self.chain_id, self.epoch, self.round, self.height, self.author, self.time_ms,
                self.parent_hash, self.parent_round, self.parent_signers, self.qc_digest, self.tc_digest,
                self.payload_root, self.state_root, self.decision_seq,
            )  # fmt: skip
        except struct.error as error:
            raise MalformedError(f"header: {error}") from error

    def _digests(self) -> tuple[bytes, ...]:
        return (self.chain_id, self.parent_hash, self.qc_digest, self.tc_digest, self.payload_root, self.state_root)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Return the header these bytes encode; every 248 bytes are one, and only one.

        Raises:
            MalformedError: another length.
        """
        if len(data) != HEADER_BYTES:
            raise MalformedError(f"header: {len(data)} bytes instead of {HEADER_BYTES}")
        return cls(*_HEADER.unpack(data))


@dataclass(frozen=True, slots=True)
class QuorumCert:
    """A quorum voted for ``block_hash`` in ``round``; ``signatures`` are (validator, 64 bytes), ascending by validator.

    When ``parent_round + 1 == round`` it also proves to anybody that the parent is committed.
    """

    epoch: int
    round: Round
    block_hash: BlockHash
    parent_round: Round
    parent_hash: BlockHash
    signatures: tuple[tuple[int, bytes], ...]
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        packed = _QC.pack(self.epoch, self.round, self.block_hash, self.parent_round, self.parent_hash)
        object.__setattr__(self, "digest", hashlib.sha256(_QC_DOMAIN + packed).digest())

    @property
    def proves_parent(self) -> bool:
        """Whether this certificate commits its parent (rule R5)."""
        return self.parent_round + 1 == self.round

    @property
    def signers(self) -> int:
        """The voters as a bitmap, bit i for validator i."""
        return bitmap(voter for voter, _ in self.signatures)


@dataclass(frozen=True, slots=True)
class Vote:
    """One validator's signature under a block and its parent."""

    epoch: int
    round: Round
    block_hash: BlockHash
    parent_round: Round
    parent_hash: BlockHash
    voter: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class TimeoutCert:
    """A quorum gave up on ``round``; ``signatures`` are (validator, round of its highest certificate, 64 bytes), ascending.

    ``high_qc`` is a certificate of the highest of those rounds.
    """

    epoch: int
    round: Round
    high_qc: QuorumCert
    signatures: tuple[tuple[int, Round, bytes], ...]
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = b"".join(_TC_ENTRY.pack(voter, high_round) for voter, high_round, _ in self.signatures)
        object.__setattr__(self, "digest", hashlib.sha256(_TC_DOMAIN + _TC.pack(self.epoch, self.round) + entries).digest())

    @property
    def high_round(self) -> Round:
        """The highest certified round that any of the signers knew."""
        return max(high_round for _, high_round, _ in self.signatures)


@dataclass(frozen=True, slots=True)
class Timeout:
    """One validator gives up on a round. Both certificates travel along, so the receiver can always enter the round."""

    epoch: int
    round: Round
    high_qc: QuorumCert
    last_tc: TimeoutCert | None
    voter: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A proposal, and after its commit the chain's record: header, what it extends, opaque transactions, author's signature."""

    header: Header
    qc: QuorumCert
    tc: TimeoutCert | None
    payload: tuple[bytes, ...]
    signature: bytes

    @property
    def hash(self) -> BlockHash:
        """The identity of the block: the digest of its header."""
        return self.header.hash

    @property
    def round(self) -> Round:
        """The round it was proposed in."""
        return self.header.round

    @property
    def height(self) -> Height:
        """Its distance from genesis."""
        return self.header.height


@dataclass(frozen=True, slots=True)
class Proposal:
    """A block on its way: its transactions are named by their digests, which the header's payload root does not cover."""

    header: Header
    qc: QuorumCert
    tc: TimeoutCert | None
    digests: tuple[bytes, ...]
    signature: bytes

    @property
    def hash(self) -> BlockHash:
        """The identity of the block."""
        return self.header.hash


@dataclass(frozen=True, slots=True)
class GetPayload:
    """Asks the sender of a proposal for transactions of the block."""

    epoch: int
    block_hash: BlockHash
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    """Transactions of a block, as far as one message holds."""

    epoch: int
    block_hash: BlockHash
    transactions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Sync:
    """Where a node stands; answers messages of old rounds and is exchanged on every connection.

    ``boot`` numbers the starts of the sender's key; ``wants_reply`` asks for the receiver's own.
    """

    epoch: int
    high_qc: QuorumCert
    last_tc: TimeoutCert | None
    committed_height: Height
    boot: int
    wants_reply: bool


@dataclass(frozen=True, slots=True)
class GetBlocks:
    """Asks for the chain from a height on towards the block ``wanted``."""

    epoch: int
    from_height: Height
    wanted: BlockHash


@dataclass(frozen=True, slots=True)
class Blocks:
    """Consecutive blocks, oldest first, and a certificate over the last one.

    The last block of an epoch comes with the certificate that committed it, and with the headers between the two, if any.
    """

    epoch: int
    blocks: tuple[Block, ...]
    certificate: QuorumCert
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True, slots=True)
class Forward:
    """The oldest transaction of a replica that has waited in vain for a proposal of this round."""

    epoch: int
    round: Round
    transaction: bytes


@dataclass(frozen=True, slots=True)
class DoubleVote:
    """Two votes by one key in one round."""

    first: Vote
    second: Vote


@dataclass(frozen=True, slots=True)
class DoubleTimeout:
    """Two timeouts by one key in one round that report different certificates."""

    first: Timeout
    second: Timeout


@dataclass(frozen=True, slots=True)
class DoubleProposal:
    """Two headers signed by one leader in one round, each with its signature."""

    first: Header
    first_signature: bytes
    second: Header
    second_signature: bytes


Evidence = DoubleVote | DoubleTimeout | DoubleProposal
"""Proof that the holder of a key broke the protocol; verifiable by anybody who holds the committee."""

Message = Block | Vote | Timeout | Sync | GetBlocks | Blocks | Forward
"""What replicas say to each other."""

Parcel = Proposal | GetPayload | Payload
"""How a block's payload gets from one replica to another."""


def accused(evidence: Evidence) -> int:
    """Return the validator that the evidence names."""
    if isinstance(evidence, DoubleProposal):
        return evidence.first.author
    return evidence.first.voter


def bitmap(members: Iterable[int]) -> int:
    """Return an integer with the bits of ``members`` set."""
    bits = 0
    for member in members:
        bits |= 1 << member
    return bits


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the RFC 9162 (section 2.1.1) Merkle tree hash of the leaves in order; of none, the hash of nothing."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
    # Pairing neighbours and carrying an odd last node upwards gives the RFC's split at the largest power of two.
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]
