# ruff: noqa: E501 - log lines are as long as they are
"""Log lines to events: the patterns' own tests, times, repetitions, hostile names, and lines made to stall a matcher."""

from __future__ import annotations

import datetime
import ipaddress
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.events import EventBatch, EventKind, Outcome
from cybermesh.telemetry.sources.linear_match import LinearPattern, PatternError
from cybermesh.telemetry.sources.log_patterns import (
    DATA,
    LogPattern,
    LogPatternError,
    LogTest,
    load_patterns,
    months,
    shipped_patterns,
)
from cybermesh.telemetry.sources.log_times import LogTimes
from cybermesh.telemetry.sources.logs import LONGEST, LogDecoder, LogMatcher
from cybermesh.telemetry.windows import Service

PATTERNS = shipped_patterns()
REFERENCE = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC).timestamp()
FAILED = "Failed password for root from 203.0.113.66 port 41022 ssh2"


def read(
    *lines: str | bytes, patterns: list[LogPattern] = PATTERNS, at: float = REFERENCE
) -> tuple[EventBatch | None, Counters]:
    decoder = LogDecoder(LogMatcher(patterns, LogTimes(months(), datetime.UTC)), now=lambda: at)
    decoder.begin("a.log", b"", None)
    counters = Counters()
    batches = decoder.decode([line.encode() if isinstance(line, str) else line for line in lines], counters)
    assert counters.packets == len(lines) == counters.metered + sum(counters.skipped.values())
    return (batches[0] if batches else None), counters  # type: ignore[return-value]


def one(line: str | bytes) -> dict[str, str]:
    """The event of a line as the patterns' tests tell it; empty for none."""
    events, _ = read(line)
    return {} if events is None else described(events)


def described(events: EventBatch, row: int = 0) -> dict[str, str]:
    source, destination = (ipaddress.IPv6Address(column[row].tobytes()) for column in (events.source, events.destination))
    when = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(microseconds=int(events.ts_us[row]))
    return {
        "source": str(source.ipv4_mapped or source),
        "destination": str(destination.ipv4_mapped or destination),
        "user": events.text[row],
        "time": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "outcome": Outcome(events.outcome[row]).name.lower(),
        "status": str(events.status[row]),
        "count": str(events.count[row]),
    }


@pytest.mark.parametrize(
    ("pattern", "test"),
    [(p, t) for p in PATTERNS for t in p.tests],
    ids=[f"{p.name}-{n}" for p in PATTERNS for n, _ in enumerate(p.tests)],
)
def test_a_shipped_pattern_gives_what_its_own_tests_say(pattern: LogPattern, test: LogTest) -> None:
    events, _ = read(test.line, patterns=[pattern])
    if test.gives is None:
        assert events is None
        return
    assert events is not None
    found = described(events)
    expected = dict(test.gives)
    if "time" in expected:
        moment = datetime.datetime.fromisoformat(expected["time"]).astimezone(datetime.UTC)
        expected["time"] = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    assert {name: found[name] for name in expected} == expected
    assert (events.kind[0], events.service[0], events.port[0]) == (pattern.kind, pattern.service, pattern.port)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_a_shipped_patterns_lines_mean_the_same_among_all_patterns(pattern: LogPattern) -> None:
    for test in pattern.tests:
        if test.gives is not None:
            alone, together = read(test.line, patterns=[pattern])[0], read(test.line)[0]
            assert alone is not None
            assert together is not None
            assert described(alone) == described(together)


