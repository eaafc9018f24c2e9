"""Authentication and web access logs: lines to events, by patterns that are data.

A line is taken apart by the envelope it comes in (syslog as RFC 3164, RFC 5424 or rsyslog's ISO form; none for services that
write their own files), then the patterns of its program are tried whose literal it contains. Lines that no pattern knows are
the usual case; they are counted and left out. "message repeated 5 times: [ … ]" and "last message repeated 5 times" count.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.event_rows import NOWHERE, packed
from cybermesh.telemetry.events import EventBatch, Outcome
from cybermesh.telemetry.sources import Batch, SourceError
from cybermesh.telemetry.sources.log_patterns import LogPattern, months, shipped_patterns
from cybermesh.telemetry.sources.log_times import LogTimes

LONGEST = 8192  # bytes in a line; syslog senders cut at 8 KiB at the latest
COUNT_MAX = 1_000_000

UNKNOWN = "line that no pattern knows"
NO_TIME = "time cannot be read"
NO_ADDRESS = "source is not an address"

_REPEATED, _LAST = b"message repeated ", b"last message repeated "
_TCP = 6
_FIRST_ERROR = 400
_SUCCESS, _FAILURE = int(Outcome.SUCCESS), int(Outcome.FAILURE)


# Plain tuples, because there is one of each for every line. An event: time, number of its pattern, source, destination,
# outcome, status, count, host, text. An envelope: time, host, program, message.
Found: TypeAlias = tuple[int, int, bytes, bytes, int, int, int, bytes, bytes]
_Envelope: TypeAlias = tuple[bytes, bytes, bytes, bytes]


@dataclass(frozen=True, slots=True)
class _Groups:
    """The numbers of a pattern's groups, 0 (the whole match) for one it does not have."""

    time: int
    source: int
    destination: int
    user: int
    outcome: int
    status: int
    count: int


