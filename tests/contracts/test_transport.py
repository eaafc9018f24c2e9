"""What every transport between validators must do; today's one is memory, TCP joins the list."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from cybermesh.consensus.transport import Frame, Kind
from cybermesh.consensus.transport.memory import MemoryNetwork
from cybermesh.consensus.transport.queues import PeerQueue


@pytest.fixture
def network():
    return MemoryNetwork(3)


async def frames(endpoint, count: int) -> list[Frame]:
    return [await asyncio.wait_for(endpoint.receive(), 5) for _ in range(count)]


async def test_both_sides_learn_of_a_connection_and_frames_keep_their_order(network):
    with network.endpoint(0) as zero, network.endpoint(1) as one:
        assert [(frame.peer, frame.is_connection) for frame in await frames(one, 1)] == [(0, True)]
        assert [(frame.peer, frame.is_connection) for frame in await frames(zero, 1)] == [(1, True)]
        for number in range(20):
            zero.send(1, Kind.VOTE, b"%d" % number)
        assert [(frame.peer, frame.data) for frame in await frames(one, 20)] == [(0, b"%d" % number) for number in range(20)]


async def test_a_flooding_peer_does_not_hold_up_another(network):
    with ExitStack() as stack:
        zero, one, two = [stack.enter_context(network.endpoint(index)) for index in range(3)]
        await frames(two, 2)
        for number in range(500):
            zero.send(2, Kind.VOTE, b"flood %d" % number)
        one.send(2, Kind.TIMEOUT, b"quiet")
        assert Frame(1, b"quiet") in await frames(two, 2)


async def test_overflow_drops_the_oldest_of_its_kind_and_is_counted(network):
    with network.endpoint(0) as zero, network.endpoint(1) as one:
        await frames(one, 1)
        zero.send(1, Kind.SYNC, b"kept")
        for number in range(2_000):
            zero.send(1, Kind.VOTE, b"%d" % number)
        received = await frames(one, 1_024)
        assert received[0].data == b"kept"
        assert received[-1].data == b"1999"
        assert one.lost == 2_001 - 1_024


async def test_a_closed_endpoint_receives_nothing_and_a_new_one_starts_empty(network):
    with network.endpoint(0) as zero:
        with network.endpoint(1) as one:
            zero.send(1, Kind.VOTE, b"lost with the connection")
        zero.send(1, Kind.VOTE, b"to nobody")
        one.send(0, Kind.VOTE, b"from nobody")
        with network.endpoint(1) as one:
            zero.send(1, Kind.VOTE, b"new")
            assert [frame.data for frame in await frames(one, 2)] == [b"", b"new"]
        assert [frame.data for frame in await frames(zero, 1)] == [b""]


def test_a_frame_larger_than_the_queue_is_refused_and_costs_the_others_nothing():
    queue = PeerQueue(frames_max=10, bytes_max=100)
    assert queue.put(Kind.VOTE, b"v" * 40)
    assert not queue.put(Kind.BLOCKS, b"b" * 101)
    assert queue.put(Kind.VOTE, b"w" * 70)
    assert (len(queue), queue.dropped, queue.superseded) == (1, 1, 1)
    assert queue.take() == b"w" * 70
