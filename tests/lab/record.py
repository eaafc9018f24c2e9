"""Record a labelled capture: ``python -m tests.lab.record --out DIR [--scenario NAME]`` (root).

Writes ``DIR/NAME.pcap`` and ``DIR/NAME.labels.json``. A recording in which anything went wrong (a bystander not served, a
packet dropped, an attack not seen, a name of this machine in the bytes) is an error and writes no labels.
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from tests.lab import labels
from tests.lab.attacks import carry_out
from tests.lab.capture import SNAPLEN, packets, recording
from tests.lab.clients import busy_clients
from tests.lab.network import Lab, LabError, missing_tools
from tests.lab.scenarios import SCENARIOS, Scenario
from tests.lab.servers import serve

_TEXT = re.compile(rb"[\x20-\x7e]{4,}")
_SSH_PORT = 22
_FIRST_USER_ID = 1_000


def record(name: str, scenario: Scenario, out: Path, *, seed: int = 1) -> Path:
    """Play ``scenario`` in a new lab and write its capture and labels into ``out``; return the labels' path.

    Raises:
        LabError: a program is missing, or the recording is not what its labels would say.
    """
    if missing := missing_tools(scenario.needed()):
        raise LabError(f"not installed: {', '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    with Lab() as lab:
        serve(lab)
        for start in scenario.extra_servers:
            start(lab)
        path = lab.directory / f"{name}.pcap"
        truths = []
        with recording(lab, path), busy_clients(lab, seed=seed, scripts=scenario.clients) as failed:
            began = time.monotonic()
            for act in scenario.acts:
                _pause(failed, began + act.at_s - time.monotonic())
                truths.append(carry_out(lab, act.plan(lab)))
        refuse_names(path)
        labels.write(labels.describe(lab, path, truths, scenario=name, snaplen=SNAPLEN), path.with_suffix(".labels.json"))
        # Only together: a new capture beside old labels would be worse than none.
        return [Path(shutil.copy(made, out)) for made in (path, path.with_suffix(".labels.json"))][1]


def refuse_names(path: Path) -> None:
    """Fail if readable text in the capture holds this machine's name or that of one of its people.

    Raises:
        LabError: it does.
    """
    host = socket.gethostname()
    names = {host, host.partition(".")[0], os.environ.get("SUDO_USER", "")}
    names |= {user.pw_name for user in pwd.getpwall() if _FIRST_USER_ID <= user.pw_uid < 60_000}
    names -= {"", "localhost"}
    pattern = re.compile(rb"\b(" + b"|".join(re.escape(name.encode()) for name in sorted(names)) + rb")\b", re.IGNORECASE)
    for packet in packets(path):
        # Above its banner ssh is encrypted, and noise spells any short name sooner or later.
        if _SSH_PORT in {packet.sport, packet.dport} and not packet.payload.startswith(b"SSH-"):
            continue
        for text in _TEXT.findall(packet.payload):
            if found := pattern.search(text):
                raise LabError(f"{path.name}: {found[0]!r} is in a packet from {packet.src} to {packet.dst}")


def _pause(failed: threading.Event, seconds: float) -> None:
    if failed.wait(max(0.0, seconds)):
        raise LabError("a bystander was not served")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Parse the command line, record, and say what was recorded."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.record", description="Record a labelled capture in the lab.")
    parser.add_argument("--out", type=Path, required=True, help="directory for NAME.pcap and NAME.labels.json")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), default="demo")
    parser.add_argument("--seed", type=int, default=1, help="pacing of the bystanders (default 1)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("record: network namespaces need root", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job is born deaf to the first
        signal.signal(number, _interrupt)
    try:
        path = record(options.scenario, SCENARIOS[options.scenario], options.out, seed=options.seed)
    except LabError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("record: interrupted; everything was removed", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
