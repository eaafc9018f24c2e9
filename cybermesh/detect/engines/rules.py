"""The rule engine: known attacks as conditions over flows and windows, evaluated on whole batches.

A rule whose condition needs a value the source could not know abstains, and that is counted. What fired is explained with the
values it fired on, so a finding can be checked without the traffic.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cybermesh.addresses import normalise_address
from cybermesh.detect.engines import Finding
from cybermesh.detect.engines.rule_file import FLOWS, KEY_NAMES, Rule, RuleSet
from cybermesh.detect.expressions import Column
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.windows import COLUMN, NAMES, Scope, Service, WindowBatch

FINDINGS_PER_RULE_MAX = 256  # of one batch; more entities than that are counted, not listed
_MAJORITY = 0.5
_FEW_PORTS = 8  # beyond this an attack is not on one port, even if most packets are


class RuleEngine:
    """Evaluates a rule set; ``flow_names`` are the names of the feature columns, in order."""

    def __init__(self, rules: RuleSet, flow_names: tuple[str, ...] = ()) -> None:
        self.rules = rules
        self.abstained = 0  # rule evaluations left out for want of a value
        self.unlisted = 0  # findings beyond ``FINDINGS_PER_RULE_MAX``
        self._flow_names = flow_names
        self._applicable: dict[tuple[str, bytes], tuple[list[Rule], int]] = {}  # by kind of window and by what is known in it

    def replace(self, rules: RuleSet) -> None:
        """Go on with another rule set."""
        self.rules = rules
        self._applicable = {}

    @property
    def name(self) -> str:
        """``rules``."""
        return "rules"

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        """Return the findings of the rules over flows."""
        rules = [rule for rule in self.rules.rules if rule.over == FLOWS]
        if not rules or len(flows) == 0:
            return []
        rules, abstaining = _applicable(rules, dict(zip(self._flow_names, flows.known.tolist(), strict=True)))
        self.abstained += abstaining
        columns = {name: flows.features[:, index] for index, name in enumerate(self._flow_names)}
        columns |= {"port": flows.dport.astype(np.float64), "protocol": flows.proto.astype(np.float64)}
        columns["service"] = np.zeros(len(flows))
        found: list[Finding] = []
        for rule in rules:
            for row, values in self._fired(rule, columns, len(flows)):
                found.append(_flow_finding(rule, flows, row, values))
        return found

    def score_windows(self, windows: WindowBatch) -> list[Finding]:
        """Return the findings of the rules over this scope and window length."""
        if len(windows) == 0:
            return []
        kind = f"{windows.scope} {windows.window_s}", windows.known.tobytes()
        if kind not in self._applicable:
            of_kind = [rule for rule in self.rules.rules if rule.over == windows.scope and rule.window_s == windows.window_s]
            self._applicable[kind] = _applicable(of_kind, dict(zip(NAMES, windows.known.tolist(), strict=True)))
        rules, abstaining = self._applicable[kind]
        self.abstained += abstaining
        columns = _WindowColumns(windows)
        found: list[Finding] = []
        for rule in rules:
            for row, values in self._fired(rule, columns, len(windows)):
                found.append(_window_finding(rule, windows, row, values))
        return found

    def _fired(self, rule: Rule, columns: Mapping[str, Column], n: int) -> list[tuple[int, dict[str, float]]]:
        """Return the rows a rule fires on, the strongest first if there are too many, with the values it read."""
        fires = rule.condition(columns)
        rows = np.nonzero(fires if fires.ndim else np.broadcast_to(fires, n))[0]
        if len(rows) == 0:
            return []
        picked = {name: columns[name][rows] for name in rule.names}
        picked["confidence"] = np.broadcast_to(np.clip(rule.confidence(picked), 0, 1), len(rows))
        picked["proof"] = np.broadcast_to(rule.proof(picked), len(rows))
        picked["count"] = np.broadcast_to(np.maximum(rule.count(picked), 1), len(rows))
        order: npt.NDArray[np.intp] = np.arange(len(rows))
        if len(rows) > FINDINGS_PER_RULE_MAX:
            self.unlisted += len(rows) - FINDINGS_PER_RULE_MAX
            order = np.argsort(-picked["count"], kind="stable")[:FINDINGS_PER_RULE_MAX]
        return [(int(rows[i]), {name: float(column[i]) for name, column in picked.items()}) for i in order.tolist()]


def _applicable(rules: Sequence[Rule], known: Mapping[str, bool]) -> tuple[list[Rule], int]:
    """Return the rules that can be evaluated where ``known`` tells what is known, and how many of the others abstain."""
    meant = [rule for rule in rules if not rule.unless_known or not all(known.get(name, True) for name in rule.unless_known)]
    able = [rule for rule in meant if all(known.get(name, True) for name in rule.condition.names)]
    return able, len(meant) - len(able)


class _WindowColumns(dict[str, Column]):
    """The columns of a batch by name, made when a rule asks for them."""

    def __init__(self, windows: WindowBatch) -> None:
        super().__init__()
        self._windows = windows

    def __missing__(self, name: str) -> Column:
        of_key = name in KEY_NAMES
        column = getattr(self._windows, name).astype(np.float64) if of_key else self._windows.values[:, COLUMN[name]]
        self[name] = column
        return column


def address_text(packed: npt.NDArray[np.uint8]) -> str:
    """Return 16 address bytes as canonical text, IPv4-mapped ones as IPv4."""
    return str(normalise_address(ipaddress.IPv6Address(packed.tobytes())))


def _window_finding(rule: Rule, windows: WindowBatch, row: int, values: Mapping[str, float]) -> Finding:
    """Name the parties of a window's row: the initiator (of a destination's row, the most active one) and its victim."""
    shares = {name: float(windows.values[row, COLUMN[name]]) for name in ("port_share", "peer_share")}
    source = address_text(windows.source[row])
    victim = address_text(windows.destination[row]) if windows.destination[row].any() else ""  # a log knows no addresses
    if windows.scope is Scope.DESTINATION:
        source = address_text(windows.peer[row])
    elif windows.scope in (Scope.SOURCE, Scope.FANOUT):
        victim = address_text(windows.peer[row]) if shares["peer_share"] >= _MAJORITY else ""
    elif windows.scope is Scope.DOMAIN:
        victim = address_text(windows.peer[row]) if windows.peer[row].any() else ""
    keyed = windows.scope in (Scope.FANOUT, Scope.SERVICE, Scope.DOMAIN, Scope.RESOLVER)
    single = shares["port_share"] >= _MAJORITY and windows.values[row, COLUMN["ports"]] <= _FEW_PORTS
    port = int(windows.port[row]) if keyed or single else 0
    if rule.responder_accused:  # the port is the accused's own, not one of the victim's
        source, victim, port = victim, source, 0
        if not source:
            source = address_text(windows.peer[row])
    times = int(windows.first_us[row]), int(windows.last_us[row])
    service = Service(int(windows.service[row])).name.lower()
    texts = {"service_name": service, "domain": windows.domain[row] if windows.domain is not None else ""}
    return _finding(rule, values, (source, victim), (port, int(windows.protocol[row])), times, texts)


def _flow_finding(rule: Rule, flows: FlowBatch, row: int, values: Mapping[str, float]) -> Finding:
    parties = address_text(flows.src[row]), address_text(flows.dst[row])
    times = int(flows.start_us[row]), int(flows.end_us[row])
    return _finding(
        rule, values, parties, (int(flows.dport[row]), int(flows.proto[row])), times, {"service_name": "unknown", "domain": ""}
    )


def _finding(
    rule: Rule,
    values: Mapping[str, float],
    parties: tuple[str, str],
    service: tuple[int, int],
    times: tuple[int, int],
    texts: Mapping[str, str],
) -> Finding:
    source, victim = parties
    shown = {name: _short(value) for name, value in values.items()}
    shown |= {"source": source, "victim": victim or "many hosts", "window_s": str(rule.window_s)}
    shown |= {"port": str(service[0]), **texts}
    details: dict[str, float | int | str] = {name: value for name, value in values.items() if name in rule.names}
    return Finding(
        engine="rules",
        type=rule.type,
        entity=source,
        victim=victim or None,
        port=service[0] or None,
        protocol=service[1] or None,
        score=values["confidence"],
        severity=rule.severity,
        first_us=times[0],
        last_us=times[1],
        count=int(values["count"]),
        spoofable=rule.spoofable,
        proven=bool(values["proof"]) and not rule.spoofable,
        explanation=rule.explanation.format_map(shown),
        rule_id=rule.id,
        details={"window_s": rule.window_s, "over": rule.over, **details},
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"
