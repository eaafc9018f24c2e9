"""``cybermesh bench ledger``: what a block of 1,000 transactions costs, an audit, and a proof.

A block is 600 anomalies, 300 pieces of evidence and 100 policies that two sites agree on and that become rules: at 1,000
transactions a second that is the 6,000 new targets a minute that the default limits allow. ``all_policies`` is the worst case,
a third of each. Transactions are decoded and their signatures checked at admission, which is not counted, except in the audit,
which does both. Beside the wall clock stands the processor time of the cheapest block, which other programs disturb less.

The history is made and not lived: the state holds 10,000 decisions in force and the windows of 200 producers with 5,000 nonces
each, put there as entries; the log is a frontier of that size; the store's rows below the head are short, but as many, with
every index. What is timed is real: executing, roots, rows, and a durable commit to SQLite (WAL, synchronous=FULL).
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cybermesh import proof
from cybermesh.bus.topics import Topics
from cybermesh.cli import output
from cybermesh.consensus.application import Execution
from cybermesh.consensus.certificates import vote_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.events import Commit, CommittedBlock
from cybermesh.consensus.types import (
    NO_CERT,
    PROTOCOL_VERSION,
    Block,
    BlockHash,
    Header,
    Height,
    QuorumCert,
    Round,
    merkle_root,
)
from cybermesh.envelope.nonces import Nonce
from cybermesh.envelope.signing import (
    AnomalyContent,
    EvidenceContent,
    PolicyContent,
    Stamp,
    sign_anomaly,
    sign_evidence,
    sign_policy,
)
from cybermesh.genesis import Budget, Genesis, Limits, Producer, Validator
from cybermesh.keys import SigningKey
from cybermesh.ledger.merkle import Frontier
from cybermesh.ledger.receipts import Ending, Why
from cybermesh.ledger.records import DecisionRecord, WindowRecord
from cybermesh.ledger.state import Applied, LedgerBlock, State
from cybermesh.ledger.timers import release_due_ms
from cybermesh.messages import SignedMessage, Transaction, TxKind
from cybermesh.roles import records
from cybermesh.roles.audit import Auditor
from cybermesh.store.rows import CHAIN
from cybermesh.store.store import Store, open_store
from cybermesh.wire import codec
from cybermesh.wire.admission import verify_transaction

PRODUCERS = 200
DECISIONS = 10_000
NONCES = 1_000_000
START_MS = 1_700_000_000_000
POINTS = (1_000, 100_000, 1_000_000)
BLOCK = 1_000
_OLD_INSTANCE, _NEW_INSTANCE = 1, 2
_HISTORY_BLOB = 96
_HISTORY_LEAF = 1 << 40  # above every leaf that is timed


def _key(name: str) -> SigningKey:
    return SigningKey(hashlib.sha256(b"cybermesh bench " + name.encode()).digest())


def deployment() -> Genesis:
    """Return a genesis of four validators and 200 producers, each a site of its own."""
    budget = Budget(max_active=10_000, max_per_minute=10_000)  # for the worst case, where no second site reports
    names = [f"producer-{number}" for number in range(PRODUCERS)]
    return Genesis(
        chain_name="bench",
        validators=tuple(Validator(f"validator-{number}", _key(f"validator-{number}").public) for number in range(4)),
        producers=tuple(
            Producer(name, _key(name).public, f"site-{name}", networks=(IPv4Network("0.0.0.0/0"),), budget=budget)
            for name in names
        ),
        limits=Limits(targets_per_minute=1_000_000, references_per_producer=1_000_000),
    )


class Traffic:
    """Signed messages of the producers; every block accuses other hosts."""

    def __init__(self) -> None:
        self._keys = [_key(f"producer-{number}") for number in range(PRODUCERS)]
        self._counters = [0] * PRODUCERS
        self._case = 0

    def _stamp(self, who: int, now_ms: int) -> Stamp:
        self._counters[who] += 1
        return Stamp(self._keys[who], now_ms // 1_000, Nonce(now_ms, _NEW_INSTANCE, self._counters[who]).encode())

    def block(self, now_ms: int, *, policies: int, corroborated: bool) -> tuple[bytes, ...]:
        """Return 1,000 transactions with this many policies, in the order an honest proposer gives them."""
        evidence = 300 if corroborated else policies
        anomalies = BLOCK - policies - evidence
        made: list[tuple[TxKind, SignedMessage]] = []
        for number in range(anomalies):
            # The first reports of a case are of two sites; those beyond the cases are about hosts of nobody's policy.
            case = number % policies if number < (2 if corroborated else 1) * policies else policies + number
            who = (self._case + case + (7 if number >= policies else 0)) % PRODUCERS
            name, host = f"a-{self._case + case}-{number}", str(IPv4Address(0x2C000000 + self._case + case))
            content = AnomalyContent(name, "port_scan", "rules", host, 8, 0.95, "m1", {"ports": 120})
            made.append((TxKind.ANOMALY, sign_anomaly(content, self._stamp(who, now_ms))))
        for number in range(evidence):
            who = (self._case + number) % PRODUCERS
            flows = EvidenceContent(f"e-{self._case + number}", "flows", (), {"flows": [[80, 1, 2, 3]] * 4})
            made.append((TxKind.EVIDENCE, sign_evidence(flows, self._stamp(who, now_ms))))
        for case in range(policies):
            number = self._case + case
            body = {
                "rule_type": "block",
                "action": "drop",
                "target": {"ips": [str(IPv4Address(0x2C000000 + number))]},
                "guardrails": {"ttl_seconds": 900},
            }
            wanted = PolicyContent(f"p-{number}", "drop", "block", f"a-{number}-{case}", f"e-{number}", body)
            made.append((TxKind.POLICY, sign_policy(wanted, self._stamp(number % PRODUCERS, now_ms))))
        self._case += BLOCK
        return tuple(Transaction(kind, codec.encode(message)).encode() for kind, message in made)


def loaded_state(genesis: Genesis, log_size: int) -> State:
    """Return a state with 10,000 decisions in force, a million nonces in the windows, and a log of ``log_size`` entries."""
    state = State.at_genesis(genesis)
    draft = state.draft(height=0, time_ms=START_MS)
    each = NONCES // PRODUCERS
    for producer in genesis.producers:
        window = WindowRecord(bits=b"\xff" * (each // 8), floor=0, start=0, used_ms=START_MS)
        draft.put_window(producer.pubkey + _OLD_INSTANCE.to_bytes(4, "big"), window)
    for number in range(DECISIONS):
        draft.put_decision(_decision(genesis, number))
    parts = draft.finish(release_due_ms(draft))
    lattice = state.lattice.updated(parts.removed, parts.added)
    peaks = tuple(hashlib.sha256(b"peak %d" % number).digest() for number in range(log_size.bit_count()))
    return State(genesis, parts.tables, parts.index, lattice, Frontier(log_size, peaks))


def _decision(genesis: Genesis, number: int) -> DecisionRecord:
    name, host = f"active-{number}", str(IPv4Address(0x2B000000 + number))
    rule = (
        f'{{"action":"drop","guardrails":{{"ttl_seconds":86400}},"policy_id":"{name}","rule_type":"block",'
        f'"target":{{"direction":"ingress","ips":["{host}"],"scope":"cluster"}}}}'
    )
    producer = genesis.producers[number % PRODUCERS].pubkey
    return DecisionRecord(
        action="drop", approvers=(), direction="ingress", ending=Ending.NONE, expires_at_ms=START_MS + 86_400_000, holder=b"",
        hosts=1, is_operators=False, level=0, level_since_ms=START_MS, networks=0, opened_at_ms=START_MS, policy_id=name,
        producer=producer, reporters=(producer,), request_id=name, rule_data=rule.encode(),
        rule_key=hashlib.sha256(name.encode()).digest(), rule_type="block", ttl_s=86_400, why=Why.CORROBORATED,
    )  # fmt: skip


class Chain:
    """Blocks and certificates of the bench's committee, as a replica hands them over."""

    def __init__(self, genesis: Genesis) -> None:
        self.committee = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
        self._keys = sorted((_key(member.name) for member in genesis.validators), key=lambda signer: signer.public)
        self._before = self.committee.genesis_cert()

    def commit(self, applied: Applied, payload: tuple[bytes, ...], *, height: int, time_ms: int) -> Commit[State]:
        """Return the commit of the next block, whose outcome is ``applied``."""
        before, state = self._before, applied.state
        round_ = Round(before.round + 1)
        header = Header(
            version=PROTOCOL_VERSION, chain_id=self.committee.chain_id, epoch=1, round=round_, height=Height(height),
            author=round_ % self.committee.n, time_ms=time_ms, parent_hash=before.block_hash, parent_round=before.round,
            parent_signers=before.signers, qc_digest=before.digest, tc_digest=NO_CERT, payload_root=merkle_root(payload),
            state_root=state.root, decision_seq=state.decision_seq,
        )  # fmt: skip
        block = Block(header, before, None, payload, self._keys[header.author].sign(header.hash))
        self._before = self._certify(round_, header.hash, header.parent_round, header.parent_hash)
        certificate = self._certify(Round(round_ + 1), BlockHash(bytes(32)), round_, header.hash)
        execution = Execution(state, state.root, state.decision_seq, bool(applied.receipts), applied)
        return Commit((CommittedBlock(block, execution),), certificate)

    def _certify(self, round_: Round, block_hash: BlockHash, parent_round: Round, parent_hash: BlockHash) -> QuorumCert:
        message = vote_bytes(self.committee, round_, block_hash, parent_round, parent_hash)
        signatures = tuple((voter, self._keys[voter].sign(message)) for voter in range(self.committee.quorum))
        return QuorumCert(1, round_, block_hash, parent_round, parent_hash, signatures)