def test_every_shipped_file_has_patterns_and_every_kind_of_service_is_covered() -> None:
    names = {path.name for path in DATA.glob("*.yaml")} - {"months.yaml"}
    assert names == {"databases.yaml", "ftp.yaml", "mail.yaml", "sshd.yaml", "sudo.yaml", "web.yaml"}
    services = {Service.SSH, Service.FTP, Service.SMTP, Service.POP3, Service.IMAP, Service.POSTGRESQL, Service.MYSQL}
    assert {p.service for p in PATTERNS} == services | {Service.HTTP, Service.SUDO}


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        ("Nov 20 21:16:58", "2026-11-20T21:16:58.000000Z"),
        ("Nov 21 12:00:00", "2026-11-21T12:00:00.000000Z"),  # a clock that is ahead by hours
        ("Nov 23 00:00:00", "2025-11-23T00:00:00.000000Z"),
        ("Jan  2 03:04:05", "2026-01-02T03:04:05.000000Z"),
        ("Feb 29 01:00:00", "2024-02-29T01:00:00.000000Z"),
        ("Dez  1 10:00:00", "2025-12-01T10:00:00.000000Z"),
        ("Mär  1 10:00:00", "2026-03-01T10:00:00.000000Z"),
        ("août  1 10:00:00", "2026-08-01T10:00:00.000000Z"),
        ("févr. 3 10:00:00", "2026-02-03T10:00:00.000000Z"),
        ("3. Okt 10:00:00", "2026-10-03T10:00:00.000000Z"),
        ("OTT  3 10:00:00", "2026-10-03T10:00:00.000000Z"),
        ("paź  3 10:00:00", "2026-10-03T10:00:00.000000Z"),
        ("ноя  3 10:00:00", "2026-11-03T10:00:00.000000Z"),
        ("říj  3 10:00:00", "2026-10-03T10:00:00.000000Z"),
        ("11月 20 10:00:00", "2026-11-20T10:00:00.000000Z"),
        (" 1月  2 10:00:00", "2026-01-02T10:00:00.000000Z"),
        ("1월  2 10:00:00", "2026-01-02T10:00:00.000000Z"),
        ("2026-11-20 21:16:58", "2026-11-20T21:16:58.000000Z"),
        ("2026-11-20 21:16:58.123456+05:30", "2026-11-20T15:46:58.123456Z"),
        ("2026-11-20T21:16:58.123456+05:30", "2026-11-20T15:46:58.123456Z"),
        ("2026-11-20T21:16:58Z", "2026-11-20T21:16:58.000000Z"),
    ],
)
def test_times_of_syslog_are_read_in_any_form_and_language(stamp: str, expected: str) -> None:
    assert one(f"{stamp} gate sshd[1]: {FAILED}")["time"] == expected


@pytest.mark.parametrize("stamp", ["Xyz 20 21:16:58", "Nov 31 21:16:58", "Nov 20 25:16:58", "Nov 20 21:61:58"])
def test_a_time_that_is_none_is_counted(stamp: str) -> None:
    events, counters = read(f"{stamp} gate sshd[1]: {FAILED}")
    assert events is None
    assert counters.skipped == {"time cannot be read": 1}


def test_every_second_of_a_long_log_has_its_time() -> None:
    lines = [f"Nov 20 {n // 3600:02}:{n // 60 % 60:02}:{n % 60:02} gate sshd[1]: {FAILED}" for n in range(3 * 3600)]
    events, _ = read(*lines)
    assert events is not None
    assert set(np.diff(events.ts_us).tolist()) == {1_000_000}
    assert one(lines[0].replace("00:00:00", "23:59:60"))["time"].endswith("T23:59:59.000000Z")  # a leap second


def test_a_log_read_after_new_year_has_its_december_in_the_old_year() -> None:
    january = datetime.datetime(2027, 1, 1, 0, 5, tzinfo=datetime.UTC).timestamp()
    events, _ = read(f"Dec 31 23:59:59 gate sshd[1]: {FAILED}", f"Jan  1 00:00:01 gate sshd[1]: {FAILED}", at=january)
    assert events is not None
    assert [described(events, row)["time"][:4] for row in (0, 1)] == ["2026", "2027"]


def test_repetitions_are_counted_in_both_forms() -> None:
    head = "Nov 20 21:16:58 gate"
    events, counters = read(
        f"{head} sshd[1]: message repeated 5 times: [ {FAILED}]",
        f"{head} sshd[1]: {FAILED}",
        f"{head} last message repeated 3 times",
        f"{head} cron[1]: something else",
        f"{head} last message repeated 9 times",
        "Nov 20 21:16:58 other last message repeated 9 times",
    )
    assert events is not None
    assert events.count.tolist() == [5, 1, 3]
    assert counters.skipped == {"line that no pattern knows": 3}


