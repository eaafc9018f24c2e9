"""Four validators as processes over mutual TLS, killed, stopped and cut off from each other, while transactions come in.

By hand: ``python -m tests.e2e.chaos --seconds 180 --seed 7``. Every connection between two validators leads through a proxy
that can cut it, hold it, or hold one direction. Afterwards everything heals, and three things must hold: the committed chains
are prefixes of one another, every transaction that the bus accepted is in each chain exactly once, and new blocks come again
within five seconds of the moment at which all processes are up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cybermesh.bus.local import LocalBus
from cybermesh.bus.topics import Topics
from cybermesh.envelope.nonces import Nonce
from cybermesh.envelope.signing import AnomalyContent, Stamp, sign_anomaly
from cybermesh.keys import SigningKey
from cybermesh.keystore import load_key
from cybermesh.messages import TxKind
from cybermesh.wire import codec
from tests.e2e.deployment import DEADLINE_S, Node, free_ports, output_of

N = 4
NAMES = [f"validator-{number}" for number in range(1, N + 1)]
PAUSE_S = 0.02
PROGRESS_S = 5.0


@dataclass(frozen=True, slots=True)
class Report:
    """What a campaign did, and how it ended."""

    seed: int
    kills: int
    stops: int
    cuts: int
    transactions: int
    blocks: int
    progress_s: float


class Link:
    """What one validator dials to reach another: forwards bytes, unless the link is cut or one of its directions is held."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._ends: set[asyncio.StreamWriter] = set()
        self._open = [asyncio.Event(), asyncio.Event()]
        self.port = 0
        self.heal()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self.cut()
            self._hold(0, 1, held=False)
            server.close()

    def cut(self) -> None:
        """End the connections and refuse new ones."""
        self._is_cut = True
        for end in self._ends:
            end.transport.abort()

    def hold(self, *directions: int) -> None:
        """Let nothing more through, in the direction of the dialler's words (0), of the answers (1), or both."""
        self._hold(*directions, held=True)

    def _hold(self, *directions: int, held: bool) -> None:
        for direction in directions:
            (self._open[direction].clear if held else self._open[direction].set)()

    def heal(self) -> None:
        self._is_cut = False
        self._hold(0, 1, held=False)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far: asyncio.StreamWriter | None = None
        try:
            if self._is_cut:
                return
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._ends |= {writer, far}
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, far, 0), name="proxy there")
                tasks.create_task(self._pump(far_reader, writer, 1), name="proxy back")
        except* OSError:
            pass  # one end is gone, as is the point of this
        finally:
            for end in (writer, far):
                if end is not None:
                    self._ends.discard(end)
                    end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: int) -> None:
        while data := await reader.read(65_536):
            await self._open[direction].wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionError("closed")


