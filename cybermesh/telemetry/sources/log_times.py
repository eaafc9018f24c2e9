"""Times as log writers write them, to microseconds since 1970.

The classic syslog format (RFC 3164) has neither year nor zone. The year is the latest one in which the time lies at most a
day after a reference: the file's last change, or now where the file is still written. A log that spans more than a year in
one file cannot be read right in that format, by anybody. Without a zone, the writer's is this machine's unless told otherwise.
Month names are those of C locales as well as English (``months`` in the data); the clock of a writer may be off by that day.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_AHEAD = datetime.timedelta(days=1)
_CACHE_MAX = 4096
_CLASSIC, _SECOND_US, _LEAP = 15, 1_000_000, 60  # "Nov 20 21:16:58"
_CLOCK = r"(?P<clock>\d\d:\d\d:\d\d)(?:[.,](?P<fraction>\d{1,9}))?"
_ZONE = r"(?: ?(?P<zone>Z|[A-Z]{2,5}|[+-]\d\d:?\d\d|[+-]\d\d))?"
# The texts come out of patterns matched in linear time and are short; these have no nested repetition.
_SHAPES = (
    re.compile(rf"(?P<year>\d{{4}})[-/](?P<month>\d\d)[-/](?P<day>\d\d)[T ]{_CLOCK}{_ZONE}", re.ASCII),  # ISO 8601, nginx
    re.compile(rf"(?P<month>[^\W\d]+)\.? +(?P<day>\d\d?)\.? {_CLOCK}"),  # RFC 3164
    re.compile(rf"(?P<month>\d\d?)[月월] +(?P<day>\d\d?) {_CLOCK}"),  # the same in locales that number the months
    re.compile(rf"(?P<day>\d\d?)\.? +(?P<month>[^\W\d]+)\.? {_CLOCK}"),  # and in those that put the day first
    re.compile(rf"(?P<day>\d\d)/(?P<month>[^\W\d]+)/(?P<year>\d{{4}}):{_CLOCK}{_ZONE}"),  # common log format
    re.compile(rf"[^\W\d]+\.? (?P<month>[^\W\d]+)\.? +(?P<day>\d\d?) {_CLOCK} (?P<year>\d{{4}})"),  # asctime
)


class LogTimes:
    """Reads times; ``zone`` is the writer's where the text has none (None: this machine's)."""

    def __init__(self, months: Mapping[str, int], zone: datetime.tzinfo | None = None) -> None:
        self._months = months
        self._zone = zone
        self._reference = _EPOCH
        self._known: dict[bytes, int | None] = {}

    def refer_to(self, seconds: float) -> None:
        """Set the reference for times without a year, in seconds since 1970."""
        reference = datetime.datetime.fromtimestamp(min(max(seconds, 0.0), 2e11), datetime.UTC)
        if reference.date() != self._reference.date():
            self._known.clear()
        self._reference = reference

    def read(self, text: bytes) -> int | None:
        """Return the time in microseconds since 1970, or None if the text is none."""
        if len(text) == _CLASSIC and text[12:13] == b":" and text[13:].isdigit():  # parsed once a minute
            minute = self._read(text[:13] + b"00")
            return None if minute is None else minute + _SECOND_US * min(int(text[13:]), _LEAP - 1)
        return self._read(text)

    def _read(self, text: bytes) -> int | None:
        try:
            return self._known[text]
        except KeyError:
            pass
        if len(self._known) >= _CACHE_MAX:
            self._known.clear()
        found = self._known[text] = self._parse(text)
        return found

    def _parse(self, text: bytes) -> int | None:
        decoded = text.decode("utf-8", "replace")
        try:
            moment = _iso(decoded) or self._by_shape(decoded)
            if moment is not None and moment.tzinfo is None:
                moment = moment.replace(tzinfo=self._zone) if self._zone is not None else moment.astimezone()
            return None if moment is None else (moment - _EPOCH) // _MICROSECOND
        except (ValueError, OverflowError, OSError):  # no such day, or before any clock
            return None

    def _by_shape(self, text: str) -> datetime.datetime | None:
        found = next((match for shape in _SHAPES if (match := shape.fullmatch(text))), None)
        if found is None:
            return None
        parts = found.groupdict()
        month = int(parts["month"]) if parts["month"].isdecimal() else self._months.get(parts["month"].casefold(), 0)
        hour, minute, second = map(int, parts["clock"].split(":"))
        micros = int((parts["fraction"] or "0").ljust(6, "0")[:6])
        clock = (hour, minute, min(second, _LEAP - 1), micros)  # a leap second is the one before it
        if parts.get("year"):
            return datetime.datetime(int(parts["year"]), month, int(parts["day"]), *clock, tzinfo=_zone(parts.get("zone")))
        return self._with_year(month, int(parts["day"]), clock)

    def _with_year(self, month: int, day: int, clock: tuple[int, int, int, int]) -> datetime.datetime | None:
        """Return the time in the latest year in which it exists and lies at most a day after the reference."""
        for year in range(self._reference.year + 1, self._reference.year - 9, -1):  # leap days are at most eight years apart
            try:
                moment = datetime.datetime(year, month, day, *clock)  # noqa: DTZ001 - the writer's zone comes later
            except ValueError:
                continue
            zoned = moment.replace(tzinfo=self._zone) if self._zone is not None else moment.astimezone()
            if zoned <= self._reference + _AHEAD:
                return moment
        return None


def _iso(text: str) -> datetime.datetime | None:
    """Return what most lines have, the fast way."""
    try:
        return datetime.datetime.fromisoformat(text) if text[4:5] == "-" else None
    except ValueError:
        return None


def _zone(text: str | None) -> datetime.tzinfo | None:
    """Return the zone that is written; None for none and for names, which mean the writer's own."""
    if text in {"Z", "UTC", "GMT"}:
        return datetime.UTC
    if not text or text[0] not in "+-":
        return None
    digits = text[1:].replace(":", "").ljust(4, "0")
    offset = datetime.timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return datetime.timezone(-offset if text[0] == "-" else offset)