def test_bytes_that_are_no_text_hide_nothing() -> None:
    assert (
        one(b"Nov 20 21:16:58 gate sshd[1]: Failed password for \xff\xfe\x80 from 203.0.113.66 port 1 ssh2")["source"]
        == "203.0.113.66"
    )


@pytest.mark.parametrize("address", ["2001:db8::66", "::ffff:203.0.113.66", "fe80::1%eth0"])
def test_ipv6_sources_are_read(address: str) -> None:
    expected = {"::ffff:203.0.113.66": "203.0.113.66", "fe80::1%eth0": "fe80::1"}.get(address, address)
    assert one(f"Nov 20 21:16:58 gate sshd[1]: Failed password for x from {address} port 1 ssh2")["source"] == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [("192.0.2.22", "192.0.2.22"), ("2001:db8::22", "2001:db8::22"), ("gate", "::"), ("gate.example", "::")],
)
def test_the_server_is_known_where_its_address_stands_for_its_name(host: str, expected: str) -> None:
    for stamp in ("Nov 20 21:16:58", "2026-11-20T21:16:58Z"):
        assert one(f"{stamp} {host} sshd[1]: {FAILED}")["destination"] == expected


def test_a_server_that_a_line_names_goes_before_the_writer() -> None:
    line = "Nov 20 21:16:58 192.0.2.9 dovecot: imap-login: Login: user=<a>, rip=192.0.2.7, lip=192.0.2.1"
    assert one(line)["destination"] == "192.0.2.1"
    assert one(line.replace("lip=192.0.2.1", "lip=nonsense"))["destination"] == "192.0.2.9"


def test_a_source_that_is_no_address_is_counted() -> None:
    _, counters = read("Nov 20 21:16:58 gate sshd[1]: Failed password for x from 999.1.1.1 port 1 ssh2")
    assert counters.skipped == {"source is not an address": 1}


# What an attacker may choose: a name that looks like the rest of a line. It may hide, but never accuse somebody else.
NAMES = st.lists(
    st.sampled_from(
        [
            "x", " ", "from", "198.51.100.1", "port 1", "ssh2", "rhost=198.51.100.1", "user=b", ", client: 198.51.100.1", '"', "'", "@",
            "]", "[", "FAIL LOGIN: Client", ": password mismatch", "rip=198.51.100.1", "lip=1", ">", "<", ",", "FATAL:  password",
            "authentication failed for user", "(using password: YES)", "[198.51.100.1]", "SASL LOGIN", ":", ", server: s, request: ",
        ]
    ),
    max_size=14,
).map(lambda parts: " ".join(parts))  # fmt: skip
TEMPLATES = [
    "Nov 20 21:16:58 gate sshd[1]: Failed password for invalid user {} from 203.0.113.66 port 41022 ssh2",
    "Nov 20 21:16:58 gate sshd[1]: Connection closed by invalid user {} 203.0.113.66 port 41022 [preauth]",
    'Fri Nov 20 21:16:58 2026 [pid 2] [{}] FAIL LOGIN: Client "203.0.113.66"',
    "Nov 20 21:16:58 gate vsftpd[7]: pam_unix(vsftpd:auth): authentication failure; logname= uid=0 euid=0 tty=ftp ruser={0} rhost=203.0.113.66  user={0}",
    "Nov 20 21:16:58 gate proftpd[7]: 192.0.2.1 (203.0.113.66[203.0.113.66]) - USER {} (Login failed): Incorrect password",
    "Nov 20 21:16:58 mx postfix/smtpd[9]: warning: unknown[203.0.113.66]: SASL PLAIN authentication failed: x, sasl_username={}",
    "Nov 20 21:16:58 mx dovecot: imap-login: Disconnected (auth failed, 3 attempts in 12 secs): user=<{}>, method=PLAIN, rip=203.0.113.66, lip=192.0.2.1, TLS",
    '2026-11-20 21:16:58 UTC [77] client=203.0.113.66 FATAL:  password authentication failed for user "{}"',
    '2026-11-20 21:16:58 UTC [77] {0}@db 203.0.113.66 FATAL:  password authentication failed for user "{0}"',
    "2026-11-20 21:16:58 8 [Warning] Access denied for user '{}'@'203.0.113.66' (using password: NO)",
    '2026/11/20 21:16:58 [error] 12#12: *3 user "{}": password mismatch, client: 203.0.113.66, server: s, request: "GET /{} HTTP/1.1"',
    "Nov 20 21:16:58 mx dovecot: submission-login: Disconnected (auth failed, 3 attempts in 12 secs): user=<{}>, method=PLAIN, rip=203.0.113.66, lip=192.0.2.1, TLS",
    'Nov 20 21:16:58 web nginx: 203.0.113.66 - {} [20/Nov/2026:21:16:58 +0000] "GET / HTTP/1.1" 401 1',
    '[Fri Nov 20 21:16:58 2026] [error] [client 203.0.113.66] user {}: authentication failure for "/": Password Mismatch',
    '[Fri Nov 20 21:16:58.1 2026] [auth_basic:error] [pid 7] [client 203.0.113.66:5544] AH01617: user {}: authentication failure for "/": Password Mismatch',
]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.split("{")[0][-30:])
@given(name=NAMES)
def test_a_hostile_name_accuses_nobody_else(template: str, name: str) -> None:
    found = one(template.format(name, name))
    assert found.get("source", "203.0.113.66") == "203.0.113.66"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.split("{")[0][-30:])
