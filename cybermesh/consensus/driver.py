"""The one task that owns a replica, and everything around it that waits.

Rules:
* The replica is touched by this task only, one event at a time, and its effects are performed in order: what must be durable
  is durable before the first message of the same step leaves. While the safety file cannot be written the node is silent; it
  tries again for ever, so a full disk heals by itself.
* Every queue is bounded. A full inbox makes the transport's queues fill, whose overflow is stated there; a store that is slow
  to take commits makes this task wait (back-pressure); block requests beyond one of each peer and a few in all are dropped,
  they are repeated.
* Commits are handed over oldest first and each at least once: after a restart the newest may come again, the store compares
  heights. The journal forgets a block only after its commit was taken.
* A driver serves one epoch. It ends when the epoch's last block is durable, and tells the committee that takes over; the next
  one begins with an empty memory of what was signed, which is durable before it signs (R12).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar, assert_never

from cybermesh.consensus.codec import WireMessage, decode_message, encode_message
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.courier import Courier
from cybermesh.consensus.events import (
    Accuse,
    Broadcast,
    Commit,
    Connected,
    Effect,
    Event,
    Halt,
    Now,
    Persist,
    Received,
    Refuse,
    SafetyRecord,
    Send,
    ServeBlocks,
    ServeEpoch,
    Started,
    StopVoting,
    Tick,
)
from cybermesh.consensus.journal import JournalError
from cybermesh.consensus.mempool import Admission, PendingTransaction
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.sync import ANSWER_BLOCKS_MAX, lead_on, splice
from cybermesh.consensus.transport import Kind, Transport
from cybermesh.consensus.types import (
    Block,
    Blocks,
    Evidence,
    Forward,
    GetBlocks,
    GetPayload,
    Header,
    Height,
    MalformedError,
    Message,
    Payload,
    Proposal,
    QuorumCert,
    Round,
    Sync,
    Timeout,
    Vote,
)

S = TypeVar("S")

_INBOX_MAX: Final = 256
_HAND_OVER_MAX: Final = 16
_SERVE_MAX: Final = 8
_QUICK_S: Final = 0.000_5
_USUAL_OF: Final = 16
_RETRY_FIRST_S: Final = 0.1
_RETRY_MAX_S: Final = 5.0
_KINDS: Final[dict[type[WireMessage], Kind]] = {
    Proposal: Kind.PROPOSAL,
    GetPayload: Kind.GET_PAYLOAD,
    Payload: Kind.PAYLOAD,
    Vote: Kind.VOTE,
    Timeout: Kind.TIMEOUT,
    Sync: Kind.SYNC,
    GetBlocks: Kind.GET_BLOCKS,
    Blocks: Kind.BLOCKS,
    Forward: Kind.FORWARD,
}


class HaltedError(Exception):
    """This node computes something else than a quorum did; it must not go on."""


class SafetyFile(Protocol):
    """What the driver needs of a ``Journal``."""

    def load(self) -> SafetyRecord:
        """Return the newest record."""
        ...

    def blocks(self, above: Height) -> list[Block]:
        """Return the journaled blocks above a height."""
        ...

    def write(self, record: SafetyRecord, blocks: Sequence[Block]) -> None:
        """Make both durable before returning, or raise JournalError."""
        ...

    def prune(self, height: Height) -> None:
        """Forget blocks up to a height with the next write."""
        ...


class BlockSource(Protocol):
    """The committed chain, as the store has it."""

    async def blocks(self, from_height: int, count_max: int) -> Sequence[Block]:
        """Return consecutive committed blocks from a height on, lowest first, as many as there are up to ``count_max``."""
        ...

    async def epoch_end(self, epoch: int) -> tuple[Sequence[Header], QuorumCert] | None:
        """Return the proof that an epoch has ended, None if it has not.

        The headers lead from the epoch's last block to the parent of the certificate that committed it.
        """
        ...


class QuickOrThreaded:
    """Does blocking work in place while it usually takes less than handing it to a thread and back, else in a thread.

    What is usual is a moving average over the last writes; ``clock`` gives seconds and never jumps.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._usual_s = _QUICK_S

    async def __call__(self, write: Callable[[], None]) -> None:
        """Return when the work is done; what it raises is raised here."""
        if self._usual_s < _QUICK_S:
            self._timed(write)
        else:
            await asyncio.to_thread(self._timed, write)

    def _timed(self, write: Callable[[], None]) -> None:
        began = self._clock()
        write()
        self._usual_s += (self._clock() - began - self._usual_s) / _USUAL_OF


@dataclass(frozen=True, slots=True)
class Shell(Generic[S]):
    """What surrounds a replica.

    ``on_commit`` takes one commit at a time, returns when it is durable, and retries by itself; what it raises ends the driver.
    ``on_evidence`` and ``wall_ms`` (milliseconds since 1970) return at once.
    """

    transport: Transport
    journal: SafetyFile
    source: BlockSource
    on_commit: Callable[[Commit[S]], Awaitable[None]]
    on_evidence: Callable[[Evidence], None]
    wall_ms: Callable[[], int]
    run_blocking: Callable[[Callable[[], None]], Awaitable[None]] = field(
        default_factory=lambda: QuickOrThreaded(time.monotonic)
    )


