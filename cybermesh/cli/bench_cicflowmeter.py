"""The Python CICFlowMeter, for ``cybermesh bench flows``: a program of an environment of its own.

It needs numpy below 2 and a scapy of 2023, so it cannot be installed beside us, and scapy's licence (GPL) would not fit here
either. It is run as the command that its users run, on a short capture, since it meters about two thousand packets a second;
its start-up is measured and not counted.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from cybermesh.cli import output

CAPTURE_PACKETS = 10_000
_TIME_LIMIT_S = 300.0


class CicFlowMeter:
    """The program, ready to be measured."""

    def __init__(self, program: str) -> None:
        """Measure its start-up.

        Raises:
            CommandError: It does not start.
        """
        self._program = program
        self._startup_s = self._run("--help")

    def packets_per_s(self, capture: Path, packets: int) -> float:
        """Return how many packets a second it makes into rows of flows.

        Raises:
            CommandError: It failed, or wrote no flows.
        """
        with tempfile.TemporaryDirectory(prefix="cybermesh-bench-") as made:
            rows = Path(made) / "flows.csv"
            seconds = self._run("-f", str(capture), "-c", str(rows)) - self._startup_s
            if not rows.exists() or rows.read_bytes().count(b"\n") < 2:
                raise output.CommandError(
                    f"{self._program} wrote no flows; its environment needs scapy 2.5.0, newer ones break it"
                )
        return packets / max(seconds, 1e-3)

    def _run(self, *words: str) -> float:
        began = time.perf_counter()
        command = [self._program, *words]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=_TIME_LIMIT_S)  # noqa: S603 - named by the user
        except (OSError, subprocess.SubprocessError) as error:
            raise output.CommandError(f"{self._program}: cannot be measured: {error}") from error
        return time.perf_counter() - began
