"""A fuzzing campaign: seeded cases for a time, watched for crashes, hangs and growing memory.

    python -m tests.fuzz.campaign pcap --seconds 600 --seed 1 --corpus ../shared/data/pcaps

Case n of a seed is always the same (for the same corpus), so a finding is repeated with ``--case n``. A case that takes more
than ``HANG_S`` of processor time (a busy machine is no finding), or ten times as long by the clock, ends the process with a
traceback of where it is; the number of the case at work is in the file named at the beginning, which also outlives a crash of
the interpreter. Memory is measured twice: what the process holds, from a warm state on, and what Python allocates and keeps
when cases are repeated that were all seen before.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from pathlib import Path
from random import Random

from tests.fuzz.mutations import Corpus
from tests.fuzz.targets import DEFECTIVE, TARGETS, Target, forget

HANG_S = 20.0
WARM_CASES = 100
GROWTH_MB = 24.0  # of the process, after it is warm
REPEATED = 12  # cases
KEPT_BYTES = 40_000  # by Python, when these are repeated


class Finding(Exception):  # noqa: N818 - what is looked for, not an error of the campaign
    """Something is wrong with the target; the text says what and how to see it again."""


def run(name: str, seed: int, seconds: float, corpus: Corpus, folder: Path, hang_s: float = HANG_S) -> dict[str, object]:
    """Run cases until the time is up; at least the warm ones.

    Raises:
        Finding: A case raised, or memory grew.
    """
    judge = ({**TARGETS, **DEFECTIVE})[name](corpus, folder)
    state = os.open(folder / "case-number", os.O_CREAT | os.O_RDWR)
    began = armed = time.monotonic()
    faulthandler.dump_traceback_later(10 * hang_s, exit=True)
    faulthandler.register(signal.SIGPROF, chain=True)  # tells where it is; then the signal ends the process
    number, warm_mb = 0, 0.0
    try:
        while number < WARM_CASES or time.monotonic() - began < seconds:
            signal.setitimer(signal.ITIMER_PROF, hang_s)
            if time.monotonic() - armed > hang_s:
                armed = time.monotonic()
                faulthandler.dump_traceback_later(10 * hang_s, exit=True)
            os.pwrite(state, b"%-20d" % number, 0)
            case(judge, name, seed, number)
            number += 1
            if number == WARM_CASES:
                forget()
                warm_mb = resident_mb()
        forget()
        grown_mb = resident_mb() - warm_mb
        signal.setitimer(signal.ITIMER_PROF, 3 * hang_s)
        kept = kept_by_repeating(judge, name, seed)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.unregister(signal.SIGPROF)
        faulthandler.cancel_dump_traceback_later()
        os.close(state)
    if grown_mb > GROWTH_MB or kept > KEPT_BYTES:
        raise Finding(
            f"{name}: memory grew by {grown_mb:.1f} MB over {number} cases; {REPEATED} repeated ones kept {kept} bytes"
        )
    return {
        "target": name,
        "seed": seed,
        "cases": number,
        "seconds": round(time.monotonic() - began, 1),
        "grown_mb": round(grown_mb, 1),
        "kept_bytes": kept,
    }


def case(judge: Target, name: str, seed: int, number: int) -> None:
    """Judge one case."""
    try:
        judge(Random(f"{name} {seed} {number}"))
    except Exception as error:  # supervisor: whatever is raised is what this looks for
        traceback.print_exc()
        raise Finding(f"{name}: {type(error).__name__}: {error}; see it again with --seed {seed} --case {number}") from error


def kept_by_repeating(judge: Target, name: str, seed: int) -> int:
    """Return how many bytes more Python holds after some cases were repeated."""
    for number in range(REPEATED):
        case(judge, name, seed, number)
    tracemalloc.start()
    try:
        for number in range(REPEATED):  # once more: what tracing itself and caches keep
            case(judge, name, seed, number)
        forget()
        before, _ = tracemalloc.get_traced_memory()
        for number in range(REPEATED):
            case(judge, name, seed, number)
        forget()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def resident_mb() -> float:
    """Return what the process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, *DEFECTIVE])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--corpus", type=Path, help="a folder of captures to begin with; left out if it is not there")
    parser.add_argument("--hang-seconds", type=float, default=HANG_S)
    given = parser.parse_args()
    corpus = Corpus(given.corpus)
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="cybermesh-fuzz-"))
    try:
        if given.case is not None:
            judge = ({**TARGETS, **DEFECTIVE})[given.target](corpus, folder)
            case(judge, given.target, given.seed, given.case)
            return 0
        print(f"{given.target}: the case at work is in {folder}", file=sys.stderr)
        told = run(given.target, given.seed, given.seconds, corpus, folder, given.hang_seconds)
    except Finding as finding:
        print(finding, file=sys.stderr)
        return 1
    print(json.dumps(told))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
