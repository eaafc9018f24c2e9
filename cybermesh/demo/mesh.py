"""The mesh of the demo: every part is the one that a deployment runs, only bus and transport are in memory.

The demo has a single detector, which nobody can corroborate, so its genesis grants that detector a budget; a real deployment
with two sites needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import CONSUMER_GROUP, Topics
from cybermesh.consensus.committee import quorum
from cybermesh.consensus.events import Commit
from cybermesh.consensus.transport.memory import MemoryNetworks
from cybermesh.detect.pipeline import Pipeline
from cybermesh.enforce import guard
from cybermesh.enforce.acks import Outcome
from cybermesh.enforce.backends import Backend
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import State as AgentState
from cybermesh.envelope.nonces import NonceSource
from cybermesh.genesis import Budget
from cybermesh.keystore import FileCounters
from cybermesh.ledger.state import State as LedgerState
from cybermesh.roles.agent import AgentParts, AgentRole
from cybermesh.roles.ai import AiRole, Parts, Published
from cybermesh.roles.clock import Clock
from cybermesh.roles.deployment import Deployment, Roster, create
from cybermesh.roles.feeds import SourceFeed
from cybermesh.roles.positions import Nowhere
from cybermesh.roles.validator import ValidatorParts, ValidatorRole, create_safety_file, safety_file_of
from cybermesh.store.store import Store, open_store
from cybermesh.telemetry.sources import Source

VALIDATORS = 4


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told what happens, as it happens: plain calls from the tasks of the mesh."""

    on_published: Callable[[Published], None]
    on_commit: Callable[[int, Commit[LedgerState]], None]
    on_outcome: Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Detector:
    """What the demo's ai role reads and scores with."""

    source: Source
    pipeline: Pipeline


@dataclass(slots=True)
class Mesh:
    """The running roles; ``validators`` by their number, without those that were stopped."""

    deployment: Deployment
    stores: dict[int, Store] = field(default_factory=dict)
    validators: dict[int, ValidatorRole] = field(default_factory=dict)
    agent: AgentRole | None = None
    ai: AiRole | None = None

    @property
    def needed(self) -> int:
        """How many validators must be up for anything to be decided."""
        return quorum(VALIDATORS)

    @property
    def is_voting(self) -> bool:
        """Whether every running validator takes part."""
        found = [role.status for role in self.validators.values()]
        return all(status is not None and status.problem is None for status in found)


def plan() -> Deployment:
    """Return a new deployment for one demo."""
    return create(Roster("demo", VALIDATORS, producers=1, agents=1, operators=1, budget=Budget()))


class Assembly:
    """Builds the mesh in a folder, and runs it."""

    def __init__(self, folder: Path, clock: Clock, watch: Watch, *, stopped: Sequence[int] = ()) -> None:
        self._folder = folder
        self._clock = clock
        self._watch = watch
        self._stopped = frozenset(stopped)
        self._bus = MemoryBus(clock.wall_ms)
        self._networks = MemoryNetworks()
        self.mesh = Mesh(plan())

    async def open(self, stack: AsyncExitStack, backend: Backend, detector: Detector | None) -> Mesh:
        """Make every role, the ai only if there is something to detect with; ``stack`` closes what they hold open."""
        await stack.enter_async_context(self._bus)
        for number in range(1, VALIDATORS + 1):
            if number not in self._stopped:
                await self._add_validator(stack, number)
        self._add_agent(stack, backend)
        if detector is not None:
            self._add_ai(stack, detector)
        return self.mesh

    async def run(self) -> None:
        """Run all roles until cancelled."""
        mesh = self.mesh
        assert mesh.agent is not None
        async with asyncio.TaskGroup() as group:
            for number, role in mesh.validators.items():
                group.create_task(role.run(), name=f"validator-{number}")
            group.create_task(mesh.agent.run(), name="agent-1")

    async def _add_validator(self, stack: AsyncExitStack, number: int) -> None:
        deployment, name = self.mesh.deployment, f"validator-{number}"
        folder = self._folder / name
        folder.mkdir()
        key = deployment.keys[name]
        safety_file = safety_file_of(folder / "validator.key")
        create_safety_file(safety_file, deployment.genesis, key)
        store = await stack.enter_async_context(open_store(folder / "ledger.db"))
        self.mesh.stores[number] = store
        self.mesh.validators[number] = ValidatorRole(
            ValidatorParts(
                genesis=deployment.genesis,
                key=key,
                number=number,
                topics=Topics(),
                group=CONSUMER_GROUP,
                bus=self._bus,
                connect=self._networks.links(key.public),
                store=store,
                safety_file=safety_file,
                clock=self._clock,
                on_commit=lambda commit: self._watch.on_commit(number, commit),
            )
        )

    def _add_agent(self, stack: AsyncExitStack, backend: Backend) -> None:
        state = AgentState(self._folder / "agent.db", default_mode=Mode.ENFORCE)
        stack.callback(state.close)
        self.mesh.agent = AgentRole(
            AgentParts(
                genesis=self.mesh.deployment.genesis,
                key=self.mesh.deployment.keys["agent-1"],
                name="agent-1",
                topics=Topics(),
                bus=self._bus,
                state=state,
                backend=backend,
                nonces=NonceSource(stack.enter_context(FileCounters(self._folder / "agent.nonces"))),
                clock=self._clock,
                look=guard.Protected,
                on_outcome=self._watch.on_outcome,
            )
        )

    def _add_ai(self, stack: AsyncExitStack, detector: Detector) -> None:
        self.mesh.ai = AiRole(
            Parts(
                genesis=self.mesh.deployment.genesis,
                key=self.mesh.deployment.keys["ai-1"],
                instance="ai-1",
                topics=Topics(),
                bus=self._bus,
                nonces=NonceSource(stack.enter_context(FileCounters(self._folder / "ai.nonces"))),
                clock=self._clock,
                feeds=[SourceFeed(detector.source.name, lambda _: detector.source, Nowhere())],
                pipeline=detector.pipeline,
                on_published=self._watch.on_published,
            )
        )
