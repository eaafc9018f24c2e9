"""Nonces: 16 bytes that a producer never uses twice, and the bounded memory that notices when one comes again.

Rules:

- a nonce is ``ts_ms u64 || instance u32 || counter u32``, big-endian; the counter never repeats for an instance, also across
  restarts, because it comes from ranges that were reserved durably before use;
- a receiver keeps, per producer and instance, a bitmap of the 65,536 counters below the highest one seen. What is below that,
  or carries a time more than ten minutes past, is STALE; so an instance that was idle for ten minutes can be forgotten: its old
  messages are too old anyway;
- a bitmap cannot compare contents. Where the newest ones are still remembered, the same content is a DUPLICATE and other
  content a NONCE_REPLAY; where they are not, it is a DUPLICATE.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from cybermesh.envelope import Code, EnvelopeError

NONCE_BYTES = 16
WINDOW_COUNTERS = 65_536
FLOOR_MS = 600_000
INSTANCES_MAX = 64
REMEMBERED_MAX = 65_536
_LAYOUT = struct.Struct(">QII")


@dataclass(frozen=True, slots=True)
class Nonce:
    """The parts of a nonce; ``ts_ms`` is milliseconds since 1970."""

    ts_ms: int
    instance: int
    counter: int

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        return _LAYOUT.pack(self.ts_ms, self.instance, self.counter)

    @classmethod
    def parse(cls, nonce: bytes) -> Nonce:
        """Read 16 bytes; every 16 bytes are a nonce."""
        return cls(*_LAYOUT.unpack(nonce))


class Counters(Protocol):
    """Where a producer's counters come from. A range is handed out once for ever, also after a crash."""

    @property
    def instance(self) -> int:
        """The 32-bit instance that the counters belong to."""
        ...

    def reserve(self, count: int) -> range:
        """Reserve up to ``count`` counters durably; empty when the instance has none left."""
        ...


class NonceSource:
    """Makes the nonces of one producer instance; counters are reserved ``batch`` at a time."""

    def __init__(self, counters: Counters, batch: int = 256) -> None:
        assert batch > 0
        self._counters = counters
        self._batch = batch
        self._reserved = iter(range(0))

    def next(self, now_ms: int) -> bytes:
        """Return a new nonce.

        Raises:
            EnvelopeError: NONCES_EXHAUSTED: all counters of the instance are used.
        """
        counter = next(self._reserved, None)
        if counter is None:
            self._reserved = iter(self._counters.reserve(self._batch))
            counter = next(self._reserved, None)
        if counter is None:
            raise EnvelopeError(Code.NONCES_EXHAUSTED, "nonce", "the instance has used all its counters; start a new instance")
        return _LAYOUT.pack(now_ms, self._counters.instance, counter)


