r"""The pattern format: what a log line means, as data with its own tests.

A file is a list of patterns. A pattern:

    - name: sshd-failed                  # unique, lower case, words joined by hyphens
      program: [sshd, sshd-session]      # whose messages (syslog, journald); without it, the pattern is matched to whole lines
      kind: login                        # login or web
      service: ssh                       # telemetry.windows.Service in lower case
      port: 22                           # its usual port
      outcome: failure                   # success, failure; or: outcomes: {OK: success, FAIL: failure} for the group's texts
      literal: "Failed "                 # what every matching text contains; looked for first, which is cheap
      pattern: 'Failed \S+ for (?P<user>.*) from (?P<source>\S+) port \d+'     # RE2, matched to the whole message or line
      tests:
        - line: 'Nov 20 21:16:58 host sshd[1]: Failed password for root from 192.0.2.1 port 5 ssh2'
          gives: {source: 192.0.2.1, user: root, time: "2026-11-20T21:16:58Z"}     # or outcome, status, count
        - line: 'a line that looks like it and must not match'
          gives: null

Groups: ``time`` (whole lines need it), ``source`` (the client's address), ``destination`` (the server's, where a line tells
it), ``user`` (of web patterns: the request), ``outcome``, ``status`` (HTTP), ``count``. A text that others choose, as a user's
name, must not be able to feign another source: patterns are matched to the end, and what follows the name is matched from the
right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from cybermesh.telemetry.events import EventKind, Outcome
from cybermesh.telemetry.sources.linear_match import LinearPattern, PatternError
from cybermesh.telemetry.windows import Service

DATA = Path(__file__).resolve().parents[2] / "data" / "logs"
MONTHS = "months.yaml"

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_GROUPS = frozenset({"time", "source", "destination", "user", "outcome", "status", "count"})
_REQUIRED = frozenset({"name", "kind", "service", "literal", "pattern", "tests"})
_KEYS = _REQUIRED | {"program", "port", "outcome", "outcomes"}
_KINDS = {"login": EventKind.LOGIN, "web": EventKind.WEB}
_OUTCOMES = {"success": Outcome.SUCCESS, "failure": Outcome.FAILURE, "unknown": Outcome.UNKNOWN}
_SERVICES = {service.name.lower(): service for service in Service}


class LogPatternError(Exception):
    """A pattern file is wrong; the text says which file, which pattern, and why."""


@dataclass(frozen=True, slots=True)
class LogTest:
    """A line and what it must give: group texts by name, or None for no match."""

    line: str
    gives: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class LogPattern:
    """A compiled pattern; see the module for the fields."""

    name: str
    programs: tuple[str, ...]
    kind: EventKind
    service: Service
    port: int
    outcome: Outcome
    outcomes: Mapping[bytes, Outcome]
    literal: bytes
    pattern: LinearPattern
    tests: tuple[LogTest, ...]


def shipped_patterns() -> list[LogPattern]:
    """Return the patterns that come with the package."""
    return load_patterns(path for path in DATA.glob("*.yaml") if path.name != MONTHS)


def load_patterns(paths: Iterable[Path]) -> list[LogPattern]:
    """Read pattern files, in order of their names.

    Raises:
        LogPatternError: The first fault.
        OSError: A file cannot be read.
    """
    patterns: dict[str, LogPattern] = {}
    for path in sorted(paths):
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise LogPatternError(f"{path}: not YAML: {error}") from error
        if not isinstance(entries, list):
            raise LogPatternError(f"{path}: expected a list of patterns")
        for entry in entries:
            pattern = _pattern(str(path), entry)
            if pattern.name in patterns:
                raise LogPatternError(f"{path}: {pattern.name}: the name is used twice")
            patterns[pattern.name] = pattern
    return list(patterns.values())


def months() -> dict[str, int]:
    """Return the numbers of month names, case folded, in the languages of the data."""
    table = yaml.safe_load((DATA / MONTHS).read_text(encoding="utf-8"))
    return {str(name).casefold(): int(number) for number, names in table.items() for name in names}


def _pattern(path: str, entry: object) -> LogPattern:
    name = entry.get("name") if isinstance(entry, dict) else None
    where = f"{path}: {name or 'a pattern'}"
    if not isinstance(entry, dict) or not entry.keys() <= _KEYS or not entry.keys() >= _REQUIRED:
        raise LogPatternError(
            f"{where}: needs the keys {', '.join(sorted(_REQUIRED))}, and may have {', '.join(sorted(_KEYS))}"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LogPatternError(f"{where}: name: expected lower-case words joined by hyphens")
    if not all(isinstance(entry[key], str) and entry[key] for key in ("literal", "pattern")):
        raise LogPatternError(f"{where}: literal and pattern are texts")
    try:
        compiled = LinearPattern(entry["pattern"])
        programs = tuple(entry.get("program", ()))
        outcomes = {text.encode(): _OUTCOMES[value] for text, value in entry.get("outcomes", {}).items()}
        kind, service = _KINDS[entry["kind"]], _SERVICES[entry["service"]]
        outcome, port = _OUTCOMES[entry.get("outcome", "unknown")], int(entry.get("port", 0))
        tests = tuple(LogTest(test["line"], test["gives"]) for test in entry["tests"])
    except PatternError as error:
        raise LogPatternError(f"{where}: pattern: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LogPatternError(f"{where}: {error!r} is not a value of its key") from error
    if not compiled.groups.keys() <= _GROUPS:
        raise LogPatternError(f"{where}: groups are {', '.join(sorted(_GROUPS))}")
    if (not programs and "time" not in compiled.groups) or ("outcome" in compiled.groups) != bool(outcomes):
        raise LogPatternError(f"{where}: without a program it needs the group time; outcomes go with the group outcome")
    if {test.gives is None for test in tests} != {True, False}:
        raise LogPatternError(f"{where}: at least one test that matches and one that does not are needed")
    return LogPattern(name, programs, kind, service, port, outcome, outcomes, entry["literal"].encode(), compiled, tests)
