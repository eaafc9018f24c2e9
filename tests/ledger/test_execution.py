"""What a validator asks of the ledger: an honest proposer's choice, the cheap limits, intrinsic validity."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cybermesh import genesis as g
from cybermesh.ledger.execution import choose, execute, is_valid, is_within_limits, would_admit
from cybermesh.ledger.receipts import JUNK, Code
from cybermesh.ledger.state import Applied
from cybermesh.messages import Anomaly
from tests.ledger.history import History
from tests.ledger.world import World, codes, deployment, key, policy


def test_anomaly_comes_before_evidence_before_policy_whatever_the_order_of_arrival() -> None:
    world = World()
    anomaly, evidence, wanted = world.case("solo", "p1")
    chosen = choose(world.state, height=1, time_ms=world.now_ms, candidates=[wanted, evidence, anomaly])
    assert chosen.payload == (anomaly, evidence, wanted)
    assert chosen.refused == ()
    assert codes(world.apply(*chosen.payload)) == [Code.OK] * 3


def test_what_anybody_could_fill_blocks_with_is_left_out_and_given_up() -> None:
    world = World()
    used = world.anomaly("solo", "old")
    world.apply(used)
    stale = world.anomaly("solo", "stale", stamp=world.stamp("solo", ts_ms=world.now_ms - 400_000))
    stranger = world.anomaly("mallory", "x")
    garbage = b"\x01garbage"
    good = world.anomaly("solo", "new")
    chosen = choose(world.state, height=2, time_ms=world.now_ms, candidates=[used, stale, stranger, garbage, good, good])
    assert chosen.payload == (good,)
    assert set(chosen.refused) == {used, stale, stranger, garbage}


def test_what_the_governance_refuses_or_keeps_is_committed_so_that_it_can_be_proved() -> None:
    world = World()
    waiting = world.case("solo", "p1")[2]
    pending = world.case("north-1", "p2")
    refused = [world.policy("solo", "p3", policy("127.0.0.1")), world.command("alice", "revoke", policy_id="none")]
    chosen = choose(world.state, height=1, time_ms=world.now_ms, candidates=[waiting, *pending, *refused])
    assert set(chosen.payload) == {waiting, *pending, *refused}
    assert chosen.refused == ()
    assert {Code.PROTECTED_TARGET, Code.UNKNOWN_POLICY} <= set(codes(world.apply(*chosen.payload)))


def test_the_callers_clock_ends_the_choice_but_never_before_the_first() -> None:
    world = World()
    sent = [world.anomaly("solo", f"a{i}") for i in range(5)]
    answers = iter([False, False, True])
    how = {"height": 1, "time_ms": world.now_ms, "candidates": sent}
    assert choose(world.state, **how, is_time_up=lambda: next(answers)).payload == tuple(sent[:3])  # type: ignore[arg-type]
    assert choose(world.state, **how, is_time_up=lambda: True).payload == tuple(sent[:1])  # type: ignore[arg-type]


def test_a_proposal_keeps_its_limits_and_always_takes_one() -> None:
    genesis = deployment(block_limits=g.BlockLimits(proposal_transactions=3, proposal_bytes=2_048))
    world = World(genesis)
    small = [world.anomaly("solo", f"a{i}") for i in range(5)]
    chosen = choose(world.state, height=1, time_ms=world.now_ms, candidates=small)
    assert chosen.payload == tuple(small[:3])
    assert chosen.refused == ()
    big = world.anomaly("solo", "big", details={"pad": "x" * 4_000})
    chosen = choose(world.state, height=1, time_ms=world.now_ms, candidates=[big, *small])
    assert chosen.payload == (big,)


@given(st.integers(0, 2**32))
@settings(max_examples=25)
def test_what_an_honest_proposer_chooses_is_always_a_valid_block_without_junk(seed: int) -> None:
    history = History(random.Random(seed))
    for _ in range(6):
        history.step()
    world = history.world
    history.step()
    candidates = [*history.sent, *world.case("solo", "fresh"), b"", b"\x07"]
    random.Random(seed).shuffle(candidates)
    chosen = choose(world.state, height=world.height + 1, time_ms=world.now_ms, candidates=candidates)
    block = world.block(chosen.payload)
    assert is_within_limits(world.state, block)
    applied = execute(world.state, block)
    assert isinstance(applied, Applied)
    assert not [
        receipt for receipt in applied.receipts if not receipt.is_system and receipt.code in JUNK and not receipt.detail
    ]


def test_the_cheap_limits_agree_with_execution() -> None:
    world = World()
    junk = [world.anomaly("mallory", f"a{i}") for i in range(17)]
    for sent in (junk, junk[:16], [b"\x01x"], [junk[0], junk[0]], [world.anomaly("solo", "a")]):
        block = world.block(sent)
        assert is_within_limits(world.state, block) == (execute(world.state, block) is not None)


def test_a_message_is_valid_by_itself_or_not() -> None:
    world = World()
    good = world.anomaly("mallory", "a")
    assert is_valid(world.genesis, good)
    for position in range(0, len(good), 7):
        broken = bytearray(good)
        broken[position] ^= 1
        assert not is_valid(world.genesis, bytes(broken))
    assert not is_valid(world.genesis, b"")


def test_a_forwarded_message_is_admitted_when_a_block_now_would_take_it() -> None:
    world = World()
    good = world.anomaly("solo", "a")
    message = would_admit(world.state, good, world.now_ms)
    assert isinstance(message, Anomaly)
    assert would_admit(world.state, good, world.now_ms + 301_000) is None
    assert would_admit(world.state, world.anomaly("mallory", "a"), world.now_ms) is None
    assert would_admit(world.state, b"\x01", world.now_ms) is None
    world.apply(good)
    assert would_admit(world.state, good, world.now_ms) is None


def test_a_key_that_a_block_adds_is_unknown_in_that_block_so_its_proposer_leaves_its_messages_out() -> None:
    """Else more of them than the junk a block may hold would make an honest proposer's own block invalid."""
    world = World(deployment(governance=g.Governance(operators_needed=1)))
    added = [{"name": "carol", "pubkey": key("carol").public.hex()}]
    change = world.command("alice", "key_ring", add_operators=added)
    early = [world.command("carol", "label", anomaly_id=f"a{i}", label="benign") for i in range(20)]
    chosen = choose(world.state, height=1, time_ms=world.now_ms, candidates=[change, *early])
    assert chosen.payload == (change,)
    assert codes(world.apply(*chosen.payload)) == [Code.OK]


def test_a_proposers_limits_above_those_of_the_block_do_not_count() -> None:
    limits = g.BlockLimits(transactions=3, proposal_transactions=10)
    world = World(deployment(block_limits=limits))
    sent = [world.anomaly("solo", f"a{i}") for i in range(5)]
    chosen = choose(world.state, height=1, time_ms=world.now_ms, candidates=sent)
    assert chosen.payload == tuple(sent[:3])
    assert codes(world.apply(*chosen.payload)) == [Code.OK] * 3
