"""The protocol of one validator: two-chain HotStuff (Jolteon), votes broadcast, as a pure function of events.

``step`` takes one event with its time and returns the effects to perform in order; nothing here waits, reads a clock, draws a
number or touches a disk. The rules, cited where the code follows them:

R1  advance   a valid certificate, of votes or of timeouts, leads into the round after its own; the highest one is extended.
R2  propose   the leader of a round proposes once: on the highest certificate, with the timeout certificate of the round before
              iff that certificate is older.
R3  vote      safety.py; before it, the block is executed on its parent's state and must give the header's roots.
R4  timeout   safety.py; when the round timer ends, or f + 1 others have given up the round.
R5  commit    blocktree.py        R6  collect   collector.py        R9  memory   safety.py        R11 catch up   sync.py
R7  idle      a leader proposes when it has transactions, when an uncommitted ancestor has a payload, when a time-driven effect
              is due, when somebody waits, else when the heartbeat is due. The same conditions start the round timer. A
              transaction that sees no proposal for a while is sent to all, once per round.
R8  time      block time never falls; a voter refuses what is more than 10 s ahead of its clock and holds nothing back.
R12 epoch   blocktree.py; the replica of an epoch does nothing more after it. Whoever is in an earlier epoch is led to its end.
R10 start     safety.py; a node that starts asks all where they stand and signs nothing before a quorum, itself included, told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar, assert_never

from cybermesh.consensus.blocktree import Position
from cybermesh.consensus.certificates import CertificateVerifier
from cybermesh.consensus.chain import Chain
from cybermesh.consensus.collector import Collector
from cybermesh.consensus.events import (
    Accuse,
    Broadcast,
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
from cybermesh.consensus.execution import Draft, Outlook
from cybermesh.consensus.pacemaker import Pacemaker
from cybermesh.consensus.parts import Parts, Root
from cybermesh.consensus.safety import SafetyRules
from cybermesh.consensus.sync import CatchUp, Muster, PeerBudget, PeerLimit, with_certificates
from cybermesh.consensus.types import (
    Block,
    BlockHash,
    Blocks,
    Evidence,
    Forward,
    GetBlocks,
    Header,
    Height,
    Message,
    QuorumCert,
    Round,
    Sync,
    Timeout,
    TimeoutCert,
    Vote,
)

S = TypeVar("S")


class Replica(Generic[S]):
    """One validator of one epoch. ``journal`` holds the blocks that were persisted above ``root``."""

    def __init__(self, parts: Parts[S], root: Root[S], record: SafetyRecord, now: Now, journal: Sequence[Block] = ()) -> None:
        self._parts = parts
        self._app = parts.application
        self._committee = parts.committee
        self._index = parts.index
        self._mempool = parts.mempool
        self._verifier = CertificateVerifier(parts.committee, parts.check, parts.committee.genesis_cert())
        signer = None if parts.signer is None else self._verifier.remembering(parts.signer, parts.index)
        self._safety = SafetyRules(parts.committee, parts.index, signer, record)
        self._chain = Chain(parts, root)
        self._tree = self._chain.tree
        self._high_qc = max(record.high_qc, root.certificate, key=lambda qc: qc.round)
        self._held_qc = root.certificate
        self._last_tc = record.last_tc
        self._commit_qc: QuorumCert | None = None
        tc_round = 0 if record.last_tc is None else record.last_tc.round
        round_ = Round(max(self._high_qc.round, tc_round) + 1)
        timing = parts.timing
        self._pacemaker = Pacemaker(timing, parts.jitter, round_, now.mono_ms)
        self._collector = Collector(parts.committee, round_)
        self._catch_up = CatchUp(parts.committee.n, parts.index, patience_ms=2 * timing.base_ms, delay_ms=timing.base_ms // 10)
        self._sync_limit = PeerLimit(timing.base_ms // 4)
        self._blocks_limit = PeerLimit(1)
        self._urge_limit = PeerBudget(2 * parts.committee.n, max(1, timing.heartbeat_ms // 2))
        self._forward_limit = PeerLimit(timing.forward_ms // 2)
        self._muster = Muster(parts.committee.quorum, parts.index, now.mono_ms)
        self._is_judged = self._is_urged = self._is_over = False
        self._times_given_up = 0
        self._ahead: set[int] = set()
        self._now = now
        self._effects: list[Effect[S]] = []
        self._own: deque[Message] = deque()
        self._chain.restore(journal)

    # What the shell sees

    @property
    def round(self) -> Round:
        """The current round."""
        return self._pacemaker.round

    @property
    def leader(self) -> int:
        """The leader of the current round."""
        return self._chain.leader(self.round)

    @property
    def high_qc(self) -> QuorumCert:
        """The highest certificate seen."""
        return self._high_qc

    @property
    def root(self) -> Position[S]:
        """The last committed block and the state after it."""
        return self._tree.root

    @property
    def waiting_for(self) -> str | None:
        """What keeps the node from taking full part, None when nothing does."""
        if not self._safety.is_open or self._times_given_up > 2:
            return "a quorum"
        return None if self._catch_up.wanted is None else "missing blocks"

    @property
    def held(self) -> int:
        """How many blocks, votes and timeouts are in memory."""
        return len(self._tree) + self._collector.size

    def step(self, event: Event, now: Now) -> list[Effect[S]]:
        """Take one event and return what to do, in order."""
        self._now = now
        self._effects = []
        if self._is_over:
            return []
        match event:
            case Received(sender, message):
                self._receive(sender, message)
            case Connected(peer):
                self._effects.append(Send(peer, self._where_i_stand(wants_reply=True)))
            case Started():
                self._learn_qc(self._high_qc)  # it may commit what only the journal still holds
            case Tick():
                pass
            case _:
                assert_never(event)
        self._tend()
        while self._own and not self._is_over:
            self._receive(self._index, self._own.popleft())
            if not self._own:
                self._tend()
        return self._effects

    def wake_ms(self) -> int | None:
        """Return when, on the clock that never jumps, a ``Tick`` is needed; None if only an event can change anything."""
        pacemaker = self._pacemaker
        if self._is_over:
            return None
        times = [pacemaker.deadline, pacemaker.forward_at, self._catch_up.next_at]
        if not self._safety.is_open:
            times.append(self._muster.ask_at)
        if self._may_propose() and self._high_qc.block_hash in self._tree:
            times.append(pacemaker.heartbeat_at)
            times.append(self._outlook().due_at(self._now))
        return min((time for time in times if time is not None), default=None)

    # Messages

    def _receive(self, sender: int, message: Message) -> None:
        epoch = message.header.epoch if isinstance(message, Block) else message.epoch
        if epoch != self._committee.epoch:
            self._on_other_epoch(sender, epoch, message)
            return
        match message:
            case Vote():
                self._on_vote(sender, message)
            case Block():
                self._on_proposal(sender, message)
            case Timeout():
                self._on_timeout(sender, message)
            case Sync():
                self._on_sync(sender, message)
            case GetBlocks():
                self._on_get_blocks(sender, message)
            case Blocks():
                self._on_blocks(sender, message)
            case Forward():
                self._on_forward(sender, message)
            case _:
                assert_never(message)

    def _on_other_epoch(self, sender: int, epoch: int, message: Message) -> None:
        """Lead whoever is in an ended epoch on (R12); one that is ahead will do the same for this node."""
        if epoch < self._committee.epoch and isinstance(message, Sync):
            if self._blocks_limit.allows(sender, self._now.mono_ms):
                self._effects.append(ServeEpoch(sender, epoch, Height(message.committed_height + 1)))
            return
        self._is_refused(sender, "epoch")
        if epoch > self._committee.epoch:
            self._ahead.add(sender)
            self._help(sender)

    def _on_proposal(self, sender: int, block: Block) -> None:
        if self._collector.knows_proposal(block):
            self._effects.extend(self._safety.repeat_vote(block, sender) if sender != self._index else ())
            return
        is_late = block.round < self.round
        if is_late and (block.hash != self._high_qc.block_hash or block.hash in self._tree):
            return
        if self._is_refused(sender, self._verifier.proposal_fault(block, self._chain.leader(block.round))):
            return
        self._learn_qc(block.qc)
        if block.tc is not None:
            self._learn_tc(block.tc)
        if is_late:
            if block.header.parent_hash in self._tree:
                self._add_certified(block)
            return
        self._conclude(self._collector.add_proposal(block))  # R6

    def _on_vote(self, sender: int, vote: Vote) -> None:
        if vote.round < self.round or self._collector.knows_vote(vote):
            return
        if self._is_refused(sender, None if self._verifier.is_valid_vote(vote) else "vote"):
            return
        self._conclude(self._collector.add_vote(vote))  # R6

    def _on_timeout(self, sender: int, timeout: Timeout) -> None:
        is_old = timeout.round < self.round
        if not is_old or timeout.high_qc.round > self._high_qc.round:
            if self._is_refused(sender, None if self._verifier.is_valid_timeout(timeout) else "timeout"):
                return
            self._learn_qc(timeout.high_qc)
            if timeout.last_tc is not None:
                self._learn_tc(timeout.last_tc)
        if timeout.round < self.round:
            self._help(sender)
            return
        self._is_urged |= self._urge_limit.allows(sender, self._now.mono_ms)
        self._conclude(self._collector.add_timeout(timeout))  # R6
        if self._collector.timeouts > self._committee.f and not self._times_given_up:
            self._give_up()  # R4: at least one of them is honest

    def _conclude(self, result: QuorumCert | TimeoutCert | Evidence | None) -> None:
        if isinstance(result, QuorumCert):
            self._learn_qc(result)
        elif isinstance(result, TimeoutCert):
            self._learn_tc(result)
        elif result is not None:
            self._effects.append(Accuse(result))

    def _help(self, sender: int) -> None:
        """Tell a validator that is behind, or asks, where this one stands."""
        if sender != self._index and self._sync_limit.allows(sender, self._now.mono_ms):
            self._effects.append(Send(sender, self._where_i_stand(wants_reply=False)))

    def _on_sync(self, sender: int, sync: Sync) -> None:
        if sync.high_qc.round > self._high_qc.round:
            if self._is_refused(sender, None if self._verifier.is_valid_quorum_cert(sync.high_qc) else "certificate"):
                return
            self._learn_qc(sync.high_qc)
        if sync.last_tc is not None and sync.last_tc.round >= self.round:
            fault = None if self._verifier.is_valid_timeout_cert(sync.last_tc) else "timeout certificate"
            if self._is_refused(sender, fault):
                return
            self._learn_tc(sync.last_tc)
        self._muster.report(sender, sync.high_qc.round)
        if sync.wants_reply:
            self._help(sender)

    def _on_get_blocks(self, sender: int, request: GetBlocks) -> None:
        if self._blocks_limit.allows(sender, self._now.mono_ms):
            path = self._tree.path(request.wanted) or self._tree.path(self._held_qc.block_hash)
            tail = tuple(node.block for node in path if node.block.height >= request.from_height)
            self._effects.append(ServeBlocks(sender, request.from_height, self.root.height, tail, self._held_qc))

    def _on_blocks(self, sender: int, answer: Blocks) -> None:
        is_asked = sender == self._catch_up.asked
        if self._is_refused(sender, None if is_asked or sender in self._ahead else "unasked blocks"):
            return
        has_grown = False
        for block, certificate in with_certificates(answer, self._high_qc):
            is_known = block.hash in self._tree and certificate.block_hash == block.hash
            if block.height <= self.root.height or is_known:
                continue
            above = answer.headers if block is answer.blocks[-1] else ()
            fault = self._verifier.certified_fault(block, certificate, above)
            if fault is None and block.header.parent_hash not in self._tree:
                fault = "parent"
            if self._is_refused(sender, fault):
                break
            self._learn_qc(block.qc)
            if not self._add_certified(block):
                return
            if certificate.block_hash != block.hash:
                self._commit(certificate, block.hash, above)
            else:
                self._learn_qc(certificate)
            has_grown = True
        if has_grown and is_asked:
            self._catch_up.go_on(self._now.mono_ms)
        elif has_grown:
            self._effects.append(Send(sender, self._where_i_stand(wants_reply=True)))

    def _on_forward(self, sender: int, forward: Forward) -> None:
        if not self._forward_limit.allows(sender, self._now.mono_ms):
            return
        candidate = self._app.admit(self.root.state, forward.transaction, self._now.wall_ms)
        if candidate is not None:
            self._mempool.add(candidate)
        if forward.round >= self.round:
            self._is_urged |= self._urge_limit.allows(sender, self._now.mono_ms)  # R7: an empty block if it is refused
        else:
            self._help(sender)

    # Certificates (verified by the caller) and rounds

    def _learn_qc(self, qc: QuorumCert) -> None:
        self._check_own_signature(qc)
        if qc.round > self._high_qc.round:
            self._high_qc = qc
            self._pacemaker.progress(self._now.mono_ms)
        if qc.proves_parent and qc.parent_round > self.root.round:  # R5
            if qc.parent_hash in self._tree:
                self._commit(qc, qc.parent_hash)
            elif self._commit_qc is None or qc.round > self._commit_qc.round:
                self._commit_qc = qc
        self._enter(Round(qc.round + 1))

    def _learn_tc(self, tc: TimeoutCert) -> None:
        self._check_own_signature(tc)
        self._learn_qc(tc.high_qc)
        if self._last_tc is None or tc.round > self._last_tc.round:
            self._last_tc = tc
        self._enter(Round(tc.round + 1))

    def _check_own_signature(self, cert: QuorumCert | TimeoutCert) -> None:
        if self._safety.is_betrayed_by(cert):  # R10
            self._safety.stop()
            self._effects.append(StopVoting(f"a certificate of round {cert.round} has a signature of this key not made here"))

    def _enter(self, round_: Round) -> None:
        if round_ <= self.round:
            return
        self._chain.leave(self._collector.proposal, self._high_qc, self._now)
        self._pacemaker.enter(round_)  # R1
        self._own.extend(self._collector.enter(round_))
        self._is_judged = self._is_urged = False
        self._times_given_up = 0
        self._tree.prune(self._high_qc.block_hash, Round(round_ - 2 * self._committee.n))

    def _commit(self, qc: QuorumCert, block_hash: BlockHash, above: Sequence[Header] = ()) -> None:
        if block_hash != self.root.hash and not self._is_over:  # another certificate may have been faster
            commit = self._chain.commit(qc, block_hash, above)
            self._effects.append(commit)
            self._is_over = commit.next_committee is not None  # R12

    def _add_certified(self, block: Block) -> bool:
        fault = None if block.hash in self._tree else self._chain.add(block)
        if fault is not None:
            self._effects.append(Halt(f"block {block.hash.hex()} at height {block.height} is certified but has a bad {fault}"))
            return False
        if self._commit_qc is not None and self._commit_qc.parent_hash == block.hash:
            self._commit(self._commit_qc, block.hash)  # R5: its proof came before the block
        return True

    def _judge_proposal(self) -> None:
        """Execute and vote for the round's proposal, as soon as its parent is here (R3)."""
        block = self._collector.proposal
        if block is None or self._is_judged or block.header.parent_hash not in self._tree:
            return
        self._is_judged = True
        # The time comes first: nobody's clock but a quorum's may let everything that is pending fall due (R8).
        is_ahead = block.header.time_ms > self._now.wall_ms + self._parts.timing.ahead_ms
        fault = "time" if is_ahead else None if block.hash in self._tree else self._chain.add(block)
        if self._is_refused(block.header.author, fault):
            return
        self._emit(self._safety.vote(block, self.round))

    # What is done without being told

    def _tend(self) -> None:
        if self._is_over:
            return
        now_ms = self._now.mono_ms
        self._track_missing()
        self._tell_or_open()
        self._judge_proposal()
        if self._may_propose():
            self._propose()
        self._arm()
        if self._pacemaker.is_over(now_ms):
            self._give_up()
        self._forward_oldest()
        question = self._catch_up.ask(now_ms, Height(self.root.height + 1))
        if question is not None:
            self._effects.append(question)

    def _track_missing(self) -> None:
        if self._high_qc.block_hash in self._tree:
            self._held_qc = self._high_qc
            self._catch_up.satisfied()
        elif self._high_qc.round > self.root.round:
            self._catch_up.want(self._high_qc, self._now.mono_ms)  # R11

    def _tell_or_open(self) -> None:
        """Ask all where they stand until a quorum has told (R10)."""
        if self._safety.is_open:
            return
        highest = self._muster.highest(self._high_qc.round)
        if highest is not None:
            self._safety.open(highest)
        elif self._muster.ask(self._now.mono_ms):
            self._effects.append(Broadcast(self._where_i_stand(wants_reply=True)))

    def _where_i_stand(self, *, wants_reply: bool) -> Sync:
        boot = self._safety.record.boot
        return Sync(self._committee.epoch, self._high_qc, self._last_tc, self.root.height, boot, wants_reply)

    def _may_propose(self) -> bool:
        return self._collector.proposal is None and self.leader == self._index and self._safety.may_propose(self.round)

    def _propose(self) -> None:
        """Propose if there is a reason to (R2, R7)."""
        parent = self._tree.position(self._high_qc.block_hash)
        if parent is None:
            return
        context = self._chain.context(parent, self._now)
        payload = self._chain.choose(parent, context, self._outlook(), self._now)
        if not payload and not self._has_reason_for_empty(context.time_ms):
            return
        qc = self._high_qc
        tc = None if qc.round + 1 == self.round else self._last_tc
        draft = Draft(self._committee, self.round, self._index, context, qc, tc, payload)
        header, execution = self._chain.compose(parent, draft)
        effects, block = self._safety.propose(header, qc, tc, payload)
        self._chain.insert(block, execution)
        self._effects.extend(effects)
        self._own.append(block)

    def _has_reason_for_empty(self, time_ms: int) -> bool:
        outlook = self._outlook()
        is_due = outlook.due_ms is not None and outlook.due_ms <= time_ms
        return self._is_urged or is_due or outlook.has_payload or self._now.mono_ms >= self._pacemaker.heartbeat_at

    def _outlook(self) -> Outlook:
        return self._chain.outlook(self._collector.proposal, self._held_qc.block_hash)

    def _arm(self) -> None:
        """Start the round timer when there is something to wait for (R7)."""
        now, pacemaker = self._now, self._pacemaker
        is_waited_for = self._is_urged or self._safety.is_barred_from_voting(self.round)
        start = now.mono_ms if is_waited_for else self._outlook().waits_from(now, pacemaker.heartbeat_at)
        pacemaker.arm(start, self._high_qc.round)

    def _give_up(self) -> None:
        """Give up the round, or say so again, and wait another timer's length (R4)."""
        self._times_given_up += 1
        self._pacemaker.rearm(self._now.mono_ms, self._high_qc.round)
        signed = self._safety.timeout(self.round, self._high_qc, self._last_tc)
        self._emit(signed)
        if signed is None:  # whoever may not sign asks the others whether they have gone on
            self._effects.append(Broadcast(self._where_i_stand(wants_reply=True)))

    def _forward_oldest(self) -> None:
        """Send the oldest transaction to all when no proposal comes (R7)."""
        if not self._outlook().has_transactions or self._collector.proposal is not None or self.leader == self._index:
            self._pacemaker.stop_missing()
        elif self._pacemaker.misses_proposal(self._now.mono_ms):
            parent = self._tree.position(self._held_qc.block_hash) or self.root
            oldest = self._chain.oldest_worthy(parent, self._chain.context(parent, self._now), self._outlook())
            if oldest is not None:
                self._effects.append(Broadcast(Forward(self._committee.epoch, self.round, oldest.data)))

    def _emit(self, signed: tuple[tuple[Persist, Broadcast], Message] | None) -> None:
        """Let what was signed out behind its memory, and take it in like everybody else (R9)."""
        if signed is not None:
            self._effects.extend(signed[0])
            self._own.append(signed[1])

    def _is_refused(self, sender: int, fault: str | None) -> bool:
        if fault is not None:
            self._effects.append(Refuse(sender, fault))
        return fault is not None
