"""One TLS connection between two validators: frames in, frames out, and since when nothing moved.

It starts with the proof of identity, then the greeting; only after both does its owner hear of it. It never waits and has no
task: the event loop calls it, and it calls its owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.transport.tcp_frames import PING, FrameReader, Greeting, Refusal, RefusedError, encode_frame

_WRITE_HIGH_BYTES: Final = 256 * 1024
_TOGETHER_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Owner:
    """What a connection asks and tells; each returns at once; ``identify`` and ``received`` may raise RefusedError.

    ``begun`` comes first, once TLS stands; ``identify`` gives the validator that a certificate (DER) proves. ``greeted`` comes
    once, before the first ``received``, and ``writable`` when more can be written again. ``ended`` comes once: why this side
    ended it, None when the other side did.
    """

    identify: Callable[[bytes | None], int]
    begun: Callable[[Connection], None]
    greeted: Callable[[Connection], None]
    received: Callable[[Connection, int, bytes], None]
    writable: Callable[[Connection], None]
    ended: Callable[[Connection, Refusal | None], None]


class Connection(asyncio.Protocol):
    """A connection; ``called`` is the validator that this side wanted to reach, None when the other side opened it.

    ``body_max`` bounds frames after the greeting. ``peer`` is who was called until it is proven who it is.
    """

    def __init__(self, owner: Owner, greeting: Greeting, *, called: int | None, body_max: int) -> None:
        self.called = called
        self.peer = called
        self.greeting = greeting
        self.settled = asyncio.Event()
        self.closed = asyncio.Event()
        self._owner = owner
        self._body_max = body_max
        self._reader = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._refusal: Refusal | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._outgoing: list[bytes] = []
        self._heard_at = self._said_at = self._loop.time()
        self._stuck_since: float | None = None

    # What the owner does with it

    @property
    def instance(self) -> bytes:
        """Which process is at the other end; greeted connections only."""
        assert self.greeting.theirs is not None
        return self.greeting.theirs.instance

    @property
    def has_begun(self) -> bool:
        """Whether TLS was established; only then does ``closed`` follow."""
        return self._transport is not None

    @property
    def is_open(self) -> bool:
        """Whether frames still go through."""
        return self._transport is not None and self._refusal is None and not self.closed.is_set()

    @property
    def is_writable(self) -> bool:
        """Whether a frame can be written now; otherwise ``Owner.writable`` follows."""
        return self.is_open and self._stuck_since is None

    def write(self, frame: bytes) -> None:
        """Write a whole frame; it may wait in memory, so look at ``is_writable`` first.

        What is written in one turn of the event loop leaves together: a leader's proposal and vote cost one record of TLS.
        """
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frame)
        if len(frame) > _TOGETHER_BYTES:
            self._flush()  # now, so that ``is_writable`` knows of it

    def _flush(self) -> None:
        frames, self._outgoing = self._outgoing, []
        if frames and self.is_open:
            assert self._transport is not None
            self._said_at = self._loop.time()
            self._transport.write(b"".join(frames))

    def refuse(self, reason: Refusal) -> None:
        """End the connection at once."""
        if self._refusal is None and not self.closed.is_set():
            self._refusal = reason
            if self._transport is not None:
                self._transport.abort()

    def rest(self, pause_s: float) -> None:
        """Read nothing for a while: the peer sends more than can be taken."""
        if self._resume is None and self.is_open:
            assert self._transport is not None
            self._transport.pause_reading()
            self._resume = self._loop.call_later(pause_s, self._read_on)

    def _read_on(self) -> None:
        self._resume = None
        if self.is_open:
            assert self._transport is not None
            self._transport.resume_reading()

    def look(self, ping_s: float, silent_s: float, stuck_s: float) -> None:
        """Keep the connection alive, or end it when the peer has gone without a word; call it now and then."""
        now = self._loop.time()
        if now - self._heard_at > silent_s:
            self.refuse(Refusal.SILENT)
        elif self._stuck_since is not None and now - self._stuck_since > stuck_s:
            self.refuse(Refusal.STUCK)
        elif self.is_writable and now - self._said_at > ping_s:
            self.write(encode_frame(PING))

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out who it is, and greet."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._owner.begun(self)
        tls = transport.get_extra_info("ssl_object")
        try:
            self.peer = self._owner.identify(tls.getpeercert(binary_form=True))
        except RefusedError as refused:
            self.refuse(refused.reason)
        else:
            self._answer(self.greeting.opening())

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, frame by frame."""
        self._heard_at = self._loop.time()
        try:
            for tag, body in self._reader.feed(data):
                if not self.is_open:
                    return
                self._take(tag, body)
        except RefusedError as refused:
            self.refuse(refused.reason)

    def _take(self, tag: int, body: bytes) -> None:
        if self.greeting.is_complete:
            self._owner.received(self, tag, body)
        else:
            self._greet(tag, body)

    def _greet(self, tag: int, body: bytes) -> None:
        self._answer(self.greeting.take(tag, body))
        if self.greeting.is_complete:
            self._reader.body_max = self._body_max
            self._owner.greeted(self)
            self.settled.set()

    def _answer(self, data: bytes) -> None:
        if data:
            self.write(data)
            self._flush()  # a spare connection may be ended in this very turn, and its peer must have heard who it was

    def pause_writing(self) -> None:
        """Remember since when the peer takes nothing."""
        self._stuck_since = self._loop.time()

    def resume_writing(self) -> None:
        """Go on with what waits."""
        self._stuck_since = None
        if self.is_open:
            self._owner.writable(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the owner that this is over, whoever ended it."""
        if self._resume is not None:
            self._resume.cancel()
        self.closed.set()
        self.settled.set()
        self._owner.ended(self, self._refusal)
