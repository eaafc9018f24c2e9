"""One process with one or more roles, composed from settings: what ``cybermesh run`` runs.

All roles of the process share one bus. A validator among several reaches the others over TCP; one that is alone has nobody to
reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cybermesh.api.health import Probes, serve
from cybermesh.bus import Bus
from cybermesh.bus.topics import Topics
from cybermesh.config import ConfigError, Settings
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport.memory import MemoryNetworks
from cybermesh.consensus.transport.tcp import Address, listen_on
from cybermesh.detect.engines.rule_file import RuleError
from cybermesh.detect.modelfile import ModelError
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import FILE_NAME
from cybermesh.enforce.state import State as AgentState
from cybermesh.envelope.nonces import NonceSource
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey
from cybermesh.keystore import FileCounters, load_key
from cybermesh.metrics import Figures
from cybermesh.roles.agent import AgentParts, AgentRole
from cybermesh.roles.ai import AiRole, Parts
from cybermesh.roles.clock import Clock, SystemClock
from cybermesh.roles.detection import open_detector
from cybermesh.roles.firewall import Shield, open_backend, read_genesis
from cybermesh.roles.garbage import collect_rarely
from cybermesh.roles.inputs import feeds_of, metering_of
from cybermesh.roles.links import Links
from cybermesh.roles.open_bus import open_bus
from cybermesh.roles.peers import parse_address, read_peers
from cybermesh.roles.positions import Positions
from cybermesh.roles.recovery import present_committee
from cybermesh.roles.validator import ValidatorParts, ValidatorRole, safety_file_of
from cybermesh.store.store import open_store


class Role(StrEnum):
    """What a process can be."""

    AI = "ai"
    VALIDATOR = "validator"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class _Context:
    """What all roles of the process share."""

    settings: Settings
    genesis: Genesis
    bus: Bus
    topics: Topics
    clock: Clock = field(default_factory=SystemClock)

    def key_file(self, role: Role) -> Path:
        """Return where the role's own key lies."""
        named: Path | None = getattr(self.settings.keys, role)
        return named or self.settings.node.state_dir / f"{role}.key"

    def key(self, role: Role) -> SigningKey:
        """Load the role's own key."""
        return load_key(self.key_file(role))

    def file(self, name: str) -> Path:
        """Return a file of the state directory."""
        return self.settings.node.state_dir / name


async def run(settings: Settings, roles: Sequence[Role]) -> None:
    """Run the roles until SIGINT or SIGTERM.

    Raises:
        ConfigError: The settings do not fit these roles.
    """
    genesis = read_genesis(settings.node.genesis)
    _check(settings, genesis, roles)
    collect_rarely()
    settings.node.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    topics = Topics(**settings.topics.model_dump())
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(open_bus(settings))
        context = _Context(settings, genesis, bus, topics)
        running = [await _make(role, context, stack) for role in roles]
        await _until_signal(running, settings, bus)


@dataclass(frozen=True, slots=True)
class _Running:
    """A role of the process: what runs it, why it is not ready (empty when it is), its figures."""

    name: Role
    role: AiRole | ValidatorRole | AgentRole
    links: Links | None = None

    def problem(self) -> str:
        match self.role:
            case ValidatorRole():
                status = self.role.status
                return "starting" if status is None else status.problem or ""
            case AgentRole():
                return str(self.role.enforcer.status().get("problem") or "")
            case AiRole():
                return self.role.problem or ""

    def figures(self) -> Figures:
        found = dict(self.role.figures())
        if self.links is not None:
            found |= self.links.figures()
        return found