class CounterWindow:
    """The counters seen among the newest ``WINDOW_COUNTERS``, as a ring of bits (the scheme of RFC 6479)."""

    __slots__ = ("_bits", "highest")

    def __init__(self) -> None:
        self._bits = bytearray(WINDOW_COUNTERS // 8)
        self.highest = -1

    def is_below(self, counter: int) -> bool:
        """Return whether the counter has left the window, so that nobody can say whether it was used."""
        return counter <= self.highest - WINDOW_COUNTERS

    def __contains__(self, counter: int) -> bool:
        if counter > self.highest or self.is_below(counter):
            return False
        place = counter % WINDOW_COUNTERS
        return bool(self._bits[place >> 3] & (1 << (place & 7)))

    def add(self, counter: int) -> None:
        """Mark a counter that is not below the window."""
        assert not self.is_below(counter)
        if counter > self.highest:
            if counter > self.highest + 1:
                self._forget(self.highest + 1, counter - 1)
            self.highest = counter
        place = counter % WINDOW_COUNTERS
        self._bits[place >> 3] |= 1 << (place & 7)

    def _forget(self, first: int, last: int) -> None:
        """Clear the bits of ``first`` to ``last``, which still belong to counters one window lower."""
        if last - first >= WINDOW_COUNTERS - 1:
            self._bits = bytearray(WINDOW_COUNTERS // 8)
            return
        while first <= last:
            byte, bit = divmod(first % WINDOW_COUNTERS, 8)
            count = last - first + 1
            if bit or count < 8:
                count = min(count, 8 - bit)
                self._bits[byte] &= ~(((1 << count) - 1) << bit)
            else:
                count = min(count & ~7, WINDOW_COUNTERS - (byte << 3))
                self._bits[byte : byte + (count >> 3)] = bytes(count >> 3)
            first += count


@dataclass(slots=True)
class _Instance:
    window: CounterWindow
    last_ms: int


_NO_INSTANCES: Final[Mapping[int, _Instance]] = {}


class NonceTable:
    """The nonces this node has admitted: at most 64 instances of 8 KB per producer, and the content of the newest 65,536.

    ``check`` changes nothing that matters, ``record`` remembers what passed, ``take`` does both. Who records before the message
    is durable must not need to take it again. Producers must have been found in a key ring before, or strangers could fill
    the table.
    """

    def __init__(self) -> None:
        self._producers: dict[bytes, dict[int, _Instance]] = {}
        self._contents: OrderedDict[bytes, bytes] = OrderedDict()

    def check(self, producer: bytes, nonce: bytes, content: bytes, now_ms: int) -> None:
        """Refuse a nonce that was used or cannot be judged any more; ``content`` is the digest that identifies the content.

        Raises:
            EnvelopeError: STALE, DUPLICATE, NONCE_REPLAY or TOO_MANY_INSTANCES.
        """
        ts_ms, instance, counter = _LAYOUT.unpack(nonce)
        if ts_ms < now_ms - FLOOR_MS:
            raise EnvelopeError(Code.STALE, "nonce", f"its time is {now_ms - ts_ms} ms past, at most {FLOOR_MS} are remembered")
        instances = self._producers.get(producer, {})
        known = instances.get(instance)
        if known is None:
            if len(instances) >= INSTANCES_MAX and not self._forget_idle(producer, now_ms):
                raise EnvelopeError(Code.TOO_MANY_INSTANCES, "nonce", f"more than {INSTANCES_MAX} instances within ten minutes")
            return
        if known.window.is_below(counter):
            raise EnvelopeError(
                Code.STALE, "nonce", f"counter {counter} is more than {WINDOW_COUNTERS} below {known.window.highest}"
            )
        if counter in known.window:
            remembered = self._contents.get(producer + nonce[8:])
            if remembered is None or remembered == content:
                raise EnvelopeError(Code.DUPLICATE, "nonce", f"counter {counter} of instance {instance} was seen already")
            raise EnvelopeError(
                Code.NONCE_REPLAY, "nonce", f"counter {counter} of instance {instance} was used for other content"
            )

    def take(self, producer: bytes, nonce: bytes, content: bytes, now_ms: int) -> None:
        """Check a nonce and, when it passes, record it.

        Raises:
            EnvelopeError: as ``check``; nothing is recorded then.
        """
        ts_ms, instance, counter = _LAYOUT.unpack(nonce)
        known = self._producers.get(producer, _NO_INSTANCES).get(instance)
        # The usual one is above all that its instance has used, and recent: there is nothing to look up then.
        if known is None or counter <= known.window.highest or ts_ms < now_ms - FLOOR_MS:
            self.check(producer, nonce, content, now_ms)
        self.record(producer, nonce, content, now_ms)

    def record(self, producer: bytes, nonce: bytes, content: bytes, now_ms: int) -> None:
        """Remember a nonce that ``check`` let pass; recording it twice changes nothing."""
        _, instance, counter = _LAYOUT.unpack(nonce)
        instances = self._producers.setdefault(producer, {})
        known = instances.get(instance)
        if known is None:
            known = instances[instance] = _Instance(CounterWindow(), now_ms)
        known.last_ms = max(known.last_ms, now_ms)
        if known.window.is_below(counter):
            return
        known.window.add(counter)
        self._contents[producer + nonce[8:]] = content
        if len(self._contents) > REMEMBERED_MAX:
            self._contents.popitem(last=False)

    def _forget_idle(self, producer: bytes, now_ms: int) -> bool:
        """Drop the producer's instances idle for ten minutes; return whether there is room again."""
        instances = self._producers[producer]
        for instance in [number for number, known in instances.items() if known.last_ms < now_ms - FLOOR_MS]:
            del instances[instance]
        return len(instances) < INSTANCES_MAX
