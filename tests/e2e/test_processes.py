"""A deployment as its operator runs it: every role a process of its own, over TCP and the bus of one host."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CAPTURE = Path(__file__).resolve().parents[2] / "cybermesh" / "data" / "demo.pcap"
COMMAND = [sys.executable, "-c", "from cybermesh.cli import main; main()"]
DEADLINE_S = 60.0
STOP_S = 2.0
VALIDATORS = [f"validator-{number}" for number in range(1, 5)]


def cybermesh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def output_of(*arguments: str) -> str:
    done = cybermesh(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses; all are held at once, so they differ."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [entry.getsockname()[1] for entry in held]


def until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again until it holds."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.05)


class Node:
    """One process of the deployment."""

    def __init__(self, folder: Path, name: str, port: int) -> None:
        self.name = name
        self.settings = folder / f"{name}.toml"
        self._log = folder / f"{name}.log"
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        role = self.name.partition("-")[0]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "run", "--role", role, "-c", str(self.settings)], stdout=log, stderr=subprocess.STDOUT
            )

    def _get(self, path: str) -> str | None:
        assert self._process is not None
        assert self._process.poll() is None, f"{self.name} ended by itself:\n{self._log.read_text()[-2_000:]}"
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=5) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None  # not up yet, or not ready

    @property
    def is_ready(self) -> bool:
        return self._get("ready") is not None

    def figure(self, name: str) -> float:
        """Return one of its metrics, 0 while it does not answer."""
        lines = (self._get("metrics") or "").splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"cybermesh_{name} ")), 0.0)

    @property
    def height(self) -> float:
        return self.figure("validator_height_blocks")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> tuple[int, float]:
        """Interrupt it; return its exit code and how long that took."""
        assert self._process is not None
        began = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(timeout=DEADLINE_S)
        return code, time.monotonic() - began


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, Node]]:
    """A deployment as ``init`` makes it, moved to ports that are free here."""
    folder = tmp_path / "mesh"
    output_of("init", str(folder), "--validators", "4", "--ai", "1", "--agents", "1", "--budget")
    peers = tomllib.loads((folder / "peers.toml").read_text())["validators"]
    assert list(peers) == VALIDATORS
    assert len(set(peers.values())) == len(VALIDATORS)
    names = [*VALIDATORS, "agent-1", "ai-1"]
    ports = free_ports(len(VALIDATORS) + len(names))
    lines = [f'{name} = "127.0.0.1:{ports.pop()}"\n' for name in VALIDATORS]
    (folder / "peers.toml").write_text("[validators]\n" + "".join(lines))
    extra = {"agent-1": '[enforce]\nmode = "enforce"\n', "ai-1": f'[telemetry]\ninputs = ["{CAPTURE}"]\n'}
    found = {}
    for name in names:
        port = ports.pop()
        (folder / f"{name}.local.toml").write_text(f"[http]\nport = {port}\n{extra.get(name, '')}")
        found[name] = Node(folder, name, port)
    try:
        yield found
    finally:
        for node in found.values():
            node.kill()


def decisions(node: Node) -> list[dict[str, object]]:
    return json.loads(output_of("policy", "list", "--json", "-c", str(node.settings)))


@pytest.mark.slow
def test_six_processes_decide_enforce_survive_a_kill_and_prove_it(nodes: dict[str, Node], tmp_path: Path) -> None:
    for node in nodes.values():
        node.start()
    validators = [nodes[name] for name in VALIDATORS]
    first, victim = validators[0], validators[1]
    until(lambda: all(node.is_ready and node.figure("validator_peers_connected") == 3 for node in validators), "a full mesh")
    until(lambda: nodes["agent-1"].figure("agent_acks_published_total") >= 2, "two decisions applied")
    until(lambda: first.figure("validator_acks_total") >= 2, "their acks stored")

    victim.kill()
    height = max(node.height for node in validators if node is not victim)
    until(lambda: first.figure("validator_peers_connected") == 2, "the others notice")
    victim.start()
    until(lambda: victim.is_ready and victim.height >= height, "the killed validator has caught up and votes")
    until(lambda: victim.figure("validator_peers_connected") == 3, "it is connected to all others again")

    decided = decisions(victim)
    assert len(decided) >= 2
    assert {entry["policy_id"] for entry in decided} == {entry["policy_id"] for entry in decisions(first)}
    proof = tmp_path / "proof.json"
    proof.write_text(output_of("policy", "prove", str(decided[-1]["policy_id"]), "-c", str(victim.settings)))
    checked = cybermesh("verify", str(proof), "--genesis", str(tmp_path / "mesh" / "genesis.json"))
    assert checked.returncode == 0, checked.stderr

    stopped = {name: node.stop() for name, node in nodes.items()}
    assert {name: code for name, (code, _) in stopped.items()} == dict.fromkeys(nodes, 0)
    assert {name: round(took_s, 2) for name, (_, took_s) in stopped.items() if took_s > STOP_S} == {}
