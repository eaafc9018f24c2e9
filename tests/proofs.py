"""Blocks that really commit: headers over ledger states and certificates signed by the validators' keys, for proof tests."""

from __future__ import annotations

from cybermesh.consensus.certificates import vote_bytes
from cybermesh.consensus.committee import Committee, quorum
from cybermesh.consensus.types import NO_CERT, PROTOCOL_VERSION, BlockHash, Header, Height, QuorumCert, Round, merkle_root
from cybermesh.ledger.state import Applied
from cybermesh.proof import EpochStep, included, prove, prove_step
from tests.ledger.world import World, key


class Chain:
    """Puts a world's blocks into headers, in rounds the test chooses."""

    def __init__(self, world: World) -> None:
        self.world = world
        names = [validator.name for validator in world.genesis.validators]
        self.committee = Committee.of(world.genesis.chain_id, (validator.pubkey for validator in world.genesis.validators))
        self.keys = sorted((key(name) for name in names), key=lambda signer: signer.public)
        self.headers: list[Header] = []
        self.outcomes: list[Applied] = []
        self.certs = [self.committee.genesis_cert()]
        self.before = self.certs[0]
        self.ends: dict[int, QuorumCert] = {}
        self.steps: list[EpochStep] = []

    def commit(self, *transactions: bytes, round_: int | None = None) -> Applied:
        """Execute a block and certify it; ``round_`` leaves a gap when it is not the next one."""
        before = self.before
        applied = self.world.try_apply(*transactions)
        assert isinstance(applied, Applied)
        self.world.apply(*transactions)
        round_ = Round(before.round + 1 if round_ is None else round_)
        header = Header(
            version=PROTOCOL_VERSION, chain_id=self.world.genesis.chain_id, epoch=self.committee.epoch, round=round_,
            height=Height(self.world.height), author=round_ % self.committee.n, time_ms=self.world.now_ms,
            parent_hash=before.block_hash, parent_round=before.round,
            parent_signers=before.signers, qc_digest=before.digest,
            tc_digest=NO_CERT if round_ == before.round + 1 else bytes([7]) * 32,
            payload_root=merkle_root(transactions), state_root=applied.state.root, decision_seq=applied.state.decision_seq,
        )  # fmt: skip
        self.headers.append(header)
        self.outcomes.append(applied)
        self.before = self.certify(header)
        self.certs.append(self.before)
        return applied

    def hand_over(self, *names: str) -> None:
        """Begin the next epoch, whose committee (these names) the newest block has named."""
        end, last, applied = len(self.headers) - 1, self.headers[-1], self.outcomes[-1]
        assert applied.next_committee is not None
        child, round_ = BlockHash(bytes([9]) * 32), Round(last.round + 1)
        message = vote_bytes(self.committee, round_, child, last.round, last.hash)
        votes = tuple((voter, signer.sign(message)) for voter, signer in enumerate(self.keys))
        self.ends[end] = QuorumCert(self.committee.epoch, round_, child, last.round, last.hash, votes)
        position = next(place for place, receipt in enumerate(applied.receipts) if receipt.committee is not None)
        self.steps.append(prove_step([last], self.ends[end], included(applied, position), self.committee.quorum))
        self.committee = Committee.of(self.world.genesis.chain_id, applied.next_committee, epoch=self.committee.epoch + 1)
        self.keys = sorted((key(name) for name in names), key=lambda signer: signer.public)
        assert self.committee.public_keys == tuple(signer.public for signer in self.keys)
        self.before = self.committee.genesis_cert(last.hash)

    def certify(self, header: Header, voters: tuple[int, ...] = (0, 1, 2, 3)) -> QuorumCert:
        message = vote_bytes(self.committee, header.round, header.hash, header.parent_round, header.parent_hash)
        signatures = tuple((voter, self.keys[voter].sign(message)) for voter in voters)
        return QuorumCert(
            self.committee.epoch, header.round, BlockHash(header.hash), header.parent_round, header.parent_hash, signatures
        )

    def prove(self, block: int, position: int, last: int | None = None) -> bytes:
        """Prove a receipt of block ``block`` by the certificate that extends block ``last`` (the same one by default)."""
        last = block if last is None else last
        certificate = self.ends[last] if last in self.ends else self.certs[last + 2]
        epoch = self.headers[block].epoch
        members = len(self.world.genesis.validators) if epoch == 1 else self.committee.n
        place = included(self.outcomes[block], position)
        return prove(self.headers[block : last + 1], certificate, place, quorum(members), self.steps[: epoch - 1])