@dataclasses.dataclass(slots=True)
class Cost:
    """Milliseconds of every timed block."""

    apply: list[float] = dataclasses.field(default_factory=list)
    store: list[float] = dataclasses.field(default_factory=list)
    processor: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> float:
        """The median of both together."""
        return statistics.median(one + two for one, two in zip(self.apply, self.store, strict=True))


def run(blocks: int, points: Sequence[int], audited: int, folder: Path | None) -> dict[str, object]:
    """Measure everything; ``blocks`` are timed at each point (after two that are not), ``audited`` blocks are audited."""
    with tempfile.TemporaryDirectory(prefix="cybermesh-bench-", dir=folder) as made:
        return asyncio.run(_run(blocks, points, audited, Path(made)))


async def _run(blocks: int, points: Sequence[int], audited: int, folder: Path) -> dict[str, object]:
    genesis = deployment()
    at: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}
    where = folder / "ledger.db"
    processor: dict[str, dict[str, float]] = {}
    stored = 0
    for point in points:
        output.note(f"{point:,} blocks")
        stored = await _extend(where, stored, point)
        cost = await _measure(genesis, where, point, blocks, policies=100, corroborated=True)
        at[str(point)] = round(cost.total, 1)
        parts[str(point)] = {"apply": round(statistics.median(cost.apply), 1), "store": round(statistics.median(cost.store), 1)}
        apply, store = min(cost.processor, key=sum)
        processor[str(point)] = {"apply": round(apply, 1), "store": round(store, 1)}
    worst = (await _measure(genesis, folder / "worst.db", 0, max(3, blocks // 2), policies=333, corroborated=False)).total
    rate = await _audit_rate(folder / "audit.db", audited)
    size, verify_ms = _proof_cost(genesis)
    return {
        "apply_store_ms_per_1000tx": at[str(points[0])],
        "at_blocks": at,
        "parts_ms": parts,
        "processor_ms_min": processor,
        "all_policies_ms_per_1000tx": round(worst, 1),
        "audit_tx_per_s": rate,
        "proof_bytes": size,
        "verify_ms": verify_ms,
        "mix": "600 anomalies, 300 evidence, 100 policies decided",
        "active_decisions": DECISIONS,
        "nonces": NONCES,
        "producers": PRODUCERS,
        "load_average": round(os.getloadavg()[0], 1),
    }


async def _extend(where: Path, stored: int, blocks: int) -> int:
    """Give the store this many blocks; their rows are short, but as many and with every index."""
    async with open_store(where):
        pass
    plain = sqlite3.connect(where, isolation_level=None)
    plain.execute("PRAGMA synchronous=OFF")
    plain.execute("BEGIN")
    for table in CHAIN.values():
        plain.execute(f"DELETE FROM {table[0].name} WHERE height > ?", (stored,))  # noqa: S608 - what was timed there
    for statement, rows in _history(stored + 1, blocks):
        plain.executemany(statement, rows)
    plain.execute("COMMIT")
    plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    plain.close()
    return blocks


def _history(first: int, last: int) -> Iterator[tuple[str, list[tuple[object, ...]]]]:
    blob = bytes(_HISTORY_BLOB)
    for low in range(first, last + 1, 10_000):
        heights = range(low, min(low + 10_000, last + 1))
        digests = [hashlib.sha256(b"%d" % height).digest() for height in heights]
        pairs = list(zip(heights, digests, strict=True))
        yield (
            "INSERT INTO blocks VALUES (?,?,1,?,?,0,?,?,?,0,1,?,1,0,0)",
            [(height, digest, height, START_MS, blob, blob, digest, height - 1) for height, digest in pairs],
        )
        yield "INSERT INTO certificates VALUES (?,?)", [(height, blob) for height in heights]
        yield "INSERT INTO transactions VALUES (?,0,?,?)", [(height, digest, blob) for height, digest in pairs]
        yield (
            "INSERT INTO receipts VALUES (?,?,'anomaly',?,'OK',?)",
            [(_HISTORY_LEAF + height, height, digest.hex(), blob) for height, digest in pairs],
        )


async def _measure(genesis: Genesis, where: Path, point: int, blocks: int, *, policies: int, corroborated: bool) -> Cost:
    state, traffic, chain = loaded_state(genesis, point), Traffic(), Chain(genesis)
    author = records.Author(genesis, _key("validator-0"), Topics())
    cost = Cost()
    async with open_store(where) as store:
        gc.collect()
        gc.freeze()
        for number in range(blocks + 2):
            time_ms = START_MS + 1_000 * number
            payload = traffic.block(time_ms, policies=policies, corroborated=corroborated)
            for transaction in payload:
                verify_transaction(transaction)
            worked, began = time.process_time(), time.perf_counter()
            applied = state.apply(LedgerBlock(point + number + 1, time_ms, payload))
            executed, worked_apply = time.perf_counter(), time.process_time() - worked
            assert isinstance(applied, Applied), applied
            assert len(applied.rules) == policies, f"{len(applied.rules)} of {policies} policies were decided"
            commit = chain.commit(applied, payload, height=point + number + 1, time_ms=time_ms)
            worked, handed_over = time.process_time(), time.perf_counter()
            await store.append(records.of_commit(commit, author, records.Moment(time_ms, number)))
            stored, worked_store = time.perf_counter(), time.process_time() - worked
            state = applied.state
            if number >= 2:
                cost.apply.append(1_000 * (executed - began))
                cost.store.append(1_000 * (stored - handed_over))
                cost.processor.append((1_000 * worked_apply, 1_000 * worked_store))
        gc.unfreeze()
    return cost


async def _audit_rate(where: Path, blocks: int) -> int:
    """Return the transactions per second of an audit of a chain that was executed from its genesis."""
    genesis = deployment()
    state, traffic, chain = State.at_genesis(genesis), Traffic(), Chain(genesis)
    author = records.Author(genesis, _key("validator-0"), Topics())
    output.note(f"audit of {blocks * BLOCK:,} transactions")
    async with open_store(where) as store:
        for number in range(blocks):
            time_ms = START_MS + 1_000 * number
            payload = traffic.block(time_ms, policies=100, corroborated=True)
            applied = state.apply(LedgerBlock(number + 1, time_ms, payload))
            assert isinstance(applied, Applied)
            commit = chain.commit(applied, payload, height=number + 1, time_ms=time_ms)
            await store.append(records.of_commit(commit, author, records.Moment(time_ms, number)))
            state = applied.state
        return await _timed_audit(store, genesis, blocks)


async def _timed_audit(store: Store, genesis: Genesis, blocks: int) -> int:
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as workers:
        workers.submit(int).result()  # the processes are up
        began = time.perf_counter()
        report = await Auditor(store.rows, genesis, workers).run()
        seconds = time.perf_counter() - began
    assert report.finding is None, str(report.finding)
    return round(blocks * BLOCK / seconds)


def _proof_cost(genesis: Genesis) -> tuple[int, float]:
    """Return the bytes of a proof in a log of a million receipts, and the milliseconds of its verification."""
    log = Frontier().append([hashlib.sha256(b"%d" % number).digest() for number in range(1_000_000 - BLOCK)])
    base = State.at_genesis(genesis)
    state = State(genesis, base.tables, base.index, base.lattice, log)
    payload = Traffic().block(START_MS, policies=100, corroborated=True)
    applied = state.apply(LedgerBlock(1, START_MS, payload))
    assert isinstance(applied, Applied)
    chain = Chain(genesis)
    commit = chain.commit(applied, payload, height=1, time_ms=START_MS)
    place = proof.included(applied, next(number for number, receipt in enumerate(applied.receipts) if receipt.decisions))
    data = proof.prove([commit.blocks[0].block.header], commit.certificate, place, chain.committee.quorum)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        proof.verify_proof(data, genesis)
        times.append(1_000 * (time.perf_counter() - began))
    return len(data), round(statistics.median(times), 3)
