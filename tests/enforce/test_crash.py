"""Kill -9 at every step: afterwards the kernel holds what is desired, and every decision is answered once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.enforce.agent_process import ROOT
from tests.enforce.crash_process import STEPS
from tests.enforce.namespaces import bare

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_after_a_kill_at_any_step_the_kernel_is_as_desired_and_each_decision_has_one_answer(
    netns: None, backend: str, tmp_path: Path
) -> None:
    with bare() as name:
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "tests.enforce.crash_process", str(tmp_path), backend]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [item["step"] for item in told] == list(STEPS)
    for item in told:
        assert (item["died"], item["ended"]) == (-signal.SIGKILL, 0), (item, done.stderr)
        assert item["acks"] == [
            "longer 1 applied",
            "longer 4 applied",
            "new 3 applied",
            "revoked 2 applied",
            "revoked 5 applied",
        ]
        assert (item["damage"], item["drift"]) == ([], 0), item
        left = item["kernel"]
        assert set(left) == {"drop from 203.0.113.1", "drop from 203.0.113.3"}, item
        assert 880 <= left["drop from 203.0.113.1"] <= 900
        assert 580 <= left["drop from 203.0.113.3"] <= 600
