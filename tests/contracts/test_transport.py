"""What every transport between validators must do, over memory and over TCP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport import Frame, Kind, Transport
from cybermesh.consensus.transport.memory import MemoryNetwork
from cybermesh.consensus.transport.queues import PeerQueue
from cybermesh.consensus.transport.tcp import TcpLimits, TcpTransport, listen_on
from cybermesh.keys import SigningKey

N = 3
KEYS = sorted(
    (SigningKey(hashlib.sha256(b"validator %d" % number).digest()) for number in range(N)), key=lambda key: key.public
)
COMMITTEE = Committee.of(bytes(32), [key.public for key in KEYS])


class OverMemory:
    """The transports of one process."""

    def __init__(self) -> None:
        self._network = MemoryNetwork(N)

    @asynccontextmanager
    async def endpoint(self, index: int) -> AsyncIterator[Transport]:
        with self._network.endpoint(index) as transport:
            yield transport


class OverTcp:
    """Transports that find each other on ports the system chose; an endpoint that is opened again keeps its port."""

    def __init__(self) -> None:
        self._listeners = [listen_on(("127.0.0.1", 0)) for _ in range(N)]
        self._addresses = {index: listener.getsockname()[:2] for index, listener in enumerate(self._listeners)}

    @asynccontextmanager
    async def endpoint(self, index: int) -> AsyncIterator[Transport]:
        # A long head start for the lower index: no spare connections, on which frames would be lost as the contract allows.
        limits = TcpLimits(redial_first_s=2.0 * index or 0.01, redial_max_s=2.0 * index or 0.01)
        transport = TcpTransport(COMMITTEE, KEYS[index], self._listeners[index], self._addresses, lambda: 0.5, limits)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(transport.run(), name=f"transport {index}")
            try:
                yield transport
            finally:
                task.cancel()

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


@pytest.fixture(params=["memory", "tcp"])
def network(request):
    if request.param == "memory":
        yield OverMemory()
    else:
        tcp = OverTcp()
        yield tcp
        tcp.close()


async def next_frame(endpoint: Transport) -> Frame:
    return await asyncio.wait_for(endpoint.receive(), 10)


async def frames(endpoint: Transport, count: int) -> list[Frame]:
    return [await next_frame(endpoint) for _ in range(count)]


async def connect(*endpoints: Transport) -> None:
    """Return when all of them have heard of each other."""
    for endpoint in endpoints:
        for _ in range(len(endpoints) - 1):
            assert (await next_frame(endpoint)).is_connection


async def test_both_sides_learn_of_a_connection_and_frames_keep_their_order(network):
    async with network.endpoint(0) as zero, network.endpoint(1) as one:
        assert await frames(one, 1) == [Frame(0, b"")]
        assert await frames(zero, 1) == [Frame(1, b"")]
        for number in range(20):
            zero.send(1, Kind.VOTE, b"%d" % number)
        assert await frames(one, 20) == [Frame(0, b"%d" % number) for number in range(20)]


async def test_a_large_frame_arrives_whole(network):
    large = bytes(range(256)) * (4 * 1024 * 8)
    async with network.endpoint(0) as zero, network.endpoint(1) as one:
        await connect(zero, one)
        zero.send(1, Kind.PROPOSAL, large)
        zero.send(1, Kind.VOTE, b"after it")
        assert [frame.data for frame in await frames(one, 2)] == [large, b"after it"]


async def test_a_flooding_peer_does_not_hold_up_another(network):
    async with AsyncExitStack() as stack:
        zero, one, two = [await stack.enter_async_context(network.endpoint(index)) for index in range(3)]
        await connect(zero, one, two)
        for number in range(500):
            zero.send(2, Kind.VOTE, b"flood %d" % number)
        one.send(2, Kind.TIMEOUT, b"quiet")
        # Taking turns, a frame of the other peer comes next as soon as it is there.
        heard = []
        while Frame(1, b"quiet") not in heard:
            heard += await frames(two, 1)
        assert len(heard) < 500
        assert heard[:-1] == [Frame(0, b"flood %d" % number) for number in range(len(heard) - 1)]


async def test_overflow_drops_the_oldest_of_its_kind_and_is_counted(network):
    async with network.endpoint(0) as zero, network.endpoint(1) as one:
        await connect(zero, one)
        zero.send(1, Kind.TIMEOUT, b"kept")
        for number in range(3_000):
            zero.send(1, Kind.VOTE, b"%d" % number)
        received = [(await frames(one, 1))[0].data]
        while received[-1] != b"2999":
            received.append((await frames(one, 1))[0].data)
        assert received[0] == b"kept"
        votes = [int(vote) for vote in received[1:]]
        assert votes == sorted(votes)
        assert len(received) + zero.lost + one.lost == 3_001


async def test_a_peer_that_was_started_anew_is_connected_again_and_hears_nothing_from_before(network):
    async with network.endpoint(0) as zero:
        async with network.endpoint(1) as one:
            await connect(zero, one)
            zero.send(1, Kind.VOTE, b"lost with the connection")
        zero.send(1, Kind.VOTE, b"to nobody")
        one.send(0, Kind.VOTE, b"from nobody")
        async with network.endpoint(1) as one:
            # The connection is in both inboxes before what follows it; nothing of the former one is.
            assert await frames(one, 1) == [Frame(0, b"")]
            assert await frames(zero, 1) == [Frame(1, b"")]
            zero.send(1, Kind.VOTE, b"new")
            one.send(0, Kind.VOTE, b"new too")
            assert await frames(one, 1) == [Frame(0, b"new")]
            assert await frames(zero, 1) == [Frame(1, b"new too")]


def test_a_frame_larger_than_the_queue_is_refused_and_costs_the_others_nothing():
    queue = PeerQueue(frames_max=10, bytes_max=100)
    assert queue.put(Kind.VOTE, b"v" * 40)
    assert not queue.put(Kind.BLOCKS, b"b" * 101)
    assert queue.put(Kind.VOTE, b"w" * 70)
    assert (len(queue), queue.dropped, queue.superseded) == (1, 1, 1)
    assert queue.take() == b"w" * 70
