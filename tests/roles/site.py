"""A deployment whose validators have real files in a folder and a bus in memory; they come and go like processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from cybermesh.bus import BusError, Delivery, Published
from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import CONSUMER_GROUP, Topics
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport.memory import MemoryNetworks
from cybermesh.envelope.nonces import Nonce
from cybermesh.envelope.signing import (
    AnomalyContent,
    EvidenceContent,
    OperatorContent,
    PolicyContent,
    Stamp,
    sign_anomaly,
    sign_evidence,
    sign_operator,
    sign_policy,
)
from cybermesh.genesis import Budget, Timing
from cybermesh.messages import Anomaly, DeadLetter, OperatorAction, SignedMessage, TxKind
from cybermesh.roles.clock import SystemClock
from cybermesh.roles.deployment import Roster, create
from cybermesh.roles.validator import ValidatorParts, ValidatorRole, create_safety_file, safety_file_of
from cybermesh.store.records import StoredTransaction
from cybermesh.store.store import Store, open_store
from cybermesh.wire import codec

TOPICS = Topics()
ATTACKER = "203.0.113.7"
KINDS: dict[str, TxKind] = {
    "Anomaly": TxKind.ANOMALY,
    "Evidence": TxKind.EVIDENCE,
    "Policy": TxKind.POLICY,
    "OperatorCommand": TxKind.OPERATOR,
}


class StubbornBus(MemoryBus):
    """A memory bus that refuses to take what roles publish on some topics, as a broker does that is away for them."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        super().__init__(now_ms)
        self.refused_topics: set[str] = set()
        self.has_refused = asyncio.Event()

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        if topic in self.refused_topics:
            self.has_refused.set()
            raise BusError(f"{topic}: away")
        return await super().publish(topic, key, value)


