"""A deployment as its operator runs it: every role a process of its own, over TCP and the bus of one host."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.deployment import Node, cybermesh, free_ports, output_of, until

CAPTURE = Path(__file__).resolve().parents[2] / "cybermesh" / "data" / "demo.pcap"
STOP_S = 2.0
VALIDATORS = [f"validator-{number}" for number in range(1, 5)]


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