def test_a_line_made_to_stall_a_matcher_does_not(template: str) -> None:
    pieces = [" from 1.1.1.1 port 1", "a", "[", "=", " ", '"', "\\", "ruser= rhost=1", "F", "FATA", ", rip=1", "@'1'"]
    lines = [template.format(piece * (LONGEST // len(piece)), "x")[:LONGEST].encode() for piece in pieces]
    began = time.process_time()
    for _ in range(10):
        read(*lines)
    assert (time.process_time() - began) / (10 * len(lines)) < 0.01  # a second and more where a matcher backtracks


@given(st.binary(max_size=300))
def test_any_line_is_an_event_or_counted(line: bytes) -> None:
    read(line.replace(b"\n", b""))


@given(st.sampled_from([t.line for p in PATTERNS for t in p.tests]), st.data())
def test_any_damaged_line_is_an_event_or_counted(line: str, data: st.DataObject) -> None:
    raw = bytearray(line.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(raw))


GOOD = """
- name: a-pattern
  program: [x]
  kind: login
  service: ssh
  outcome: failure
  literal: "no "
  pattern: 'no (?P<source>\\S+)'
  tests:
    - {line: "Nov 20 21:16:58 h x: no 1.2.3.4", gives: {source: 1.2.3.4}}
    - {line: "Nov 20 21:16:58 h x: yes", gives: null}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("a-pattern", "A pattern", "lower-case"),
        ("kind: login", "kind: logout", "value"),
        ("service: ssh", "service: gopher", "value"),
        ("(?P<source>", "(?P<origin>", "groups"),
        ("(?P<source>\\S+)", "(a", "pattern"),
        ("(?P<source>\\S+)", "(?=a)", "pattern"),
        ("  program: [x]\n", "", "time"),
        ("outcome: failure", "outcomes: {a: failure}", "outcome"),
        ("gives: null", "gives: {source: 1.1.1.1}", "does not"),
        ('literal: "no "', "literal: 7", "texts"),
        ("kind: login", "kind: login\n  more: 1", "keys"),
        ("- name", "name", "list|YAML"),
    ],
)
def test_a_bad_pattern_file_says_what_is_wrong(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GOOD)
    assert [pattern.name for pattern in load_patterns([path])] == ["a-pattern"]
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(LogPatternError, match=says) as caught:
        load_patterns([path])
    assert str(path) in str(caught.value)


def test_what_needs_backtracking_is_no_pattern() -> None:
    for expression in (r"(a)\1", "(?!a)b", "(?<=a)b", "a{1001}", "("):
        with pytest.raises(PatternError):
            LinearPattern(expression)


def test_web_access_is_an_event_with_its_status() -> None:
    events, _ = read('203.0.113.66 - - [20/Nov/2026:21:16:58 +0000] "GET /x HTTP/1.1" 404 1 "-" "-"')
    assert events is not None
    assert (events.kind[0], events.status[0], events.service[0]) == (EventKind.WEB, 404, Service.HTTP)