@dataclass(frozen=True, slots=True)
class EpochEnd(Generic[S]):
    """Who takes over, and from where; ``root`` is the state after the epoch's last block, which the store has."""

    committee: Committee
    root: Root[S]


@dataclass(slots=True)
class Counters:
    """What the driver has seen and done since it was made; ``refused`` counts by (validator, reason).

    ``commit_latency_ms`` sums the time from each committed block's stamp to its commit here, by this node's clock.
    """

    events: int = 0
    wakes: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    commits: int = 0
    blocks: int = 0
    refused: Counter[tuple[int, str]] = field(default_factory=Counter)
    evidence: int = 0
    unserved: int = 0
    journal_failures: int = 0
    commit_latency_ms: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """Where the node stands; ``problem`` says why it does not vote, None when it does."""

    round: int
    leader: int
    height: int
    high_round: int
    mempool: int
    problem: str | None


class Driver(Generic[S]):
    """Runs one validator. ``run`` may be called once."""

    def __init__(self, parts: Parts[S], root: Root[S], shell: Shell[S]) -> None:
        self._parts = parts
        self._root = root
        self._shell = shell
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(_INBOX_MAX)
        self._commits: asyncio.Queue[Commit[S]] = asyncio.Queue(_HAND_OVER_MAX)
        self._requests: asyncio.Queue[ServeBlocks | ServeEpoch] = asyncio.Queue(_SERVE_MAX)
        self._over = asyncio.Event()
        self._end: EpochEnd[S] | None = None
        self._served: set[int] = set()
        self._courier = Courier(parts.mempool)
        self._room = asyncio.Event()
        self._is_poked = False
        self._replica: Replica[S] | None = None
        self._problem: str | None = None
        self.counters = Counters()

    def submit(self, transaction: PendingTransaction) -> Admission:
        """Offer an admitted transaction; ``FULL`` asks the caller to wait for ``room`` before it takes more."""
        admission = self._parts.mempool.add(transaction)
        if admission is Admission.ADDED and not self._is_poked and not self._inbox.full():
            self._is_poked = True
            self._inbox.put_nowait(Tick())
        return admission

    async def room(self) -> None:
        """Return after the next commit, which may have made room in the mempool."""
        self._room.clear()
        await self._room.wait()

    @property
    def record(self) -> SafetyRecord:
        """What the key has signed last; the store keeps its boot number and last voted round to recognise an old copy."""
        return self._shell.journal.load()

    @property
    def status(self) -> Status:
        """Where the node stands now."""
        replica = self._replica
        waiting = len(self._parts.mempool)
        if replica is None:
            return Status(0, 0, self._root.height, 0, waiting, "not started")
        problem = self._problem
        if problem is None and replica.waiting_for is not None:
            problem = f"waiting for {replica.waiting_for}"
        return Status(replica.round, replica.leader, replica.root.height, replica.high_qc.round, waiting, problem)

    async def run(self) -> EpochEnd[S]:
        """Take part in consensus until cancelled, or until the epoch has ended.

        Raises:
            HaltedError: inside an exception group, when the node computes another state than a quorum did.
        """
        name = f"consensus-{self._parts.index}"
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._own_replica(), name=f"{name}-replica"),
                group.create_task(self._receive(), name=f"{name}-receive"),
                group.create_task(self._hand_over(), name=f"{name}-commits"),
                group.create_task(self._serve(), name=f"{name}-blocks"),
            ]
            await self._over.wait()
            for task in tasks:
                task.cancel()
        assert self._end is not None
        return self._end

    async def _own_replica(self) -> None:
        journal = self._shell.journal
        record = journal.load()
        if record.epoch < self._parts.committee.epoch:
            await self._write(SafetyRecord.fresh(self._root.certificate, boot=record.boot), ())
        blocks = journal.blocks(self._root.height)
        replica = Replica(self._parts, self._root, journal.load(), self._now(), blocks)
        self._replica = replica
        if self._parts.signer is None:
            self._problem = "observer"
        event: Event = Started()
        while True:
            self.counters.events += 1
            await self._perform(replica.step(event, self._now()))
            event = await self._next_event(replica.wake_ms())

    def _now(self) -> Now:
        return Now(int(asyncio.get_running_loop().time() * 1000), self._shell.wall_ms())

    async def _next_event(self, wake_ms: int | None) -> Event:
        try:
            event = self._inbox.get_nowait()
        except asyncio.QueueEmpty:
            # Half a millisecond more: the clock is read in whole ones and must not come out just below the wake-up time.
            when = None if wake_ms is None else wake_ms / 1000 + 0.0005
            try:
                async with asyncio.timeout_at(when):
                    event = await self._inbox.get()
            except TimeoutError:
                self.counters.wakes += 1
                event = Tick()
        if isinstance(event, Tick):
            self._is_poked = False
        return event

    async def _receive(self) -> None:
        transport = self._shell.transport
        while True:
            frame = await transport.receive()
            if frame.is_connection:
                await self._inbox.put(Connected(frame.peer))
                continue
            try:
                message = decode_message(frame.data)
            except MalformedError:
                self.counters.refused[frame.peer, "malformed"] += 1
                continue
            whole = self._unpack(frame.peer, message)
            if whole is not None:
                await self._inbox.put(Received(frame.peer, whole))

    def _unpack(self, peer: int, message: WireMessage) -> Message | None:
        """Return what is for the replica: a proposal only when its whole payload is here."""
        match message:
            case Proposal():
                result = self._courier.take(peer, message)
            case Payload():
                result = self._courier.fill(peer, message)
            case GetPayload():
                answer = self._courier.serve(message)
                if answer is not None:
                    self._post([peer], answer)
                return None
            case _:
                return message
        if isinstance(result, GetPayload):
            self._post([peer], result)
            return None
        return result

    # Effects

    async def _perform(self, effects: Sequence[Effect[S]]) -> None:
        # One write per step, ahead of all: the newest record covers what the earlier ones of the step promise.
        writes = [effect for effect in effects if isinstance(effect, Persist)]
        if writes:
            await self._write(writes[-1].record, [write.block for write in writes if write.block is not None])
        for effect in effects:
            match effect:
                case Persist():
                    pass
                case Broadcast(message):
                    self._send([peer for peer in range(self._parts.committee.n) if peer != self._parts.index], message)
                case Send(to, message):
                    self._send([to], message)
                case Commit():
                    self.counters.commits += 1
                    self.counters.blocks += len(effect.blocks)
                    now_ms = self._shell.wall_ms()
                    self.counters.commit_latency_ms += sum(max(0, now_ms - each.block.header.time_ms) for each in effect.blocks)
                    await self._commits.put(effect)
                case _:
                    self._note(effect)

    def _note(self, effect: ServeBlocks | ServeEpoch | Refuse | Accuse | StopVoting | Halt) -> None:
        match effect:
            case ServeBlocks() | ServeEpoch():
                if self._requests.full() or effect.to in self._served:
                    self.counters.unserved += 1
                else:
                    self._served.add(effect.to)
                    self._requests.put_nowait(effect)
            case Refuse(sender, reason):
                self.counters.refused[sender, reason] += 1
            case Accuse(evidence):
                self.counters.evidence += 1
                self._shell.on_evidence(evidence)
            case StopVoting(reason):
                self._problem = reason
            case Halt(reason):
                raise HaltedError(reason)
            case _:
                assert_never(effect)

    def _send(self, peers: Sequence[int], message: Message) -> None:
        self._post(peers, self._courier.compact(message) if isinstance(message, Block) else message)

    def _post(self, peers: Sequence[int], message: WireMessage) -> None:
        kind = _KINDS[type(message)]
        data = encode_message(message)
        self.counters.sent[kind.value] += 1
        for peer in peers:
            self._shell.transport.send(peer, kind, data)

    async def _write(self, record: SafetyRecord, blocks: Sequence[Block]) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                await self._shell.run_blocking(lambda: self._shell.journal.write(record, blocks))
            except JournalError as error:
                self.counters.journal_failures += 1
                before, self._problem = self._problem, str(error)
                await asyncio.sleep(pause_s)
                self._problem = before
                pause_s = min(2 * pause_s, _RETRY_MAX_S)
            else:
                return

    async def _hand_over(self) -> None:
        while True:
            commit = await self._commits.get()
            await self._shell.on_commit(commit)
            self._shell.journal.prune(commit.blocks[-1].block.height)
            self._room.set()
            if commit.next_committee is not None:
                self._end = _end_of(commit, commit.next_committee, self._parts.committee)
                self._over.set()

    async def _serve(self) -> None:
        while True:
            request = await self._requests.get()
            if isinstance(request, ServeBlocks):
                stored = await self._stored(request.from_height, request.stored_to)
                answer = splice(self._parts.committee.epoch, request, stored)
            else:
                answer = await self._lead_on(request)
            if answer is not None:
                self._send([request.to], answer)
            self._served.discard(request.to)

    async def _lead_on(self, request: ServeEpoch) -> Blocks | None:
        end = await self._shell.source.epoch_end(request.epoch)
        if end is None:
            return None
        return lead_on(request, await self._stored(request.from_height, end[0][0].height), end)

    async def _stored(self, from_height: int, to_height: int) -> Sequence[Block]:
        """Return blocks of a range of heights, one more than an answer holds at most."""
        count = min(to_height - from_height + 1, ANSWER_BLOCKS_MAX + 1)
        return await self._shell.source.blocks(from_height, count) if count > 0 else ()


def _end_of(commit: Commit[S], keys: Sequence[bytes], committee: Committee) -> EpochEnd[S]:
    last = commit.blocks[-1]
    successor = committee.successor(keys, last.block.hash)
    certificate, header = successor.genesis_cert(), last.block.header
    root = Root(certificate.block_hash, Round(0), header.height, header.time_ms, last.execution.state, certificate)
    return EpochEnd(successor, root)
