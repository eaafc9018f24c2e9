"""The state machine as a whole: determinism, what the root covers, snapshots, invalid blocks, and that nothing raises."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import immutables
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cybermesh import genesis as g
from cybermesh.ledger import encoding, receipts, records
from cybermesh.ledger.lattice import LatticeHash
from cybermesh.ledger.merkle import Frontier
from cybermesh.ledger.receipts import Code, Receipt
from cybermesh.ledger.snapshot import decode_snapshot, encode_snapshot
from cybermesh.ledger.state import Applied, InvalidBlock, LedgerBlock, State
from cybermesh.ledger.tables import Tables, encode_entry
from cybermesh.messages import TxKind
from tests.ledger.history import History
from tests.ledger.world import World, codes, deployment, policy

ROOT = Path(__file__).resolve().parents[2]
SEEDS = st.integers(0, 2**32)


def played(seed: int, blocks: int) -> History:
    history = History(random.Random(seed))
    for _ in range(blocks):
        history.step()
    return history


def sum_of(tables: Tables) -> LatticeHash:
    entries = [
        encode_entry(table.name, name, record)
        for table in dataclasses.fields(Tables)
        for name, record in getattr(tables, table.name).items()
    ]
    return LatticeHash().updated((), entries)


def drained(schedule: object) -> list[object]:
    out = []
    while (first := schedule.first()) is not None:  # type: ignore[attr-defined]
        out.append(first)
        schedule = schedule.without_first()  # type: ignore[attr-defined]
    return out


@given(SEEDS, st.integers(1, 25))
@settings(max_examples=40)
def test_no_history_raises_and_every_invariant_holds(seed: int, blocks: int) -> None:
    history = played(seed, blocks)
    world, state = history.world, history.world.state
    assert state.lattice == sum_of(state.tables)
    assert state.log == Frontier().append([receipt.leaf for receipt in world.receipts])
    numbers = [effect.decision_seq for receipt in world.receipts for effect in receipt.decisions]
    assert sorted(numbers) == list(range(1, state.decision_seq + 1))
    assert set(world.rules) == set(numbers)
    for record in state.decisions():
        assert record.expires_at_ms - world.now_ms <= 1_000 * record.ttl_s
    limits = world.genesis.limits
    assert sum(record.targets for record in state.decisions() if not record.is_operators) <= limits.targets_active
    assert state.index.targets_detectors + state.index.targets_operators == sum(record.targets for record in state.decisions())


@given(SEEDS, st.integers(1, 25))
@settings(max_examples=30)
def test_a_snapshot_gives_back_the_state_and_the_same_future(seed: int, blocks: int) -> None:
    history = played(seed, blocks)
    state = history.world.state
    data = encode_snapshot(state)
    again = decode_snapshot(history.world.genesis, data, state.root)
    assert again == state
    assert encode_snapshot(again) == data
    for name in (
        "instances",
        "tallies",
        "reports",
        "missing",
        "pending_on",
        "pending_rules",
        "rules",
        "targets",
        "held",
        "protected",
        "allowed",
    ):
        assert getattr(again.index, name) == getattr(state.index, name), name
    assert (again.index.targets_detectors, again.index.targets_operators) == (
        state.index.targets_detectors,
        state.index.targets_operators,
    )
    assert again.next_due_ms == state.next_due_ms
    history.step()
    applied = again.apply(LedgerBlock(history.world.height, history.world.now_ms, history.last))
    assert isinstance(applied, Applied)
    assert applied.state.root == history.world.state.root


@given(SEEDS)
@settings(max_examples=10)
def test_applying_a_block_twice_gives_equal_bytes_and_leaves_the_parent_alone(seed: int) -> None:
    history = played(seed, 6)
    state, root = history.world.state, history.world.state.root
    block = history.world.block(
        [*history.world.case("solo", "twice"), history.world.command("alice", "approve", policy_id="p1")]
    )
    one, two = state.apply(block), state.apply(block)
    assert isinstance(one, Applied)
    assert isinstance(two, Applied)
    assert [r.encode() for r in one.receipts] == [r.encode() for r in two.receipts]
    assert one.state.root == two.state.root
    assert state.root == root == State(state.genesis, state.tables, state.index, state.lattice, state.log).root


def test_processes_with_other_hash_seeds_agree_byte_for_byte() -> None:
    program = [sys.executable, "-m", "tests.ledger.history", "7", "40"]
    outputs = {
        subprocess.run(
            program, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == 40


def full_state() -> State:
    """A state with at least one entry in every table."""
    world = World()
    world.apply(*world.case("solo", "gone", policy("203.0.113.9", ttl=60), "203.0.113.9"))
    world.after(60).apply(*world.case("north-1", "pending"), *world.case("solo", "active", entity="203.0.113.8"))
    world.apply(
        world.command("alice", "allow_list", add=["192.0.2.7/32"]),
        world.command("alice", "protected_networks", add=["192.0.2.8/32"]),
    )
    for table in dataclasses.fields(Tables):
        assert getattr(world.state.tables, table.name), table.name
    return world.state


def other(value: object) -> object:
    """A value of the same type that differs."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str() if type(value) is not str:
            return next(member for member in type(value) if member != value)  # type: ignore[attr-defined]
        case str():
            return value + "x"
        case bytes():
            return value + b"x"
        case tuple():
            return (*value, value[0]) if value else (1,)
    raise AssertionError(value)


