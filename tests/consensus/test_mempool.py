"""Bounds, fairness and order of the waiting transactions."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cybermesh.consensus.mempool import Admission, Mempool, PendingTransaction
from cybermesh.messages import tx_digest


def tx(producer: str, text: str, priority: int = 0) -> PendingTransaction:
    data = f"{producer}/{text}".encode()
    return PendingTransaction(tx_digest(data), producer.encode(), priority, data)


def names(mempool: Mempool, count: int = 100, exclude: frozenset[bytes] = frozenset()) -> list[str]:
    return [each.data.decode() for each in mempool.candidates(count_max=count, bytes_max=10_000, exclude=exclude)]


def test_severe_transactions_come_first_and_producers_take_turns():
    mempool = Mempool()
    for each in [tx("a", "1"), tx("a", "2"), tx("a", "3"), tx("b", "1"), tx("c", "low", -1), tx("b", "urgent", 9)]:
        mempool.add(each)
    assert names(mempool) == ["b/urgent", "a/1", "b/1", "a/2", "a/3", "c/low"]
    assert names(mempool, 3) == ["b/urgent", "a/1", "b/1"]
    assert names(mempool, exclude=frozenset({tx("a", "1").digest})) == ["b/urgent", "b/1", "a/2", "a/3", "c/low"]


def test_one_producer_cannot_fill_it():
    mempool = Mempool(bytes_max=1_000, producer_bytes_max=250)
    loud = [mempool.add(tx("a", "x" * 90 + str(number))) for number in range(5)]
    assert loud == [Admission.ADDED, Admission.ADDED, *[Admission.FULL] * 3]
    assert mempool.add(tx("b", "x" * 90)) is Admission.ADDED


def test_a_full_mempool_refuses_and_takes_again_when_there_is_room():
    mempool = Mempool(bytes_max=200, producer_bytes_max=200)
    first, second = tx("a", "x" * 120), tx("b", "y" * 120)
    assert mempool.add(first) is Admission.ADDED
    assert mempool.add(first) is Admission.DUPLICATE
    assert mempool.add(second) is Admission.FULL
    mempool.remove([first.digest, b"unknown"])
    assert mempool.add(second) is Admission.ADDED


def test_a_block_takes_at_least_one_transaction_however_large():
    mempool = Mempool()
    mempool.add(tx("a", "x" * 500))
    mempool.add(tx("a", "y" * 500))
    assert len(mempool.candidates(count_max=10, bytes_max=100, exclude=frozenset())) == 1


def test_the_oldest_is_by_arrival_not_by_priority():
    mempool = Mempool()
    first, second = tx("a", "1"), tx("b", "2", 9)
    mempool.add(first)
    mempool.add(second)
    assert mempool.oldest(frozenset()) == first
    assert mempool.oldest({first.digest}) == second
    assert mempool.oldest({first.digest, second.digest}) is None


class MempoolMachine(RuleBasedStateMachine):
    """Any sequence of calls against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.mempool = Mempool(bytes_max=600, producer_bytes_max=200)
        self.model: dict[bytes, PendingTransaction] = {}

    @rule(producer=st.sampled_from("abcd"), text=st.text("xyz", max_size=60), priority=st.integers(0, 2))
    def add(self, producer: str, text: str, priority: int) -> None:
        transaction = tx(producer, text, priority)
        size = len(transaction.data)
        held = sum(len(each.data) for each in self.model.values() if each.producer == transaction.producer)
        fits = held + size <= 200 and self.mempool.size_bytes + size <= 600
        admission = self.mempool.add(transaction)
        if transaction.digest in self.model:
            assert admission is Admission.DUPLICATE
        else:
            assert admission is (Admission.ADDED if fits else Admission.FULL)
            if fits:
                self.model[transaction.digest] = transaction

    @rule(number=st.integers(0, 20))
    def remove(self, number: int) -> None:
        chosen = list(self.model)[:number:2]
        self.mempool.remove(chosen)
        for digest in chosen:
            del self.model[digest]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        candidates = self.mempool.candidates(count_max=1_000, bytes_max=10**6, exclude=frozenset())
        assert {each.digest for each in candidates} == set(self.model)
        assert len(candidates) == len(self.mempool) == len(self.model)
        assert self.mempool.size_bytes == sum(len(each.data) for each in self.model.values())
        assert [each.priority for each in candidates] == sorted((each.priority for each in candidates), reverse=True)
        assert self.mempool.oldest(frozenset()) == next(iter(self.model.values()), None)


MempoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestMempool = MempoolMachine.TestCase


def test_what_failed_in_three_own_blocks_is_set_aside_for_ten_minutes():
    mempool = Mempool()
    poison, harmless = tx("a", "poison"), tx("a", "harmless")
    mempool.add(poison)
    mempool.add(harmless)
    mempool.abandoned([poison.digest, harmless.digest], 0)
    mempool.abandoned([poison.digest, tx("a", "unknown").digest], 0)
    assert names(mempool) == ["a/poison", "a/harmless"]
    mempool.abandoned([poison.digest], 1_000)
    assert names(mempool) == ["a/harmless"]
    assert mempool.oldest(()) == harmless
    assert poison.digest in mempool, "others may still propose it"
    mempool.take_back(1_000 + 599_999)
    assert mempool.aside == 1
    version = mempool.version
    mempool.take_back(1_000 + 600_000)
    assert names(mempool) == ["a/poison", "a/harmless"]
    assert mempool.version > version
    mempool.abandoned([poison.digest] * 3, 700_000)
    mempool.remove([poison.digest])
    assert (mempool.aside, mempool.add(poison)) == (0, Admission.ADDED)
    assert names(mempool) == ["a/harmless", "a/poison"], "a transaction that comes again begins anew"
