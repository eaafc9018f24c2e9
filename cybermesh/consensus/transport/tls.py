"""TLS between validators: who is at the other end is proven by a committee key, and by nothing else.

Rules:

- the genesis is all that is needed. A validator's trust anchor is a name and a public key (RFC 5280, 6.1.1 d), so every node
  computes the anchors of all members; no certificate is exchanged, stored or renewed (docs/adr/0009-validator-transport.md);
- a process makes a fresh TLS key and certifies it with the validator's key, which itself never reaches OpenSSL's files;
- certificates do not expire: membership ends with the epoch, and a wrong clock must not keep a validator out;
- OpenSSL checks the chain; then ``member_of`` checks again, with the same verification as every vote, that a committee key
  signed the peer's certificate directly;
- TLS 1.3 only, both sides with a certificate, no session is ever resumed: a recorded handshake is worth nothing.
"""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from cybermesh.keys import SigningKey, verify

_ALWAYS: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NEVER: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # "no expiration", RFC 5280, 4.1.2.5


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """The settings of a process for its connections, by who opens them."""

    dial: ssl.SSLContext
    listen: ssl.SSLContext


def make_contexts(key: SigningKey, public_keys: Sequence[bytes]) -> TlsContexts:
    """Return contexts that show a certificate of ``key`` and trust those of ``public_keys`` (raw Ed25519, 32 bytes each)."""
    fresh = Ed25519PrivateKey.generate()
    anchors = b"".join(_anchor(public, fresh) for public in public_keys)
    shown = _leaf(key, fresh.public_key())
    dial, listen = (_context(protocol, anchors) for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER))
    secret = fresh.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for context in (dial, listen):
        _show(context, shown.public_bytes(serialization.Encoding.PEM) + secret)
    listen.num_tickets = 0
    return TlsContexts(dial, listen)


def member_of(certificate: bytes | None, public_keys: Sequence[bytes]) -> int | None:
    """Return the position of the key that signed a peer's certificate (DER), None when none of them did."""
    if certificate is None:
        return None
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        names = parsed.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        issuer = bytes.fromhex(str(names[0].value)) if len(names) == 1 else b""
        is_ours = issuer in public_keys and parsed.signature_algorithm_oid == SignatureAlgorithmOID.ED25519
        if is_ours and verify(issuer, parsed.tbs_certificate_bytes, parsed.signature):
            return list(public_keys).index(issuer)
    except (ValueError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType):
        return None
    return None


def _name(public: bytes) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, public.hex())])


def _builder(issuer: bytes, subject: x509.Name, key: Ed25519PublicKey) -> x509.CertificateBuilder:
    issuer_key = Ed25519PublicKey.from_public_bytes(issuer)
    return (
        x509.CertificateBuilder()
        .issuer_name(_name(issuer))
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_ALWAYS)
        .not_valid_after(_NEVER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _anchor(public: bytes, any_key: Ed25519PrivateKey) -> bytes:
    """Return a member's trust anchor; the format wants a signature, but an anchor's own proves nothing and nobody reads it."""
    builder = _builder(public, _name(public), Ed25519PublicKey.from_public_bytes(public))
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .sign(any_key, None)
        .public_bytes(serialization.Encoding.DER)
    )


def _leaf(key: SigningKey, tls_key: Ed25519PublicKey) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cybermesh validator transport")])
    return (
        _builder(key.public, subject, tls_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .sign(Ed25519PrivateKey.from_private_bytes(key.seed), None)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _context(protocol: int, anchors: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # a validator is its key, wherever it runs
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=anchors)
    return context


def _show(context: ssl.SSLContext, pem: bytes) -> None:
    """Load certificate and key; the standard library takes them from files only, so this one exists in memory only."""
    descriptor = os.memfd_create("cybermesh-tls")
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