def test_the_root_covers_every_field_of_every_kind_of_entry() -> None:
    state = full_state()
    for table in dataclasses.fields(Tables):
        entries: immutables.Map[bytes | str, object] = getattr(state.tables, table.name)
        name = min(entries, key=str)
        record = entries[name]
        before = encode_entry(table.name, name, record)
        roots = {state.root}
        for field in dataclasses.fields(record):  # type: ignore[arg-type]
            altered = dataclasses.replace(record, **{field.name: other(getattr(record, field.name))})  # type: ignore[type-var]
            lattice = state.lattice.updated([before], [encode_entry(table.name, name, altered)])
            roots.add(dataclasses.replace(state, lattice=lattice).root)
        roots.add(dataclasses.replace(state, lattice=state.lattice.updated([before], [])).root)
        assert len(roots) == 2 + len(dataclasses.fields(record)), table.name  # type: ignore[arg-type]
    assert dataclasses.replace(state, log=state.log.append([bytes(32)])).root != state.root


def test_a_changed_line_of_a_snapshot_is_refused() -> None:
    state = full_state()
    data = encode_snapshot(state)
    lines = data.split(b"\n")
    for index, line in enumerate(lines[:-1]):
        without = b"\n".join([*lines[:index], *lines[index + 1 :]])
        twice = b"\n".join([*lines[: index + 1], line, *lines[index + 1 :]])
        spaced = b"\n".join([*lines[:index], line.replace(b",", b", ", 1), *lines[index + 1 :]])
        for forged in (without, twice, spaced):
            with pytest.raises(encoding.EncodingError):
                decode_snapshot(state.genesis, forged, state.root)
    for forged in (data[:-1], data + b"x", b"", b"\n", data.replace(b'"genesis"', b'"genesiz"')):
        with pytest.raises(encoding.EncodingError):
            decode_snapshot(state.genesis, forged, state.root)
    with pytest.raises(encoding.EncodingError):
        decode_snapshot(deployment(chain_name="another"), data, state.root)


# Blocks that are invalid as such


def reason(applied: Applied | InvalidBlock) -> str:
    assert isinstance(applied, InvalidBlock)
    return applied.reason


