"""The thread of a local bus: the only one that touches the file, one turn after the other.

A turn waits until somebody has something to do (this process' event loop, another process, a deadline), then does everything
that is waiting in one transaction, answers, and hands out what has become readable.

Rules:

- publishes that arrive while a transaction is being made durable share the next one: many writers, one flush;
- an answer is given after the commit, and a record is handed out after its commit;
- acknowledgements wait up to ``ACK_DELAY_S`` for company; losing them costs a second delivery, nothing else;
- publishes to one partition keep their order, also while they wait for room;
- with neither members nor waiting publishers nothing wakes the thread; otherwise one look a ``BEAT_S`` for dead neighbours.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, assert_never

from cybermesh.bus import BusError, Delivery, Published
from cybermesh.bus.arrivals import Place
from cybermesh.bus.local_store import Assigned, Bounds, LocalStore, Member
from cybermesh.bus.local_wake import WakeSocket

ACK_DELAY_S = 0.02
BEAT_S = 1.0
EXPIRE_S = 60.0
COMMANDS_MAX = 1_024
FETCH_RECORDS_MAX = 256
FETCH_BYTES_MAX = 1024 * 1024


class Receiver(Protocol):
    """The event loop's side of a subscription; called on the loop's thread."""

    def feed(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries that were asked for."""
        ...

    def revoke(self, places: frozenset[Place]) -> None:
        """Forget what has arrived of partitions that changed hands."""
        ...

    def end(self) -> None:
        """The bus was closed."""
        ...


@dataclass(frozen=True, slots=True)
class Publish:
    """Append a record; answered with ``Published`` once it is durable."""

    topic: str
    key: bytes
    value: bytes
    answer: asyncio.Future[Published]


@dataclass(frozen=True, slots=True)
class Join:
    """Enter a member; answered once it is."""

    member: Member
    receiver: Receiver
    from_start: bool
    answer: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Leave:
    """Remove a member; answered when its acknowledgements are durable and its partitions are free."""

    member: Member
    answer: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Mark a record, and the earlier ones of its partition, as processed."""

    member: Member
    place: Place
    offset: int


@dataclass(frozen=True, slots=True)
class Want:
    """Hand out records to a member as soon as there are some."""

    member: Member


@dataclass(frozen=True, slots=True)
class Close:
    """Do what is waiting and stop."""


Command = Publish | Join | Leave | Acknowledge | Want | Close


@dataclass(slots=True)
class _Reader:
    """What the thread knows about one of this process' members."""

    member: Member
    receiver: Receiver
    is_hungry: bool = False
    assigned: dict[int, Assigned] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)  # the first offset that was not handed out
    at: dict[Place, int] = field(default_factory=dict)  # the ids of the assigned partitions