async def _until_signal(running: Sequence[_Running], settings: Settings, bus: Bus) -> None:
    """Run everything in one task group; a signal ends it in an orderly way."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    probes = Probes(
        problems=lambda: {
            name: problem
            for name, problem in (("bus", bus.trouble), *((entry.name.value, entry.problem()) for entry in running))
            if problem
        },
        figures=lambda: {name: value for entry in running for name, value in entry.figures().items()},
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(entry.role.run(), name=entry.name) for entry in running]
        tasks.append(group.create_task(serve(settings.http.host, settings.http.port, probes), name="health"))
        await stopped.wait()
        for task in tasks:
            task.cancel()


def _check(settings: Settings, genesis: Genesis, roles: Sequence[Role]) -> None:
    """Refuse what cannot work, before anything is opened."""
    domains = genesis.wire.signing_domains
    for key, ours, theirs in (
        ("signing.control_domain", settings.signing.control_domain, domains.commits),
        ("signing.control_policy_domain", settings.signing.control_policy_domain, domains.policy),
    ):
        if ours is not None and ours != theirs:
            raise ConfigError(f"{key}: {ours!r} differs from the genesis, which says {theirs!r}; remove the setting")
    if len(set(roles)) != len(roles):
        raise ConfigError("--role: each role once; start another process for a second one")
    if Role.VALIDATOR in roles:
        members = len(genesis.validators)
        if members > 1 and settings.node.id is None:
            raise ConfigError("node.id: a validator among several needs its number (NODE_ID)")
        if members > 1 and settings.bus.kind == "memory":
            raise ConfigError(
                "bus.kind: a memory bus ends at this process, and the other validators need one too; name another"
            )
    elif settings.bus.kind == "memory" and len(roles) == 1:
        raise ConfigError("bus.kind: a memory bus ends at this process; run all roles in one, or name another bus")


async def _make(role: Role, context: _Context, stack: AsyncExitStack) -> _Running:
    match role:
        case Role.AI:
            return _Running(role, await _make_ai(context, stack))
        case Role.VALIDATOR:
            return await _make_validator(context, stack)
        case Role.AGENT:
            return _Running(role, _make_agent(context, stack))


async def _make_ai(context: _Context, stack: AsyncExitStack) -> AiRole:
    settings = context.settings
    metering = await asyncio.to_thread(metering_of, settings.telemetry)
    try:
        detection = settings.detection
        detector = open_detector(
            detection.rules_dir,
            detection.model_dir,
            detection.site_key,
            meter=metering.new_meter(),
            state=context.file("ai.baselines.json"),
        )
    except RuleError as error:
        raise ConfigError(f"detection.rules_dir: {error}") from error
    except ModelError as error:
        raise ConfigError(f"detection.model_dir: {error} (detection.site_key names that key)") from error
    return AiRole(
        Parts(
            genesis=context.genesis,
            key=context.key(Role.AI),
            instance=f"ai-{settings.node.id or 1}",
            topics=context.topics,
            bus=context.bus,
            nonces=NonceSource(stack.enter_context(FileCounters(context.file("ai.nonces")))),
            clock=context.clock,
            feeds=feeds_of(settings, metering, context.bus, Positions(context.file("ai.positions.json"))),
            pipeline=detector.pipeline,
            upkeep=detector.upkeep,
            signs_batches=settings.signing.batches,
        )
    )


async def _make_validator(context: _Context, stack: AsyncExitStack) -> _Running:
    settings = context.settings
    key = context.key(Role.VALIDATOR)
    store = await stack.enter_async_context(open_store(store_location(settings)))
    first = Committee.of(context.genesis.chain_id, (member.pubkey for member in context.genesis.validators))
    committee = await present_committee(store, first)
    if committee.index_of(key.public) is None:
        raise ConfigError(
            f"keys.validator: {key.public.hex()} belongs to no validator of the committee; use this node's own key"
        )
    links = None if first.n == 1 else _open_links(context, key, stack)
    role = ValidatorRole(
        ValidatorParts(
            genesis=context.genesis,
            key=key,
            number=settings.node.id or 1,
            topics=context.topics,
            group=settings.kafka.consumer_group_id,
            bus=context.bus,
            connect=MemoryNetworks().links(key.public) if links is None else links.connect,
            store=store,
            safety_file=safety_file_of(context.key_file(Role.VALIDATOR)),
            clock=context.clock,
        )
    )
    return _Running(Role.VALIDATOR, role, links)


def _open_links(context: _Context, key: SigningKey, stack: AsyncExitStack) -> Links:
    settings = context.settings.consensus
    addresses = read_peers(settings.peers, context.genesis)
    if not settings.listen and key.public not in addresses:
        raise ConfigError(f"{settings.peers}: does not say where {key.public.hex()} listens; add it, or set consensus.listen")
    address = parse_address(settings.listen, "consensus.listen") if settings.listen else addresses[key.public]
    try:
        listener = stack.enter_context(listen_on(address))
    except OSError as error:
        where = f"{address[0]}:{address[1]}"
        raise ConfigError(f"consensus.listen: cannot listen on {where}: {error.strerror}; see {settings.peers}") from error

    def known() -> Mapping[bytes, Address]:
        # Read again for each committee. A file that was spoilt meanwhile must not stop a validator that runs.
        with contextlib.suppress(ConfigError):
            addresses.update(read_peers(settings.peers, context.genesis))
        return addresses

    return Links(key, listener, known)


def store_location(settings: Settings) -> str | Path:
    """Return the URL or file of the validator's store."""
    return settings.store.url or settings.node.state_dir / "validator.ledger.db"


def _make_agent(context: _Context, stack: AsyncExitStack) -> AgentRole:
    settings = context.settings.enforce
    state = AgentState(context.file(FILE_NAME), Mode(settings.mode))
    stack.callback(state.close)
    backend = open_backend(settings.backend, settings.namespaces)
    stack.callback(backend.close)
    return AgentRole(
        AgentParts(
            genesis=context.genesis,
            key=context.key(Role.AGENT),
            name=settings.scope or socket.gethostname(),
            topics=context.topics,
            bus=context.bus,
            state=state,
            backend=backend,
            nonces=NonceSource(stack.enter_context(FileCounters(context.file("agent.nonces")))),
            clock=context.clock,
            look=Shield(context.settings, context.genesis, context.clock.wall_ms),
        )
    )
