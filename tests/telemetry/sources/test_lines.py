"""Lines of files that grow, rotate and are truncated under the reader: each is handed on once."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.lines import GONE, OVERLONG, SETTLE_S, Lines, Pace, Reading

OPENED: list[Lines] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


class Following:
    """A followed file and a clock that stands still unless told."""

    def __init__(self, path: Path, position: object = None, follow: bool = True, longest: int = 1000) -> None:
        self.now, self.pauses = 0.0, 0
        self.counters = Counters()
        self.lines = Lines(str(path), self.counters, Reading(follow, longest, Pace(lambda: self.now, self._pause)), position)
        OPENED.append(self.lines)

    def _pause(self, seconds: float) -> None:
        self.now += seconds
        self.pauses += 1

    def take(self, limit: int = 1000) -> list[str]:
        """Everything there is now."""
        found: list[str] = []
        quiet = 0
        while quiet < 3 + int(SETTLE_S * 10):
            lines = self.lines.read(limit)
            if lines is None:
                break
            quiet = 0 if lines else quiet + 1
            found += [line.decode() for line in lines]
        return found

    def position(self) -> object:
        return json.loads(json.dumps(self.lines.place.to_json()))


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_lines_appended_are_read_when_they_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "one\ntw")
    reader = Following(path)
    assert reader.take() == ["one"]
    append(path, "o\nthree\n")
    assert reader.take() == ["two", "three"]
    assert reader.pauses > 0


def test_a_renamed_file_is_read_to_its_end_before_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\n2\n")
    reader = Following(path)
    assert reader.take() == ["1", "2"]
    path.rename(tmp_path / "a.log.1")
    append(tmp_path / "a.log.1", "3\n")
    append(path, "4\n")
    append(tmp_path / "a.log.1", "late")
    assert reader.take() == ["3", "late", "4"]
    append(path, "5\n")
    assert reader.take() == ["5"]


def test_several_rotations_between_two_looks_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\n")
    reader = Following(path)
    assert reader.take() == ["1"]
    for number in (2, 3, 4):
        _rotate(path, number)
        append(path, f"{number}\n")
    assert reader.take() == ["2", "3", "4"]


def test_a_file_that_is_copied_and_truncated_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\n2\n")
    reader = Following(path)
    assert reader.take() == ["1", "2"]
    append(path, "3\n4\n")
    shutil.copy(path, tmp_path / "a.log.1")
    os.truncate(path, 0)
    append(path, "5\n")
    assert reader.take() == ["3", "4", "5"]


def test_a_file_written_anew_and_longer_than_before_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\n2\n")
    reader = Following(path)
    assert reader.take() == ["1", "2"]
    path.write_text("x\ny\nz\nzz\n")  # the same inode
    assert reader.take() == ["x", "y", "z", "zz"]


@pytest.mark.parametrize("packed", [False, True])
def test_after_a_restart_the_rest_is_found_under_its_new_name(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "a.log"
    append(path, "".join(f"{n}\n" for n in range(10)))
    reader = Following(path)
    assert reader.take(4)[:4] == ["0", "1", "2", "3"]
    reader = Following(path)
    first = reader.lines.read(4)
    position = reader.position()
    reader.lines.close()
    assert first == [b"0", b"1", b"2", b"3"]
    _rotate(path, 10)
    append(path, "new\n")
    if packed:
        old = next(tmp_path.glob("a.log.9*"))
        stamp = old.stat().st_mtime_ns
        target = tmp_path / "a.log.1.gz"
        target.write_bytes(gzip.compress(old.read_bytes()))
        os.utime(target, ns=(stamp, stamp))
        old.unlink()
    assert Following(path, position).take() == ["4", "5", "6", "7", "8", "9", "new"]


def test_after_a_restart_a_file_that_is_gone_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\n2\n")
    reader = Following(path)
    reader.take()
    position = reader.position()
    path.unlink()
    append(path, "3\n")
    again = Following(path, position)
    assert again.take() == ["3"]
    assert again.counters.skipped == {GONE: 1}


def test_the_last_line_without_an_end_counts_once_if_the_file_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\nhalf")
    reader = Following(path, follow=False)
    assert reader.take() == ["1", "half"]
    append(path, " a line\n2\n")
    assert Following(path, reader.position(), follow=False).take() == ["2"]


def test_an_overlong_line_is_left_out_and_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"1\n" + b"x" * 5_000_000 + b"\n2\n" + b"y" * 1001 + b"\n3\n")
    reader = Following(path, follow=False)
    assert reader.take() == ["1", "2", "3"]
    assert reader.counters.skipped == {OVERLONG: 2}


def test_any_history_of_a_log_is_read_once_and_in_order(tmp_path: Path) -> None:
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        _one_history(folder / "a.log", random.Random(seed))


def _one_history(path: Path, chance: random.Random) -> None:
    """Write, rotate, copy and truncate, read, and restart by chance; compare what was read with what was written."""
    numbers, written, read = itertools.count(), [], []
    rotation = itertools.count(1)
    path.touch()
    reader = Following(path)
    pending = ""
    for _ in range(40):
        match chance.choice(["write", "write", "write", "read", "read", "rename", "copy", "restart"]):
            case "write":
                line = f"{path.parent.name} line {next(numbers)} " + "." * chance.randrange(40)
                written.append(line)
                cut = chance.randrange(len(line))
                append(path, pending + line[:cut])
                pending = line[cut:] + "\n"
            case "read":
                read += [line.decode() for line in reader.lines.read(chance.randrange(1, 4)) or []]
            case "rename" | "copy" as how:
                append(path, pending)
                pending = ""
                if how == "rename":
                    _rotate(path, next(rotation))
                    path.touch()
                else:
                    if reader.lines.place.offset == 0:
                        read += reader.take()  # who has seen nothing of a file cannot know its copy
                    _stamp(shutil.copy(path, path.with_name(f"a.log.{1000 - next(rotation)}")))
                    os.truncate(path, 0)
                    read += reader.take()  # two truncations between looks leave nothing to know the file by
            case "restart":
                position = reader.position()
                reader.lines.close()
                reader = Following(path, position)
    append(path, pending)
    read += reader.take()
    reader.lines.close()
    assert read == written, path.parent.name


def _rotate(path: Path, number: int) -> None:
    """Rename the log; names fall and times rise, as logrotate's."""
    _stamp(path.rename(path.with_name(f"{path.name}.{1000 - number}")))


def _stamp(path: Path) -> None:
    """Set the time of a rotation after those of the others, which the file system's clock may be too coarse for."""
    newest = max(each.stat().st_mtime_ns for each in path.parent.iterdir())
    os.utime(path, ns=(newest + 1_000_000_000, newest + 1_000_000_000))


def test_what_is_no_position_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, "1\n")
    for position in (7, {}, {"inode": 1}, {"inode": -1, "offset": 0, "head": [0, ""], "partial": False}):
        with pytest.raises(SourceError, match="position"):
            Following(path, position)