@dataclass(slots=True)
class _Done:
    """What a transaction did, for after its commit."""

    answers: list[Callable[[], None]] = field(default_factory=list)
    topics: set[str] = field(default_factory=set)
    held: dict[int, deque[Publish]] = field(default_factory=dict)
    joined: list[_Reader] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class LocalWorker:
    """See the module. Made and started on the event loop's thread; ``ready`` tells whether the file could be opened."""

    def __init__(self, path: Path, partitions: int, bounds: Bounds, now_ms: Callable[[], int], lease_s: float) -> None:
        self._thread = threading.Thread(target=self._run, name=f"local bus {path.name}", daemon=True)
        self._path = path
        self._partitions = partitions
        self._bounds = bounds
        self._now_ms = now_ms
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.wake = WakeSocket(path.with_name(f"{path.name}.wake"))
        self.trouble = ""
        self._inbox: deque[Command] = deque()
        self._readers: dict[str, _Reader] = {}
        self._held: dict[int, deque[Publish]] = {}  # publishers waiting for room, by partition
        self._acks: dict[tuple[str, int], int] = {}
        self._acks_due_s: float | None = None
        self._beat_due_s = 0.0
        self._expire_due_s = 0.0
        self._calls: list[Callable[[], None]] = []
        self._is_closing = False
        self._is_over = False
        self._end_lock = threading.Lock()  # nobody kicks a socket that this thread has closed

    def submit(self, command: Command) -> None:
        """Hand over a command; from the event loop's thread."""
        with self._end_lock:
            self._inbox.append(command)
            if not self._is_over:
                self.wake.kick()
                return
        self._abandon()
        self._flush_calls()

    def start(self) -> None:
        """Open the file, then take turns until ``Close``."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end; after ``closed`` that is at once."""
        self._thread.join()

    def _run(self) -> None:
        try:
            with self.wake.alone():
                self.wake.sweep()
                store = LocalStore(self._path, self._partitions, self._bounds)
        except (OSError, sqlite3.Error, BusError) as error:
            self._retire()
            self._call(_fail, self.ready, f"{self._path}: {error}")
            self._flush_calls()
            return
        self._call(_settle, self.ready, None)
        self._flush_calls()
        try:
            while not (self._is_closing and not self._inbox):
                self.wake.wait(0 if self._inbox else self._patience_s())
                self._turn(store)
            self._end(store)
        finally:
            store.close()
            self._retire()
            self._abandon()
            self._call(_settle, self.closed, None)
            self._flush_calls()

    def _patience_s(self) -> float | None:
        deadlines = [self._beat_due_s] if self._readers or self._held else []
        if self._acks_due_s is not None:
            deadlines.append(self._acks_due_s)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    # One turn

    def _turn(self, store: LocalStore) -> None:
        now_s = time.monotonic()
        is_beat = bool(self._readers or self._held) and now_s >= self._beat_due_s
        commands = self._take()
        dead = self._find_dead(store) if is_beat else []
        acks_due = self._acks_due_s is not None and (now_s >= self._acks_due_s or bool(commands))
        try:
            if commands or dead or self._held or acks_due:
                self._write(store, commands, dead)
            if now_s >= self._expire_due_s:
                self._expire(store)
            self._hand_out(store)
            self.trouble = ""
        except sqlite3.Error as error:
            self.trouble = f"{self._path}: {error}"
            self._refuse([c for c in commands if not isinstance(c, Close)])
        self._flush_calls()

    def _take(self) -> list[Command]:
        """Sort what has come in: what needs no transaction is done at once, the rest is returned."""
        commands: list[Command] = []
        while self._inbox and len(commands) < COMMANDS_MAX:
            match self._inbox.popleft():
                case Want(member):
                    if member.token in self._readers:
                        self._readers[member.token].is_hungry = True
                case Acknowledge(member, place, offset):
                    self._note_ack(member, place, offset)
                case Close():
                    self._is_closing = True
                case command:
                    commands.append(command)
        return commands

    def _note_ack(self, member: Member, place: Place, offset: int) -> None:
        reader = self._readers.get(member.token)
        partition = reader.at.get(place) if reader else None
        if reader is None or partition is None or offset >= reader.positions[partition]:
            return  # it went to another member, which gets the record again
        slot = (member.token, partition)
        self._acks[slot] = max(self._acks.get(slot, -1), offset)
        if self._acks_due_s is None:
            self._acks_due_s = time.monotonic() + ACK_DELAY_S

    def _find_dead(self, store: LocalStore) -> list[str]:
        self._beat_due_s = time.monotonic() + min(BEAT_S, self._lease_s / 4)
        self.wake.touch()
        return [name for name in store.processes() if not self.wake.is_alive(name, self._lease_s)]

    def _write(self, store: LocalStore, commands: Sequence[Command], dead: Sequence[str]) -> None:
        """Do everything that changes the file in one transaction; answer and wake the others after it."""
        done = _Done()
        with store.transaction():
            # Before the publishes: these acknowledgements may make room for them, and a publisher that stays blocked marks
            # its partition again.
            makes_room = self._write_acks(store)
            store.leave(store.members_of(dead))
            self._append(store, commands, done)
            self._regroup(store, commands, done)
            if makes_room or dead or done.joined or done.left:
                to_wake = self.wake.everyone()
            else:
                to_wake = store.processes(done.topics) if done.topics else []
        self._held = done.held
        self._acks.clear()
        self._acks_due_s = None
        self._readers.update({reader.member.token: reader for reader in done.joined})
        for token in done.left:
            self._readers.pop(token, None)
        self._calls.extend(done.answers)
        self.wake.wake(to_wake)

    def _write_acks(self, store: LocalStore) -> bool:
        """Move the marks; return whether a publisher somewhere waits for the room that this may make."""
        for (token, partition), offset in self._acks.items():
            store.acknowledge(self._readers[token].member, partition, offset)
        return store.unblock([partition for _, partition in self._acks])

    def _append(self, store: LocalStore, commands: Sequence[Command], done: _Done) -> None:
        for publish, partition in self._queued(store, commands):
            published = None
            if partition not in done.held:
                published = store.append(partition, publish.key, publish.value, self._now_ms())
            if published is None:
                done.held.setdefault(partition, deque()).append(publish)
            else:
                done.topics.add(publish.topic)
                done.answers.append(_later(_settle, publish.answer, published))

    def _regroup(self, store: LocalStore, commands: Sequence[Command], done: _Done) -> None:
        for command in commands:
            match command:
                case Join(member, receiver, from_start, answer):
                    store.join(member, from_start=from_start)
                    done.joined.append(_Reader(member, receiver))
                    done.answers.append(_later(_settle, answer, None))
                case Leave(member, answer):
                    store.leave([member.token])
                    done.left.append(member.token)
                    done.answers.append(_later(_settle, answer, None))
                case Publish() | Acknowledge() | Want() | Close():
                    pass
                case _:
                    assert_never(command)

    def _queued(self, store: LocalStore, commands: Sequence[Command]) -> list[tuple[Publish, int]]:
        """Return the publishes in order with their partitions, those that wait for room first, without the cancelled ones."""
        queue = [(publish, partition) for partition, waiting in self._held.items() for publish in waiting]
        queue += [(c, store.partition_of(c.topic, c.key)) for c in commands if isinstance(c, Publish)]
        return [(publish, partition) for publish, partition in queue if not publish.answer.cancelled()]

    def _expire(self, store: LocalStore) -> None:
        self._expire_due_s = time.monotonic() + EXPIRE_S
        with store.transaction():
            store.expire(self._now_ms())

    def _refuse(self, commands: Sequence[Command]) -> None:
        """Answer everything that waits with the trouble; acknowledgements are kept for the next turn."""
        waiting: list[Command] = [publish for held in self._held.values() for publish in held]
        self._held = {}
        for command in (*waiting, *commands):
            match command:
                case Publish() | Join() | Leave():
                    self._call(_fail, command.answer, self.trouble)
                case Acknowledge() | Want() | Close():
                    pass
                case _:
                    assert_never(command)
            if isinstance(command, Leave):
                self._readers.pop(command.member.token, None)
                self._acks = {slot: offset for slot, offset in self._acks.items() if slot[0] != command.member.token}
        if self._acks_due_s is not None:
            self._acks_due_s = time.monotonic() + BEAT_S

    # What has become readable

    def _hand_out(self, store: LocalStore) -> None:
        for reader in list(self._readers.values()):
            assigned = store.assignments(reader.member)
            if assigned is None:
                # The others took this process for dead, and it is not: it begins anew.
                with store.transaction():
                    store.join(reader.member, from_start=True)
                self.wake.wake(self.wake.everyone())
                assigned = store.assignments(reader.member) or []
            self._reassign(reader, assigned)
            if reader.is_hungry:
                self._feed(store, reader)

    def _reassign(self, reader: _Reader, assigned: Sequence[Assigned]) -> None:
        """Take over who owns what; a partition that changed hands starts again after its last acknowledged record."""
        before = reader.assigned
        reader.assigned = {one.partition: one for one in assigned}
        reader.at = {(one.topic, one.number): one.partition for one in assigned}
        turned = [
            old
            for old in before.values()
            if old.partition not in reader.assigned or reader.assigned[old.partition].turn != old.turn
        ]
        for old in turned:
            del reader.positions[old.partition]
            self._acks.pop((reader.member.token, old.partition), None)
        if turned:
            self._call(reader.receiver.revoke, frozenset((old.topic, old.number) for old in turned))
        for one in assigned:
            position = reader.positions.get(one.partition, one.acknowledged)
            reader.positions[one.partition] = max(position, one.base)

    def _feed(self, store: LocalStore, reader: _Reader) -> None:
        """Give every readable partition its share of one batch, whatever the others hold."""
        readable = [one for one in reader.assigned.values() if reader.positions[one.partition] < one.next]
        batch: list[Delivery] = []
        for one in readable:
            share = (max(1, FETCH_RECORDS_MAX // len(readable)), FETCH_BYTES_MAX // len(readable))
            taken = store.read(one, reader.positions[one.partition], *share)
            if taken:
                reader.positions[one.partition] = taken[-1].offset + 1
                batch += taken
        if batch:
            reader.is_hungry = False
            self._call(reader.receiver.feed, batch)

    # The end, and the way back to the event loop

    def _end(self, store: LocalStore) -> None:
        """Note the last acknowledgements and leave the groups, so that the others take over at once."""
        try:
            with store.transaction():
                self._write_acks(store)
                store.leave(list(self._readers))
            self.wake.wake(self.wake.everyone())
        except sqlite3.Error as error:
            # The others find the socket gone and take over; what was not noted is delivered again.
            self.trouble = f"{self._path}: {error}"

    def _retire(self) -> None:
        with self._end_lock:
            self._is_over = True
            self.wake.close()

    def _abandon(self) -> None:
        """Answer whoever still waits for this thread, which does nothing any more."""
        self.trouble = f"{self._path}: the bus is closed"
        left: list[Command] = []
        while self._inbox:
            left.append(self._inbox.popleft())
        for reader in self._readers.values():
            self._call(reader.receiver.end)
        self._readers = {}
        self._refuse(left)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        self._calls.append(_later(function, *arguments))

    def _flush_calls(self) -> None:
        if not self._calls:
            return
        calls, self._calls = self._calls, []
        try:
            self._loop.call_soon_threadsafe(_run_all, calls)
        except RuntimeError:
            self._is_closing = True  # the event loop has ended without closing the bus


def _later(function: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: function(*arguments)


def _run_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _settle(answer: asyncio.Future[object], value: object) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[object], text: str) -> None:
    if not answer.done():
        answer.set_exception(BusError(text))
