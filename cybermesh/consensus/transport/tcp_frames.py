"""What validators say to each other on a TCP connection, as bytes; nothing here waits or reads a clock.

    connection = frame*             frame = length (u32, big-endian, of what follows) · tag (u8) · body
    dialer → listener  HELLO        both: version (u16) · chain id (32) · epoch (u64) · instance (16) · nonce (32)
    listener → dialer  HELLO
    both               CONFIRM      SHA-256("cm/hello/1" · dialer's hello · listener's hello · "d" or "l")
    both, then         messages (tag = kind), PING when nothing else was sent for a while (no body, no answer)

Rules:

- TLS has proven who is at the other end; the greeting says for which chain, and CONFIRM binds the connection to both fresh
  nonces, so that frames recorded from another connection open nothing;
- a hello of another length is malformed, but its version is read first: a newer one may be longer;
- the epoch is told, not compared: a validator that is an epoch behind must be able to catch up here;
- before the greeting is complete, no frame may be larger than a hello.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cybermesh.consensus.transport import Kind

VERSION: Final = 1
HELLO: Final = 0x80
CONFIRM: Final = 0x81
PING: Final = 0x82
TAGS: Final[dict[Kind, int]] = {
    Kind.PROPOSAL: 1,
    Kind.VOTE: 2,
    Kind.TIMEOUT: 3,
    Kind.SYNC: 4,
    Kind.GET_BLOCKS: 5,
    Kind.BLOCKS: 6,
    Kind.FORWARD: 7,
    Kind.GET_PAYLOAD: 8,
    Kind.PAYLOAD: 9,
}
KINDS: Final = {tag: kind for kind, tag in TAGS.items()}
GREETING_BODY_MAX: Final = 256

_LENGTH: Final = struct.Struct(">I")
_VERSION: Final = struct.Struct(">H")
_HELLO: Final = struct.Struct(">H32sQ16s32s")
_DOMAIN: Final = b"cm/hello/1"


class Refusal(enum.StrEnum):
    """Why a connection was refused or ended by this side."""

    NO_TLS = "no TLS 1.3"
    STRANGER = "certificate of no member"
    ANOTHER_MEMBER = "not the validator that was called"
    ITSELF = "this validator's own key"
    VERSION = "another protocol version"
    CHAIN = "another chain"
    GREETING = "greeting out of order"
    REPLAY = "greeting of another connection"
    OVERSIZE = "frame too large"
    MALFORMED = "malformed frame"
    SLOW_GREETING = "greeting took too long"
    CROWDED = "too many connections without a greeting"
    SILENT = "nothing heard"
    STUCK = "takes nothing"
    SPARE = "another connection is kept"
    STOPPING = "this validator stops"


NO_FAULT: Final = frozenset({Refusal.SPARE, Refusal.STOPPING})


class RefusedError(Exception):
    """The peer did something that ends the connection."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


def encode_frame(tag: int, body: bytes = b"") -> bytes:
    """Return a whole frame."""
    return _LENGTH.pack(1 + len(body)) + bytes((tag,)) + body


class FrameReader:
    """Cuts a stream into frames; holds at most one that is not whole."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self.body_max = GREETING_BODY_MAX

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take bytes and yield the tag and body of every frame that they complete; iterate to the end.

        Raises:
            RefusedError: a frame is empty or larger than ``body_max``; what came before it was yielded.
        """
        self._pending += data
        at = 0
        try:
            while len(self._pending) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._pending, at)
                if length == 0:
                    raise RefusedError(Refusal.MALFORMED)
                if length - 1 > self.body_max:
                    raise RefusedError(Refusal.OVERSIZE)
                start = at + _LENGTH.size
                if len(self._pending) - start < length:
                    return
                at = start + length
                yield self._pending[start], bytes(self._pending[start + 1 : at])
        finally:
            del self._pending[:at]


@dataclass(frozen=True, slots=True)
class Hello:
    """How a validator greets; ``instance`` is chosen once per process, ``nonce`` for every connection."""

    chain_id: bytes
    epoch: int
    instance: bytes
    nonce: bytes

    def encode(self) -> bytes:
        """Return the body of the frame."""
        return _HELLO.pack(VERSION, self.chain_id, self.epoch, self.instance, self.nonce)

    @classmethod
    def decode(cls, body: bytes) -> Hello:
        """Return the greeting.

        Raises:
            RefusedError: it is of another version, or malformed.
        """
        if len(body) < _VERSION.size:
            raise RefusedError(Refusal.MALFORMED)
        if _VERSION.unpack_from(body) != (VERSION,):
            raise RefusedError(Refusal.VERSION)
        if len(body) != _HELLO.size:
            raise RefusedError(Refusal.MALFORMED)
        _, chain_id, epoch, instance, nonce = _HELLO.unpack(body)
        return cls(chain_id, epoch, instance, nonce)


class Greeting:
    """The first two frames of each side; the dialer begins."""

    def __init__(self, mine: Hello, *, dials: bool) -> None:
        self._mine = mine
        self._dials = dials
        self._expected = b""
        self.theirs: Hello | None = None
        self.is_complete = False

    def opening(self) -> bytes:
        """Return what this side sends unasked."""
        return encode_frame(HELLO, self._mine.encode()) if self._dials else b""

    def take(self, tag: int, body: bytes) -> bytes:
        """Take the peer's next frame and return what to send for it, empty for nothing.

        Raises:
            RefusedError: the frame does not belong here, or the peer is of another version or chain.
        """
        match (tag, self.theirs):
            case (tag, None) if tag == HELLO:
                return self._take_hello(Hello.decode(body), body)
            case (tag, Hello()) if tag == CONFIRM:
                if body != self._expected:
                    raise RefusedError(Refusal.REPLAY)
                self.is_complete = True
                return b""
            case _:
                raise RefusedError(Refusal.GREETING)

    def _take_hello(self, theirs: Hello, body: bytes) -> bytes:
        if theirs.chain_id != self._mine.chain_id:
            raise RefusedError(Refusal.CHAIN)
        self.theirs = theirs
        mine = self._mine.encode()
        both = mine + body if self._dials else body + mine
        confirm, self._expected = (
            hashlib.sha256(_DOMAIN + both + side).digest() for side in ((b"d", b"l") if self._dials else (b"l", b"d"))
        )
        answer = b"" if self._dials else encode_frame(HELLO, mine)
        return answer + encode_frame(CONFIRM, confirm)
