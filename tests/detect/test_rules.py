"""The rule format, its language, and the shipped rules' own examples."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.detect.engines.rule_file import Rule, RuleError, example_columns, failures, load, parse, shipped_paths
from cybermesh.detect.expressions import ExpressionError, compile_expression
from cybermesh.telemetry.windows import Scope

RULES = load(shipped_paths()).rules
GOOD = b"""- id: a-rule
  type: port_scan
  over: pair
  window_s: 60
  condition: ports >= 20
  severity: 8
  confidence: 0.9
  count: attempts
  explanation: "{source} tried {ports} ports of {victim}"
  references: [T1046]
  tests:
    - {name: yes, fires: true, values: {ports: 20, attempts: 20}}
    - {name: no, fires: false, values: {ports: 19}}
""".replace(b"name: yes", b"name: a scan").replace(b"name: no", b"name: quiet")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_shipped_rule_passes_its_own_examples(rule: Rule) -> None:
    assert failures(rule) == []
    assert {test.fires for test in rule.tests} == {True, False}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_shipped_rule_reaches_its_types_threshold_where_it_fires(rule: Rule) -> None:
    needed = 0.7 if rule.type in ("dos", "ddos") else 0.75
    for test in rule.tests:
        if test.fires:
            assert float(np.ravel(rule.confidence(example_columns(rule, test)))[0]) >= needed


def test_the_shipped_rules_cover_what_they_promise() -> None:
    assert {rule.id.split("-")[0] for rule in RULES} == {"flood", "slow", "scan", "brute", "web", "dns"}
    floods = {rule.id for rule in RULES if rule.id.startswith("flood") and not rule.id.startswith("flood-http")}
    assert {rule.id for rule in RULES if rule.spoofable} == floods  # who floods by HTTP has shaken hands


def test_the_digest_depends_on_the_rules_and_not_on_comments_or_files(tmp_path: Path) -> None:
    one = tmp_path / "one.yaml"
    one.write_bytes(GOOD)
    digest = load([one]).digest
    one.write_bytes(b"# a comment\n" + GOOD)
    assert load([one]).digest == digest
    one.write_bytes(GOOD.replace(b"ports >= 20", b"ports >= 18").replace(b"ports: 19", b"ports: 17"))
    assert load([one]).digest != digest


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        (b"id: a-rule", b"id: A Rule", 1, "id: expected lower-case words"),
        (b"type: port_scan", b"type: portscan", 2, "type: expected one of"),
        (b"over: pair", b"over: hosts", 3, "over: expected one of"),
        (b"window_s: 60", b"window_s: 0", 4, "window_s: expected a whole number from 1"),
        (b"ports >= 20", b"portz >= 20", 5, "unknown name 'portz'"),
        (b"ports >= 20", b"__import__('os')", 5, "is not allowed"),
        (b"ports >= 20", b"ports >", 5, "not an expression"),
        (b"severity: 8", b"severity: 11", 6, "severity: expected a whole number"),
        (b"severity: 8", b"severity: true", 6, "severity: expected a whole number"),
        (b"confidence: 0.9", b"confidence: 9", 11, "confidence 9"),
        (b"{source} tried", b"{source.__class__} tried", 9, "is not a known name"),
        (b"[T1046]", b"[scan]", 10, "neither an ATT&CK technique"),
        (b"[T1046]", b"[]", 10, "at least one entry"),
        (b"fires: false", b"fires: true", 11, "one that does not"),
        (b"values: {ports: 19}", b"values: {portz: 19}", 11, "'portz' is not a known name"),
        (b"  count: attempts\n", b"", 1, "count is missing"),
        (b"  severity: 8\n", b"  severity: 8\n  colour: red\n", 7, "unknown key 'colour'"),
        (b"  severity: 8\n", b"  severity: 8\n  severity: 9\n", 7, "given twice"),
        (b"  severity: 8\n", b"  severity: [8\n", 7, ""),
        (b"[T1046]", b"&a [T1046, *a]", 1, "aliases"),
    ],
)
def test_a_bad_rule_names_file_line_and_reason(old: bytes, new: bytes, line: int, reason: str) -> None:
    assert old in GOOD
    with pytest.raises(RuleError) as caught:
        parse(GOOD.replace(old, new, 1), "site.yaml")
    assert caught.value.path == "site.yaml"
    assert reason in caught.value.reason
    if reason:
        assert caught.value.line == line


def test_an_id_used_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(RuleError, match="used already in"):
        load(tmp_path.glob("*.yaml"))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_give_rules_or_a_rule_error(text: bytes) -> None:
    with contextlib.suppress(RuleError):
        assert isinstance(parse(text, "x"), list)


@given(
    st.sampled_from(sorted(yaml.safe_load(GOOD)[0])),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_value_of_any_key_gives_rules_or_a_rule_error(key: str, value: object) -> None:
    rule = yaml.safe_load(GOOD)[0] | {key: value}
    with contextlib.suppress(RuleError):
        assert len(parse(yaml.safe_dump([rule]).encode(), "x")) == 1


NAMES = frozenset({"a", "b"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b * 2", [5, 10]),
        ("1 < a <= 2", [0, 1]),
        ("a > 1 and b > 1 or a == 1", [1, 1]),
        ("not a > 1", [1, 0]),
        ("a in (1, ten)", [1, 0]),
        ("a not in [1]", [0, 1]),
        ("a / (b - 2)", [0, 1]),
        ("log2(a - 1)", [0, 0]),
        ("clip(b, 3, 3.5)", [3, 3.5]),
        ("max(a, -b)", [1, 2]),
        ("min(a, b) + abs(-a)", [2, 4]),
    ],
)
def test_expressions_mean_what_they_say(text: str, expected: list[float]) -> None:
    columns = {"a": np.array([1.0, 2.0]), "b": np.array([2.0, 4.0])}
    assert compile_expression(text, NAMES, {"ten": 10})(columns).tolist() == expected


@pytest.mark.parametrize(
    "text",
    [
        "a.real",
        "a[0]",
        "'x'",
        "lambda: 1",
        "[a]",
        "a if b else 1",
        "open(a)",
        "a ** b",
        "a @ b",
        "(a := 1)",
        "f'{a}'",
        "min(a)",
        "a is b",
        "a in b",
        "min(a, b=1)",
        "a\x00",
        "",
        "a" * 3000,
        "a" + "+a" * 400,
        "(" * 500 + "a" + ")" * 500,
    ],
)
def test_nothing_else_is_in_the_language(text: str) -> None:
    with pytest.raises(ExpressionError):
        compile_expression(text, NAMES, {})


@given(st.text(alphabet=string.ascii_letters[:6] + string.digits + "()<>=+-*/.,[]{}'\" \n:_", max_size=60))
def test_any_text_compiles_or_is_refused(text: str) -> None:
    with contextlib.suppress(ExpressionError), np.errstate(all="ignore"):
        expression = compile_expression(text, NAMES, {})
        values = expression({"a": np.array([1.0, 2.0]), "b": np.array([0.0, 1.0])})
        assert np.broadcast_to(values, 2).dtype == np.float64
        assert expression.names <= NAMES


@pytest.mark.parametrize(
    ("text", "floors"),
    [
        ("a >= 5 and b > 2", {"a": 5, "b": 2}),
        ("a >= 5 and a >= 7 and b < 3", {"a": 7}),
        ("a >= 5 or b >= 2", {}),
        ("not a >= 5", {}),
        ("(a >= 5 and b >= 1) and (a >= 9 or b >= 4)", {"a": 5, "b": 1}),
        ("a >= b", {}),
        ("1 < a", {}),
    ],
)
def test_an_expression_tells_what_it_cannot_be_true_without(text: str, floors: dict[str, float]) -> None:
    assert compile_expression(text, NAMES, {}).floors == floors


def test_no_example_that_fires_is_below_its_rules_floor() -> None:
    for rule in RULES:
        for test in rule.tests:
            if test.fires:
                assert all(test.values.get(name, 0) >= least for name, least in rule.condition.floors.items()), rule.id


def test_rows_that_fire_nothing_are_not_looked_at() -> None:
    floors = load(shipped_paths()).floors()
    assert floors[Scope.PAIR, 10] >= 50
    assert floors[Scope.PAIR, 60] >= 5
    assert floors[Scope.SOURCE, 60] <= 1  # one request with an exploit is enough
