"""What people see while the demo runs: detections, the blocks they became part of, and the rules that came of them."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.live import Live
from rich.table import Table
from rich.text import Text

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.demo.play import Demo, Story
    from cybermesh.roles.ai import Published

ROWS_MAX = 20


class Display:
    """A live table on a terminal; elsewhere one line for each thing that happens."""

    def __init__(self, plan: Demo, story: Story) -> None:
        self._plan = plan
        self._story = story
        self._told: set[str] = set()
        self._live = Live(console=output.console(stderr=True), refresh_per_second=8) if sys.stderr.isatty() else None

    def refresh(self) -> None:
        """Show the story as it stands."""
        if self._live is not None:
            self._live.update(self._table())
            return
        for entry in self._story.published:
            line = f"{self._cells(entry)}"
            if line not in self._told:
                self._told.add(line)
                output.note("  ".join(self._cells(entry)))

    def _table(self) -> Table:
        progress = self._plan.detector.source.progress
        share = "" if progress is None else f" · capture {100 * progress:.0f} %"
        heights = sorted(self._story.heights.values())
        table = Table(
            title=f"blocks {heights[0] if heights else 0} to {heights[-1] if heights else 0}{share}",
            title_justify="left",
            expand=False,
        )
        for name in ("detection", "source → destination", "decided", "firewall"):
            table.add_column(name)
        for entry in self._story.published[-ROWS_MAX:]:
            table.add_row(*(Text(cell) for cell in self._cells(entry)))
        return table

    def _cells(self, entry: Published) -> tuple[str, str, str, str]:
        detection = entry.detection
        where = f"{detection.entity} → {detection.victim or '*'}{f':{detection.port}' if detection.port else ''}"
        return f"{detection.type} ({detection.count:,})", where, *self._fate(entry)

    def _fate(self, entry: Published) -> tuple[str, str]:
        """Return what the validators and the agent made of a detection."""
        if entry.policy_id is None:
            return "alert only", ""
        for seq, decided in self._story.decided.items():
            if decided.effect.request_id == entry.policy_id:
                answer = self._story.outcomes.get(seq)
                verb = f"{decided.effect.change} #{seq} at height {decided.height}"
                return verb, f"{decided.effect.action} {answer[0].result}" if answer is not None else "…"
        return self._story.fate(entry) or "…", ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()
