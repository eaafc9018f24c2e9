"""The rule format: YAML in, compiled rules out, or one error that names file, line and reason.

A file is a list of rules. A rule:

    - id: scan-vertical-tcp              # unique, lower case, words joined by hyphens
      type: port_scan                    # a detection type
      over: pair                         # flows, or a window's scope: source destination pair fanout service domain resolver
      window_s: 60                       # for windows
      condition: ports >= 20 and failed >= 0.8 * attempts
      severity: 8                        # 1-10
      confidence: clip(0.9 + ports / 1000, 0, 0.98)    # a number or an expression, 0-1
      count: attempts                    # expression: how many flows, packets or attempts are behind a finding
      spoofable: false                   # true: needs no answer, so sources may be forged: the victim is what counts
      proof: established >= 1            # when the accused's address cannot be forged; without it no block is proposed
      accused: initiator                 # or responder: who opened the connections, or who answered them
      unless_known: [data_out]           # says nothing where the source knows these: a better rule reads them
      explanation: "{source} tried {ports} ports of {victim}"
      references: [T1046]                # MITRE ATT&CK technique ids, or URLs
      tests:                             # at least one that fires and one that does not
        - {name: a scan, fires: true, values: {ports: 100, attempts: 100, failed: 100}}

Conditions are expressions of ``detect.expressions`` over the window's names (``telemetry.windows.NAMES``) or the flow features,
plus ``port``, ``protocol`` and ``service``, which may be compared with ``tcp udp icmp icmpv6`` and ``ssh ftp telnet smtp pop3
imap rdp vnc``. Unknown keys are errors; YAML anchors are refused (they can make a small file huge).
"""

from __future__ import annotations

import hashlib
import math
import re
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import orjson
import yaml

from cybermesh.detect.engines import TYPES
from cybermesh.detect.expressions import Column, Expression, ExpressionError, compile_expression
from cybermesh.telemetry.windows import COUNTED, NAMES, Scope, Service

FLOWS = "flows"
WINDOW_S_MAX = 3600
PROOF = "established >= 1"  # a forged address never completes a handshake
CONSTANTS: Mapping[str, float] = {
    "tcp": 6,
    "udp": 17,
    "icmp": 1,
    "icmpv6": 58,
    **{service.name.lower(): float(service) for service in Service},
}
KEY_NAMES = frozenset({"port", "protocol", "service"})
TEXT_NAMES = frozenset({"source", "victim", "service_name", "window_s", "domain"})  # only for explanations

_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_REFERENCE = re.compile(r"T\d{4}(\.\d{3})?|https://\S+")
_REQUIRED = frozenset(
    {"id", "type", "over", "condition", "severity", "confidence", "count", "explanation", "references", "tests"}
)
_KEYS = _REQUIRED | {"window_s", "spoofable", "proof", "accused", "unless_known"}


