"""Plays a capture through the mesh and says what came of it.

What is counted is what the parts report: decisions from the committed blocks, acks from the agent, agreement from comparing the
stores of all running validators block by block, and the first proof from verifying it as an auditor would.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cybermesh.addresses import Network
from cybermesh.consensus.committee import quorum
from cybermesh.consensus.events import Commit
from cybermesh.consensus.types import Header, QuorumCert
from cybermesh.demo.labels import Labels
from cybermesh.demo.mesh import Assembly, Detector, Mesh, Watch
from cybermesh.enforce.acks import Outcome, Result
from cybermesh.enforce.backends import Backend
from cybermesh.genesis import Genesis
from cybermesh.ledger.receipts import REQUEST_KEPT, Change, Code, DecisionEffect, Kind
from cybermesh.ledger.state import Applied, State
from cybermesh.policy import Action, parse
from cybermesh.proof import ProofError, included, prove, verify_proof
from cybermesh.roles.ai import Published
from cybermesh.roles.clock import Clock, SystemClock
from cybermesh.wire.admission import read_transaction

READY_S = 5.0
QUIET_S = 8.0  # without any progress for so long, nothing more will come
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Summary:
    """What one demo did; ``problems`` is empty when all of it happened."""

    packets: int
    flows: int
    anomalies: int
    policies: int
    height: int
    acks: int
    attacks_expected: int
    attacks_found: int
    benign_blocked: int
    validators_agree: bool
    proof_verified: bool
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    backend: str
    validators_up: int
    validators_needed: int
    problems: tuple[str, ...]
    genesis: bytes = field(repr=False)
    first_proof: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision as the first validator committed it, with everything its proof needs."""

    effect: DecisionEffect
    height: int
    rule_data: bytes
    proof: bytes


@dataclass(slots=True)
class Story:
    """What has happened so far; the display reads it."""

    published: list[Published] = field(default_factory=list)
    decided: dict[int, Decided] = field(default_factory=dict)
    settled: dict[str, str] = field(default_factory=dict)
    outcomes: dict[int, tuple[Outcome, float]] = field(default_factory=dict)
    heights: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How much has happened; blocks alone do not count, for an idle chain makes them too."""
        return len(self.published) + len(self.decided) + len(self.settled) + len(self.outcomes)

    def fate(self, entry: Published) -> str | None:
        """Return the code of the receipt that says what became of a proposed policy; None while it is open."""
        return self.settled.get(entry.policy_id or "")

    def is_complete(self) -> bool:
        """Return whether every proposed policy was settled, and every decision that orders something was answered."""
        proposed = [entry for entry in self.published if entry.policy_id is not None]
        return all(self.fate(entry) is not None for entry in proposed) and all(seq in self.outcomes for seq in self.decided)


@dataclass(frozen=True, slots=True)
class Demo:
    """What to play: the scorer with its capture, the truth if it is known, the firewall, and the validators to leave out."""

    detector: Detector
    labels: Labels | None
    backend: Backend
    stopped: tuple[int, ...] = ()
    clock: Clock = field(default_factory=SystemClock)


async def play(demo: Demo, story: Story, told: Callable[[], None]) -> Summary:
    """Run the whole mesh over one capture; ``told`` is called after each change of ``story``."""
    with tempfile.TemporaryDirectory(prefix="cybermesh-demo-") as folder:
        async with AsyncExitStack() as stack:
            observer = _Observer(story, told, demo.clock)
            assembly = Assembly(Path(folder), demo.clock, observer.watch, stopped=demo.stopped)
            observer.genesis = assembly.mesh.deployment.genesis
            mesh = await assembly.open(stack, demo.backend, demo.detector)
            async with asyncio.TaskGroup() as group:
                running = group.create_task(assembly.run(), name="mesh")
                problems = await _until_settled(mesh, story, group)
                running.cancel()
            return await _summarise(demo, mesh, story, problems)


async def _until_settled(mesh: Mesh, story: Story, group: asyncio.TaskGroup) -> list[str]:
    """Play the capture and wait until everything that was proposed is settled; return what did not happen."""
    ai = mesh.ai
    assert ai is not None
    up, needed = len(mesh.validators), mesh.needed
    await _soon(lambda: mesh.is_voting, READY_S)
    reading = group.create_task(ai.run(), name="ai-1")
    problems = []
    loop = asyncio.get_running_loop()
    progress, since_s = (0, 0), loop.time()
    while not (ai.finished.is_set() and story.is_complete()):
        newest = (story.size, ai.counts.packets)
        if newest != progress:
            progress, since_s = newest, loop.time()
        elif loop.time() - since_s > QUIET_S:
            problems.append(f"no progress for {QUIET_S:.0f} s: {up} validators up, {needed} needed")
            break
        await asyncio.sleep(POLL_S)
    await _soon(lambda: len(set(story.heights.values())) <= 1, READY_S)
    reading.cancel()
    return problems


async def _soon(condition: Callable[[], bool], limit_s: float) -> bool:
    """Return whether the condition comes true within the limit."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110 - what is waited for is spread over every role
                await asyncio.sleep(POLL_S)
            return True
    return False


