"""The fuzzing campaigns, each for some seconds, and what they would notice. ``make nightly`` runs them for ten minutes each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHARED
from tests.fuzz.targets import TARGETS

SECONDS = "10"


def campaign(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.campaign", *words]
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_no_case_crashes_hangs_or_makes_memory_grow(target: str, tmp_path: Path) -> None:
    done = campaign(tmp_path, target, "--seconds", SECONDS, "--seed", "1", "--corpus", str(SHARED / "data" / "pcaps"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cases"] >= 100


@pytest.mark.parametrize(
    ("target", "says"),
    [("crash", "IndexError: found; see it again with --seed 3 --case"), ("hang", "in judge"), ("growth", "memory grew")],
)
def test_a_campaign_notices_what_it_looks_for(target: str, says: str, tmp_path: Path) -> None:
    done = campaign(tmp_path, target, "--seconds", "1", "--seed", "3", "--hang-seconds", "2")
    assert done.returncode == (-signal.SIGPROF if target == "hang" else 1)
    assert says in done.stderr
