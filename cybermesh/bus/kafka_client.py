"""How to reach the brokers, and what their errors mean: shared by the Kafka bus' producer, consumers and administration.

Rules:

- every error of aiokafka becomes a ``BusError`` here or is answered by another attempt; none gets past this package;
- an error is final when only a person can mend it: credentials, certificates, rights, sizes. Everything else is an environment
  that is away for now, and is tried again with growing pauses for as long as it takes;
- ``Troubles`` keeps one line for each part that does not work at the moment, for /ready.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from aiokafka import errors
from aiokafka.conn import create_conn

from cybermesh.bus import BusError
from cybermesh.messages import MIB

RECORD_MAX = 2 * MIB
REQUEST_TIMEOUT_MS = 15_000
# What leaving may take when a broker accepts requests and does not answer; asyncio ends what is left with the event loop.
LEAVE_S = 1.0
PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 5.0

Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
Compression = Literal["none", "snappy", "zstd", "lz4", "gzip"]
T = TypeVar("T")

_FINAL = (
    errors.AuthenticationFailedError,
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.IllegalArgumentError,
    errors.InvalidTopicError,
    errors.InvalidGroupIdError,
    errors.InconsistentGroupProtocolError,
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidReplicationFactorError,
    errors.InvalidPartitionsError,
    errors.InvalidConfigurationError,
    errors.PolicyViolationError,
    errors.IncompatibleBrokerVersion,
    errors.UnsupportedVersionError,
)


@dataclass(frozen=True, slots=True)
class Sasl:
    """A user of the brokers."""

    mechanism: Mechanism
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """What a topic gets that is not there yet.

    Args:
        partitions: Their number; a topic that exists keeps its own.
        replication_factor: -1 leaves it to the brokers.
        retention_s: By topic; the others keep records as long as the brokers are set to.
    """

    partitions: int = 8
    replication_factor: int = -1
    retention_s: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KafkaOptions:
    """How to use a cluster.

    Args:
        brokers: HOST:PORT of some of them; the others are learnt from these.
        tls: From ``make_tls``; None means without protection.
        sasl: Who this client is; None when nobody asks, or when the certificate says so.
        compression: Of what is published; what others compressed is read whatever it is.
        is_idempotent: Whether the brokers sort out the producer's own repetitions.
        topics: How to make missing topics; None leaves that to somebody else.
        client_id: Appears in the brokers' logs.
        heartbeat_ms: How often a subscriber shows that it lives; it learns of a new member of its group as late as this.
        session_ms: How long it may be silent before its partitions go to others.

    Raises:
        BusError: a password would go over the wire in the clear.
    """

    brokers: tuple[str, ...]
    tls: ssl.SSLContext | None = None
    sasl: Sasl | None = None
    compression: Compression = "snappy"
    is_idempotent: bool = True
    topics: TopicPlan | None = field(default_factory=TopicPlan)
    client_id: str = "cybermesh"
    heartbeat_ms: int = 1_000
    session_ms: int = 10_000

    def __post_init__(self) -> None:
        if self.sasl is not None and self.sasl.mechanism == "PLAIN" and self.tls is None:
            raise BusError(
                "kafka.sasl_mechanism: PLAIN sends the password as it is; use it with TLS only, or use SCRAM-SHA-512"
            )

    def connection(self) -> dict[str, Any]:
        """Return the arguments that every aiokafka client takes."""
        protected = {
            (False, False): "PLAINTEXT",
            (True, False): "SSL",
            (False, True): "SASL_PLAINTEXT",
            (True, True): "SASL_SSL",
        }
        arguments: dict[str, Any] = {
            "bootstrap_servers": list(self.brokers),
            "client_id": self.client_id,
            "request_timeout_ms": REQUEST_TIMEOUT_MS,
            **self._security(protected[self.tls is not None, self.sasl is not None]),
        }
        return arguments

    def _security(self, protocol: str) -> dict[str, Any]:
        arguments: dict[str, Any] = {"security_protocol": protocol, "ssl_context": self.tls}
        if self.sasl is not None:
            arguments["sasl_mechanism"] = self.sasl.mechanism
            arguments["sasl_plain_username"] = self.sasl.username
            arguments["sasl_plain_password"] = self.sasl.password
        return arguments


def make_tls(ca_file: Path | None, cert_file: Path | None = None, key_file: Path | None = None) -> ssl.SSLContext:
    """Return the TLS settings of a client; the brokers' names are checked.

    Args:
        ca_file: Certificates of the authorities to trust, PEM; None trusts those of the system.
        cert_file: This client's certificate, PEM, for brokers that know clients by certificate.
        key_file: Its key, unless it is in ``cert_file`` too.

    Raises:
        BusError: a file cannot be read or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise BusError(f"kafka.ca_file: {ca_file}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except (OSError, ssl.SSLError) as error:
            raise BusError(f"kafka.cert_file: {cert_file}, {key_file or 'no key_file'}: {error}") from error
    return context


class Troubles:
    """What does not work at the moment, a line for each part."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def __str__(self) -> str:
        return "; ".join(f"{part}: {line}" for part, line in sorted(self._lines.items()))

    def note(self, part: str, line: str) -> None:
        """Say that ``part`` does not work."""
        self._lines[part] = line

    def clear(self, part: str) -> None:
        """Say that ``part`` works."""
        self._lines.pop(part, None)


def is_final(error: BaseException) -> bool:
    """Return whether trying again cannot help."""
    return isinstance(error, (*_FINAL, ssl.SSLCertVerificationError))


def explain(error: BaseException) -> str:
    """Return the error in one line, without addresses: /ready shows it to anybody who asks."""
    if isinstance(error, errors.KafkaConnectionError):
        return "no broker can be reached"
    if isinstance(error, socket.gaierror):
        return f"a broker's name is not known: {error.strerror}"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError | TimeoutError):
        return f"no broker can be reached: {os.strerror(error.errno)}" if error.errno else "no broker can be reached"
    return str(error).strip() or type(error).__name__


async def find_fault(options: KafkaOptions) -> BaseException | None:
    """Return why no broker can be reached, None when one can.

    The clients only say that they found none; whether it is the network, the certificate or the password is seen by connecting.
    """
    found: BaseException | None = None
    security = options.connection()
    del security["bootstrap_servers"]
    for broker in options.brokers:
        host, _, port = broker.rpartition(":")
        try:
            connection = await create_conn(host.strip("[]"), int(port), **security)
        except (errors.KafkaError, OSError) as error:
            found = error if found is None or is_final(error) else found
        else:
            connection.close()
            return None
    return found


async def patiently(work: Callable[[], Awaitable[T]], options: KafkaOptions, troubles: Troubles, part: str) -> T:
    """Do ``work`` again and again until the brokers are there.

    Raises:
        BusError: a fault that trying again does not mend.
    """
    pause_s = PAUSE_FIRST_S
    while True:
        try:
            done = await work()
        except (errors.KafkaError, OSError) as error:
            fault: BaseException = error
            if isinstance(error, errors.KafkaConnectionError):
                fault = await find_fault(options) or error
            troubles.note(part, explain(fault))
            if is_final(fault):
                raise BusError(f"{part}: {explain(fault)}") from error
        else:
            troubles.clear(part)
            return done
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (spreads the attempts of many clients)
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
