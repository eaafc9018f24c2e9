"""The systemd journal as a source: ``journalctl`` writes one JSON object for each entry, and knows where it was.

The position is the journal's own cursor. Without ``journalctl`` or without a journal the source cannot be opened and says why.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import orjson

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.event_rows import no_events
from cybermesh.telemetry.sources import DEFAULT_BLOCK, Batch, SourceError
from cybermesh.telemetry.sources.lines import LONGEST, OVERLONG, POLL_S
from cybermesh.telemetry.sources.logs import Found, LogMatcher

NAME = "journald"
NOT_JSON = "not a journal entry"
_COMMAND = ("journalctl", "--output=json", "--all", "--no-pager", "--quiet")
_READ_BYTES = 1 << 18
_TIME_MAX_US = 1 << 53


class JournalSource:
    """Events of the journal's messages, by the patterns of the logs."""

    def __init__(
        self,
        *,
        block: int = DEFAULT_BLOCK,
        position: str = "",
        follow: bool = False,
        matcher: LogMatcher | None = None,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """Start ``journalctl``.

        Args:
            block: Most entries in a batch.
            position: Cursor behind which to go on.
            follow: Go on with what is written later; otherwise end with the last entry.
            matcher: The patterns; those shipped by default.
            command: The program and its options.

        Raises:
            SourceError: There is no ``journalctl``, or it has no journal to read.
        """
        if shutil.which(command[0]) is None:
            raise SourceError(f"logs:{NAME}: {command[0]} is not installed; give log files instead (logs:/var/log/auth.log)")
        self._counters = Counters(unit="entries")
        self._matcher = matcher if matcher is not None else LogMatcher()
        self._block, self._follow = block, follow
        self._position = position
        options = [f"--after-cursor={position}"] if position else []
        if follow:
            options += ["--follow", "--lines=all" if not position else "--no-tail"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close; a pipe could fill up
        self._process = subprocess.Popen(  # noqa: S603 - fixed words and a cursor in one word
            [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._rest = b""
        self._first = self._read(wait_s=None if not follow else POLL_S)
        if self._process.poll() is not None and not self._first and (self._process.returncode or not position):
            self._errors.seek(0)
            reason = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            self.close()
            shown = reason[-1] if reason else "the journal is empty, or this user may not read it"
            raise SourceError(f"logs:{NAME}: {shown}; give log files instead")

    @property
    def name(self) -> str:
        """``journald``."""
        return NAME

    @property
    def counters(self) -> Counters:
        """What was read and what was left out so far."""
        return self._counters

    @property
    def position(self) -> str:
        """The cursor of the last entry."""
        return self._position

    @property
    def progress(self) -> None:
        """Not known."""
        return

    def batches(self) -> Iterator[Batch]:
        """Yield the journal's events in its order."""
        data: bytes | None = self._first
        while data is not None:
            lines = (self._rest + data).split(b"\n")
            self._rest = lines.pop()
            if len(self._rest) > LONGEST:
                self._rest = b""
                self._counters.packets += 1
                self._counters.skip(OVERLONG)
            for start in range(0, len(lines), self._block):
                yield self._batch(lines[start : start + self._block])
            if not lines and self._follow:
                yield no_events()
            data = self._read(wait_s=POLL_S if self._follow else None)

    def close(self) -> None:
        """End ``journalctl``; may be called more than once."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def _read(self, wait_s: float | None) -> bytes | None:
        """Return what is there within the time, None at the end."""
        if not select.select([self._out], [], [], wait_s)[0]:
            return b""
        data = os.read(self._out, _READ_BYTES)
        if data:
            return data
        self._process.wait()
        return None

    def _batch(self, lines: Sequence[bytes]) -> Batch:
        found: list[Found] = []
        for line in lines:
            self._counters.packets += 1
            event = self._event(line)
            if isinstance(event, str):
                self._counters.skip(event)
            else:
                found.append(event)
        self._counters.metered += len(found)
        return self._matcher.columns(found) if found else no_events()

    def _event(self, line: bytes) -> Found | str:
        try:
            entry = orjson.loads(line)
            cursor, when = entry["__CURSOR"], int(entry["__REALTIME_TIMESTAMP"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return NOT_JSON
        if not isinstance(cursor, str) or not 0 <= when < _TIME_MAX_US:
            return NOT_JSON
        self._position = cursor
        program = _text(entry, "SYSLOG_IDENTIFIER") or _text(entry, "_COMM")
        return self._matcher.message(program, _text(entry, "MESSAGE").strip(), when, _text(entry, "_HOSTNAME"))


def _text(entry: Mapping[str, object], name: str) -> bytes:
    """Return a field; what is not UTF-8 comes as a list of bytes."""
    value = entry.get(name)
    if isinstance(value, str):
        return value.encode()
    try:
        return bytes(value) if isinstance(value, list) else b""
    except (TypeError, ValueError):
        return b""
