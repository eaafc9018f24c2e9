"""The demo as a user calls it: what it prints, what it exits with, what its proof is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "packets", "flows", "anomalies", "policies", "height", "acks", "attacks_expected", "attacks_found", "benign_blocked",
    "validators_agree", "proof_verified", "latency_ms", "backend",
}  # fmt: skip


def cybermesh(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-c", "from cybermesh.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_the_demo_finds_decides_enforces_and_proves(tmp_path: Path) -> None:
    done = cybermesh("demo", "--json", "--keep", str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.keys() >= KEYS
    assert told["attacks_expected"] == 3
    assert told["attacks_found"] == 3
    assert told["benign_blocked"] == 0
    assert told["validators_agree"] is True
    assert told["proof_verified"] is True
    assert told["policies"] >= 2
    assert told["acks"] >= told["policies"]
    assert told["latency_ms"]["packet_to_ack_p50"] <= told["latency_ms"]["packet_to_ack_p99"]
    assert told["backend"] == "noop"

    proof, genesis = tmp_path / "proof.json", tmp_path / "genesis.json"
    checked = cybermesh("verify", str(proof), "--genesis", str(genesis))
    assert checked.returncode == 0, checked.stderr
    proof.write_bytes(proof.read_bytes().replace(b'"index":', b'"index": '))
    refused = cybermesh("verify", str(proof), "--genesis", str(genesis))
    assert refused.returncode == 1
    assert "ENCODING" in refused.stderr


def test_three_of_four_validators_are_enough() -> None:
    done = cybermesh("demo", "--json", "--stop-validator", "2")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["policies"] >= 2
    assert told["validators"] == {"up": 3, "needed": 3}


def test_two_of_four_decide_nothing_and_say_why() -> None:
    done = cybermesh("demo", "--json", "--stop-validator", "2", "--stop-validator", "3")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["policies"], told["acks"], told["height"]) == (0, 0, 0)
    assert "2 validators up, 3 needed" in done.stderr


def test_people_get_a_summary_without_escape_codes_in_a_pipe() -> None:
    done = cybermesh("demo")
    assert done.returncode == 0, done.stderr
    assert "3 of 3 labelled attacks" in done.stdout
    assert "verified" in done.stdout
    assert "grants it a budget" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["nDPI__teams.pcap", "suricata-verify__ipv4-truncated.pcap"])
def test_a_benign_capture_decides_nothing_and_is_no_failure(shared_data: Path, name: str) -> None:
    done = cybermesh("demo", "--json", "--capture", str(shared_data / "pcaps" / name))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["policies"], told["acks"], told["attacks_expected"]) == (0, 0, 0)
