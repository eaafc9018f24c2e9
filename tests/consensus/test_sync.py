"""Who is asked for missing blocks, and how much one answer holds."""

from __future__ import annotations

import pytest

from cybermesh.consensus.events import ServeBlocks
from cybermesh.consensus.sync import (
    ANSWER_BLOCKS_MAX,
    CatchUp,
    Muster,
    PeerBudget,
    PeerLimit,
    pack,
    splice,
    with_certificates,
)
from cybermesh.consensus.types import Blocks, Height, Round


@pytest.fixture
def chain(bench):
    blocks, qc = [], None
    for round_ in range(1, ANSWER_BLOCKS_MAX + 10):
        blocks.append(bench.block(round_, qc))
        qc = bench.qc(blocks[-1])
    return blocks


def is_certified(answer: Blocks) -> bool:
    certificates = [*(block.qc for block in answer.blocks[1:]), answer.certificate]
    return all(qc.block_hash == block.hash for block, qc in zip(answer.blocks, certificates, strict=True))


def serve(bench, chain, start: int, stored_to: int) -> ServeBlocks:
    tail = tuple(chain[max(start, stored_to + 1) - 1 :])
    return ServeBlocks(1, Height(start), Height(stored_to), tail, bench.qc(chain[-1]))


def test_an_answer_holds_a_bounded_number_of_blocks_each_certified(bench, chain):
    answer = pack(1, chain, bench.qc(chain[-1]))
    assert len(answer.blocks) == ANSWER_BLOCKS_MAX
    assert is_certified(answer)
    rest = pack(1, chain[ANSWER_BLOCKS_MAX:], bench.qc(chain[-1]))
    assert [*answer.blocks, *rest.blocks] == chain
    assert is_certified(rest)
    assert pack(1, [], bench.genesis) is None


def test_an_answer_holds_a_bounded_number_of_bytes_and_at_least_one_block(bench):
    large = [b"x" * 3_000_000]
    one = bench.block(1, payload=large)
    two = bench.block(2, bench.qc(one), payload=[b"y" * 3_000_000])
    answer = pack(1, [one, two], bench.qc(two))
    assert answer.blocks == (one,)
    assert is_certified(answer)


def test_stored_and_uncommitted_blocks_are_joined(bench, chain):
    short = chain[:10]
    answer = splice(1, serve(bench, short, 3, 7), short[2:7])
    assert list(answer.blocks) == short[2:]
    assert is_certified(answer)


def test_a_store_that_is_behind_gives_what_it_can_certify(bench, chain):
    short = chain[:10]
    answer = splice(1, serve(bench, short, 3, 7), short[2:5])
    assert list(answer.blocks) == short[2:4]
    assert is_certified(answer)
    assert splice(1, serve(bench, short, 3, 7), []) is None


def test_a_request_above_the_store_is_answered_from_memory(bench, chain):
    short = chain[:10]
    answer = splice(1, serve(bench, short, 8, 7), [])
    assert list(answer.blocks) == short[7:]


def test_the_askers_own_certificate_counts_for_the_last_block(bench, chain):
    own = bench.qc(chain[4])
    pairs = with_certificates(Blocks(1, tuple(chain[2:5]), bench.genesis), own)
    assert [qc.block_hash for _, qc in pairs] == [block.hash for block in chain[2:5]]


def test_signers_are_asked_first_then_the_others_and_never_oneself(bench, chain):
    catch_up = CatchUp(5, 1, patience_ms=400, delay_ms=20)
    assert catch_up.ask(0, Height(1)) is None
    catch_up.want(bench.qc(chain[0], [0, 1, 2]), 0)
    assert catch_up.ask(19, Height(1)) is None
    asked = [catch_up.ask(20 + 400 * turn, Height(1)).to for turn in range(5)]
    assert set(asked[:2]) == {0, 2}
    assert set(asked[2:4]) == {3, 4}
    assert asked[4] == asked[0]
    catch_up.go_on(5_000)
    assert catch_up.ask(5_000, Height(9)).to == asked[4]
    catch_up.satisfied()
    assert catch_up.ask(9_000, Height(1)) is None


def test_an_answer_is_given_once_per_pause_and_peer():
    limit = PeerLimit(50)
    assert [limit.allows(1, moment) for moment in (0, 49, 50, 99)] == [True, False, True, False]
    assert limit.allows(2, 49)


def test_a_muster_counts_validators_not_answers_and_asks_again():
    muster = Muster(3, 0, 1_000)
    assert muster.ask(1_000)
    assert not muster.ask(1_200)
    assert muster.ask(1_500)
    muster.report(1, Round(4))
    muster.report(1, Round(5))
    assert muster.highest(Round(2)) is None
    muster.report(2, Round(1))
    assert muster.highest(Round(2)) == 5


def test_a_budget_runs_out_and_refills_with_time():
    budget = PeerBudget(3, 100)
    assert [budget.allows(1, 0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert budget.allows(2, 0)
    assert not budget.allows(1, 99)
    assert budget.allows(1, 100)
    assert [budget.allows(1, 10_000) for _ in range(5)] == [True] * 3 + [False] * 2
