"""Many seeds on every core; the results come in the order of the seeds, whatever the cores do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from typing import Final

from cybermesh.consensus.simulator.draw import Setup
from cybermesh.consensus.simulator.scenario import Result, run_scenario

_PIECE: Final = 50


def run_campaign(first: int, count: int, setup: Setup, *, workers: int) -> Iterator[Result]:
    """Yield the results of seeds ``first`` … ``first + count - 1``; leaving the iterator early stops the workers."""
    if workers == 1 or count <= _PIECE:
        yield from (run_scenario(seed, setup) for seed in range(first, first + count))
        return
    pieces = [range(start, min(start + _PIECE, first + count)) for start in range(first, first + count, _PIECE)]
    pool = ProcessPoolExecutor(workers, mp_context=get_context("forkserver"))
    try:
        yield from chain.from_iterable(pool.map(partial(_run_piece, setup), pieces))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_piece(setup: Setup, seeds: range) -> list[Result]:
    return [run_scenario(seed, setup) for seed in seeds]
