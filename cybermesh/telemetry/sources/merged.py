"""Several sources read as one, in order of time: what each of them shows of an incident then meets in one pipeline.

A batch is cut where another source has something older, give or take ``SLACK_US``: less than the disorder that windows take as
natural, and enough that two captures of the same minutes are not read packet by packet. A source that fails ends there, and is
told of; the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cybermesh.telemetry.sources import Batch, Source, SourceError, times_us

SLACK_US = 1_000_000


def merged(sources: Sequence[Source], failed: list[str]) -> Iterator[Batch]:
    """Yield the batches of all sources; the text of each error of a source is appended to ``failed``.

    A batch's payload bytes are valid until the next one is asked for, as those of a single source.
    """
    readers = {number: source.batches() for number, source in enumerate(sources)}
    waiting: dict[int, Batch] = {}
    while True:
        for number in [number for number in readers if number not in waiting]:
            batch = _next(readers[number], failed)
            if batch is None:
                del readers[number]
            else:
                waiting[number] = batch
        if not waiting:
            return
        begins = sorted((int(times_us(batch)[0]), number) for number, batch in waiting.items())
        number = begins[0][1]
        batch = waiting.pop(number)
        if len(begins) > 1:
            later = np.nonzero(times_us(batch) > begins[1][0] + SLACK_US)[0]
            if len(later) and later[0] > 0:
                waiting[number] = batch.take(slice(int(later[0]), None))
                batch = batch.take(slice(0, int(later[0])))
        yield batch


def _next(reader: Iterator[Batch], failed: list[str]) -> Batch | None:
    """Return a source's next batch that is not empty, None at its end."""
    try:
        return next((batch for batch in reader if len(batch)), None)
    except SourceError as error:
        failed.append(str(error))
        return None
