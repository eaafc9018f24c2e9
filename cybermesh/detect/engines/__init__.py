"""What an engine is: it scores flows or windows and reports findings, or abstains.

Engines are synchronous and pure apart from their own state; the detector calls them in turn, counts one that raises, and
goes on with the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.windows import WindowBatch

TYPES = (
    "ddos",
    "dos",
    "port_scan",
    "brute_force",
    "botnet",
    "web_attack",
    "infiltration",
    "exfiltration",
    "dns_tunnel",
    "malware",
    "anomaly",
    "policy_violation",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One engine's claim that ``entity`` did something of ``type`` between ``first_us`` and ``last_us`` (packet time).

    ``entity`` is the attacking address in canonical text; for floods whose sources can be forged (``spoofable``) it is still
    the observed source, and the policy must aim at ``victim`` and ``port`` instead. ``score`` is 0-1, ``severity`` 1-10,
    ``count`` the flows, packets or attempts behind it. ``details`` holds the feature values or window counts that fired.
    """

    engine: str
    type: str
    entity: str
    victim: str | None
    port: int | None
    protocol: int | None
    score: float
    severity: int
    first_us: int
    last_us: int
    count: int
    spoofable: bool
    explanation: str
    rule_id: str = ""
    proven: bool = False  # the accused completed handshakes or acted on answers: the address is no forgery
    details: Mapping[str, float | int | str] = field(default_factory=dict)


class Engine(Protocol):
    """Scores every flow and every window it is given."""

    @property
    def name(self) -> str:
        """``rules``, ``statistics`` or ``classifier``."""
        ...

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        """Return the findings of a batch of finished flows; rows it cannot judge are abstentions, which it counts."""
        ...

    def score_windows(self, windows: WindowBatch) -> list[Finding]:
        """Return the findings of a batch of windows."""
        ...
