"""The virtual world: a clock, a network that loses, delays, repeats and reorders, nodes that crash, disks that do not forget.

Everything happens in one heap of moments (milliseconds). The same plan and seed give the same run, event by event, in any
process: the trace hash proves it. Messages travel as values; the codec has its own tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cybermesh.consensus.certificates import SignatureCheck, Signer
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import (
    Broadcast,
    Commit,
    Connected,
    Effect,
    Event,
    Halt,
    Now,
    Persist,
    Received,
    SafetyRecord,
    Send,
    ServeBlocks,
    Started,
    StopVoting,
    Tick,
)
from cybermesh.consensus.leader import RoundRobin
from cybermesh.consensus.mempool import Mempool
from cybermesh.consensus.pacemaker import Timing
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.simulator.application import LogApplication, LogState
from cybermesh.consensus.simulator.oracles import Agreement, NodeOracle, ViolationError
from cybermesh.consensus.sync import ANSWER_BLOCKS_MAX, splice
from cybermesh.consensus.types import Block, BlockHash, Message, QuorumCert, Timeout, Vote

START_WALL_MS: Final = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Partition:
    """Between two moments only nodes of the same group hear each other; ``groups`` gives each node's group."""

    start_ms: int
    end_ms: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How bad the world is until ``heal_ms``; afterwards it is perfect but for delays.

    Probabilities are per message (``loss``, ``repeat``) and per step of a node (``crash``); delays are milliseconds. ``twins``
    names validators whose key runs on two machines. ``arrivals`` are (moment, nodes that learn of it, transaction).
    """

    heal_ms: int
    delay_min_ms: int
    delay_max_ms: int
    loss: float
    repeat: float
    crash: float
    partitions: tuple[Partition, ...]
    skews_ms: tuple[int, ...]
    twins: tuple[int, ...]
    arrivals: tuple[tuple[int, tuple[int, ...], bytes], ...]
    timing: Timing


@dataclass(slots=True)
class Disk:
    """What survives a crash of a node."""

    record: SafetyRecord
    journal: dict[BlockHash, Block] = field(default_factory=dict)
    chain: list[Block] = field(default_factory=list)
    certificate: QuorumCert | None = None
    state: LogState | None = None


@dataclass(slots=True)
class SimNode:
    """One machine: ``position`` numbers machines, ``index`` validators; a twin shares its index."""

    position: int
    index: int
    name: str
    disk: Disk
    oracle: NodeOracle
    skew_ms: int
    is_honest: bool
    replica: Replica[LogState] | None = None
    mempool: Mempool = field(default_factory=Mempool)
    peers: tuple[int, ...] = ()
    wake_at: int | None = None
    lives: int = 0


class World:
    """Runs one plan. ``note``, if given, is called with (moment, text) for the timeline."""

    def __init__(
        self,
        committee: Committee,
        keys: tuple[dict[bytes, Signer], SignatureCheck],
        plan: Plan,
        rng: random.Random,
        note: Callable[[int, str], None] | None = None,
    ) -> None:
        self.committee = committee
        self.plan = plan
        self.now_ms = 0
        self.events = 0
        self.agreement = Agreement()
        self.held_max = 0
        self._signers, self._check = keys
        self._rng = rng
        self._note = note
        self._application = LogApplication()
        self._leaders = RoundRobin(committee)
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self.nodes = [self._machine(position) for position in range(committee.n + len(plan.twins))]
        self._machines = [[node for node in self.nodes if node.index == index] for index in range(committee.n)]
        for node in self.nodes:
            self._at(0, self._starter(node))
        for moment, positions, transaction in plan.arrivals:
            self._at(moment, self._arrival(positions, transaction))

    def _machine(self, position: int) -> SimNode:
        n = self.committee.n
        index = position if position < n else self.plan.twins[position - n]
        name = f"v{index}" if position < n else f"v{index}'"
        disk = Disk(SafetyRecord.fresh(self.committee.genesis_cert()))
        is_honest = index not in self.plan.twins
        peers = tuple(peer for peer in range(n) if peer != index)
        oracle = NodeOracle(name)
        return SimNode(position, index, name, disk, oracle, self.plan.skews_ms[position], is_honest, peers=peers)

    @property
    def honest(self) -> list[SimNode]:
        """The machines whose key runs nowhere else."""
        return [node for node in self.nodes if node.is_honest]

    @property
    def trace_hash(self) -> str:
        """A digest of everything that has happened, in order."""
        return self._trace.hexdigest()

    # Time

    def _at(self, moment: int, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (moment, self._order, action))

    def run(self, until_ms: int, is_done: Callable[[], bool]) -> bool:
        """Let time pass until ``is_done`` or the moment; return whether it was done.

        Raises:
            ViolationError: an oracle saw a broken promise.
        """
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            self.now_ms, _, action = heapq.heappop(heap)
            action()
            if self.now_ms >= self.plan.heal_ms and is_done():
                return True
        self.now_ms = max(self.now_ms, until_ms)
        return is_done()

    # Nodes

    def _starter(self, node: SimNode) -> Callable[[], None]:
        def start() -> None:
            disk, committee = node.disk, self.committee
            disk.record = dataclasses.replace(disk.record, boot=disk.record.boot + 1)
            parts = Parts(
                committee, node.index, self._application, node.mempool, self._leaders, self._check,
                self._signers[committee.public_keys[node.index]], self._rng.random, self.plan.timing,
            )  # fmt: skip
            journal = [block for block in disk.journal.values() if block.height > len(disk.chain)]
            node.lives += 1
            node.wake_at = None
            node.replica = Replica(parts, self._root(disk), disk.record, self._now(node), journal)
            self._log(node, "starts")
            self._step(node, Started())
            for peer in self.nodes:
                if peer.replica is not None and peer.index != node.index:
                    self._step(peer, Connected(node.index))

        return start

    def _root(self, disk: Disk) -> Root[LogState]:
        if not disk.chain:
            return Root.genesis(self.committee, self._application.genesis())
        tip = disk.chain[-1]
        assert disk.state is not None
        assert disk.certificate is not None
        return Root(tip.hash, tip.round, tip.height, tip.header.time_ms, disk.state, disk.certificate)

    def _now(self, node: SimNode) -> Now:
        return Now(self.now_ms, START_WALL_MS + self.now_ms + node.skew_ms)

    def _arrival(self, positions: Sequence[int], transaction: bytes) -> Callable[[], None]:
        def arrive() -> None:
            for position in positions:
                node = self.nodes[position]
                state = node.disk.state or self._application.genesis()
                pending = self._application.admit(state, transaction, 0)
                if pending is not None:
                    node.mempool.add(pending)
                    self._step(node, Tick())

        return arrive

    def _step(self, node: SimNode, event: Event) -> None:
        replica = node.replica
        if replica is None:
            return
        self.events += 1
        self._trace.update(f"{self.now_ms} {node.position} {_describe(event)}".encode())
        effects = replica.step(event, self._now(node))
        count = len(effects)
        plan = self.plan
        has_crashed = plan.crash > 0 and self.now_ms < plan.heal_ms and self._rng.random() < plan.crash
        if has_crashed:
            count = self._rng.randrange(len(effects) + 1)
        for effect in effects[:count]:
            self._perform(node, effect)
        if has_crashed:
            self._crash(node)
            return
        self.held_max = max(self.held_max, replica.held)
        self._schedule(node, replica)

    def _crash(self, node: SimNode) -> None:
        self._log(node, "crashes")
        node.replica = None
        self._at(min(self.now_ms + self._rng.randrange(10, 1_500), self.plan.heal_ms), self._starter(node))

    def _schedule(self, node: SimNode, replica: Replica[LogState]) -> None:
        wake = replica.wake_ms()
        if wake is None or (node.wake_at is not None and node.wake_at <= wake):
            return
        node.wake_at = max(wake, self.now_ms + 1)
        self._at(node.wake_at, self._waker(node, node.lives, node.wake_at))

    def _waker(self, node: SimNode, life: int, moment: int) -> Callable[[], None]:
        def wake() -> None:
            replica = node.replica
            if replica is None or node.lives != life or node.wake_at != moment:
                return
            node.wake_at = None
            due = replica.wake_ms()
            if due is not None and due <= self.now_ms:
                self._step(node, Tick())
            else:
                self._schedule(node, replica)

        return wake

    # Effects

    def _perform(self, node: SimNode, effect: Effect[LogState]) -> None:
        match effect:
            case Send(to, message):
                self._send(node, [to], message)
            case Broadcast(message):
                self._send(node, node.peers, message)
            case Persist(record, block):
                node.disk.record = record
                if block is not None:
                    node.disk.journal[block.hash] = block
            case Commit():
                self._commit(node, effect)
            case ServeBlocks():
                self._serve(node, effect)
            case Halt(reason) | StopVoting(reason):
                if node.is_honest:
                    raise ViolationError(f"{node.name}: {reason}")
            case _:
                pass

    def _serve(self, node: SimNode, request: ServeBlocks) -> None:
        stored = node.disk.chain[request.from_height - 1 : request.from_height + ANSWER_BLOCKS_MAX]
        answer = splice(self.committee.epoch, request, stored)
        if answer is not None:
            self._send(node, [request.to], answer)

    def _commit(self, node: SimNode, commit: Commit[LogState]) -> None:
        if node.is_honest:
            node.oracle.commit(commit, is_first_life=node.lives == 1)
            self.agreement.committed(node.name, commit)
        disk = node.disk
        for each in commit.blocks:
            if each.block.height > len(disk.chain):
                disk.chain.append(each.block)
            disk.journal.pop(each.block.hash, None)
        disk.certificate = commit.certificate
        disk.state = commit.blocks[-1].execution.state
        self._log(node, f"commits up to height {len(disk.chain)}")

    def _send(self, node: SimNode, peers: Sequence[int], message: Message) -> None:
        if node.is_honest:
            node.oracle.sent(message, node.disk.record, self._has_block(node, message))
        if self._note is not None:
            self._log(node, f"-> {', '.join(f'v{peer}' for peer in peers)}: {_describe_message(message)}")
        plan, rng = self.plan, self._rng
        is_bad = self.now_ms < plan.heal_ms
        event = Received(node.index, message)
        for machine in (machine for peer in peers for machine in self._machines[peer]):
            if is_bad and (rng.random() < plan.loss or self._is_cut(node, machine)):
                continue
            copies = 2 if is_bad and rng.random() < plan.repeat else 1
            for _ in range(copies):
                delay = plan.delay_min_ms + int(rng.random() * (plan.delay_max_ms + 1 - plan.delay_min_ms))
                self._at(self.now_ms + delay, self._delivery(machine, event))

    def _delivery(self, machine: SimNode, event: Event) -> Callable[[], None]:
        return lambda: self._step(machine, event)

    def _is_cut(self, one: SimNode, other: SimNode) -> bool:
        for partition in self.plan.partitions:
            if partition.start_ms <= self.now_ms < partition.end_ms:
                groups = partition.groups
                return groups[one.position] != groups[other.position]
        return False

    def _has_block(self, node: SimNode, message: Message) -> bool:
        if isinstance(message, Vote):
            journal, chain = node.disk.journal, node.disk.chain
            return message.block_hash in journal or any(block.hash == message.block_hash for block in chain[-4:])
        if isinstance(message, Block):
            self.agreement.certified(message.qc)
            return message.hash in node.disk.journal
        if isinstance(message, Timeout):
            self.agreement.certified(message.high_qc)
        return True

    def _log(self, node: SimNode, text: str) -> None:
        if self._note is not None:
            self._note(self.now_ms, f"{node.name} {text}")


def _describe(event: Event) -> str:
    if isinstance(event, Received):
        return f"{event.sender} {_describe_message(event.message)}"
    return type(event).__name__


def _describe_message(message: Message) -> str:
    match message:
        case Block():
            return f"proposes {message.hash.hex()[:8]} in round {message.round} on {message.qc.round}"
        case Vote():
            return f"votes {message.block_hash.hex()[:8]} in round {message.round}"
        case Timeout():
            return f"gives up round {message.round}, knows {message.high_qc.round}"
        case _:
            return type(message).__name__