class _Observer:
    """Writes the story down as the roles tell it."""

    def __init__(self, story: Story, told: Callable[[], None], clock: Clock) -> None:
        self._story = story
        self._told = told
        self._clock = clock
        self.genesis: Genesis | None = None
        self.watch = Watch(self._published, self._committed, self._answered)

    def _published(self, entry: Published) -> None:
        self._story.published.append(entry)
        self._told()

    def _answered(self, outcome: Outcome) -> None:
        self._story.outcomes.setdefault(outcome.decision_seq, (outcome, self._clock.monotonic_s()))
        self._told()

    def _committed(self, number: int, commit: Commit[State]) -> None:
        """Note how far this validator is, and what the blocks decided if it is the first to tell."""
        newest = max(self._story.heights.values(), default=0)
        headers = [entry.block.header for entry in commit.blocks]
        for position, entry in enumerate(commit.blocks):
            if entry.block.height > newest:
                applied = entry.execution.outcome
                assert isinstance(applied, Applied)
                self._note(applied, entry.block.payload, _Proof(headers[position:], commit.certificate))
        self._story.heights[number] = commit.blocks[-1].block.height
        self._told()

    def _note(self, applied: Applied, payload: tuple[bytes, ...], evidence: _Proof) -> None:
        assert self.genesis is not None
        for position, receipt in enumerate(applied.receipts):
            subject = receipt.id
            if receipt.kind is Kind.POLICY:
                subject = read_transaction(payload[position]).id
            if receipt.code is Code.PENDING or receipt.code not in REQUEST_KEPT:
                self._story.settled[subject] = receipt.code
            for effect in receipt.decisions:
                proven = prove(
                    evidence.headers, evidence.certificate, included(applied, position), quorum(len(self.genesis.validators))
                )
                rule = applied.rules[effect.decision_seq]
                self._story.decided[effect.decision_seq] = Decided(effect, receipt.height, rule, proven)


@dataclass(frozen=True, slots=True)
class _Proof:
    headers: Sequence[Header]
    certificate: QuorumCert


async def _summarise(demo: Demo, mesh: Mesh, story: Story, problems: list[str]) -> Summary:
    assert mesh.ai is not None
    labels = demo.labels if demo.labels is not None else Labels()
    detections = [entry.detection for entry in story.published]
    found = labels.found(detections)
    decided = [entry.effect for entry in story.decided.values()]
    assert mesh.agent is not None
    acks = mesh.agent.acks_published
    agree = await _agree(mesh)
    verified = _first_proof_holds(mesh, story)
    harmed = labels.blocked(_blocked(story))
    latencies = sorted(_latencies_ms(story))

    missing = sorted(attack.name for attack in labels.attacks if attack.name not in found)
    problems += [f"attack not found: {name}" for name in missing]
    problems += [f"blocked although innocent: {host}" for host in sorted(harmed)]
    if not agree and story.heights:
        problems.append("the validators' chains differ")
    if decided and not verified:
        problems.append("the first proof does not verify")
    return Summary(
        packets=mesh.ai.counts.packets,
        flows=mesh.ai.counts.flows,
        anomalies=len({detection.alert_id for detection in detections}),
        policies=sum(effect.change is Change.OPENED for effect in decided),
        height=min(story.heights.values(), default=0),
        acks=acks,
        attacks_expected=len(labels.attacks),
        attacks_found=len(found) if demo.labels is not None else len({detection.alert_id for detection in detections}),
        benign_blocked=len(harmed),
        validators_agree=agree,
        proof_verified=verified,
        latency_p50_ms=_quantile(latencies, 0.50),
        latency_p99_ms=_quantile(latencies, 0.99),
        backend=demo.backend.name,
        validators_up=len(mesh.validators),
        validators_needed=mesh.needed,
        problems=tuple(problems),
        genesis=mesh.deployment.genesis.encode(),
        first_proof=story.decided[min(story.decided)].proof if story.decided else None,
    )


async def _agree(mesh: Mesh) -> bool:
    """Return whether all running validators stored the same blocks, hash by hash, up to the lowest of their heads."""
    heads = [await store.chain.head() for store in mesh.stores.values()]
    height = min(head.height if head is not None else 0 for head in heads)
    chains = set()
    for store in mesh.stores.values():
        rows = await store.chain.blocks(1, height) if height else []
        chains.add(tuple((row.hash, row.state_root) for row in rows))
    return height > 0 and len(chains) == 1


def _first_proof_holds(mesh: Mesh, story: Story) -> bool:
    """Verify the first decision's proof with nothing but the proof and the genesis."""
    if not story.decided:
        return False
    first = story.decided[min(story.decided)]
    try:
        proven = verify_proof(first.proof, mesh.deployment.genesis)
    except ProofError:
        return False
    return proven.decision(first.effect.decision_seq) == first.effect


def _blocked(story: Story) -> list[Network]:
    """Return everything that any decision blocked; a rate limit on a victim's port is no block of the victim."""
    networks: list[Network] = []
    for entry in story.decided.values():
        if entry.effect.change is not Change.ENDED:
            spec = parse(entry.rule_data)
            if spec.action is not Action.RATE_LIMIT:
                networks += spec.networks()
    return networks


def _latencies_ms(story: Story) -> list[float]:
    """Return for each applied decision the time from reading its decisive packet to its ack."""
    read_at = {entry.policy_id: entry.read_at_s for entry in story.published if entry.policy_id is not None}
    found = []
    for seq, (outcome, answered_s) in story.outcomes.items():
        decided = story.decided.get(seq)
        if decided is not None and outcome.result is Result.APPLIED and decided.effect.request_id in read_at:
            found.append(1000 * (answered_s - read_at[decided.effect.request_id]))
    return found


def _quantile(values: list[float], share: float) -> float | None:
    """Return the value that ``share`` of the sorted values do not exceed (nearest rank)."""
    if not values:
        return None
    return round(values[max(0, math.ceil(share * len(values)) - 1)], 2)