class Site:
    """One deployment; ``roles`` and ``stores`` hold the validators that run now, by their number."""

    def __init__(self, folder: Path, validators: int) -> None:
        roster = Roster(
            "roles", validators, producers=2, agents=1, operators=1, budget=Budget(), timing=Timing(base_ms=100, heartbeat_s=1)
        )
        self.deployment = create(roster)
        self.genesis = self.deployment.genesis
        self.clock = SystemClock()
        self.bus = StubbornBus(self.clock.wall_ms)
        self.networks = MemoryNetworks()
        self.committee = Committee.of(self.genesis.chain_id, [member.pubkey for member in self.genesis.validators])
        self.roles: dict[int, ValidatorRole] = {}
        self.stores: dict[int, Store] = {}
        self._folder = folder
        self._counter = 0
        for number in range(1, validators + 1):
            (folder / str(number)).mkdir()
            create_safety_file(self.safety_file(number), self.genesis, self.deployment.keys[f"validator-{number}"])

    def safety_file(self, number: int) -> Path:
        return safety_file_of(self._folder / str(number) / "validator.key")

    def ledger_file(self, number: int) -> Path:
        return self._folder / str(number) / "ledger.db"

    async def run(self, number: int) -> None:
        """Run one validator from its files until cancelled."""
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(open_store(self.ledger_file(number)))
            stack.callback(self.stores.pop, number, None)
            self.stores[number] = store
            key = self.deployment.keys[f"validator-{number}"]
            role = ValidatorRole(
                ValidatorParts(
                    genesis=self.genesis,
                    key=key,
                    number=number,
                    topics=TOPICS,
                    group=CONSUMER_GROUP,
                    bus=self.bus,
                    connect=self.networks.links(key.public),
                    store=store,
                    safety_file=self.safety_file(number),
                    clock=self.clock,
                )
            )
            self.roles[number] = role
            await role.run()

    @asynccontextmanager
    async def running(self, *numbers: int) -> AsyncIterator[None]:
        """These validators run inside the block, and are killed at its end."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.run(number), name=f"site-{number}") for number in numbers]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def until(self, is_so: Callable[[], bool], limit_s: float = 8) -> None:
        """Wait for something that only shows by looking."""
        async with asyncio.timeout(limit_s):
            while not is_so():  # noqa: ASYNC110 - a look is all there is
                await asyncio.sleep(0.005)

    async def until_votes(self, *numbers: int) -> None:
        def does(number: int) -> bool:
            role = self.roles.get(number)
            return role is not None and role.status is not None and role.status.problem is None

        await self.until(lambda: all(map(does, numbers)))

    async def until_committed(self, raw: bytes, *numbers: int, limit_s: float = 8) -> None:
        """Wait until a message is in a block of each of these validators."""
        async with asyncio.timeout(limit_s):
            for number in numbers:
                while not any(row.payload[1:] == raw for row in await self._transactions(number)):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)

    async def _transactions(self, number: int) -> Sequence[StoredTransaction]:
        store = self.stores.get(number)
        head = None if store is None else await store.chain.head()
        return [] if store is None or head is None else await store.chain.transactions_between(1, head.height)

    async def assert_agreement(self, *numbers: int) -> None:
        """The chains of these validators are prefixes of one."""
        chains = []
        for number in numbers:
            async with open_store(self.ledger_file(number)) as store:
                chains.append([block.hash for block in await store.chain.blocks(1, 10_000)])
        longest = max(chains, key=len)
        assert longest
        assert all(chain == longest[: len(chain)] for chain in chains)

    # Messages

    def stamp(self, who: str, *, counter: int | None = None, ts_ms: int | None = None) -> Stamp:
        when = self.clock.wall_ms() if ts_ms is None else ts_ms
        if counter is None:
            counter = self._counter = self._counter + 1
        return Stamp(self.deployment.keys[who], when // 1000, Nonce(when, 1, counter).encode())

    def anomaly(self, name: str, *, who: str = "ai-1", stamp: Stamp | None = None) -> Anomaly:
        content = AnomalyContent(name, "port_scan", "rules", ATTACKER, 9, 0.95, "m1", {})
        return sign_anomaly(content, stamp or self.stamp(who))

    def case(self, name: str) -> list[SignedMessage]:
        """An anomaly, its evidence and a policy that the budget carries."""
        policy = {
            "policy_id": name, "rule_type": "block", "action": "drop",
            "target": {"ips": [ATTACKER]}, "guardrails": {"ttl_seconds": 300},
        }  # fmt: skip
        return [
            self.anomaly(f"a-{name}"),
            sign_evidence(EvidenceContent(f"e-{name}", "flows", ()), self.stamp("ai-1")),
            sign_policy(PolicyContent(name, "drop", "block", f"a-{name}", f"e-{name}", policy), self.stamp("ai-1")),
        ]

    def command(self, action: str, **arguments: object) -> SignedMessage:
        name = f"c-{self._counter}"
        return sign_operator(OperatorContent(name, OperatorAction(action), arguments), self.stamp("operator-1"))

    async def send(self, message: SignedMessage | bytes, kind: TxKind = TxKind.ANOMALY) -> bytes:
        """Publish a message, or bytes in the place of one, under one key, so that all of them keep their order."""
        raw = message if isinstance(message, bytes) else codec.encode(message)
        kind = kind if isinstance(message, bytes) else KINDS[type(message).__name__]
        await self.bus.publish(TOPICS.of_kind(kind), b"k", raw)
        return raw

    async def records(self, topic: str, count: int, limit_s: float = 8) -> list[Delivery]:
        """Return the first records of a topic, as a new reader gets them."""
        found: list[Delivery] = []
        async with asyncio.timeout(limit_s), self.bus.subscribe((topic,), f"reader-{id(found)}") as deliveries:
            while len(found) < count:
                found.append(await anext(aiter(deliveries)))
        return sorted(found, key=lambda delivery: delivery.timestamp_ms)

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        return [codec.decode_dead_letter(record.value) for record in await self.records(TOPICS.ai_dlq, count)]
