"""What is true about a capture: who attacked whom, how, when, and who must never be blocked.

Times and packet numbers are read back from the capture itself, so a label never claims what was not recorded. The same labels
also name the kind of every flow, by which tests and evaluations score a detector.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.capture import ACK, RST, TCP, Packet, packets
from tests.lab.network import OUTSIDE, PROTECTED, Lab, LabError

FORMAT = "cybermesh-lab-labels/1"
BENIGN = "benign"

_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1}
# Answers may still be under way when the tool has ended.
_LATE_US = 1_500_000


@dataclass(frozen=True, slots=True)
class Truth:
    """One attack as it was ordered: ``began_us`` to ``ended_us`` is when its tool ran."""

    name: str
    type: str  # one of the detector's types
    technique: str
    tool: str
    command: str
    sources: tuple[str, ...]
    victims: tuple[str, ...]
    protocol: str
    port: int | None  # None: many ports
    spoofed: bool
    began_us: int
    ended_us: int

    def covers(self, packet: Packet) -> bool:
        """Does ``packet`` belong to this attack, in either direction?"""
        if self.protocol != "ip" and packet.protocol not in {_PROTOCOLS[self.protocol], _PROTOCOLS["icmp"]}:
            return False
        if not self.began_us <= packet.ts_us <= self.ended_us + _LATE_US:
            return False
        if packet.src in self.sources and packet.dst in self.victims:
            port = packet.dport
        elif packet.dst in self.sources and packet.src in self.victims:
            port = packet.sport
        else:
            return False
        # What has no port is ICMP: a ping of the flood, or the victim's "port unreachable".
        return self.port is None or packet.protocol == _PROTOCOLS["icmp"] or port == self.port


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack as it was recorded; ``first_us`` and ``last_us`` are its own packets, answers not counted."""

    name: str
    type: str
    technique: str
    tool: str
    command: str
    sources: tuple[str, ...]
    spoofed: bool
    victims: tuple[str, ...]
    protocol: str
    port: int | None
    first_us: int
    last_us: int
    packets: int
    flows: int


def describe(lab: Lab, path: Path, truths: Sequence[Truth], *, scenario: str, snaplen: int) -> dict[str, object]:
    """The labels of the capture at ``path``, ready for JSON.

    Raises:
        LabError: an attack left no packet in the capture.
    """
    recorded = list(packets(path))
    names = attribute(recorded, truths)
    benign = [host for host in lab.hosts if host.role != "attacker"]
    return {
        "format": FORMAT,
        "scenario": scenario,
        "capture": path.name,
        "capture_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "snaplen": snaplen,
        "sensor": "the router; a packet is recorded once, where it enters the router",
        "first_us": recorded[0].ts_us,
        "last_us": recorded[-1].ts_us,
        "packets": len(recorded),
        "flows": dict(sorted(flow_labels(recorded, names).items())),
        "networks": {"protected": list(PROTECTED), "outside": list(OUTSIDE)},
        "hosts": [{"name": host.name, "role": host.role, "addresses": list(host.addresses)} for host in lab.hosts],
        "router": list(lab.router.addresses),
        "benign": [address for host in benign if host.role == "client" for address in host.addresses],
        "never_block": [address for host in (*benign, lab.router) for address in host.addresses],
        "attacks": [asdict(_recorded(truth, recorded, names)) for truth in truths],
    }


def write(labels: dict[str, object], path: Path) -> None:
    """Write labels as JSON for people and programs."""
    path.write_text(json.dumps(labels, indent=1) + "\n")


def attribute(recorded: Sequence[Packet], truths: Sequence[Truth]) -> list[str]:
    """The name of the attack that each packet belongs to, or ``benign``."""
    forged = {source for truth in truths if truth.spoofed for source in truth.sources}
    # Where an innocent's address was forged, its own connections differ from the forged ones by being completed.
    completed = {p.flow for p in recorded if p.src in forged and p.protocol == TCP and p.flags & ACK and not p.flags & RST}
    return [
        next((t.name for t in truths if t.covers(packet) and not (t.spoofed and packet.flow in completed)), BENIGN)
        for packet in recorded
    ]


def flow_labels(recorded: Sequence[Packet], names: Sequence[str]) -> Counter[str]:
    """Conversations (both directions of one 5-tuple) by label; ``names`` are those of the packets."""
    labelled: dict[object, str] = {}
    for packet, name in zip(recorded, names, strict=True):
        # What is part of an attack stays so, whatever straggles in later.
        if labelled.get(packet.flow, BENIGN) == BENIGN:
            labelled[packet.flow] = name
    return Counter(labelled.values())


def _recorded(truth: Truth, recorded: Sequence[Packet], names: Sequence[str]) -> Attack:
    covered = [packet for packet, name in zip(recorded, names, strict=True) if name == truth.name]
    own = [packet.ts_us for packet in covered if packet.src in truth.sources]
    if not own:
        raise LabError(f"{truth.name}: not one packet of it was recorded")
    known = asdict(truth)
    del known["began_us"], known["ended_us"]
    return Attack(**known, first_us=min(own), last_us=max(own), packets=len(covered), flows=len({p.flow for p in covered}))
