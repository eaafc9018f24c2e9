"""The journal through ``journalctl``: a program of the test's own writes what systemd's would."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path

import pytest

from cybermesh.telemetry.events import EventBatch
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.telemetry.sources.journald import JournalSource
from cybermesh.telemetry.windows import Service

WRITER = """
import json, sys, time
after = next((word.partition("=")[2] for word in sys.argv if word.startswith("--after-cursor=")), "")
entries = json.load(open(sys.argv[1]))
begin = 1 + next((n for n, e in enumerate(entries) if isinstance(e, dict) and e["__CURSOR"] == after), -1)
for entry in entries[begin:]:
    print(json.dumps(entry) if isinstance(entry, dict) else entry)
sys.stdout.flush()
if "--follow" in sys.argv:
    time.sleep(600)
"""


def entry(n: int, message: object, program: str = "sshd") -> dict[str, object]:
    made: dict[str, object] = {"__CURSOR": f"c={n};x", "__REALTIME_TIMESTAMP": str(1_700_000_000_000_000 + n)}
    return made | {"SYSLOG_IDENTIFIER": program, "MESSAGE": message, "_HOSTNAME": "gate"}


def failed(n: int) -> dict[str, object]:
    return entry(n, f"Failed password for root from 203.0.113.{n} port 41022 ssh2")


@pytest.fixture
def journal(tmp_path: Path) -> list[str]:
    entries = [failed(0), failed(1), entry(2, "session opened"), entry(3, list(failed(3)["MESSAGE"].encode())), "not json"]  # type: ignore[attr-defined]
    (tmp_path / "entries").write_text(json.dumps([*entries, failed(5)]))
    (tmp_path / "writer.py").write_text(WRITER)
    return [sys.executable, str(tmp_path / "writer.py"), str(tmp_path / "entries")]


def sources(batches: list[object]) -> list[int]:
    return [int(last) for batch in batches if isinstance(batch, EventBatch) for last in batch.source[:, 15]]


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_entries_are_events_and_the_position_is_the_cursor(journal: list[str], block: int) -> None:
    with contextlib.closing(JournalSource(command=journal, block=block)) as source:
        read = [(batch, source.position) for batch in source.batches()]
        assert sources([batch for batch, _ in read]) == [0, 1, 3, 5]
        assert source.counters.skipped == {"line that no pattern knows": 1, "not a journal entry": 1}
        assert source.counters.packets == 6
    first = next(batch for batch, _ in read if len(batch))
    assert isinstance(first, EventBatch)
    assert (first.service[0], first.host[0], first.ts_us[0]) == (Service.SSH, "gate", 1_700_000_000_000_000)
    for stop, (_, position) in enumerate(read):
        with contextlib.closing(JournalSource(command=journal, block=block, position=position)) as source:
            after = sources(list(source.batches()))
        assert sources([batch for batch, _ in read[: stop + 1]]) + after == [0, 1, 3, 5]


def test_a_followed_journal_yields_empty_batches_while_it_is_silent(journal: list[str]) -> None:
    with contextlib.closing(JournalSource(command=journal, follow=True)) as source:
        batches = source.batches()
        found = sources(list(itertools.islice(itertools.takewhile(lambda _: source.counters.packets < 6, batches), 50)))
        assert len(next(batches)) == 0
        assert source.counters.metered == 4 >= len(found)


def test_without_journalctl_or_a_journal_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="journalctl is not installed; give log files"):
        open_source("logs:journald")
    words = [sys.executable, "-c", "import sys; sys.exit('No journal files were found.')"]
    with pytest.raises(SourceError, match="No journal files were found"):
        JournalSource(command=words)
    with pytest.raises(SourceError, match="empty"):
        JournalSource(command=[sys.executable, "-c", ""])
