"""The virtual world: a clock, a network that loses, delays, repeats and reorders, machines that crash, disks that last.

Everything happens in one heap of moments (milliseconds). The same plan and seed give the same run, event by event, in any
process: the trace hash proves it. Messages travel as values; the codec has its own tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from cybermesh.consensus.certificates import CertificateVerifier, SignatureCheck, Signer
from cybermesh.consensus.committee import Committee
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
from cybermesh.consensus.journal import standing
from cybermesh.consensus.leader import LeaderElection, Reputation
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.simulator.application import LogApplication, LogState
from cybermesh.consensus.simulator.leaders import Scripted
from cybermesh.consensus.simulator.machine import Disk, Machine
from cybermesh.consensus.simulator.oracles import Agreement, NodeOracle, ViolationError
from cybermesh.consensus.simulator.plan import Plan, Restore
from cybermesh.consensus.simulator.traitor import Letter, Traitor
from cybermesh.consensus.sync import ANSWER_BLOCKS_MAX, lead_on, splice
from cybermesh.consensus.types import Block, BlockHash, Blocks, Evidence, Message, Round, Sync, Timeout, Vote, accused

START_WALL_MS: Final = 1_700_000_000_000
_DOWN_MAX_MS: Final = 1_500
_TAIL: Final = 20


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
        self.effects = 0
        self.agreement = Agreement(is_patient=plan.must_fork)
        self.held_max = 0
        self.accused: set[int] = set()
        self.committed_at: dict[bytes, int] = {}
        self._signers, self._check = keys
        self.verifier = CertificateVerifier(committee, self._check, committee.genesis_cert())
        self._rng = rng
        self._note = note
        self._application = LogApplication(committee.public_keys)
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._has_news = False
        self._traitors = dict(plan.traitors)
        self.machines = [self._machine(position) for position in range(committee.n + len(plan.twins))]
        self._running_key = [[each for each in self.machines if each.index == index] for index in range(committee.n)]
        for machine in self.machines:
            self._at(0, self._start, machine)
        for moment, positions, transaction in plan.arrivals:
            self._at(moment, self._arrive, positions, transaction)
        for restore in plan.restores:
            self._at(restore.at_ms if restore.copied_ms is None else restore.copied_ms, self._copy, restore)

    def _machine(self, position: int) -> Machine:
        n = self.committee.n
        index = position if position < n else self.plan.twins[position - n]
        name = f"v{index}" if position < n else f"v{index}'"
        disk = Disk(SafetyRecord.fresh(self.committee.genesis_cert()))
        peers = tuple(peer for peer in range(n) if peer != index)
        oracle = NodeOracle(name, epoch=self.committee.epoch)
        machine = Machine(position, index, name, self.committee, disk, oracle, self.plan.skews_ms[position], peers)
        machine.is_honest = index not in self._traitors and index not in self.plan.twins
        return machine

    @property
    def honest(self) -> list[Machine]:
        """The machines that follow the protocol and whose key runs nowhere else."""
        return [machine for machine in self.machines if machine.is_honest]

    @property
    def trace_hash(self) -> str:
        """A digest of everything that has happened, in order."""
        return self._trace.hexdigest()

    # Time

    def _at(self, moment: int, action: Callable[..., None], *arguments: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (moment, self._order, action, arguments))

    def run(self, until_ms: int, is_done: Callable[[], bool]) -> bool:
        """Let time pass until ``is_done``, asked after every commit, or the moment; return whether it was done.

        Raises:
            ViolationError: an oracle saw a broken promise.
        """
        heap = self._heap
        self._has_news = True
        while heap and heap[0][0] <= until_ms:
            self.now_ms, _, action, arguments = heapq.heappop(heap)
            action(*arguments)
            if self._has_news and self.now_ms >= self.plan.heal_ms:
                self._has_news = False
                if is_done():
                    return True
        self.now_ms = max(self.now_ms, until_ms)
        return is_done()

    # Machines

    def _start(self, machine: Machine) -> None:
        disk = machine.disk
        disk.record = dataclasses.replace(disk.record, boot=disk.record.boot + 1)
        fault = disk.fault
        if fault is None:
            disk.stored_boot = disk.record.boot
        machine.is_observer = fault is not None
        machine.lives += 1
        self._log(machine, "starts" if fault is None else f"starts as an observer: {fault}")
        self._begin(machine)
        for peer in self.machines:
            if peer.replica is not None and peer.index != machine.index:
                self._step(peer, Connected(machine.index))

    def _begin(self, machine: Machine) -> None:
        """Take part in the epoch that the store is in."""
        disk, index = machine.disk, machine.index
        root = self._root(machine)
        committee = machine.committee
        if disk.record.epoch < committee.epoch:
            disk.record = SafetyRecord.fresh(committee.genesis_cert(), boot=disk.record.boot)
        key = self._signers[committee.public_keys[index]]
        base: LeaderElection = Reputation(committee)
        is_scripted = self.plan.leaders and committee.epoch == self.committee.epoch
        parts = Parts(
            committee, index, self._application, machine.mempool, Scripted(self.plan.leaders, base) if is_scripted else base,
            self._check, None if machine.is_observer else key, self._rng.random, self.plan.timing,
        )  # fmt: skip
        behaviours = self._traitors.get(index)
        if behaviours is not None:
            machine.traitor = Traitor(committee, index, key, behaviours, self._rng)
        journal = [block for block in disk.journal.values() if block.height > len(disk.chain)]
        machine.wake_at = None
        machine.replica = Replica(parts, root, disk.record, self._now(machine), journal)
        self._step(machine, Started())

    def _root(self, machine: Machine) -> Root[LogState]:
        disk = machine.disk
        if not disk.chain:
            return Root.genesis(self.committee, self._application.genesis())
        tip = disk.chain[-1]
        assert disk.state is not None
        assert disk.certificate is not None
        if tip.header.epoch in disk.epoch_ends:  # R12
            if machine.committee.epoch == tip.header.epoch:
                machine.committee = machine.committee.successor(self.committee.public_keys, tip.hash)
            first = machine.committee.genesis_cert()
            return Root(first.block_hash, Round(0), tip.height, tip.header.time_ms, disk.state, first)
        recent = [block.header for block in disk.chain[-8 * self.committee.n :] if block.header.epoch == tip.header.epoch]
        return Root(tip.hash, tip.round, tip.height, tip.header.time_ms, disk.state, disk.certificate, tuple(recent))

    def _now(self, machine: Machine) -> Now:
        return Now(self.now_ms, START_WALL_MS + self.now_ms + machine.skew_ms)

    def _arrive(self, positions: Sequence[int], transaction: bytes) -> None:
        for position in positions:
            machine = self.machines[position]
            state = machine.disk.state or self._application.genesis()
            pending = self._application.admit(state, transaction, self._now(machine).wall_ms)
            if pending is not None:
                machine.mempool.add(pending)
                self._step(machine, Tick())

    def _step(self, machine: Machine, event: Event) -> None:
        replica = machine.replica
        if replica is None:
            return
        if machine.stuck is not None:
            machine.backlog.append(event)
            return
        self.events += 1
        self._trace.update(f"{self.now_ms} {machine.position} {_describe(event)}".encode())
        effects: Sequence[Effect[LogState]] = replica.step(event, self._now(machine))
        if machine.traitor is not None and isinstance(event, Received):
            self._deliver(machine, machine.traitor.hears(replica, event.message))
        crash = self.plan.crash
        if crash > 0 and self.now_ms < self.plan.heal_ms and self._rng.random() < crash:
            self._perform_all(machine, effects[: self._rng.randrange(len(effects) + 1)])
            self._crash(machine)
            return
        self._perform_all(machine, effects)

    def _perform_all(self, machine: Machine, effects: Sequence[Effect[LogState]]) -> None:
        crash_at = self.plan.crash_at
        for place, effect in enumerate(effects):
            self.effects += 1
            if self.effects in crash_at:
                self._crash(machine)
                return
            if isinstance(effect, Persist) and self._is_full(machine):
                machine.stuck = effects[place:]
                self._log(machine, "waits for room on its disk")
                return
            self._perform(machine, effect)
        replica = machine.replica
        if replica is not None:
            self.held_max = max(self.held_max, replica.held)
            self._schedule(machine, replica)

    def _is_full(self, machine: Machine) -> bool:
        for full in self.plan.full_disks:
            if full.machine == machine.position and full.start_ms <= self.now_ms < full.end_ms:
                self._at(full.end_ms, self._go_on, machine, machine.lives)
                return True
        return False

    def _go_on(self, machine: Machine, life: int) -> None:
        if machine.stuck is None or machine.lives != life:
            return
        left, machine.stuck = machine.stuck, None
        backlog = list(machine.backlog)
        machine.backlog.clear()
        self._perform_all(machine, left)
        for event in backlog:
            self._step(machine, event)
        self._step(machine, Tick())

    def _crash(self, machine: Machine) -> None:
        self._stop(machine)
        up_ms = self.now_ms + self._rng.randrange(10, _DOWN_MAX_MS)
        self._at(max(self.now_ms + 10, min(up_ms, self.plan.heal_ms)), self._start, machine)

    def _stop(self, machine: Machine) -> None:
        self._log(machine, "crashes")
        machine.replica = None
        machine.stuck = None
        machine.backlog.clear()

    def _copy(self, restore: Restore) -> None:
        disk = self.machines[restore.machine].disk
        fresh = SafetyRecord.fresh(self.committee.genesis_cert())
        copy = (fresh, {}) if restore.copied_ms is None else (disk.record, dict(disk.journal))
        self._at(restore.at_ms, self._restore, restore.machine, *copy)

    def _restore(self, position: int, record: SafetyRecord, journal: dict[BlockHash, Block]) -> None:
        machine = self.machines[position]
        if machine.replica is not None:
            self._stop(machine)
            self._at(self.now_ms + 1, self._start, machine)
        self._log(machine, "gets an old copy of its safety file")
        disk = machine.disk
        disk.record, disk.journal = record, dict(journal)
        seen = standing(
            dataclasses.replace(record, boot=record.boot + 1),
            stored_boot=disk.stored_boot,
            stored_voted_round=disk.stored_voted_round,
            stored_epoch=disk.chain[-1].header.epoch if disk.chain else record.epoch,
        )
        machine.oracle.is_retired = seen is not None

    def _schedule(self, machine: Machine, replica: Replica[LogState]) -> None:
        wake = replica.wake_ms()
        if wake is None or (machine.wake_at is not None and machine.wake_at <= wake):
            return
        machine.wake_at = max(wake, self.now_ms + 1)
        self._at(machine.wake_at, self._wake, machine, machine.lives, machine.wake_at)

    def _wake(self, machine: Machine, life: int, moment: int) -> None:
        replica = machine.replica
        if replica is None or machine.lives != life or machine.wake_at != moment:
            return
        machine.wake_at = None
        due = replica.wake_ms()
        if due is not None and due <= self.now_ms:
            self._step(machine, Tick())
        else:
            self._schedule(machine, replica)

    # Effects

    def _perform(self, machine: Machine, effect: Effect[LogState]) -> None:
        match effect:
            case Send(to, message):
                self._say(machine, [to], message)
            case Broadcast(message):
                self._say(machine, machine.peers, message)
            case Persist(record, block):
                machine.disk.record = record
                if block is not None:
                    machine.disk.journal[block.hash] = block
            case Commit():
                self._commit(machine, effect)
            case ServeBlocks() | ServeEpoch():
                self._serve(machine, effect)
            case Accuse() | Refuse() | Halt() | StopVoting():
                self._judge(machine, effect)

    def _judge(self, machine: Machine, effect: Accuse | Refuse | Halt | StopVoting) -> None:
        match effect:
            case Accuse(evidence):
                self._accuse(machine, evidence)
            case Refuse(sender, reason):
                self._log(machine, f"refuses the {reason} of v{sender}")
            case Halt(reason) | StopVoting(reason):
                if machine.is_honest and not self._is_restored(machine):
                    raise ViolationError(f"{machine.name}: {reason}")

    def _accuse(self, machine: Machine, evidence: Evidence) -> None:
        culprit = accused(evidence)
        if machine.is_honest:
            verifier = CertificateVerifier(machine.committee, self._check, machine.committee.genesis_cert())
            if self._is_innocent(culprit) or not verifier.is_valid_evidence(evidence):
                raise ViolationError(f"{machine.name} accuses v{culprit} wrongly")
            self.accused.add(culprit)

    def _is_innocent(self, index: int) -> bool:
        return index not in self.plan.twins and index not in self._traitors

    def _is_restored(self, machine: Machine) -> bool:
        return any(restore.machine == machine.position for restore in self.plan.restores)

    def _serve(self, machine: Machine, request: ServeBlocks | ServeEpoch) -> None:
        disk = machine.disk
        stored = disk.chain[request.from_height - 1 : request.from_height + ANSWER_BLOCKS_MAX]
        answer: Blocks | None = None
        if isinstance(request, ServeBlocks):
            answer = splice(machine.committee.epoch, request, stored)
        elif (end := disk.epoch_ends.get(request.epoch)) is not None:
            answer = lead_on(request, [block for block in stored if block.header.epoch == request.epoch], end)
        if answer is not None:
            self._say(machine, [request.to], answer)

    def _commit(self, machine: Machine, commit: Commit[LogState]) -> None:
        if machine.is_honest:
            machine.committed.extend(each.block for each in commit.blocks if each.block.height > len(machine.committed))
            machine.certificate = commit.certificate
            for transaction in (transaction for each in commit.blocks for transaction in each.block.payload):
                self.committed_at.setdefault(transaction, self.now_ms)
            machine.oracle.commit(commit, is_first_life=machine.lives == 1)
            self.agreement.committed(machine.name, commit)
        self._log(machine, f"commits up to height {commit.blocks[-1].block.height}")
        if self.plan.store_ms:
            self._at(self.now_ms + self.plan.store_ms, self._store, machine, machine.lives, commit)
        else:
            self._store(machine, machine.lives, commit)

    def _store(self, machine: Machine, life: int, commit: Commit[LogState]) -> None:
        if machine.lives != life or machine.replica is None:
            return  # it crashed before: the journal still has the blocks
        disk = machine.disk
        for each in commit.blocks:
            if each.block.height > len(disk.chain):
                disk.chain.append(each.block)
            disk.journal.pop(each.block.hash, None)
        disk.certificate = commit.certificate
        disk.state = commit.blocks[-1].execution.state
        disk.stored_voted_round = disk.record.last_voted_round
        self._has_news = True
        if commit.next_committee is not None:
            last = commit.blocks[-1].block.header
            disk.epoch_ends[last.epoch] = ((last, *commit.suffix), commit.certificate)
            self._log(machine, f"ends epoch {last.epoch}")
            self._begin(machine)

    # Network

    def _say(self, machine: Machine, peers: Sequence[int], message: Message) -> None:
        if machine.traitor is not None and machine.replica is not None:
            self._deliver(machine, machine.traitor.says(machine.replica, peers, message))
            return
        if machine.is_honest:
            machine.oracle.sent(message, machine.disk.record, self._block_of(machine, message))
        self._send(machine, peers, message)

    def _deliver(self, machine: Machine, letters: Iterable[Letter]) -> None:
        for peers, message in letters:
            self._send(machine, peers, message)

    def _send(self, machine: Machine, peers: Sequence[int], message: Message) -> None:
        if self._note is not None:
            self._log(machine, f"-> {', '.join(f'v{peer}' for peer in peers)}: {_describe_message(message)}")
        plan, rng = self.plan, self._rng
        is_bad = self.now_ms < plan.heal_ms
        event = Received(machine.index, message)
        delay_min = plan.delay_min_ms + (plan.disk_ms[machine.position] if plan.disk_ms else 0)
        spread = plan.delay_max_ms + 1 - plan.delay_min_ms
        loss = plan.loss[machine.position] if plan.loss and is_bad else None
        for target in (each for peer in peers for each in self._running_key[peer]):
            if is_bad and (self._is_cut(machine, target) or (loss is not None and rng.random() < loss[target.position])):
                continue
            for _ in range(2 if is_bad and plan.repeat and rng.random() < plan.repeat else 1):
                delay = delay_min + int(rng.random() * spread)
                if is_bad and plan.tail and rng.random() < plan.tail:
                    delay *= _TAIL
                self._at(self.now_ms + delay, self._step, target, event)

    def _is_cut(self, one: Machine, other: Machine) -> bool:
        link = (one.position, other.position)
        return any(cut.start_ms <= self.now_ms < cut.end_ms and link in cut.links for cut in self.plan.cuts)

    def _block_of(self, machine: Machine, message: Message) -> Block | None:
        """Return the block on the machine's disk that a message concerns."""
        journal = machine.disk.journal
        if isinstance(message, Vote):
            stored = next((block for block in machine.disk.chain[-4:] if block.hash == message.block_hash), None)
            return journal.get(message.block_hash, stored)
        if isinstance(message, Block):
            self.agreement.certified(message.qc)
            return journal.get(message.hash)
        if isinstance(message, Timeout):
            self.agreement.certified(message.high_qc)
        return None

    def _log(self, machine: Machine, text: str) -> None:
        if self._note is not None:
            self._note(self.now_ms, f"{machine.name} {text}")


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
        case Blocks():
            return f"answers with {len(message.blocks)} blocks from height {message.blocks[0].height} on, epoch {message.epoch}"
        case Sync():
            return f"tells its height {message.committed_height}, epoch {message.epoch}"
        case _:
            return type(message).__name__
