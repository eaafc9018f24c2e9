"""The persistent queue of what falls due: order, and that no version changes another."""

from __future__ import annotations

import heapq

from hypothesis import given
from hypothesis import strategies as st

from cybermesh.ledger.schedule import Due, Schedule

DUES = st.builds(Due, st.integers(0, 5), st.integers(1, 3), st.binary(max_size=2))


def drained(schedule: Schedule) -> list[Due]:
    out = []
    while (first := schedule.first()) is not None:
        out.append(first)
        schedule = schedule.without_first()
    return out


@given(st.lists(DUES | st.none(), max_size=60))
def test_it_does_what_a_heap_does_and_keeps_every_old_version(steps: list[Due | None]) -> None:
    schedule, model = Schedule(), []  # type: ignore[var-annotated]
    versions = []
    for step in steps:
        versions.append((schedule, sorted(model)))
        if step is not None:
            schedule = schedule.added(step)
            heapq.heappush(model, step)
        elif model:
            assert schedule.first() == heapq.heappop(model)
            schedule = schedule.without_first()
    for version, expected in [*versions, (schedule, sorted(model))]:
        assert drained(version) == expected


def test_a_long_queue_in_either_order_is_no_deep_recursion() -> None:
    for numbers in (range(20_000), range(20_000, 0, -1)):
        schedule = Schedule()
        for number in numbers:
            schedule = schedule.added(Due(number, 1, b""))
        assert schedule.first() == Due(min(numbers), 1, b"")
        assert len(drained(schedule)) == 20_000


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.binary(max_size=2))), st.integers(0, 6))
def test_entries_added_together_come_out_as_if_added_one_by_one(items: list[tuple[int, int, bytes]], cut: int) -> None:
    dues = [Due(*item) for item in items]
    together = Schedule().added_all(dues[:cut]).added_all(dues[cut:])
    singly = Schedule()
    for due in dues:
        singly = singly.added(due)
    assert drained(together) == drained(singly) == sorted(dues)
