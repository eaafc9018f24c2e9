"""Whether a stream of flows metered elsewhere comes from another extractor.

Row by row, many flows of another extractor cannot be told apart (a scan of two empty packets looks the same in all), but an
extractor is a property of its stream: when more than 2 % of the recent rows contradict the definitions, none is judged. Rows
are forgotten by halves, so a stream that was mended is believed again. Our own meter never contradicts itself, so its flows
are not counted; a mixture is judged each for itself.
"""

from __future__ import annotations

from cybermesh.detect.datasets import FOREIGN_FILE_ROWS_MIN, FOREIGN_FILE_SHARE

HALF_LIFE_ROWS = 5_000


class ForeignStream:
    """Counts contradictions among the recent rows of one kind of stream."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._contradictions = 0.0

    def add(self, rows: int, contradictions: int) -> None:
        """Take the counts of a batch."""
        kept = 0.5 ** (rows / HALF_LIFE_ROWS)
        self._rows = self._rows * kept + rows
        self._contradictions = self._contradictions * kept + contradictions

    @property
    def is_foreign(self) -> bool:
        """Whether what was seen lately gives another extractor away."""
        return self._contradictions >= FOREIGN_FILE_ROWS_MIN and self._contradictions > FOREIGN_FILE_SHARE * self._rows