def test_a_block_over_its_size_or_with_a_transaction_twice_is_invalid() -> None:
    world = World(deployment(block_limits=g.BlockLimits(transactions=2)))
    sent = [world.anomaly("solo", f"a{i}") for i in range(3)]
    assert "3 transactions" in reason(world.try_apply(*sent))
    assert "twice" in reason(world.try_apply(sent[0], sent[0]))
    big = World(deployment(block_limits=g.BlockLimits(size_bytes=1_114_112)))
    heavy = [big.anomaly("solo", f"a{i}", details={"pad": "x" * 450_000}) for i in range(3)]
    assert "bytes" in reason(big.try_apply(*heavy))
    assert isinstance(big.try_apply(*heavy[:2]), Applied)


@pytest.mark.parametrize(
    "raw", [b"", b"\x00", b"\x63abc", bytes([TxKind.ANOMALY]), bytes([TxKind.POLICY]) + b"\xff\xff"], ids=repr
)
def test_bytes_that_are_no_message_make_a_block_invalid(raw: bytes) -> None:
    assert reason(World().try_apply(raw)).startswith("transaction 0")


def test_more_than_sixteen_that_an_honest_proposer_leaves_out_make_a_block_invalid() -> None:
    world = World()
    junk = [world.anomaly("mallory", f"a{i}") for i in range(17)]
    assert codes(world.apply(*junk[:16])) == [Code.UNKNOWN_PRODUCER] * 16
    assert "17" in reason(world.try_apply(*junk))
    stale = [world.anomaly("solo", f"s{i}", stamp=world.stamp("solo", ts_ms=world.now_ms - 400_000)) for i in range(9)]
    used = [world.anomaly("solo", f"d{i}", stamp=world.stamp("solo", counter=77)) for i in range(9)]
    assert "17" in reason(world.try_apply(*stale, *used))
    # What is refused for what it asks, not for who asks when, is nobody's trick to fill blocks.
    refused = [world.policy("solo", f"r{i}", policy("127.0.0.1")) for i in range(40)]
    assert set(codes(world.apply(*refused))) == {Code.PROTECTED_TARGET}


@given(st.lists(st.tuples(st.sampled_from(list(TxKind)), st.binary(max_size=40)), max_size=3))
def test_any_bytes_are_an_invalid_block_or_receipts(parts: list[tuple[TxKind, bytes]]) -> None:
    transactions = tuple(bytes([kind]) + body for kind, body in parts)
    applied = World().try_apply(*transactions)
    assert isinstance(applied, InvalidBlock) or len(applied.receipts) == len(transactions)


def test_an_empty_block_changes_nothing_but_what_time_does() -> None:
    world = World()
    world.apply(*world.case("north-1", "p1"))
    root = world.state.root
    assert world.wait(30) == ()
    assert world.state.root == root
    world.wait(120)
    assert not world.state.tables.anomalies
    assert not world.state.tables.evidence
    assert world.state.root != root


# Encodings


def every_dataclass() -> list[type]:
    modules = (receipts, records)
    return [
        cls for module in modules for cls in vars(module).values() if dataclasses.is_dataclass(cls) and isinstance(cls, type)
    ]


@pytest.mark.parametrize("cls", every_dataclass(), ids=lambda cls: cls.__name__)
def test_fields_stand_in_the_order_of_their_names(cls: type) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    assert names == sorted(names)


@given(SEEDS)
@settings(max_examples=15)
def test_receipts_are_canonical_json_and_come_back_equal(seed: int) -> None:
    for receipt in played(seed, 8).world.receipts:
        data = receipt.encode()
        assert receipts.decode(data) == receipt
        assert orjson.dumps(orjson.loads(data), option=orjson.OPT_SORT_KEYS) == data


@given(st.binary(max_size=60), st.integers(0, 10_000), st.integers(0, 255))
def test_other_bytes_are_no_receipt(data: bytes, position: int, value: int) -> None:
    world = World()
    good = world.apply(*world.case("solo", "p1"))[2].encode()
    mutated = bytearray(good)
    mutated[position % len(good)] = value
    for candidate in (data, bytes(mutated)):
        try:
            decoded = receipts.decode(candidate)
        except receipts.ReceiptError:
            continue
        assert isinstance(decoded, Receipt)
        assert decoded.encode() == candidate
