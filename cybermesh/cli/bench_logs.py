"""``cybermesh bench logs``: how many lines a second the log reader turns into events on one core.

Three logs are read from a file, as a source reads them: one in which every line is a failed login of sshd, each with another
user, address and port; a usual one, in which nine of ten sshd lines mean nothing to the patterns; and one whose lines were made
to be slow to match, as long as a line may be. Beside them stands what bounds the first: taking lines out of the file and
nothing else, and a Python loop that only splits each line at its blanks.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.telemetry.sources.lines import Lines, Reading
from cybermesh.telemetry.sources.logs import LONGEST

ROUNDS = 3
_BATCH = 1000  # TELEMETRY_BATCH_SIZE by default
_OTHERS = (
    "Connection closed by authenticating user u{n} 203.0.113.{low} port {port} [preauth]",
    "pam_unix(sshd:auth): authentication failure; logname= uid=0 euid=0 tty=ssh ruser= rhost=203.0.113.{low}",
    "Received disconnect from 203.0.113.{low} port {port}:11: Bye Bye [preauth]",
)


def measure(lines: int, rounds: int = ROUNDS) -> dict[str, object]:
    """Return the rates; each is the median of some rounds."""
    with tempfile.TemporaryDirectory(prefix="cybermesh-bench-") as made:
        folder = Path(made)
        failed = _write(folder / "failed.log", lines, _failed)
        usual = _write(folder / "usual.log", lines, lambda n, chance: _failed(n, chance) if n % 10 == 0 else _other(n, chance))
        hostile = _write(folder / "hostile.log", max(1, lines // 20), _hostile)
        rates = {path: [_events(path) for _ in range(rounds)] for path in (failed, usual, hostile)}
        floor = [_split(failed) for _ in range(rounds)]
        taken = [_lines(failed) for _ in range(rounds)]
        return {
            "lines": lines,
            "sshd_lines_per_s": round(statistics.median(rates[failed])),
            "usual_lines_per_s": round(statistics.median(rates[usual])),
            "hostile_lines_per_s": round(statistics.median(rates[hostile])),
            "hostile_mb_per_s": round(statistics.median(rates[hostile]) * hostile.stat().st_size / (lines // 20 or 1) / 1e6, 1),
            "reading_lines_per_s": round(statistics.median(taken)),
            "python_floor_lines_per_s": round(statistics.median(floor)),
        }


def _write(path: Path, lines: int, line: Callable[[int, random.Random], str]) -> Path:
    chance = random.Random(1)  # noqa: S311 - the same log every time
    with path.open("w", encoding="utf-8") as file:
        for n in range(lines):
            at = n % 86_400
            file.write(
                f"Nov 20 {at // 3600:02}:{at // 60 % 60:02}:{at % 60:02} gate sshd[{1000 + n % 30_000}]: {line(n, chance)}\n"
            )
    return path


def _failed(n: int, chance: random.Random) -> str:
    address = f"203.0.{chance.randrange(256)}.{chance.randrange(256)}"
    user = f"user{chance.randrange(5000)}"
    return f"Failed password for invalid user {user} from {address} port {1024 + n % 60_000} ssh2"


def _other(n: int, chance: random.Random) -> str:
    return _OTHERS[n % len(_OTHERS)].format(n=n % 5000, low=chance.randrange(256), port=1024 + n % 60_000)


def _hostile(n: int, chance: random.Random) -> str:
    del chance
    part = f"Failed password for invalid user {n} from 203.0.113.1 port 22 ssh2 "
    return (part * (LONGEST // len(part)))[: LONGEST - 60]


def _events(path: Path) -> float:
    """Return the lines a second of reading a log into batches of events, by this thread's processor time."""
    with contextlib.closing(open_source(f"logs:{path}", rows=_BATCH)) as source:
        began = time.thread_time()
        for _ in source.batches():
            pass
        seconds = time.thread_time() - began
        if source.counters.ended:
            raise SourceError(source.counters.ended)
        return source.counters.packets / seconds


def _lines(path: Path) -> float:
    reader = Lines(str(path), Counters(), Reading(longest=LONGEST))
    with contextlib.closing(reader):
        began, count = time.thread_time(), 0
        while (lines := reader.read(_BATCH)) is not None:
            count += len(lines)
        return count / (time.thread_time() - began)


def _split(path: Path) -> float:
    lines = path.read_bytes().split(b"\n")
    began = time.thread_time()
    for line in lines:
        line.split(b" ", 6)
    return len(lines) / (time.thread_time() - began)