class LogMatcher:
    """Turns messages into events; ``patterns`` are tried in order, the first that matches holds."""

    def __init__(self, patterns: Sequence[LogPattern] | None = None, times: LogTimes | None = None) -> None:
        self.patterns = list(patterns if patterns is not None else shipped_patterns())
        self.times = times if times is not None else LogTimes(months())
        self._of: dict[bytes, list[int]] = {}
        for number, pattern in enumerate(self.patterns):
            for program in pattern.programs or ("",):
                self._of.setdefault(program.encode(), []).append(number)
        for numbers in self._of.values():
            numbers.sort()
        constants = [(p.kind, p.port, _TCP if p.port else 0, p.service) for p in self.patterns]
        self._constants = np.array(constants or np.zeros((0, 4)), np.int64)
        self._groups = [_Groups(*(p.pattern.groups.get(name, 0) for name in _Groups.__slots__)) for p in self.patterns]
        self._fixed = [  # the result of the many patterns for which no group tells it
            None if groups.outcome or groups.status or groups.count else (int(pattern.outcome), 0, 1)
            for groups, pattern in zip(self._groups, self.patterns, strict=True)
        ]
        self._previous: tuple[bytes, Found | None] = (b"", None)

    def line(self, line: bytes) -> Found | str:
        """Return the event of a line, or the reason why there is none."""
        envelope = _take_apart(line)
        if envelope is None:
            return self._match(b"", line, None, b"")
        when, host, program, message = envelope
        if program in self._of and program:
            found = self.message(program, message, when, host)
            self._previous = host, (None if isinstance(found, str) else found)
            return found
        if program.startswith(_LAST):
            return self._again(when, host, program)
        self._previous = host, None
        return self._match(b"", line, None, b"")

    def message(self, program: bytes, message: bytes, when: bytes | int, host: bytes) -> Found | str:
        """Return the event of a program's message, or why there is none; ``when`` is a text or microseconds since 1970."""
        if not message.startswith(_REPEATED):
            return self._match(program, message, when, host)
        number, _, rest = message[len(_REPEATED) :].partition(b" times: [")
        found = self._match(program, rest.strip().removesuffix(b"]").rstrip(), when, host)
        return found if isinstance(found, str) else _times(found, _integer(number, COUNT_MAX))

    def columns(self, rows: Sequence[Found]) -> EventBatch:
        """Return events, at least one, as columns."""
        ts_us, pattern, source, destination, outcome, status, count, host, text = zip(*rows, strict=True)
        constants = self._constants[np.array(pattern, np.intp)]
        return EventBatch(
            ts_us=np.array(ts_us, np.int64),
            kind=constants[:, 0].astype(np.uint8),
            outcome=np.array(outcome, np.uint8),
            source=np.frombuffer(b"".join(source), np.uint8).reshape(-1, 16),
            destination=_destinations(destination, host),
            port=constants[:, 1].astype(np.uint16),
            protocol=constants[:, 2].astype(np.uint8),
            service=constants[:, 3].astype(np.uint8),
            status=np.array(status, np.uint16),
            count=np.array(count, np.int64),
            host=_texts(host),
            text=_texts(text),
        )

    def _match(self, program: bytes, text: bytes, when: bytes | int | None, host: bytes) -> Found | str:
        for number in self._of.get(program, ()):
            pattern = self.patterns[number]
            if pattern.literal in text:
                spans = pattern.pattern.spans(text)
                if spans[0][0] == 0:
                    return self._event(number, text, spans, when, host)
        return UNKNOWN

    def _event(
        self, number: int, text: bytes, spans: list[tuple[int, int]], when: bytes | int | None, host: bytes
    ) -> Found | str:
        groups = self._groups[number]
        if not isinstance(when, int):
            begin, end = spans[groups.time]
            read = self.times.read(text[begin:end] if when is None else when)
            if read is None:
                return NO_TIME
            when = read
        source: bytes | None = NOWHERE
        if groups.source:
            begin, end = spans[groups.source]
            source = _address(text[begin:end])
            if source is None:
                return NO_ADDRESS
        destination = NOWHERE
        if groups.destination:
            begin, end = spans[groups.destination]
            destination = packed(text[begin:end].decode("ascii", "replace")) or NOWHERE
        begin, end = spans[groups.user]
        user = text[begin:end] if groups.user and begin >= 0 else b""
        outcome, status, count = self._fixed[number] or self._result(number, text, spans)
        assert source is not None
        return when, number, source, destination, outcome, status, count, host, user

    def _result(self, number: int, text: bytes, spans: list[tuple[int, int]]) -> tuple[int, int, int]:
        """Return outcome, status and count of a match."""
        groups, pattern = self._groups[number], self.patterns[number]
        outcome, status, count = int(pattern.outcome), 0, 1
        if groups.outcome:
            outcome = int(pattern.outcomes.get(text[slice(*spans[groups.outcome])], pattern.outcome))
        if groups.status:
            status = _integer(text[slice(*spans[groups.status])], 999)
            outcome = outcome or (_SUCCESS if status < _FIRST_ERROR else _FAILURE)
        if groups.count:
            count = _integer(text[slice(*spans[groups.count])], COUNT_MAX)
        return outcome, status, count

    def _again(self, when: bytes, host: bytes, text: bytes) -> Found | str:
        """Repeat the event of the same host's line before, if it was one."""
        before, found = self._previous
        ts_us = self.times.read(when)
        if before != host or found is None or ts_us is None:
            return UNKNOWN
        number = text[len(_LAST) :].partition(b" ")[0]
        return _times((ts_us, *found[1:]), _integer(number, COUNT_MAX))


def _times(found: Found, count: int) -> Found:
    """Return an event that happened so many times more often."""
    *before, once, host, user = found
    return (*before, once * count, host, user)  # type: ignore[return-value]


