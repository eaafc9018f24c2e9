"""A validator that follows a script against the protocol, with its own key and everything it has seen.

It runs an honest replica to know where the others stand, and lets out something else than that replica says. It can break
every rule but forge a signature of another key.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cybermesh.consensus.application import BlockContext
from cybermesh.consensus.certificates import Signer, timeout_bytes, vote_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.execution import Draft, compose
from cybermesh.consensus.replica import Replica
from cybermesh.consensus.simulator.application import LogApplication, LogState
from cybermesh.consensus.types import Block, BlockHash, Blocks, Message, QuorumCert, Round, Sync, Timeout, Vote, merkle_root

Letter = tuple[Sequence[int], Message]
"""Some peers and what they are told."""

_MEMORY: Final = 64
_ZEAL: Final = 0.5
_FAR: Final = 1_000


class Traitor:
    """Rewrites what one machine sends; ``behaviours`` are names of ``plan.BEHAVIOURS``."""

    def __init__(self, committee: Committee, index: int, signer: Signer, behaviours: Sequence[str], rng: random.Random) -> None:
        self._committee = committee
        self._index = index
        self._signer = signer
        self._behaviours = frozenset(behaviours)
        self._rng = rng
        self._application = LogApplication(committee.public_keys)
        self._seen: deque[Message] = deque(maxlen=_MEMORY)
        self._certificates: deque[QuorumCert] = deque([committee.genesis_cert()], maxlen=_MEMORY)
        self._proposals: deque[Block] = deque(maxlen=_MEMORY)
        self._hurried: Round = Round(0)

    def _does(self, behaviour: str) -> bool:
        return behaviour in self._behaviours and self._rng.random() < _ZEAL

    # What it hears

    def hears(self, replica: Replica[LogState], message: Message) -> list[Letter]:
        """Remember a message and return what hearing it makes this validator send."""
        self._seen.append(message)
        if isinstance(message, Block):
            self._certificates.append(message.qc)
            self._proposals.append(message)
        letters: list[Letter] = []
        if "hurry" in self._behaviours and replica.round > self._hurried:
            self._hurried = replica.round
            letters.extend(self._everybody(self._timeout(replica, replica.high_qc)))
        if "replay" in self._behaviours and self._rng.random() < 0.1:
            letters.append(([self._rng.choice(self._others)], self._rng.choice(self._seen)))
        if "far future" in self._behaviours and self._rng.random() < 0.02:
            letters.extend(self._everybody(self._vote(Round(replica.round + self._rng.randrange(1, _FAR)), replica.high_qc)))
        if "forge" in self._behaviours and self._rng.random() < 0.05:
            forged = self._forged_certificate(replica)
            letters.extend(
                self._everybody(Sync(self._committee.epoch, forged, None, replica.root.height, 1, wants_reply=False))
            )
        if isinstance(message, Block) and self._does("impersonate"):
            letters.extend(self._forged_votes(message))
        return letters

    @property
    def _others(self) -> list[int]:
        return [peer for peer in range(self._committee.n) if peer != self._index]

    def _everybody(self, message: Message | None) -> list[Letter]:
        return [] if message is None else [(self._others, message)]

    # What it says

    def says(self, replica: Replica[LogState], peers: Sequence[int], message: Message) -> Iterator[Letter]:
        """Return what leaves instead of a message to ``peers``."""
        if "mute" in self._behaviours:
            return
        if self._does("hide"):
            peers = [peer for peer in peers if self._rng.random() < 0.5]
        match message:
            case Block():
                yield from self._proposes(replica, peers, message)
            case Vote() if self._does("double vote"):
                yield from self._halves(peers, message, self._other_vote(message))
            case Timeout() if self._does("stale timeout"):
                one, other = (self._timeout(replica, self._rng.choice(self._certificates)) for _ in range(2))
                yield from self._halves(peers, one or message, other or message)
            case Blocks() if self._does("bad blocks"):
                yield peers, self._spoilt(message)
            case _:
                yield peers, message

    def _halves(self, peers: Sequence[int], one: Message, other: Message) -> Iterator[Letter]:
        shuffled = self._rng.sample(list(peers), len(peers))
        middle = len(shuffled) // 2
        yield shuffled[:middle], one
        yield shuffled[middle:], other

    def _proposes(self, replica: Replica[LogState], peers: Sequence[int], block: Block) -> Iterator[Letter]:
        makers: tuple[tuple[str, Callable[[Replica[LogState], Block], Block | None]], ...] = (
            ("equivocate", self._with_other_payload),
            ("stale proposal", self._on_older_certificate),
            ("bad root", self._with_bad_root),
            ("junk", self._with_junk),
        )
        for behaviour, make in makers:
            if self._does(behaviour) and (other := make(replica, block)) is not None:
                if behaviour == "equivocate":
                    yield from self._halves(peers, block, other)
                else:
                    yield peers, other
                return
        yield peers, block

    # Forgeries with its own key

    def _with_other_payload(self, replica: Replica[LogState], block: Block) -> Block | None:
        return self._proposal(replica, block, block.qc, (*block.payload, b"traitor %d" % block.round))

    def _on_older_certificate(self, replica: Replica[LogState], block: Block) -> Block | None:
        older = [qc for qc in self._certificates if qc.round < block.qc.round]
        return self._proposal(replica, block, self._rng.choice(older), block.payload) if older else None

    def _forged_certificate(self, replica: Replica[LogState]) -> QuorumCert:
        """Return a certificate of the current round over nothing, a quorum of signatures of this one key."""
        vote = self._vote(replica.round, replica.high_qc)
        alone = ((self._index, vote.signature),) * self._committee.quorum
        return QuorumCert(vote.epoch, vote.round, vote.block_hash, vote.parent_round, vote.parent_hash, alone)

    def _forged_votes(self, block: Block) -> Iterator[Letter]:
        """Vote in everybody's name for a block that nobody has, in the round of one that everybody has."""
        real = self._other_vote(self._signed_vote(block.round, block.hash, block.header.parent_round, block.header.parent_hash))
        for voter in self._others:
            yield self._others, dataclasses.replace(real, voter=voter)

    def _with_junk(self, replica: Replica[LogState], block: Block) -> Block | None:
        stale = [each for proposal in self._proposals for each in proposal.payload][:3]
        junk = self._rng.choice(((b"",), (b"twice", b"twice"), (*stale, b"new %d" % block.round)))
        return self._proposal(replica, block, block.qc, junk)

    def _with_bad_root(self, replica: Replica[LogState], block: Block) -> Block | None:
        header = dataclasses.replace(block.header, state_root=self._rng.randbytes(32))
        return dataclasses.replace(block, header=header, signature=self._signer.sign(header.hash))

    def _proposal(self, replica: Replica[LogState], like: Block, qc: QuorumCert, payload: tuple[bytes, ...]) -> Block | None:
        parent = replica._tree.position(qc.block_hash)  # noqa: SLF001 - it looks into its own replica
        if parent is None:
            return None
        tc = replica._last_tc  # noqa: SLF001
        tc = tc if tc is not None and tc.round + 1 == like.round and qc.round + 1 != like.round else None
        context = BlockContext(self._committee.epoch, parent.height + 1, max(like.header.time_ms, parent.time_ms))
        draft = Draft(self._committee, like.round, self._index, context, qc, tc, payload)
        header, _ = compose(self._application, parent, draft)
        assert header.payload_root == merkle_root(payload)
        return Block(header, qc, tc, payload, self._signer.sign(header.hash))

    def _other_vote(self, vote: Vote) -> Vote:
        rivals = [block for block in self._proposals if block.round == vote.round and block.hash != vote.block_hash]
        if rivals:
            rival = self._rng.choice(rivals).header
            return self._signed_vote(vote.round, rival.hash, rival.parent_round, rival.parent_hash)
        return self._signed_vote(vote.round, BlockHash(self._rng.randbytes(32)), vote.parent_round, vote.parent_hash)

    def _vote(self, round_: Round, parent: QuorumCert) -> Vote:
        return self._signed_vote(round_, BlockHash(self._rng.randbytes(32)), parent.round, parent.block_hash)

    def _signed_vote(self, round_: Round, block_hash: BlockHash, parent_round: Round, parent_hash: BlockHash) -> Vote:
        signature = self._signer.sign(vote_bytes(self._committee, round_, block_hash, parent_round, parent_hash))
        return Vote(self._committee.epoch, round_, block_hash, parent_round, parent_hash, self._index, signature)

    def _timeout(self, replica: Replica[LogState], high_qc: QuorumCert) -> Timeout | None:
        round_, tc = replica.round, replica._last_tc  # noqa: SLF001
        if high_qc.round >= round_:
            return None
        last_tc = None
        if high_qc.round + 1 != round_:
            if tc is None or tc.round + 1 != round_:
                return None
            last_tc = tc
        signature = self._signer.sign(timeout_bytes(self._committee, round_, high_qc.round))
        return Timeout(self._committee.epoch, round_, high_qc, last_tc, self._index, signature)

    def _spoilt(self, answer: Blocks) -> Blocks:
        blocks = list(answer.blocks)
        place = self._rng.randrange(len(blocks))
        match self._rng.randrange(3):
            case 0:
                blocks[place] = dataclasses.replace(blocks[place], payload=(*blocks[place].payload, b"slipped in"))
            case 1:
                blocks.reverse()
            case _:
                blocks = blocks[:place] or blocks
        return dataclasses.replace(answer, blocks=tuple(blocks))
