"""A deployment's processes, as tests start, watch, kill and stop them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

COMMAND = [sys.executable, "-c", "from cybermesh.cli import main; main()"]
DEADLINE_S = 60.0


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

    @property
    def answers(self) -> bool:
        """Whether it is up, whatever it says of itself."""
        return self._get("metrics") is not None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

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
