"""Votes, alerts, evidence, proposals, statistics, and the detector that joins them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh import policy
from cybermesh.addresses import parse_network
from cybermesh.detect import evidence
from cybermesh.detect.alerts import AlertBook
from cybermesh.detect.candidates import CandidateRules, Candidates
from cybermesh.detect.detector import Detection, Detector, Limits
from cybermesh.detect.engines import Finding
from cybermesh.detect.engines.rule_file import load, shipped_paths
from cybermesh.detect.engines.rules import RuleEngine
from cybermesh.detect.engines.statistics import CUSUM_FIRES, SAMPLES, WARM, StateError, StatisticsEngine
from cybermesh.detect.ensemble import Ensemble, Verdict
from cybermesh.detect.ratelimit import RateLimit
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.telemetry.windows import COLUMN, NAMES, Scope, WindowBatch
from tests.telemetry.packet_batches import packed

S = 1_000_000
RULES = load(shipped_paths())


def finding(**changes: object) -> Finding:
    plain = Finding(
        engine="rules",
        type="port_scan",
        entity="198.51.100.7",
        victim="10.0.0.5",
        port=None,
        protocol=6,
        score=0.95,
        severity=8,
        first_us=0,
        last_us=10 * S,
        count=100,
        spoofable=False,
        explanation="seen",
        proven=True,
    )
    return replace(plain, **changes)


FLOOD = {"type": "dos", "spoofable": True, "port": 80, "severity": 9}


def windows(scope: Scope, entity: str, end_s: int, window_s: int = 10, **values: float) -> WindowBatch:
    table = np.zeros((1, len(NAMES)))
    for name, value in values.items():
        table[0, COLUMN[name]] = value
    address = np.frombuffer(packed(entity), np.uint8).reshape(1, 16)
    other = np.frombuffer(packed("10.0.0.5"), np.uint8).reshape(1, 16)
    by_victim = scope is Scope.DESTINATION
    return WindowBatch(
        scope=scope,
        window_s=window_s,
        end_us=end_s * S,
        source=other if by_victim else address,
        destination=address if by_victim else other,
        port=np.array([80], np.uint16),
        protocol=np.array([6], np.uint8),
        service=np.zeros(1, np.uint8),
        peer=other,
        first_us=np.array([(end_s - window_s) * S]),
        last_us=np.array([end_s * S]),
        values=table,
        known=np.ones(len(NAMES), np.bool_),
    )


class Broken:
    name = "classifier"

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        raise ZeroDivisionError("flows")

    def score_windows(self, windows: WindowBatch) -> list[Finding]:
        raise ZeroDivisionError("windows")


class Says:
    """An engine that finds what it is told to."""

    def __init__(self, name: str, *rounds: list[Finding]) -> None:
        self.name = name
        self._rounds = list(rounds)

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        return []

    def score_windows(self, windows: WindowBatch) -> list[Finding]:
        return self._rounds.pop(0) if self._rounds else []


def told(*rounds: list[Finding], limits: Limits | None = None) -> tuple[Detector, list[list[Detection]]]:
    detector = Detector([Says("rules", *rounds)], Ensemble(), limits)
    return detector, [detector.detect(None, [windows(Scope.PAIR, "10.1.1.1", n)]) for n in range(len(rounds))]


# --- votes


def test_silence_is_abstention_and_one_strong_vote_decides() -> None:
    (verdict,) = Ensemble().decide([finding(score=0.8)])
    assert verdict.confidence == pytest.approx(0.8)
    assert verdict.votes == {"rules": 0.8}


def test_two_engines_that_agree_leave_less_doubt_by_weight() -> None:
    (verdict,) = Ensemble().decide([finding(score=0.7), finding(engine="classifier", score=0.7)])
    assert verdict.confidence == pytest.approx(1 - 0.3 * 0.6)
    votes = {"rules": 0.9, "classifier": 0.8}
    assert Ensemble().confidence(votes) == pytest.approx(1 - (1 - (0.9 * 0.3 + 0.8 * 0.5) / 0.8) * 0.6)


@given(
    st.dictionaries(st.sampled_from(["rules", "statistics", "classifier"]), st.floats(0, 1), min_size=1),
    st.sampled_from(["rules", "statistics", "classifier"]),
    st.floats(0, 1),
)
def test_another_vote_never_lowers_the_confidence(votes: dict[str, float], engine: str, score: float) -> None:
    if engine not in votes:
        assert Ensemble().confidence(votes | {engine: score}) >= Ensemble().confidence(votes) - 1e-12
    assert 0 <= Ensemble().confidence(votes) <= 1


def test_a_weak_vote_for_one_type_does_not_hide_a_strong_one_for_another() -> None:
    weak = finding(type="ddos", score=0.69, engine="classifier")
    strong = finding(type="brute_force", score=0.9)
    assert [verdict.type for verdict in Ensemble().decide([weak, strong])] == ["brute_force"]


def test_a_rules_explanation_is_preferred_to_a_models() -> None:
    model = finding(engine="classifier", score=0.99, explanation="looks like it")
    (decided,) = Ensemble().decide([model, finding(score=0.9)])
    assert decided.explanation == "seen"


@pytest.mark.parametrize(("kind", "least"), [("dos", 0.70), ("ddos", 0.70), ("malware", 0.85), ("port_scan", 0.75)])
def test_every_type_has_its_threshold(kind: str, least: float) -> None:
    assert Ensemble().decide([finding(type=kind, score=least - 0.01)]) == []
    assert len(Ensemble().decide([finding(type=kind, score=least)])) == 1


def test_distrust_weakens_an_engine() -> None:
    assert Ensemble(trust={"rules": 0.5}).decide([finding(score=0.95)]) == []


def test_votes_given_at_different_times_meet_within_two_minutes() -> None:
    def reports(later_s: int) -> int:
        early, late = finding(score=0.7), finding(engine="classifier", score=0.7, first_us=later_s * S, last_us=later_s * S)
        detector = Detector([Says("rules", [early]), Says("classifier", [], [late])], Ensemble())
        return len([d for n in (1, 2) for d in detector.detect(None, [windows(Scope.PAIR, "10.1.1.1", n)])])

    assert reports(100) == 1
    assert reports(500) == 0


# --- alerts


def verdict(**changes: object) -> Verdict:
    (decided,) = Ensemble().decide([finding(**changes)])
    return decided


def test_counts_of_sliding_windows_add_up_without_counting_twice() -> None:
    book = AlertBook(0.9)
    for end in range(10, 101):
        alert, _ = book.fold(verdict(first_us=(end - 10) * S, last_us=end * S, count=1000))
    assert alert.count == 10_000


def test_an_alert_is_reported_when_it_begins_and_when_it_escalates() -> None:
    _, reports = told(
        [finding(score=0.8)],
        [finding(score=0.8, count=110)],
        [finding(score=0.8, severity=9)],
        [finding(score=0.91, severity=9)],
        [finding(score=0.93, severity=9)],
        [finding(score=0.93, severity=9, count=5000)],
    )
    assert [[detection.revision for detection in found] for found in reports] == [[0], [], [1], [2], [], [3]]
    assert len({detection.alert_id for found in reports for detection in found}) == 1
    assert {detection.decisive_us for found in reports for detection in found} == {10 * S}


def test_after_a_quiet_time_it_is_another_alert() -> None:
    _, reports = told([finding()], [finding(first_us=400 * S, last_us=401 * S)])
    assert [len(found) for found in reports] == [1, 1]
    assert reports[0][0].alert_id != reports[1][0].alert_id


def test_forged_sources_are_one_alert_on_the_victim_and_become_distributed() -> None:
    many = [finding(**FLOOD, entity=f"203.0.113.{n}") for n in range(1, 60)]
    detector, reports = told(many, [finding(**(FLOOD | {"type": "ddos"}))])
    assert [[detection.type for detection in found] for found in reports] == [["dos"], ["ddos"]]
    assert detector.finish() == []


def test_the_number_of_open_alerts_is_bounded() -> None:
    book = AlertBook(0.9, open_max=10)
    for n in range(50):
        book.fold(verdict(entity=f"10.9.0.{n}"))
    assert len(book) == 10
    assert book.forgotten == 40


# --- proposals


def proposed(detections: list[list[Detection]]) -> list[dict[str, object]]:
    return [dict(detection.policy) for found in detections for detection in found if detection.policy is not None]


@pytest.mark.parametrize(
    "target",
    ["0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.251", "255.255.255.255", "::", "::1", "fe80::1", "ff02::1", "10.20.0.9"],
)
def test_an_address_that_is_no_hosts_or_is_excluded_is_never_a_target(target: str) -> None:
    limits = Limits(excluded=(parse_network("10.20.0.0/16"),))
    assert proposed(told([finding(entity=target)], limits=limits)[1]) == []
    assert proposed(told([finding(**FLOOD, victim=target)], limits=limits)[1]) == []


@pytest.mark.parametrize(("severity", "score"), [(7, 0.99), (8, 0.89)])
def test_nothing_is_proposed_below_severity_or_confidence(severity: int, score: float) -> None:
    assert proposed(told([finding(severity=severity, score=score)])[1]) == []


def test_a_classifier_alone_proposes_nothing() -> None:
    detector = Detector([Says("classifier", [finding(engine="classifier", score=0.99)])], Ensemble())
    (detection,) = detector.detect(None, [windows(Scope.PAIR, "10.1.1.1", 1)])
    assert detection.policy is None


@pytest.mark.parametrize(("entity", "wide"), [("198.51.100.7", 24), ("2001:db8::7", 64)])
def test_a_block_names_the_accused_alone_and_parses(entity: str, wide: int) -> None:
    (one,) = proposed(told([finding(entity=entity)])[1])
    spec = policy.parse(orjson.dumps(one))
    assert (spec.rule_type, spec.action, str(spec.target.direction)) == ("block", "drop", "ingress")
    assert [str(network.network_address) for network in spec.networks()] == [entity]
    assert spec.guardrails.cidr_max_prefix_len == wide
    assert spec.guardrails.ttl_seconds == 900


def test_a_flood_limits_the_victims_port_and_blocks_nobody() -> None:
    (one,) = proposed(told([finding(**FLOOD, count=50_000)])[1])
    spec = policy.parse(one)
    assert (spec.rule_type, spec.action, str(spec.target.direction)) == ("rate_limit", "rate_limit", "egress")
    assert [str(address) for address in spec.target.ips] == ["10.0.0.5"]
    assert [port.first for port in spec.target.ports] == [80]
    assert spec.target.protocols == ("tcp",)
    limit = spec.packet_limit()
    assert limit is not None
    assert limit.max_actions == 500  # a tenth of what came per second


def test_repeat_offenders_get_longer_and_never_twice_at_once() -> None:
    again = [finding(first_us=n * S, last_us=(n + 1) * S, count=10 ** (k + 2)) for k, n in enumerate((0, 100, 950, 1900, 5000))]
    ttls = [one["guardrails"]["ttl_seconds"] for one in proposed(told(*([f] for f in again))[1])]  # type: ignore[index]
    assert ttls == [900, 3600, 14_400]


def test_policies_are_limited_per_second_and_the_rest_is_counted() -> None:
    detector, reports = told([finding(entity=f"10.9.0.{n}") for n in range(40)])
    assert len(reports[0]) == 40
    assert len(proposed(reports)) == 10
    assert detector.policies_put_off == 30


def test_candidates_remember_a_bounded_number_of_targets() -> None:
    candidates = Candidates(CandidateRules(rate_per_s=1000))
    book = AlertBook(0.9)
    for n in range(300):
        alert, _ = book.fold(verdict(entity=f"10.9.{n // 250}.{n % 250}"))
        assert candidates.propose(alert, "00") is not None
    assert candidates.overflow == 0


def test_alerts_are_limited_per_second_and_summed_up_at_the_end() -> None:
    detector, reports = told([finding(entity=f"10.9.{n // 250}.{n % 250}") for n in range(250)], [])
    assert len(reports[0]) == 100
    (summary,) = detector.finish()
    assert "150 more alerts" in summary.explanation
    assert summary.count == 150 * 100
    assert summary.policy is None
    assert detector.suppressed >= 150


def test_a_rate_limit_refills_with_packet_time() -> None:
    limit = RateLimit(2)
    assert [limit.allows(at) for at in (0, 0, 0, S // 2, S // 2, 0, 10 * S, 10 * S, 10 * S)] == [
        True, True, False, True, False, False, True, True, False,
    ]  # fmt: skip
    assert limit.refused == 4


# --- evidence


def test_a_packet_from_another_year_does_not_silence_the_detector() -> None:
    limit = RateLimit(2)
    now_us = 1_700_000_000_000_000
    assert limit.allows(now_us)
    assert limit.allows(now_us + 10**15)
    allowed = [limit.allows(now_us + second * 1_000_000) for second in range(10)]
    assert allowed.count(True) >= 9
    late = [limit.allows(now_us + 10_000_000 - step) for step in range(20)]  # a little late refills nothing
    assert late.count(True) <= 2


def test_evidence_holds_no_floats_and_replays() -> None:
    batch = windows(Scope.PAIR, "198.51.100.7", 60, 60, ports=100, attempts=110, failed=103, span_s=12.345)
    detector = Detector([RuleEngine(RULES)], Ensemble(), rules=RULES)
    (detection,) = detector.detect(None, [batch])
    body = dict(detection.evidence)

    def leaves(value: object) -> list[object]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return [leaf for part in parts for leaf in leaves(part)] if parts is not None else [value]

    assert {type(leaf) for leaf in leaves(body)} <= {int, str, bool, type(None)}
    assert orjson.loads(evidence.encode(body)) == body
    assert evidence.digest(body) == detection.evidence_digest
    assert evidence.replay(orjson.loads(evidence.encode(body)), RULES) == 1
    assert body["findings"][0]["fires_at"]["ports"].startswith(">= 15")  # type: ignore[index]


@pytest.mark.parametrize("change", ["values", "score", "rules"])
def test_changed_evidence_does_not_replay(change: str) -> None:
    batch = windows(Scope.PAIR, "198.51.100.7", 60, 60, ports=100, attempts=110, failed=103)
    (detection,) = Detector([RuleEngine(RULES)], Ensemble(), rules=RULES).detect(None, [batch])
    body = orjson.loads(evidence.encode(dict(detection.evidence)))
    if change == "values":
        body["findings"][0]["values"]["ports"] = 3
    elif change == "score":
        body["findings"][0]["score_ppm"] += 1
    else:
        body["rules_digest"] = "00"
    with pytest.raises(evidence.EvidenceError):
        evidence.replay(body, RULES)


# --- engines


def test_a_broken_engine_is_counted_and_the_others_go_on() -> None:
    detector = Detector([Broken(), Says("rules", [finding()])], Ensemble())
    assert len(detector.detect(None, [windows(Scope.PAIR, "10.1.1.1", 1)])) == 1
    assert detector.counters["classifier"].failures == 1
    assert "windows" in detector.counters["classifier"].last_failure
    assert detector.counters["rules"].findings == 1


def test_a_rule_abstains_where_a_value_cannot_be_known() -> None:
    batch = windows(Scope.PAIR, "198.51.100.7", 60, 60, ports=100, attempts=110, failed=103)
    engine = RuleEngine(RULES)
    assert engine.score_windows(batch)
    known = batch.known.copy()
    known[COLUMN["ports"]] = False
    abstained = engine.abstained
    assert engine.score_windows(replace(batch, known=known)) == []
    assert engine.abstained > abstained


def calm(engine: StatisticsEngine, samples: int, syn: float = 50, start: int = 0) -> list[Finding]:
    return [
        found
        for n in range(samples)
        for found in engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", start + 10 * (n + 1), syn=syn + n % 5))
    ]


def test_statistics_abstain_while_cold_however_high_the_count() -> None:
    engine = StatisticsEngine()
    assert calm(engine, WARM - 1) == []
    assert engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 10 * WARM, syn=100_000)) == []
    assert engine.abstained > 0


def test_statistics_find_what_leaves_its_own_past_and_learn_it_slowly() -> None:
    engine = StatisticsEngine()
    assert calm(engine, 40) == []
    (found,) = engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 410, syn=5000))
    assert (found.type, found.victim, found.engine) == ("dos", "10.0.0.9", "statistics")
    assert found.score > 0.85
    assert engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 420, syn=5000)) != []


def test_a_small_lasting_shift_is_found_by_cusum_and_resets() -> None:
    engine = StatisticsEngine()
    calm(engine, 60, syn=300)
    shifted = [bool(engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 600 + 10 * n, syn=380))) for n in range(1, 16)]
    assert any(shifted)
    assert not shifted[0]
    assert sum(shifted) < len(shifted)
    assert CUSUM_FIRES > 0


def test_rows_within_one_window_are_one_sample() -> None:
    engine = StatisticsEngine()
    for n in range(100):
        engine.score_windows(windows(Scope.DESTINATION, "10.0.0.9", 10, syn=n))
    state = engine.to_state()
    assert len(state["entities"]["destination 10 10.0.0.9"]["syn"]["samples"]) == 1  # type: ignore[index]


def test_statistics_state_survives_a_restart_exactly() -> None:
    engine = StatisticsEngine()
    calm(engine, SAMPLES + 10)
    restored = StatisticsEngine.from_state(orjson.loads(orjson.dumps(engine.to_state())))
    assert restored.to_state() == engine.to_state()
    spike = windows(Scope.DESTINATION, "10.0.0.9", 10_000, syn=9000)
    assert restored.score_windows(spike) == engine.score_windows(spike) != []


DAMAGED = [
    {"a": {"b": {}}},
    {"a": 3},
    {"a": {"syn": {"samples": ["x"], "sampled_us": 1, "cusum": 0, "season": {}}}},
    {"a": {"syn": {"samples": 3, "sampled_us": 1, "cusum": 0, "season": {}}}},
    {"a": {"syn": {"samples": [], "sampled_us": "now", "cusum": 0, "season": {}}}},
    {"a": {"syn": {"samples": [], "sampled_us": 1, "cusum": 0}}},
    {"a": {"syn": {"samples": [], "sampled_us": 1, "cusum": 0, "season": {"3": [1, 2]}}}},
]


@pytest.mark.parametrize(
    "state", [{}, {"version": 2}, {"version": 1, "entities": {}}, *({"version": 2, "entities": bad} for bad in DAMAGED)]
)
def test_a_foreign_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(StateError):
        StatisticsEngine.from_state(state)


def test_statistics_remember_a_bounded_number_of_entities() -> None:
    engine = StatisticsEngine(entities_max=5)
    for n in range(20):
        engine.score_windows(windows(Scope.DESTINATION, f"10.0.1.{n}", 10, syn=1))
    assert len(engine) == 5
    assert engine.forgotten == 15
