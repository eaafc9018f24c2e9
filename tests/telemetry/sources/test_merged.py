"""Several sources as one: in order of time, nothing lost, and a failing one does not stop the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.event_rows import EventRow, event_batch
from cybermesh.telemetry.sources import Batch, SourceError, times_us
from cybermesh.telemetry.sources.merged import SLACK_US, merged


class Rows:
    """A source of given times, some of which fails at its end."""

    def __init__(self, times: list[int], block: int, error: str = "") -> None:
        self._times, self._block, self._error = times, block, error

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self._times), self._block):
            yield event_batch([EventRow(at, 1) for at in self._times[start : start + self._block]])
            yield event_batch(())
        if self._error:
            raise SourceError(self._error)


@given(st.lists(st.lists(st.integers(0, 60_000_000), max_size=30).map(sorted), max_size=4), st.integers(1, 9))
def test_all_rows_come_once_and_hardly_out_of_order(inputs: list[list[int]], block: int) -> None:
    failed: list[str] = []
    out = [time for batch in merged([Rows(times, block) for times in inputs], failed) for time in times_us(batch).tolist()]  # type: ignore[misc]
    assert sorted(out) == sorted(time for times in inputs for time in times)
    assert failed == []
    newest = np.maximum.accumulate(np.array([0, *out]))
    assert (newest[:-1] - np.array(out, np.int64) <= SLACK_US).all()


def test_a_source_that_fails_is_told_of_and_the_others_go_on() -> None:
    failed: list[str] = []
    sources = [Rows([1, 2], 1, "x: gone"), Rows([3, 4, 5], 1)]
    assert sum(len(batch) for batch in merged(sources, failed)) == 5  # type: ignore[arg-type]
    assert failed == ["x: gone"]
