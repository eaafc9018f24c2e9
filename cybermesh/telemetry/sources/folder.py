"""A folder as a source: its files one after the other, each read by the source of its kind.

Files that the kind cannot read (foreign, empty, unreadable) are counted, named in ``counters.ended`` at the end, and passed
over; a folder with none that can be read is an error. The order is the names', of logs that of their last change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.sources import Batch, Source, SourceError
from cybermesh.telemetry.sources.pieces import position_text, position_value

PASSED_OVER = "file of another kind"
_NAMED_MAX = 5


class FolderSource:
    """The files of one folder, without those in folders below."""

    def __init__(
        self,
        folder: Path,
        open_file: Callable[[str, str], Source],
        *,
        position: str = "",
        by_time: bool = False,
    ) -> None:
        """List the folder and open its first readable file.

        Args:
            folder: Where the files are.
            open_file: Opens one, given its path and a position; raises ``SourceError`` for those of another kind.
            position: Where to go on; files that were read to their end are not opened again.
            by_time: Read in the order of last changes, not of names.

        Raises:
            SourceError: The folder cannot be listed, or holds nothing that can be read.
        """
        self.name = str(folder)
        self._open_file = open_file
        value = position_value(self.name, position)
        self._files = _listed(folder, by_time)
        self._done = 0
        self._position = position
        self._passed: list[str] = []
        self._counters = Counters(unit="records")
        self._total = Counters(unit="records")
        inner = ""
        if value:
            inner = self._resume(value)
        self._source = self._next(inner)
        if self._source is None and not value:
            reason = self._passed[0] if self._passed else "holds no files"
            raise SourceError(f"{folder}: nothing in it can be read ({reason}); give a folder with files of this kind")

    @property
    def counters(self) -> Counters:
        """What was read and what was left out so far, of all files together."""
        return self._counters

    @property
    def position(self) -> str:
        """The present file and the position in it."""
        return self._position

    @property
    def progress(self) -> float | None:
        """Share of the files read so far."""
        if not self._files:
            return None
        part = (self._source.progress or 0.0) if self._source is not None else 0.0
        return min(1.0, (max(self._done - 1, 0) + part) / len(self._files))

    def batches(self) -> Iterator[Batch]:
        """Yield what the files hold, one after the other."""
        while self._source is not None:
            source = self._source
            for batch in source.batches():
                self._position = position_text({"file": self._files[self._done - 1].name, "position": source.position})
                self._add_up(source.counters)
                yield batch
            self._add_up(source.counters)
            self._total = self._copy()
            if source.counters.ended:
                self._passed.append(f"{source.name}: {source.counters.ended}")
            source.close()
            self._position = position_text({"file": self._files[self._done - 1].name, "position": None})
            self._source = self._next("")
        self._counters.ended = "; ".join(self._passed[:_NAMED_MAX])
        if len(self._passed) > _NAMED_MAX:
            self._counters.ended += f"; and {len(self._passed) - _NAMED_MAX} more"

    def close(self) -> None:
        """Close the file that is open."""
        if self._source is not None:
            self._source.close()

    def _resume(self, value: dict[str, object]) -> str:
        """Go to the file of a position; return the position in it."""
        names = [path.name for path in self._files]
        name, inner = value.get("file"), value.get("position")
        if not isinstance(name, str) or not isinstance(inner, str | None) or name not in names:
            raise SourceError(f"{self.name}: the kept position names a file that is gone; forget it to begin anew")
        self._done = names.index(name) + (inner is None)
        return inner or ""

    def _next(self, position: str) -> Source | None:
        """Open the next file that can be read."""
        while self._done < len(self._files):
            path = self._files[self._done]
            self._done += 1
            try:
                source = self._open_file(str(path), position)
            except SourceError as error:
                self._passed.append(str(error))
                self._counters.packets += 1
                self._counters.skip(PASSED_OVER)
                self._total = self._copy()
            else:
                self._counters.unit = source.counters.unit
                return source
            position = ""
        return None

    def _add_up(self, counters: Counters) -> None:
        """Show the present file's counts on top of those of the files before."""
        self._counters.packets = self._total.packets + counters.packets
        self._counters.metered = self._total.metered + counters.metered
        self._counters.skipped = self._total.skipped + counters.skipped

    def _copy(self) -> Counters:
        counters = self._counters
        return Counters(counters.packets, counters.metered, counters.skipped.copy())


def _listed(folder: Path, by_time: bool) -> list[Path]:
    try:
        paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns if by_time else 0, path.name))
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed: {error.strerror}; check the path and its permissions") from error