class Campaign:
    """One deployment in ``folder``, made by ``init``, and everything that happens to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._rng = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self._accepted: list[bytes] = []
        self._key: SigningKey
        self._nodes: list[Node] = []
        self._links: dict[tuple[int, int], Link] = {}

    async def run(self, seconds: float) -> Report:
        """Run the campaign; AssertionError tells what did not hold."""
        async with contextlib.AsyncExitStack() as stack:
            await self._prepare(stack)
            stack.callback(self._kill_all)
            for node in self._nodes:
                node.start()
            await self._until_all_ready()
            bus = await stack.enter_async_context(LocalBus(self._folder / "state" / "bus.db", _now_ms))
            async with asyncio.TaskGroup() as tasks:
                producer = tasks.create_task(self._produce(bus), name="producer")
                async with asyncio.TaskGroup() as troubles:
                    until = time.monotonic() + seconds
                    troubles.create_task(self._trouble_processes(until), name="processes")
                    troubles.create_task(self._trouble_links(until), name="links")
                progress_s = await self._recover()
                producer.cancel()
            await self._until_everything_is_committed()
            self._kill_all()
            blocks = self._check()
        counts = self._counts
        return Report(
            self._seed, counts["kill"], counts["stop"], counts["cut"], len(self._accepted), blocks, round(progress_s, 2)
        )

    async def _prepare(self, stack: contextlib.AsyncExitStack) -> None:
        await asyncio.to_thread(
            output_of, "init", str(self._folder), "--validators", str(N), "--ai", "1", "--agents", "0", "--budget"
        )
        self._key = load_key(self._folder / "keys" / "ai-1.key")
        listens, http = free_ports(N), free_ports(N)
        for here in range(N):
            lines = [f'{NAMES[here]} = "127.0.0.1:{listens[here]}"']
            for there in range(N):
                if there != here:
                    link = self._links[here, there] = Link(listens[there])
                    await stack.enter_async_context(link.serving())
                    lines.append(f'{NAMES[there]} = "127.0.0.1:{link.port}"')
            peers = self._folder / f"peers-{here}.toml"
            peers.write_text("[validators]\n" + "\n".join(lines) + "\n")
            settings = f'[http]\nport = {http[here]}\n[consensus]\npeers = "{peers}"\n'
            (self._folder / f"{NAMES[here]}.local.toml").write_text(settings)
            self._nodes.append(Node(self._folder, NAMES[here], http[here]))

    # Load

    async def _produce(self, bus: LocalBus) -> None:
        topic = Topics().of_kind(TxKind.ANOMALY)
        for number in range(1, 10**9):
            now_ms = _now_ms()
            stamp = Stamp(self._key, now_ms // 1000, Nonce(now_ms, 1, number).encode())
            content = AnomalyContent(f"a-{number}", "port_scan", "rules", "203.0.113.7", 9, 0.95, "m1", {})
            raw = codec.encode(sign_anomaly(content, stamp))
            await bus.publish(topic, b"k", raw)
            self._accepted.append(raw)
            await asyncio.sleep(PAUSE_S)

    # Trouble

    async def _trouble_processes(self, until: float) -> None:
        rng = self._rng
        while time.monotonic() < until:
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            victim = rng.randrange(N)
            if rng.random() < 0.5:
                self._counts["kill"] += 1
                await asyncio.to_thread(self._nodes[victim].kill)
                await asyncio.sleep(rng.uniform(0.0, 1.0))
                self._nodes[victim].start()
                await self._until_ready(victim)
            else:
                self._counts["stop"] += 1
                self._nodes[victim].signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(rng.uniform(0.1, 3.0))
                finally:
                    self._nodes[victim].signal(signal.SIGCONT)

    async def _trouble_links(self, until: float) -> None:
        rng = self._rng
        while time.monotonic() < until:
            await asyncio.sleep(rng.uniform(0.2, 2.0))
            self._counts["cut"] += 1
            side = set(rng.sample(range(N), rng.randrange(1, N)))
            crossing = [link for (one, other), link in self._links.items() if (one in side) != (other in side)]
            kind = rng.choice(("cut", "hold both", "hold there", "hold back"))
            for link in crossing:
                match kind:
                    case "cut":
                        link.cut()
                    case "hold both":
                        link.hold(0, 1)
                    case "hold there":
                        link.hold(0)
                    case _:
                        link.hold(1)
            await asyncio.sleep(rng.uniform(0.3, 4.0))
            for link in crossing:
                link.heal()

    # Afterwards

    async def _recover(self) -> float:
        """Wait until all processes answer, then for a new block; return how long that took."""
        for link in self._links.values():
            link.heal()
        await self._until_all_answer()
        began = time.monotonic()
        before = max(self._heights())
        while max(self._heights()) <= before:
            assert time.monotonic() - began < PROGRESS_S, f"no new block {PROGRESS_S} s after healing"
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    def _heights(self) -> list[int]:
        return [len(self._rows(node, "SELECT height FROM blocks")) for node in self._nodes]

    async def _until_ready(self, index: int) -> None:
        """Wait until a started process answers; others may be cut off meanwhile, so that it need not be ready."""
        end = time.monotonic() + DEADLINE_S
        while not await asyncio.to_thread(lambda: self._nodes[index].answers):
            assert time.monotonic() < end, f"{NAMES[index]} does not answer"
            await asyncio.sleep(0.05)

    async def _until_all_answer(self) -> None:
        for index in range(N):
            await self._until_ready(index)

    async def _until_all_ready(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while not all([await asyncio.to_thread(lambda node=node: node.is_ready) for node in self._nodes]):
            assert time.monotonic() < end, "not all validators got ready"
            await asyncio.sleep(0.05)

    async def _until_everything_is_committed(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while any(self._missing(node) for node in self._nodes):
            missing = {node.name: len(self._missing(node)) for node in self._nodes}
            assert time.monotonic() < end, f"not committed after {DEADLINE_S} s: {missing} of {len(self._accepted)}"
            await asyncio.sleep(0.2)

    def _missing(self, node: Node) -> set[bytes]:
        return set(self._accepted) - {payload[1:] for (payload,) in self._rows(node, "SELECT payload FROM transactions")}

    def _check(self) -> int:
        chains = [self._rows(node, "SELECT hash FROM blocks ORDER BY height") for node in self._nodes]
        longest = max(chains, key=len)
        for node, chain in zip(self._nodes, chains, strict=True):
            assert chain == longest[: len(chain)], f"{node.name} has another chain"
            payloads = Counter(payload[1:] for (payload,) in self._rows(node, "SELECT payload FROM transactions"))
            twice = [raw for raw in self._accepted if payloads[raw] > 1]
            assert not twice, f"{node.name} applied {len(twice)} transactions twice"
        return len(longest)

    def _rows(self, node: Node, query: str) -> list[tuple[bytes, ...]]:
        ledger = self._folder / "state" / node.name / "validator.ledger.db"
        with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(query).fetchall()

    def _kill_all(self) -> None:
        for node in self._nodes:
            node.kill()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextlib.contextmanager
def campaign_folder() -> Iterator[Path]:
    """A folder that is kept, and named, when the campaign fails: its logs tell why."""
    folder = Path(tempfile.mkdtemp(prefix="cybermesh-chaos-"))
    try:
        yield folder / "mesh"
    except BaseException:
        sys.stderr.write(f"logs are in {folder}\n")
        raise
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    arguments = parser.parse_args()
    with campaign_folder() as folder:
        report = asyncio.run(Campaign(folder, arguments.seed).run(arguments.seconds))
    sys.stdout.write(json.dumps(asdict(report)) + "\n")


if __name__ == "__main__":
    main()
