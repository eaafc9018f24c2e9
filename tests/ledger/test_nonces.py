"""Nonce windows in the state, against a model that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.envelope.nonces import INSTANCES_MAX, WINDOW_COUNTERS, Nonce
from cybermesh.ledger.nonces import use_nonce
from cybermesh.ledger.receipts import Code
from cybermesh.ledger.state import State
from tests.ledger.world import START_MS, World, codes, key

PRODUCER = key("solo").public
COUNTERS = st.one_of(st.integers(0, 40), st.integers(65_500, 65_600), st.integers(200_000, 200_050), st.integers(0, 2**32 - 1))


@given(st.lists(COUNTERS, max_size=40))
def test_windows_agree_with_a_model_that_forgets_nothing(counters: list[int]) -> None:
    draft = World().state.draft(height=1, time_ms=START_MS)
    used: set[int] = set()
    for counter in counters:
        answer = use_nonce(draft, PRODUCER, Nonce(START_MS, 5, counter).encode())
        if used and counter <= max(used) - WINDOW_COUNTERS:
            assert answer is Code.STALE
        else:
            assert answer is (Code.DUPLICATE if counter in used else Code.OK)
            used.add(counter)
    for key_ in draft.windows_of(PRODUCER):
        window = draft.windows.get(key_)
        assert window is not None
        assert window.bits[0]
        assert window.bits[-1]
        assert len(window.bits) <= WINDOW_COUNTERS // 8 + 1


def test_a_message_counts_once_for_ever() -> None:
    world = World()
    sent = world.anomaly("solo", "a1")
    assert codes(world.apply(sent)) == [Code.OK]
    assert codes(world.apply(sent)) == [Code.DUPLICATE]
    assert codes(world.after(301).apply(sent)) == [Code.STALE]
    assert codes(world.after(100_000).apply(sent)) == [Code.STALE]


def test_a_used_nonce_with_other_content_is_a_duplicate() -> None:
    world = World()
    stamp = world.stamp("solo")
    receipts = world.apply(world.anomaly("solo", "a1", stamp=stamp), world.anomaly("solo", "a2", stamp=stamp))
    assert codes(receipts) == [Code.OK, Code.DUPLICATE]


@pytest.mark.parametrize(
    ("offset_ms", "code"), [(-300_000, Code.OK), (300_000, Code.OK), (-301_000, Code.STALE), (301_000, Code.STALE)]
)
def test_messages_five_minutes_off_block_time_are_stale(offset_ms: int, code: Code) -> None:
    world = World()
    assert codes(world.apply(world.anomaly("solo", "a", stamp=world.stamp("solo", ts_ms=world.now_ms + offset_ms)))) == [code]


def test_a_producer_has_64_instances_at_a_time_and_idle_ones_make_room() -> None:
    world = World()
    draft = world.state.draft(height=1, time_ms=START_MS)
    for instance in range(INSTANCES_MAX):
        assert use_nonce(draft, PRODUCER, Nonce(START_MS, instance, 0).encode()) is Code.OK
    assert use_nonce(draft, PRODUCER, Nonce(START_MS, 99, 0).encode()) is Code.TOO_MANY_INSTANCES
    later = START_MS + 600_001
    draft.time_ms = later
    assert use_nonce(draft, PRODUCER, Nonce(later, 99, 0).encode()) is Code.OK
    assert len(draft.windows_of(PRODUCER)) == 1


def test_a_nonce_whose_own_time_is_long_past_is_stale() -> None:
    draft = World().state.draft(height=1, time_ms=START_MS)
    assert use_nonce(draft, PRODUCER, Nonce(START_MS - 600_001, 1, 0).encode()) is Code.STALE
    assert use_nonce(draft, PRODUCER, Nonce(START_MS - 600_000, 1, 0).encode()) is Code.OK


def test_a_draft_leaves_the_state_it_came_from_alone() -> None:
    state: State = World().state
    root = state.root
    draft = state.draft(height=1, time_ms=START_MS)
    use_nonce(draft, PRODUCER, Nonce(START_MS, 1, 0).encode())
    assert not state.tables.windows
    assert state.root == root
