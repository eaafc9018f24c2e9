"""The memory of a key: durable, exclusive, and recognised when it is not the newest."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cybermesh.consensus.events import SafetyRecord
from cybermesh.consensus.journal import Journal, JournalError, MemoryJournal, standing
from cybermesh.consensus.types import Height, Round

CHAIN, KEY = b"c" * 32, b"k" * 32


@pytest.fixture
def path(tmp_path: Path, bench) -> Path:
    file = tmp_path / "validator.safety"
    Journal.create(file, chain_id=CHAIN, public_key=KEY, record=SafetyRecord.fresh(bench.genesis))
    return file


def reopen(path: Path) -> Journal:
    return Journal.open(path, chain_id=CHAIN, public_key=KEY)


def test_every_start_has_its_own_number(path: Path):
    for boot in (1, 2, 3):
        with reopen(path) as journal:
            assert journal.boot == journal.load().boot == boot


def test_what_was_written_is_there_after_a_restart(path: Path, bench):
    blocks = [bench.block(1, payload=[b"x"])]
    blocks.append(bench.block(2, bench.qc(blocks[0]), tc=bench.tc(1)))
    with reopen(path) as journal:
        record = dataclasses.replace(
            journal.load(),
            last_voted_round=Round(2),
            locked_round=Round(1),
            high_qc=bench.qc(blocks[0]),
            last_tc=bench.tc(1),
            last_vote=bench.vote(blocks[1], 0),
            last_timeout=bench.timeout(2, 0, bench.qc(blocks[0])),
        )
        journal.write(record, blocks)
        journal.write(record, blocks[:1])
    with reopen(path) as journal:
        assert journal.load() == dataclasses.replace(record, boot=2)
        assert journal.blocks(Height(0)) == blocks
        assert journal.blocks(Height(1)) == blocks[1:]
        journal.prune(Height(1))
        journal.write(journal.load(), ())
        assert journal.blocks(Height(0)) == blocks[1:]


def test_a_write_that_was_answered_survives_a_kill(path: Path, bench):
    """A process writes, says so, and is killed: whatever it had answered for is in the file."""
    program = f"""
import dataclasses, os, signal, sys
from pathlib import Path
from cybermesh.consensus.journal import Journal
journal = Journal.open(Path({str(path)!r}), chain_id={CHAIN!r}, public_key={KEY!r})
for round_ in range(1, 40):
    journal.write(dataclasses.replace(journal.load(), last_voted_round=round_), ())
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    with reopen(path) as journal:
        assert (journal.load().last_voted_round, journal.boot) == (39, 2)


def test_one_process_per_key(path: Path):
    with reopen(path):
        program = f"""
from pathlib import Path
from cybermesh.consensus.journal import Journal
Journal.open(Path({str(path)!r}), chain_id={CHAIN!r}, public_key={KEY!r})
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "another process uses this key" in done.stderr
    reopen(path).close()


def test_a_missing_file_is_lost_memory_and_never_made_anew_by_itself(tmp_path: Path):
    with pytest.raises(JournalError, match="missing"):
        reopen(tmp_path / "gone.safety")
    assert list(tmp_path.iterdir()) == []


def test_a_memory_is_never_replaced(path: Path, bench):
    with pytest.raises(JournalError, match="never replaced"):
        Journal.create(path, chain_id=CHAIN, public_key=KEY, record=SafetyRecord.fresh(bench.genesis))


@pytest.mark.parametrize(("chain", "key"), [(b"x" * 32, KEY), (CHAIN, b"x" * 32)])
def test_a_file_of_another_key_or_chain_is_refused(path: Path, chain: bytes, key: bytes):
    with pytest.raises(JournalError, match="another"):
        Journal.open(path, chain_id=chain, public_key=key)
    reopen(path).close()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"not a database" * 100), id="another kind of file"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:1_000]), id="cut off"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: corrupt_record(path), id="a damaged record"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(path: Path, damage):
    damage(path)
    with pytest.raises(JournalError) as caught:
        reopen(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def corrupt_record(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE safety SET record = x'ffff'")
    connection.commit()
    connection.close()


def test_only_its_owner_can_read_it(path: Path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_write_is_an_error_and_changes_nothing(path: Path):
    with reopen(path) as journal:
        before = journal.load()
        blocker = sqlite3.connect(path, timeout=0)
        blocker.execute("BEGIN EXCLUSIVE")
        journal._connection.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(JournalError, match="cannot write"):
            journal.write(dataclasses.replace(before, last_voted_round=Round(9)), ())
        blocker.close()
        assert journal.load() == before
        journal.write(dataclasses.replace(before, last_voted_round=Round(9)), ())
    with reopen(path) as journal:
        assert journal.load().last_voted_round == 9


def test_a_restored_copy_is_recognised_by_its_start_or_by_its_round(path: Path, tmp_path: Path):
    with reopen(path):
        pass
    copy = tmp_path / "backup.safety"
    shutil.copy(path, copy)
    with reopen(path) as journal:
        journal.write(dataclasses.replace(journal.load(), last_voted_round=Round(7)), ())
        newest = journal.load()
    with reopen(copy) as journal:
        old = journal.load()
    assert standing(newest, stored_boot=1, stored_voted_round=7, stored_epoch=1) is None
    assert "old copy" in standing(old, stored_boot=2, stored_voted_round=0, stored_epoch=1)
    assert "old copy" in standing(old, stored_boot=1, stored_voted_round=7, stored_epoch=1)
    assert standing(old, stored_boot=0, stored_voted_round=0, stored_epoch=0) is None


def test_an_observers_journal_keeps_nothing(bench):
    journal = MemoryJournal(SafetyRecord.fresh(bench.genesis))
    journal.write(dataclasses.replace(journal.load(), boot=4), [bench.block(1)])
    journal.prune(Height(3))
    assert journal.load().boot == 4
    assert journal.blocks(Height(0)) == []