def _destinations(told: Sequence[bytes], hosts: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """Return the address of the machine that was asked: as the line tells it, or its writer's where that is an address."""
    known = {host: packed(host.decode("ascii", "replace")) or NOWHERE for host in set(hosts)}
    chosen = b"".join(each if each != NOWHERE else known[host] for each, host in zip(told, hosts, strict=True))
    return np.frombuffer(chosen, np.uint8).reshape(-1, 16)


def _texts(raw: Sequence[bytes]) -> npt.NDArray[np.object_]:
    """Return bytes as texts, each different one decoded once."""
    decoded = {each: each.decode("utf-8", "replace") for each in set(raw)}
    return np.array([decoded[each] for each in raw], np.object_)


@functools.lru_cache(maxsize=65_536)
def _address(text: bytes) -> bytes | None:
    """Return the packed address; none at all where a log leaves it empty."""
    return packed(text.decode("ascii", "replace")) if text else NOWHERE


class LogDecoder:
    """Lines of log files to events; ``now`` gives the time (seconds since 1970) for lines of a file that is still written."""

    def __init__(self, matcher: LogMatcher | None = None, now: Callable[[], float] = time.time) -> None:
        self._matcher = matcher if matcher is not None else LogMatcher()
        self._now = now
        self._modified_s: float | None = None

    def begin(self, name: str, beginning: bytes, modified_s: float | None) -> None:
        """Note when the file was last written to; any text can be a log.

        Raises:
            SourceError: It is not text.
        """
        refuse_binary(name, beginning)
        self._modified_s = modified_s

    def decode(self, lines: Sequence[bytes], counters: Counters) -> list[Batch]:
        """Return the events of the lines; what is no event is counted by reason."""
        self._matcher.times.refer_to(self._modified_s if self._modified_s is not None else self._now())
        found: list[Found] = []
        read = self._matcher.line
        for line in lines:
            event = read(line)
            if isinstance(event, str):
                counters.skip(event)
            else:
                found.append(event)
        counters.packets += len(lines)
        counters.metered += len(found)
        return [self._matcher.columns(found)] if found else []


def is_log(lines: Sequence[bytes]) -> bool:
    """Return whether the first lines of a text look like a log: most have an envelope, or a pattern knows one."""
    whole = [line for line in lines if line.strip()]
    if 2 * sum(_take_apart(line) is not None for line in whole) > len(whole):
        return True
    matcher = LogMatcher()
    return any(not isinstance(matcher.line(line[:LONGEST]), str) for line in whole)


def _take_apart(line: bytes) -> _Envelope | None:
    """Return the parts of a syslog line, or None if it is none."""
    if line[6:16:3] == b" :: ":  # "Nov 20 21:16:58 ", as nearly always
        host, _, rest = line[16:].partition(b" ")
        return line[:15], host, *_program(rest)
    if line[:1] == b"<":
        line = line.partition(b">")[2]
        if line[:2] == b"1 ":
            return _rfc5424(line)
    if line[10:11] == b"T" and line[4:5] == b"-":
        parts = line.split(None, 2)
        return (parts[0], parts[1], *_program(parts[2])) if len(parts) == 3 else None
    if line[10:11] == b" " and line[4:8:3] == b"--" and line[13:14] == b":":  # ISO with a blank
        parts = line.split(None, 3)
        return (b" ".join(parts[:2]), parts[2], *_program(parts[3])) if len(parts) == 4 else None
    parts = line.split(None, 4)
    if len(parts) < 5 or parts[2][2:3] != b":" or parts[2][5:6] != b":":
        return None
    if parts[0].rstrip(b".").isdigit() == parts[1].rstrip(b".").isdigit():  # one is the day, the other the month
        return None
    return b" ".join(parts[:3]), parts[3], *_program(parts[4])


def _program(text: bytes) -> tuple[bytes, bytes]:
    """Return the program's name, without path and process number, and its message."""
    tag, colon, message = text.partition(b": ")
    if not colon:
        return text, b""
    name = tag.partition(b"[")[0]
    return (name.rpartition(b"/")[2] if name[:1] == b"/" else name), message.strip()


def _rfc5424(line: bytes) -> _Envelope | None:
    parts = line.split(b" ", 6)
    if len(parts) < 7:
        return None
    _, when, host, program, _, _, rest = parts
    if rest[:1] == b"[":  # structured data: elements in brackets, in which "]" is escaped
        end = rest.find(b"] ")
        while end > 0 and rest[end - 1 : end] == b"\\":
            end = rest.find(b"] ", end + 1)
        rest = rest[end + 2 :] if end >= 0 else b""
    else:
        rest = rest.partition(b" ")[2]
    return when, host, program, rest.removeprefix(b"\xef\xbb\xbf")


def _integer(text: bytes, most: int) -> int:
    """Return a number of few digits, 1 if it is none."""
    return min(int(text), most) if text.isdigit() and len(text) < 10 else 1


def refuse_binary(name: str, beginning: bytes) -> None:
    """Check that a file can be text.

    Raises:
        SourceError: It cannot.
    """
    if b"\0" in beginning:
        raise SourceError(f"{name}: is not text; give a log file, it may be .gz or .zst")