class RuleError(Exception):
    """A rule file is wrong: ``path``, ``line`` (from 1) and ``reason``."""

    def __init__(self, path: str, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RuleTest:
    """One example inside a rule: values by name (others are 0), and whether the rule must fire on them."""

    name: str
    fires: bool
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled rule; ``over`` is ``flows`` or a ``Scope``. ``source`` is what the digest covers."""

    id: str
    type: str
    over: str
    window_s: int
    condition: Expression
    severity: int
    confidence: Expression
    count: Expression
    spoofable: bool
    proof: Expression
    responder_accused: bool
    unless_known: tuple[str, ...]
    explanation: str
    references: tuple[str, ...]
    tests: tuple[RuleTest, ...]
    path: str
    line: int
    source: bytes

    @property
    def names(self) -> frozenset[str]:
        """Every column the rule reads, the explanation's too."""
        shown = {name for _, name, _, _ in string.Formatter().parse(self.explanation) if name}
        read = self.condition.names | self.confidence.names | self.count.names | self.proof.names
        return (read | shown) - TEXT_NAMES


@dataclass(frozen=True, slots=True)
class RuleSet:
    """Rules in order of their ids; ``digest`` is SHA-256 over their sources."""

    rules: tuple[Rule, ...]

    @property
    def digest(self) -> str:
        """Content digest, hex: the same rules give the same digest whatever their files, comments and order."""
        return hashlib.sha256(b"cybermesh.rules/1\0" + b"\n".join(rule.source for rule in self.rules)).hexdigest()

    def floors(self) -> dict[tuple[Scope, int], int]:
        """Packets, per scope and window length (s), below which a row of packet windows fires no rule."""
        floors: dict[tuple[Scope, int], int] = {}
        for rule in self.rules:
            if rule.over != FLOWS:
                kind = Scope(rule.over), rule.window_s
                needed = [least for name, least in rule.condition.floors.items() if name in COUNTED]
                floors[kind] = min(floors.get(kind, sys.maxsize), math.ceil(max(needed, default=0)))
        return floors

    def wanted(self) -> dict[Scope, tuple[int, ...]]:
        """The window lengths (s) that the rules need, per scope."""
        lengths: dict[Scope, set[int]] = {}
        for rule in self.rules:
            if rule.over != FLOWS:
                lengths.setdefault(Scope(rule.over), set()).add(rule.window_s)
        return {scope: tuple(sorted(seconds)) for scope, seconds in sorted(lengths.items())}


def load(paths: Iterable[Path], flow_names: Sequence[str] = ()) -> RuleSet:
    """Read rule files and return the set.

    Raises:
        RuleError: The first fault, or an id used twice.
        OSError: A file cannot be read.
    """
    rules: dict[str, Rule] = {}
    for path in sorted(paths):
        for rule in parse(path.read_bytes(), str(path), flow_names):
            if rule.id in rules:
                other = rules[rule.id]
                raise RuleError(rule.path, rule.line, f"id {rule.id!r} is used already in {other.path}:{other.line}")
            rules[rule.id] = rule
    return RuleSet(tuple(rules[key] for key in sorted(rules)))


def shipped_paths() -> list[Path]:
    """Return the rule files that come with the package."""
    return sorted((Path(__file__).resolve().parents[2] / "data" / "rules").glob("*.yaml"))


def parse(text: bytes, path: str, flow_names: Sequence[str] = ()) -> list[Rule]:
    """Parse one rule file.

    Raises:
        RuleError: The first fault.
    """
    try:
        decoded = text.decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(decoded, Loader=yaml.SafeLoader)):
            raise RuleError(path, 1, "YAML aliases are not allowed")
        root = yaml.compose(decoded, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RuleError(path, mark.line + 1 if mark else 1, getattr(error, "problem", None) or str(error)) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise RuleError(path, 1, f"not a YAML text: {error}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.SequenceNode):
        raise RuleError(path, root.start_mark.line + 1, "expected a list of rules")
    return [_Reader(path, node, frozenset(flow_names)).rule() for node in root.value]


class _Reader:
    """Reads one rule's mapping, with the line of each key for errors."""

    def __init__(self, path: str, node: yaml.Node, flow_names: frozenset[str]) -> None:
        self._path = path
        self._line = node.start_mark.line + 1
        self._flow_names = flow_names
        if not isinstance(node, yaml.MappingNode):
            self._fail(None, "expected a rule: keys and values")
        self._lines: dict[str, int] = {}
        self._values: dict[str, object] = {}
        loader = yaml.SafeLoader("")
        for key_node, value_node in node.value:
            key = str(key_node.value)
            self._lines[key] = key_node.start_mark.line + 1
            if key in self._values:
                self._fail(key, f"{key} is given twice")
            if key not in _KEYS:
                self._fail(key, f"unknown key {key!r}; known are {', '.join(sorted(_KEYS))}")
            try:
                self._values[key] = loader.construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                self._fail(key, f"{key}: {error}")
        for key in sorted(_REQUIRED - self._values.keys()):
            self._fail(None, f"{key} is missing")

    def rule(self) -> Rule:
        rule_id = self._text("id")
        if not _ID.fullmatch(rule_id):
            self._fail("id", "id: expected lower-case words joined by hyphens")
        over = self._choice("over", (FLOWS, *Scope))
        window_s = 0 if over == FLOWS else self._integer("window_s", 1, WINDOW_S_MAX)
        names = (self._flow_names if over == FLOWS else frozenset(NAMES)) | KEY_NAMES
        rule = Rule(
            id=rule_id,
            type=self._choice("type", TYPES),
            over=over,
            window_s=window_s,
            condition=self._expression("condition", names),
            severity=self._integer("severity", 1, 10),
            confidence=self._expression("confidence", names),
            count=self._expression("count", names),
            spoofable=self._boolean("spoofable"),
            proof=self._proof(over, names),
            responder_accused=self._choice("accused", ("initiator", "responder"), "initiator") == "responder",
            unless_known=self._unless_known(names),
            explanation=self._explanation(names),
            references=self._references(),
            tests=self._tests(names),
            path=self._path,
            line=self._line,
            source=orjson.dumps(self._values, option=orjson.OPT_SORT_KEYS, default=str),
        )
        self._check_tests(rule)
        return rule

    def _fail(self, key: str | None, reason: str) -> NoReturn:
        line = self._lines.get(key, self._line) if key is not None else self._line
        raise RuleError(self._path, line, reason)

    def _text(self, key: str) -> str:
        value = self._values[key]
        if not isinstance(value, str) or not value.strip():
            self._fail(key, f"{key}: expected a text")
        return value

    def _choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str) or value not in choices:
            self._fail(key, f"{key}: expected one of {', '.join(choices)}, got {value!r}")
        return value

    def _integer(self, key: str, least: int, most: int) -> int:
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._fail(key, f"{key}: expected a whole number from {least} to {most}, got {value!r}")
        return value

    def _boolean(self, key: str) -> bool:
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            self._fail(key, f"{key}: expected true or false, got {value!r}")
        return value

    def _expression(self, key: str, names: frozenset[str]) -> Expression:
        value = self._values[key]
        text = value if isinstance(value, str) else repr(value)
        try:
            return compile_expression(text, names, CONSTANTS)
        except ExpressionError as error:
            self._fail(key, f"{key}: {error}")

    def _proof(self, over: str, names: frozenset[str]) -> Expression:
        if "proof" not in self._values:
            self._values["proof"] = "0" if over == FLOWS else PROOF
        return self._expression("proof", names)

    def _unless_known(self, names: frozenset[str]) -> tuple[str, ...]:
        value = self._values.get("unless_known", [])
        if not isinstance(value, list) or not all(isinstance(name, str) and name in names - KEY_NAMES for name in value):
            self._fail("unless_known", "unless_known: expected a list of known names")
        return tuple(value)

    def _explanation(self, names: frozenset[str]) -> str:
        text = self._text("explanation")
        try:
            fields = [
                (name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text) if name is not None
            ]
        except ValueError as error:
            self._fail("explanation", f"explanation: {error}")
        for name, spec, conversion in fields:
            if name not in names | TEXT_NAMES or spec or conversion:
                self._fail("explanation", f"explanation: {{{name}}} is not a known name without a format")
        return text

    def _references(self) -> tuple[str, ...]:
        value = self._values["references"]
        if not isinstance(value, list) or not value:
            self._fail("references", "references: expected a list with at least one entry")
        for entry in value:
            if not isinstance(entry, str) or not _REFERENCE.fullmatch(entry):
                self._fail("references", f"references: {entry!r} is neither an ATT&CK technique (T1046) nor an https address")
        return tuple(value)

    def _tests(self, names: frozenset[str]) -> tuple[RuleTest, ...]:
        value = self._values["tests"]
        if not isinstance(value, list):
            self._fail("tests", "tests: expected a list")
        tests = [self._test(entry, names) for entry in value]
        if {test.fires for test in tests} != {True, False}:
            self._fail("tests", "tests: at least one that fires and one that does not are needed")
        return tuple(tests)

    def _test(self, entry: object, names: frozenset[str]) -> RuleTest:
        if not isinstance(entry, dict) or entry.keys() != {"name", "fires", "values"}:
            self._fail("tests", "tests: each needs name, fires and values")
        name, fires, values = entry["name"], entry["fires"], entry["values"]
        if not isinstance(name, str) or not isinstance(fires, bool) or not isinstance(values, dict):
            self._fail("tests", "tests: name is a text, fires true or false, values a mapping")
        numbers: dict[str, float] = {}
        for key, number in values.items():
            number = CONSTANTS.get(number, number) if isinstance(number, str) else number
            if key not in names or isinstance(number, bool) or not isinstance(number, int | float):
                self._fail("tests", f"tests: {name}: {key!r} is not a known name with a number")
            numbers[key] = float(number)
        return RuleTest(name, fires, numbers)

    def _check_tests(self, rule: Rule) -> None:
        """A fired example must give a confidence of 0 to 1 and a count of at least 1."""
        for test in rule.tests:
            columns = example_columns(rule, test)
            confidence, count = (float(np.ravel(part(columns))[0]) for part in (rule.confidence, rule.count))
            if test.fires and not (0 <= confidence <= 1 and count >= 1):
                self._fail("tests", f"tests: {test.name}: confidence {confidence:g} or count {count:g} is out of range")


def example_columns(rule: Rule, test: RuleTest) -> dict[str, Column]:
    """Return the columns of one row that a test describes."""
    return {name: np.array([test.values.get(name, 0.0)]) for name in rule.names}


def failures(rule: Rule) -> list[RuleTest]:
    """Run a rule's own tests; return those whose outcome is not the one they state."""
    return [test for test in rule.tests if bool(np.ravel(rule.condition(example_columns(rule, test)))[0]) != test.fires]
