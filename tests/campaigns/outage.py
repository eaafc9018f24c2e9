"""Takes the broker away for a while under load, and looks at what the others do meanwhile and afterwards.

Run as ``python -m tests.campaigns.outage --seconds 60``; prints a report as JSON.

What must hold: nobody ends or is restarted; /ready says that the bus is away; memory stays where it was;
afterwards everything that was accepted before, meanwhile and later is in the ledger.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.campaigns.kills import CampaignError, Mesh, Process
from tools.kafka_broker import Broker, fetch

GROWTH_MAX_MB = 64.0


@dataclass(frozen=True, slots=True)
class Report:
    """What was found; ``reason`` is what /ready said last while the broker was away."""

    away_s: float
    told_after_s: float
    reason: str
    recovered_after_s: float
    validator_grew_mb: float
    producer_grew_mb: float
    accepted: int
    in_ledger: int


def problems(mesh: Mesh) -> dict[str, str] | None:
    """Return what /ready says: nothing when it is ready, None when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{mesh.port}/api/v1/ready", timeout=5) as answer:
            return dict(json.load(answer)["problems"])
    except urllib.error.HTTPError as refused:
        with refused:
            return dict(json.load(refused)["problems"])
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def memory_mb(process: Process) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def run(folder: Path, broker: Broker, away_s: float) -> Report:
    """Run one outage on a running broker.

    Raises:
        CampaignError: a promise was broken.
    """
    mesh = Mesh(folder, broker)
    mesh.consumer.start()
    mesh.producer.start()
    try:
        mesh.until(lambda: len(mesh.digests("transactions")) >= 100, "messages flow")
        mesh.until(lambda: problems(mesh) == {}, "ready")
        before = [memory_mb(process) for process in (mesh.consumer, mesh.producer)]
        told_after_s, reason = _away(mesh, away_s)
        grown = [memory_mb(process) - mb for process, mb in zip((mesh.consumer, mesh.producer), before, strict=True)]
        began = time.monotonic()
        accepted = len(mesh.accepted())
        mesh.until(lambda: len(mesh.accepted()) > accepted + 50, "the producer publishes again")
        mesh.until(lambda: problems(mesh) == {}, "ready again")
        recovered_after_s = time.monotonic() - began
        mesh.producer.end(signal.SIGTERM)
        mesh.until(
            lambda: mesh.accepted() <= set(mesh.digests("transactions")), "everything that was accepted is in the ledger"
        )
    finally:
        mesh.producer.end()
        mesh.consumer.end()
    if max(grown) > GROWTH_MAX_MB:
        raise CampaignError(f"memory grew by {grown} MB while the broker was away; see {folder}")
    found = Counter(mesh.digests("transactions"))
    if max(found.values()) > 1:
        raise CampaignError(f"a message is in the ledger more than once; see {folder}")
    times = [round(value, 1) for value in (away_s, told_after_s)]
    sizes = [round(value, 1) for value in grown]
    return Report(*times, reason, round(recovered_after_s, 1), *sizes, len(mesh.accepted()), len(found))


def _away(mesh: Mesh, away_s: float) -> tuple[float, str]:
    """Take the broker away; return after how many seconds /ready told so, and the last that it said."""
    mesh.broker.kill()
    began = time.monotonic()
    told_after_s, reason = 0.0, ""
    while time.monotonic() < began + away_s:
        mesh.consumer.check()
        mesh.producer.check()
        if said := (problems(mesh) or {}).get("bus", ""):
            told_after_s, reason = told_after_s or time.monotonic() - began, said
        time.sleep(0.2)
    mesh.broker.start()
    if not reason:
        raise CampaignError(f"/ready did not say for {away_s:.0f} s that the bus was away; see {mesh.folder}")
    return told_after_s, reason


def main() -> None:
    """Run one outage on a broker of its own and print its report."""
    parser = argparse.ArgumentParser(description="Take the broker away under load.")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cybermesh-outage-"))  # kept: a failure is looked at there
    with Broker(folder / "broker", fetch()) as broker:
        report = run(folder, broker, arguments.seconds)
    sys.stdout.write(json.dumps(asdict(report)) + "\n")


if __name__ == "__main__":
    main()
