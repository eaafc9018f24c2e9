"""Attacks that only logs or other meters saw: lines and flow records in, the right alert out, and none for the innocent."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path

import numpy as np
import pytest

from cybermesh.detect.detector import Detection
from cybermesh.detect.engines.rule_file import RuleSet, load, shipped_paths
from cybermesh.detect.pipeline import build, latest
from cybermesh.telemetry.event_rows import EventRow, event_batch, packed
from cybermesh.telemetry.events import EventKind, Outcome
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.telemetry.sources.merged import merged
from cybermesh.telemetry.windows import COLUMN, EVENT_COUNTS, Scope, Service
from cybermesh.telemetry.windows_reports import EventWindows

RULES = load(shipped_paths())
OTHER_RECORDS = {"brute-ssh-records"}  # for flows of other meters
LOG_RULES = {rule.id for rule in RULES.rules if rule.names & EVENT_COUNTS or rule.unless_known} - OTHER_RECORDS
START = datetime.datetime(2026, 11, 20, 21, 0, tzinfo=datetime.UTC)


def detected(path: Path, kind: str, *, block: int = 1000, rules: RuleSet = RULES) -> list[Detection]:
    pipeline = build(rules)
    with contextlib.closing(open_source(f"{kind}:{path}", block=block)) as source:
        found = [detection for batch in source.batches() for detection in pipeline.feed(batch)]
    return latest(found + pipeline.finish())


def sshd(
    source: str, count: int, every_s: float, *, message: str = "Failed password for root", host: str = "gate"
) -> list[str]:
    times = [START + datetime.timedelta(seconds=n * every_s) for n in range(count)]
    return [f"{t.isoformat()} {host} sshd[{n}]: {message} from {source} port {n + 1024} ssh2" for n, t in enumerate(times)]


def access(source: str, count: int, status: int) -> list[str]:
    times = [START + datetime.timedelta(seconds=n / 10) for n in range(count)]
    return [f'{source} - - [{t:%d/%b/%Y:%H:%M:%S %z}] "GET /{n} HTTP/1.1" {status} 9 "-" "x"' for n, t in enumerate(times)]


def log(path: Path, *parts: list[str]) -> Path:
    """Write lines of several sources in the order of their times."""
    path.write_text("\n".join(sorted((line for part in parts for line in part), key=lambda line: line[:25])) + "\n")
    return path


LINES_OF = {
    "brute-log": lambda: sshd("203.0.113.66", 12, 1.0),  # too few for the slow rule
    "brute-log-slow": lambda: sshd("203.0.113.66", 30, 18.0),
    "web-scan-log": lambda: access("203.0.113.66", 300, 404),
}


def test_every_log_rule_has_lines_that_are_reported_because_of_it() -> None:
    assert set(LINES_OF) == LOG_RULES


@pytest.mark.parametrize("rule_id", LINES_OF)
@pytest.mark.parametrize("block", [1, 1000])
def test_a_log_rule_reports_the_lines_it_is_for(tmp_path: Path, rule_id: str, block: int) -> None:
    path = log(tmp_path / "a.log", LINES_OF[rule_id]())
    (alert,) = detected(path, "logs", block=block)
    rule = next(rule for rule in RULES.rules if rule.id == rule_id)
    assert (alert.type, alert.entity, alert.victim, alert.spoofable) == (rule.type, "203.0.113.66", None, False)
    without = RuleSet(tuple(each for each in RULES.rules if each.id != rule_id))
    assert detected(path, "logs", rules=without) == []


def test_a_guesser_in_a_log_is_blocked_and_its_neighbours_are_not(tmp_path: Path) -> None:
    guesser, typist = sshd("203.0.113.66", 60, 0.9), sshd("203.0.113.7", 3, 20.0)
    people = sshd("203.0.113.8", 40, 1.0, message="Accepted publickey for deploy")
    (alert,) = detected(log(tmp_path / "a.log", guesser, typist, people), "logs")
    assert (alert.type, alert.entity, alert.port) == ("brute_force", "203.0.113.66", 22)
    assert alert.policy is not None
    assert alert.policy["action"] == "drop"
    assert alert.policy["target"]["ips"] == ["203.0.113.66"]  # type: ignore[index]
    assert "by its log" in alert.explanation


def test_repeated_messages_count_as_often_as_they_say(tmp_path: Path) -> None:
    lines = sshd("2001:db8::66", 2, 5.0)
    head, _, message = lines[1].partition("]: ")
    lines[1] = f"{head}]: message repeated 20 times: [ {message}]"
    (alert,) = detected(log(tmp_path / "a.log", lines), "logs")
    assert (alert.type, alert.entity) == ("brute_force", "2001:db8::66")


@pytest.mark.parametrize(
    "lines",
    [
        sshd("203.0.113.66", 4, 1.0),
        sshd("203.0.113.66", 10, 70.0),
        access("203.0.113.66", 400, 200) + access("203.0.113.66", 29, 404),
        access("203.0.113.66", 19, 401),
        [line for host in range(8) for line in sshd("203.0.113.66", 3, 1.0, host=f"host{host}")],
    ],
    ids=["mistyped", "now and then", "missing images", "a few refusals", "mistyped on many hosts"],
)
def test_innocent_lines_are_not_reported(tmp_path: Path, lines: list[str]) -> None:
    assert detected(log(tmp_path / "a.log", lines), "logs") == []


def conn(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def flow(second: float, port: int, **more: object) -> dict[str, object]:
    record: dict[str, object] = {"ts": 1_700_000_000 + second, "id.orig_h": "203.0.113.66", "id.orig_p": 40_000 + port % 1000}
    record |= {"id.resp_h": "192.0.2.10", "id.resp_p": port, "proto": "tcp", "conn_state": "REJ", "duration": 0.001}
    return record | {"orig_pkts": 1, "resp_pkts": 1, "orig_bytes": 0, "resp_bytes": 0} | more


def test_a_port_scan_in_zeeks_log_is_reported(tmp_path: Path) -> None:
    path = conn(tmp_path / "conn.log", *(flow(n / 20, n + 1) for n in range(200)))
    assert [(alert.type, alert.entity, alert.victim) for alert in detected(path, "zeek")] == [
        ("port_scan", "203.0.113.66", "192.0.2.10")
    ]


def test_an_ssh_guesser_in_zeeks_log_is_reported_and_a_web_user_is_not(tmp_path: Path) -> None:
    session = {"conn_state": "SF", "duration": 1.5, "orig_pkts": 14, "resp_pkts": 12, "orig_bytes": 1800, "resp_bytes": 2100}
    guesses = [flow(n, 22, **session) for n in range(40)]
    visits = [{**flow(n / 3, 443, **session), "id.orig_h": "203.0.113.7"} for n in range(120)]
    found = detected(conn(tmp_path / "conn.log", *sorted(guesses + visits, key=lambda each: str(each["ts"]))), "zeek")
    assert [(alert.type, alert.entity, alert.port) for alert in found] == [("brute_force", "203.0.113.66", 22)]
    rules = RuleSet(tuple(rule for rule in RULES.rules if rule.id != "brute-ssh-records"))
    assert detected(tmp_path / "conn.log", "zeek", rules=rules) == []


def test_a_web_scan_is_found_in_flows_in_a_log_and_once_in_both(tmp_path: Path) -> None:
    began = START.timestamp() - 1_700_000_000
    tiny = {"conn_state": "SF", "duration": 0.01, "orig_pkts": 6, "resp_pkts": 5, "orig_bytes": 150, "resp_bytes": 310}
    flows = conn(tmp_path / "conn.log", *(flow(began + n / 10, 80, **tiny) | {"id.orig_p": 20_000 + n} for n in range(300)))
    lines = log(tmp_path / "access.log", access("203.0.113.66", 300, 404))
    for inputs in ([f"zeek:{flows}"], [f"logs:{lines}"], [f"zeek:{flows}", f"logs:{lines}"]):
        pipeline, failed = build(RULES), list[str]()
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(contextlib.closing(open_source(spec))) for spec in inputs]
            found = [each for batch in merged(sources, failed) for each in pipeline.feed(batch)] + pipeline.finish()
        assert [(each.type, each.entity) for each in latest(found)] == [("web_attack", "203.0.113.66")], inputs


def test_windows_of_events_keep_hosts_apart_and_know_nothing_of_packets() -> None:
    windows = EventWindows({Scope.SERVICE: (60,), Scope.SOURCE: (60,), Scope.PAIR: (60,)})
    source = packed("203.0.113.66")
    assert source is not None
    common = {"kind": EventKind.LOGIN, "outcome": Outcome.FAILURE, "source": source, "port": 22, "service": Service.SSH}
    rows = [EventRow(n * 1000, host=f"h{n % 3}", times=n + 1, **common) for n in range(6)]  # type: ignore[arg-type]
    no_address = EventRow(7000, kind=EventKind.LOGIN, outcome=Outcome.FAILURE, service=Service.SUDO)
    assert windows.update(event_batch([*rows, no_address])) == []
    found = {batch.scope: batch for batch in windows.finish()}
    assert windows.without_source == 1
    assert set(found) == {Scope.SERVICE, Scope.SOURCE}
    failures = COLUMN["login_failures"]
    assert sorted(found[Scope.SERVICE].values[:, failures].tolist()) == [5, 7, 9]
    assert found[Scope.SOURCE].values[:, failures].tolist() == [21]
    for batch in found.values():
        told = {name for name, index in COLUMN.items() if batch.known[index]}
        web = {name for name in COLUMN if name.startswith("web_")}
        assert told == EVENT_COUNTS | web | {"login_failures", "established", "span_s"}
        assert not batch.values[:, ~batch.known].any()
        assert np.isfinite(batch.values).all()
