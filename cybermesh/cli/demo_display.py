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
        for cells in self._rows():
            line = "  ".join(cells)
            if line not in self._told:
                self._told.add(line)
                output.note(line)

    def _table(self) -> Table:
        progress = self._plan.detector.source.progress
        share = "" if progress is None else f" · capture {100 * progress:.0f} %"
        height = max(self._story.heights.values(), default=0)
        table = Table(title=f"{height} blocks{share}", title_justify="left", expand=False)
        for name in ("detection", "source → destination", "decided", "firewall"):
            table.add_column(name)
        for cells in self._rows()[-ROWS_MAX:]:
            table.add_row(*(Text(cell) for cell in cells))
        return table

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """Return a row for each alert: its newest report, and what became of the policy that one of its reports proposed."""
        alerts: dict[str, list[Published]] = {}
        for entry in self._story.published:
            alerts.setdefault(entry.detection.alert_id, []).append(entry)
        rows = []
        for reports in alerts.values():
            newest = reports[-1].detection
            where = f"{newest.entity} → {newest.victim or '*'}{f':{newest.port}' if newest.port else ''}"
            proposed = [entry for entry in reports if entry.policy_id is not None]
            decided, rule = self._fate(proposed[0]) if proposed else ("alert only", "")
            rows.append((f"{newest.type} ({newest.count:,})", where, decided, rule))
        return rows

    def _fate(self, entry: Published) -> tuple[str, str]:
        """Return what the validators and the agent made of a proposed policy."""
        for seq, decided in self._story.decided.items():
            if decided.effect.request_id == entry.policy_id:
                answer = self._story.outcomes.get(seq)
                verb = f"{decided.effect.change} #{seq} at height {decided.height}"
                return verb, f"{decided.effect.action} {answer[0].result}" if answer is not None else "…"
        code = self._story.fate(entry)
        return ("…" if code is None else "decided already" if code == "ALREADY_ACTIVE" else code), ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()
