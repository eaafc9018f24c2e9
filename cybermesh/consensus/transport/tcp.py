"""Validators of different processes talk over TCP and mutual TLS 1.3: a ``Transport`` that ``run`` keeps connected.

Rules:

- a connection belongs to the validator whose key its certificate proves; strangers, other chains, oversize and malformed frames
  end their own connection, are counted, and touch nobody else's;
- every validator calls every other one, with a growing, jittered pause after failures; the lower index has a head start, so
  that both seldom call at once. Of two connections with the same process the one that the lower index has opened is kept, so
  both ends keep the same one. A peer that was started anew replaces whatever is left of its former connection;
- a peer that says nothing for ``silent_s`` or takes nothing for ``stuck_s`` is disconnected; pings fill the silence;
- what cannot be written waits in the peer's own bounded queue, what is not read in the inbox's; a peer that overflows the inbox
  is read more slowly;
- connections that have not greeted are few; when more come, the oldest makes room, so idle strangers keep nobody out.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cybermesh.consensus.codec import MESSAGE_BYTES_MAX
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport import Frame, Kind
from cybermesh.consensus.transport.inbox import Inbox
from cybermesh.consensus.transport.queues import PeerQueue
from cybermesh.consensus.transport.tcp_connection import Connection, Owner
from cybermesh.consensus.transport.tcp_frames import (
    KINDS,
    NO_FAULT,
    PING,
    TAGS,
    Greeting,
    Hello,
    Refusal,
    RefusedError,
    encode_frame,
)
from cybermesh.consensus.transport.tls import make_contexts, member_of
from cybermesh.keys import SigningKey
from cybermesh.log import logger

Address = tuple[str, int]

_REST_S: Final = 0.01
_BACKLOG: Final = 128
_NO_CERTIFICATE: Final = "PEER_DID_NOT_RETURN_A_CERTIFICATE"


@dataclass(frozen=True, slots=True)
class TcpLimits:
    """Bounds of every connection, in seconds, bytes and connections."""

    greeting_s: float = 5.0
    ping_s: float = 2.0
    silent_s: float = 8.0
    stuck_s: float = 8.0
    redial_first_s: float = 0.1
    redial_max_s: float = 5.0
    body_max_bytes: int = MESSAGE_BYTES_MAX
    greetings_max: int = 64


@dataclass(slots=True)
class TcpCounters:
    """What happened since the start; ``refused`` by (validator or None for nobody known, reason)."""

    connections: int = 0
    calls_failed: int = 0
    accept_failures: int = 0
    too_large: int = 0
    refused: Counter[tuple[int | None, Refusal]] = field(default_factory=Counter)


@dataclass(slots=True)
class _Link:
    """One peer: what waits for it, and its connection; without an address it has to call."""

    peer: int
    address: Address | None
    queue: PeerQueue = field(default_factory=PeerQueue)
    connection: Connection | None = None
    since: float = 0.0
    is_down: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Arrival:
    """A connection that was accepted and has not greeted."""

    peer_socket: socket.socket
    connection: Connection
    is_taken: bool = False

    def drop(self) -> None:
        """Close the socket if its task was cancelled before it could begin; afterwards it is the event loop's."""
        if not self.is_taken:
            self.peer_socket.close()


def listen_on(address: Address) -> socket.socket:
    """Return a listening socket; the caller closes it. Port 0 takes any.

    Raises:
        OSError: the address is not of this host, or in use.
    """
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


