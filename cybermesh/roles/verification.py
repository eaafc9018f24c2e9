"""Verifies batches of received messages on all cores: a signature costs more than everything else of a message together.

Rules:

- libsodium gives the interpreter free while it verifies, so threads are enough; each thread takes one contiguous part of the
  batch, and the outcomes come in the order of the deliveries, so the order of every producer is kept;
- a small batch is verified where it is: handing it over would take longer;
- nothing here remembers anything: nonces are the caller's, in order, afterwards.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from cybermesh.bus import Delivery
from cybermesh.envelope import EnvelopeError
from cybermesh.keys import KeyRing
from cybermesh.messages import KIB, TxKind
from cybermesh.wire.admission import AdmissionRules, Admitted, verify_on_wire

THREADS_MAX: Final = 8
AT_ONCE_MAX: Final = 8
"""Messages that are verified without a thread, about half a millisecond; and bytes, because hashing takes time, too."""
AT_ONCE_BYTES_MAX: Final = 64 * KIB


@dataclass(frozen=True, slots=True)
class Terms:
    """What messages are verified by: the same for a whole batch."""

    kinds: Mapping[str, TxKind]
    ring: KeyRing
    rules: AdmissionRules
    now_ms: int


Outcome = Admitted | EnvelopeError
"""What was found of a delivery: the admitted message, up to its nonce, or the fault."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A batch and, in its order, what was found of each delivery."""

    batch: Sequence[Delivery]
    outcomes: Sequence[Outcome]


def default_threads() -> int:
    """Return one thread for each core that this process may use."""
    return min(len(os.sched_getaffinity(0)), THREADS_MAX)


class Verifier:
    """Threads that verify; leaving its context ends them."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = default_threads() if threads is None else threads
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="verify")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def check(self, batch: Sequence[Delivery], terms: Terms) -> Checked:
        """Verify every message of a batch; see ``wire.admission.verify_on_wire``."""
        if len(batch) <= AT_ONCE_MAX and sum(len(delivery.value) for delivery in batch) <= AT_ONCE_BYTES_MAX:
            return Checked(batch, _check_all(batch, terms))
        size = -(-len(batch) // self._threads)
        loop = asyncio.get_running_loop()
        running = [
            loop.run_in_executor(self._pool, _check_all, batch[start : start + size], terms)
            for start in range(0, len(batch), size)
        ]
        outcomes: list[Outcome] = []
        for part in running:
            outcomes += await part
        return Checked(batch, outcomes)


def _check_all(batch: Sequence[Delivery], terms: Terms) -> list[Outcome]:
    kinds, ring, rules, now_ms = terms.kinds, terms.ring, terms.rules, terms.now_ms
    outcomes: list[Outcome] = []
    for delivery in batch:
        try:
            outcomes.append(verify_on_wire(kinds[delivery.topic], delivery.value, now_ms, ring, rules))
        except EnvelopeError as error:
            # Without its traceback, which would keep every frame of the verification alive until the batch is done.
            outcomes.append(error.with_traceback(None))
    return outcomes
