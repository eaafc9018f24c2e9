"""Control messages signed and opened: the codec and the envelope joined.

The signature of a control message says only who sent it; what it claims is proven by the quorum proof inside, which is not this
module's business. Domains come from the genesis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from cybermesh.envelope.intrinsic import verify_control
from cybermesh.envelope.local import check_producer
from cybermesh.envelope.signing import (
    ACK_DOMAIN,
    COMMITS_DOMAIN,
    CONTROL_POLICY_DOMAIN,
    sign_control,
    with_signer,
)
from cybermesh.keys import KeyRing, SigningKey
from cybermesh.messages import Ack, Commit, ControlMessage, EpochChange, PolicyUpdate
from cybermesh.wire import codec

C = TypeVar("C", bound=ControlMessage)


@dataclass(frozen=True, slots=True)
class ControlDomains:
    """The signing domains of the genesis."""

    commits: bytes = COMMITS_DOMAIN
    policy: bytes = CONTROL_POLICY_DOMAIN
    ack: bytes = ACK_DOMAIN

    def of(self, message: ControlMessage) -> bytes:
        """Return the domain under which the message is signed."""
        if isinstance(message, Commit):
            return self.commits
        return self.ack if isinstance(message, Ack) else self.policy


def seal(message: C, key: SigningKey, domains: ControlDomains) -> C:
    """Return the message signed by ``key``; producer, signature, pubkey and alg are set here, whatever they were."""
    named = with_signer(message, key)
    return sign_control(named, codec.encode_cleared(named), domains.of(named), key)


def open_commit(raw: bytes, ring: KeyRing, domains: ControlDomains) -> Commit:
    """Read and verify a record of ``control.commits.v1``.

    Raises:
        EnvelopeError: the first fault found.
    """
    return _open(codec.COMMIT.decode(raw), ring, domains)


def open_policy(raw: bytes, ring: KeyRing, domains: ControlDomains) -> PolicyUpdate | EpochChange:
    """Read and verify a record of ``control.policy.v1``.

    Raises:
        EnvelopeError: the first fault found.
    """
    if codec.is_epoch_change(raw):
        return _open(codec.EPOCH_CHANGE.decode(raw), ring, domains)
    return _open(codec.POLICY_UPDATE.decode(raw), ring, domains)


def open_ack(raw: bytes, ring: KeyRing, domains: ControlDomains) -> Ack:
    """Read and verify a record of ``control.policy.ack.v1``.

    Raises:
        EnvelopeError: the first fault found.
    """
    return _open(codec.ACK.decode(raw), ring, domains)


def _open(message: C, ring: KeyRing, domains: ControlDomains) -> C:
    verify_control(message, codec.encode_cleared(message), domains.of(message))
    check_producer(message, ring)
    return message
