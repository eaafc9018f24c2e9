"""Labelled flows from labelled captures: ``python -m tests.lab.rows CAPTURE... --out FILE.csv.gz``.

A flow belongs to an attack as its packets do (``labels.attribute``). Difficulty is fixed here, before anything is measured:
flows of one packet are left out, because no classifier judges them; of every technique in a capture at most 60 flows are kept,
and 250 benign ones, drawn by a seed, so that a flood of ten thousand equal flows does not decide what the table measures. Only
the table is fixed so: how ``adapt`` learns it was chosen on draws from it (docs/measurements.md says which).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cybermesh.detect.engines.rules import address_text
from cybermesh.detect.sitetraffic import metered
from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.flows import FlowBatch
from tests.lab.labels import BENIGN

ATTACK_ROWS_MAX, BENIGN_ROWS_MAX = 60, 250
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1}
_ICMP = 1
_LATE_US = 1_500_000


def attack_of(flows: FlowBatch, row: int, attacks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the attack that a flow belongs to, or None."""
    ends = [(address_text(flows.src[row]), int(flows.dport[row])), (address_text(flows.dst[row]), int(flows.sport[row]))]
    protocol = int(flows.proto[row])
    payload = flows.features[row, COLUMN["totlen_fwd_pkts"]] + flows.features[row, COLUMN["totlen_bwd_pkts"]]
    for attack in attacks:
        when = flows.end_us[row] >= attack["first_us"] and flows.start_us[row] <= attack["last_us"] + _LATE_US
        if not when or protocol not in {_PROTOCOLS[attack["protocol"]], _ICMP}:
            continue
        if attack["spoofed"] and protocol == _PROTOCOLS["tcp"] and payload:
            continue  # a forged connection cannot be completed: this is the innocent's own
        # Each end with the port it speaks to on the other.
        (source, port), (target, _) = sorted(ends, key=lambda end: end[0] not in attack["sources"])
        fits = attack["port"] is None or protocol == _ICMP or port == attack["port"]
        if source in attack["sources"] and target in attack["victims"] and fits:
            return attack
    return None


def rows_of(capture: Path) -> list[tuple[int, list[float], str, str]]:
    """Return (start, features, technique, class) of the capture's flows of several packets, in order of time."""
    told = json.loads(capture.with_suffix(".labels.json").read_text())
    rows = []
    for flows in metered(capture):
        for row in np.flatnonzero(~flows.single_packet).tolist():
            attack = attack_of(flows, row, told["attacks"])
            technique, kind = (BENIGN, BENIGN) if attack is None else (attack["name"], attack["type"])
            rows.append((int(flows.start_us[row]), flows.features[row].tolist(), technique, kind))
    return sorted(rows)


def thinned(rows: Sequence[tuple[int, list[float], str, str]], seed: int) -> list[tuple[int, list[float], str, str]]:
    """Return at most so many rows of each technique, in order of time."""
    generator = np.random.default_rng(seed)
    kept: list[tuple[int, list[float], str, str]] = []
    for technique in sorted({row[2] for row in rows}):
        own = [row for row in rows if row[2] == technique]
        most = BENIGN_ROWS_MAX if technique == BENIGN else ATTACK_ROWS_MAX
        kept += [own[at] for at in generator.permutation(len(own))[:most].tolist()]
    return sorted(kept)


def main() -> int:
    """Parse the command line, read the captures and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.rows", description="Labelled flows from labelled captures.")
    parser.add_argument("captures", type=Path, nargs="+", help="NAME.pcap with NAME.labels.json beside it")
    parser.add_argument("--out", type=Path, required=True, help="CSV.gz to write")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["start_us", *NAMES, "Label", "label_class"])
    for capture in options.captures:
        for start, features, technique, kind in thinned(rows_of(capture), options.seed):
            numbers = [int(value) if value.is_integer() else value for value in features]
            out.writerow([start, *numbers, technique, kind])
    options.out.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