class TcpTransport:
    """One validator's connections over TCP.

    Args:
        committee: Who may connect, and for which chain.
        key: This validator's own key.
        listener: A listening socket, closed by whoever opened it.
        addresses: Where the others listen, by index; who has none is not called and must call.
        jitter: Gives numbers from 0 to 1 that spread the calls of many nodes.
        limits: Bounds of the connections.
    """

    def __init__(
        self,
        committee: Committee,
        key: SigningKey,
        listener: socket.socket,
        addresses: Mapping[int, Address],
        jitter: Callable[[], float],
        limits: TcpLimits | None = None,
    ) -> None:
        index = committee.index_of(key.public)
        assert index is not None
        self.index = index
        self.counters = TcpCounters()
        self._committee = committee
        self._listener = listener
        self._jitter = jitter
        self._limits = limits or TcpLimits()
        self._tls = make_contexts(key, committee.public_keys)
        self._instance = secrets.token_bytes(16)
        self._links = {peer: _Link(peer, addresses.get(peer)) for peer in range(committee.n) if peer != index}
        self._inbox = Inbox()
        self._open: set[Connection] = set()
        self._arrivals: dict[asyncio.Task[None], _Arrival] = {}
        self._log = logger(part="transport", index=index)

    @property
    def address(self) -> Address:
        """Where this validator listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def peers(self) -> frozenset[int]:
        """The validators that are connected now."""
        return frozenset(link.peer for link in self._links.values() if link.connection is not None)

    @property
    def lost(self) -> int:
        """How many frames overflowed here, on their way out or in."""
        return self._inbox.lost + sum(link.queue.superseded + link.queue.dropped for link in self._links.values())

    def send(self, peer: int, kind: Kind, data: bytes) -> None:
        """Write a frame to a connected peer, or queue it while the peer does not take more."""
        link = self._links[peer]
        connection = link.connection
        if connection is None:
            return
        if len(data) > self._limits.body_max_bytes:
            self.counters.too_large += 1
            return
        frame = encode_frame(TAGS[kind], data)
        if connection.is_writable and not link.queue:
            connection.write(frame)
        else:
            link.queue.put(kind, frame)

    async def receive(self) -> Frame:
        """Return the next frame, one of each peer in turn."""
        return await self._inbox.take()

    async def run(self) -> None:
        """Accept, call and watch connections until cancelled; nothing is connected afterwards."""
        for link in self._links.values():
            link.is_down.set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._accept(group), name=f"transport-{self.index} accept")
                group.create_task(self._watch(), name=f"transport-{self.index} watch")
                for link in self._links.values():
                    if link.address is not None:
                        calling = self._keep_calling(link, link.address)
                        group.create_task(calling, name=f"transport-{self.index} to {link.peer}")
        finally:
            for connection in list(self._open):
                connection.refuse(Refusal.STOPPING)
                await connection.closed.wait()

    # Connecting

    async def _accept(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self._somebody_calls()
            # Without waiting from here on: a socket that is accepted while this task is cancelled would belong to nobody.
            try:
                peer_socket, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError:  # out of file descriptors, or the caller has gone again
                self.counters.accept_failures += 1
                await asyncio.sleep(self._limits.redial_first_s)
                continue
            peer_socket.setblocking(False)
            # The event loop does it only for sockets that name their protocol, which accepted ones do not. Without it a vote
            # behind a proposal waits 40 ms for the peer's acknowledgement.
            peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._make_room()
            arrival = _Arrival(peer_socket, self._connection(self._any_member, called=None))
            task = group.create_task(self._answer(arrival), name=f"transport-{self.index} answer")
            self._arrivals[task] = arrival
            task.add_done_callback(self._forget)

    async def _somebody_calls(self) -> None:
        loop = asyncio.get_running_loop()
        calls = asyncio.Event()
        loop.add_reader(self._listener, calls.set)
        try:
            await calls.wait()
        finally:
            loop.remove_reader(self._listener)

    def _make_room(self) -> None:
        if len(self._arrivals) < self._limits.greetings_max:
            return
        task, oldest = next(iter(self._arrivals.items()))
        del self._arrivals[task]
        if oldest.connection.has_begun:
            oldest.connection.refuse(Refusal.CROWDED)
        else:
            self._count(None, Refusal.CROWDED)
            task.cancel()
            task.add_done_callback(lambda _: oldest.drop())

    def _forget(self, task: asyncio.Task[None]) -> None:
        arrival = self._arrivals.pop(task, None)
        if arrival is not None:
            arrival.drop()

    async def _answer(self, arrival: _Arrival) -> None:
        """Lead an accepted connection through TLS and greeting."""
        arrival.is_taken = True
        connection = arrival.connection
        try:
            async with asyncio.timeout(self._limits.greeting_s):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection, arrival.peer_socket, ssl=self._tls.listen
                )
                await connection.settled.wait()
        except TimeoutError:
            self._give_up(connection, None)
        except ssl.SSLError as error:
            is_stranger = isinstance(error, ssl.SSLCertVerificationError) or error.reason == _NO_CERTIFICATE
            self._count(None, Refusal.STRANGER if is_stranger else Refusal.NO_TLS)
        except OSError:
            self.counters.accept_failures += 1

    async def _keep_calling(self, link: _Link, address: Address) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        if self.index > link.peer:
            await asyncio.sleep(self._pause_s(failures))
        while True:
            await link.is_down.wait()
            await self._call(link, address)
            if link.connection is not None:
                await link.is_down.wait()
                has_lasted = loop.time() - link.since > self._limits.redial_max_s
                failures = 0 if has_lasted else failures + 1
            else:
                failures += 1
            await asyncio.sleep(self._pause_s(failures))

    def _pause_s(self, failures: int) -> float:
        limits = self._limits
        pause_s = min(limits.redial_first_s * 2.0 ** min(failures, 30), limits.redial_max_s)
        return pause_s * (0.5 + 0.5 * self._jitter())

    async def _call(self, link: _Link, address: Address) -> None:
        """Try once to connect to a peer."""

        def identify(certificate: bytes | None) -> int:
            if self._any_member(certificate) != link.peer:
                raise RefusedError(Refusal.ANOTHER_MEMBER)
            return link.peer

        connection = self._connection(identify, called=link.peer)
        host, port = address
        try:
            async with asyncio.timeout(self._limits.greeting_s):
                # No server name: a validator is its key. The empty one keeps asyncio from taking the host's.
                await asyncio.get_running_loop().create_connection(
                    lambda: connection, host, port, ssl=self._tls.dial, server_hostname=""
                )
                await connection.settled.wait()
        except TimeoutError:
            self._give_up(connection, link.peer)
        except ssl.SSLCertVerificationError:
            self._count(link.peer, Refusal.STRANGER)
        except OSError:
            self.counters.calls_failed += 1

    def _give_up(self, connection: Connection, peer: int | None) -> None:
        if connection.has_begun:
            connection.refuse(Refusal.SLOW_GREETING)
        else:
            self._count(peer, Refusal.SLOW_GREETING)

    def _connection(self, identify: Callable[[bytes | None], int], *, called: int | None) -> Connection:
        owner = Owner(identify, self._begun, self._greeted, self._received, self._writable, self._ended)
        committee = self._committee
        hello = Hello(committee.chain_id, committee.epoch, self._instance, secrets.token_bytes(32))
        return Connection(owner, Greeting(hello, dials=called is not None), called=called, body_max=self._limits.body_max_bytes)

    def _any_member(self, certificate: bytes | None) -> int:
        peer = member_of(certificate, self._committee.public_keys)
        if peer is None:
            raise RefusedError(Refusal.STRANGER)
        if peer == self.index:
            raise RefusedError(Refusal.ITSELF)
        return peer

    async def _watch(self) -> None:
        limits = self._limits
        while True:
            await asyncio.sleep(limits.ping_s / 2)
            for connection in [link.connection for link in self._links.values() if link.connection is not None]:
                connection.look(limits.ping_s, limits.silent_s, limits.stuck_s)

    # What connections tell

    def _begun(self, connection: Connection) -> None:
        self._open.add(connection)

    def _greeted(self, connection: Connection) -> None:
        assert connection.peer is not None
        link = self._links[connection.peer]
        held = link.connection
        if held is not None and held.instance == connection.instance:
            is_spare = self._is_preferred(held) and not self._is_preferred(connection)
            if is_spare:
                connection.refuse(Refusal.SPARE)
                return
        self.counters.connections += 1
        link.connection = connection
        link.since = asyncio.get_running_loop().time()
        link.is_down.clear()
        link.queue.clear()
        self._inbox.connected(connection.peer)
        self._log.info("peer_connected", peer=connection.peer)
        if held is not None:
            held.refuse(Refusal.SPARE)

    def _is_preferred(self, connection: Connection) -> bool:
        """Return whether the lower index has opened it."""
        assert connection.peer is not None
        return (connection.called is not None) == (self.index < connection.peer)

    def _received(self, connection: Connection, tag: int, body: bytes) -> None:
        assert connection.peer is not None
        if tag == PING and not body:
            return
        kind = KINDS.get(tag)
        if kind is None or not body:  # an empty message would look like a new connection
            raise RefusedError(Refusal.MALFORMED)
        if self._links[connection.peer].connection is connection and not self._inbox.put(connection.peer, kind, body):
            connection.rest(_REST_S)

    def _writable(self, connection: Connection) -> None:
        assert connection.peer is not None
        link = self._links[connection.peer]
        while link.connection is connection and link.queue and connection.is_writable:
            connection.write(link.queue.take())

    def _ended(self, connection: Connection, refusal: Refusal | None) -> None:
        self._open.discard(connection)
        if refusal is not None and refusal not in NO_FAULT:
            self._count(connection.peer, refusal)
        link = self._links[connection.peer] if connection.peer is not None else None
        if link is not None and link.connection is connection:
            link.connection = None
            link.queue.clear()
            link.is_down.set()
            self._log.info("peer_lost", peer=connection.peer, reason=refusal.value if refusal else "ended by the peer")

    def _count(self, peer: int | None, reason: Refusal) -> None:
        """Count a refusal; the first of its kind is also logged, the others would let strangers fill the log."""
        self.counters.refused[peer, reason] += 1
        if self.counters.refused[peer, reason] == 1:
            self._log.warning("connection_refused", peer=peer, reason=reason.value)
