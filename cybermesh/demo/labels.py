"""What a labelled capture holds: its attacks, and the hosts that nobody may block.

Labels stand beside a capture as ``NAME.labels.json`` (``tests/lab`` writes them). A capture without them is played all the
same; then nothing is known to be missing, and nobody is known to be innocent.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cybermesh.addresses import Network, overlaps, parse_network
from cybermesh.detect.detector import Detection

FORMAT = "cybermesh-lab-labels/1"
# Whether a flood came from one host or from many is often a matter of forged addresses, so either name is right.
_FLOODS = frozenset({"ddos", "dos"})


class LabelsError(Exception):
    """A labels file that cannot be used."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One labelled attack; with ``spoofed`` sources it is the victim that identifies it."""

    name: str
    type: str
    sources: frozenset[str]
    victims: frozenset[str]
    spoofed: bool

    def is_told_by(self, detection: Detection) -> bool:
        """Return whether the detection names this attack: its type, and its source (its victim, where sources are forged)."""
        same_type = detection.type == self.type or {detection.type, self.type} <= _FLOODS
        if self.spoofed:
            return same_type and detection.victim in self.victims
        return same_type and detection.entity in self.sources


@dataclass(frozen=True, slots=True)
class Labels:
    """The truth about a capture."""

    attacks: tuple[Attack, ...] = ()
    never_block: frozenset[str] = frozenset()
    protected: tuple[Network, ...] = ()

    def found(self, detections: Iterable[Detection]) -> set[str]:
        """Return the names of the attacks that the detections tell of."""
        told = list(detections)
        return {attack.name for attack in self.attacks if any(attack.is_told_by(detection) for detection in told)}

    def blocked(self, networks: Sequence[Network]) -> set[str]:
        """Return the hosts among ``networks`` that must never be blocked."""
        hosts = {host: ipaddress.ip_network(host) for host in self.never_block}
        return {host for host, network in hosts.items() if any(overlaps(network, target) for target in networks)}


def beside(capture: Path) -> Labels | None:
    """Return the labels that stand beside a capture, None when there are none.

    Raises:
        LabelsError: There is a labels file, and it is not usable.
    """
    path = capture.with_suffix(".labels.json")
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise LabelsError(f"{path}: format {tree['format']!r} instead of {FORMAT!r}")
        return Labels(
            attacks=tuple(
                Attack(
                    entry["name"],
                    entry["type"],
                    frozenset(entry["sources"]),
                    frozenset(entry["victims"]),
                    bool(entry["spoofed"]),
                )
                for entry in tree["attacks"]
            ),
            never_block=frozenset(tree["never_block"]),
            protected=tuple(parse_network(text) for text in tree["networks"]["protected"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelsError(f"{path}: not usable as labels: {type(error).__name__}: {error}") from error
