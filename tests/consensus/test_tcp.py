"""TCP between validators against peers that misbehave; what all transports share is in tests/contracts."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.transport import Frame, Kind, tls
from cybermesh.consensus.transport import tcp_frames as wire
from cybermesh.consensus.transport.tcp import TcpLimits, TcpTransport, listen_on
from cybermesh.consensus.transport.tcp_frames import FrameReader, Greeting, Hello, Refusal, RefusedError, encode_frame
from cybermesh.consensus.transport.tls import make_contexts, member_of
from cybermesh.keys import SigningKey

N = 3
CHAIN = bytes(range(32))


def key_of(name: str) -> SigningKey:
    return SigningKey(hashlib.sha256(name.encode()).digest())


KEYS = sorted((key_of(f"validator {number}") for number in range(N)), key=lambda key: key.public)
STRANGER = key_of("stranger")
COMMITTEE = Committee.of(CHAIN, [key.public for key in KEYS])


class Net:
    """The validators' sockets; whoever is not running accepts nothing."""

    def __init__(self) -> None:
        self.listeners = [listen_on(("127.0.0.1", 0)) for _ in range(N)]
        self.addresses = {index: listener.getsockname()[:2] for index, listener in enumerate(self.listeners)}

    @asynccontextmanager
    async def running(self, index: int, limits: TcpLimits, **changes) -> AsyncIterator[TcpTransport]:
        committee = changes.get("committee", COMMITTEE)
        addresses = changes.get("addresses", self.addresses)
        transport = TcpTransport(committee, KEYS[index], self.listeners[index], addresses, lambda: 0.0, limits)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(transport.run(), name=f"transport {index}")
            try:
                yield transport
            finally:
                task.cancel()


# The highest index gives all others a head start, here a long one: it calls nobody by itself.
QUIET = TcpLimits(redial_first_s=1_000.0, redial_max_s=1_000.0)


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    for listener in net.listeners:
        listener.close()


class Peer:
    """A peer under the test's control: real TLS, frames by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting: Greeting | None = None

    async def frame(self) -> tuple[int, bytes]:
        length = int.from_bytes(await self.reader.readexactly(4), "big")
        data = await self.reader.readexactly(length)
        return data[0], data[1:]

    async def greet(self, *, chain: bytes = CHAIN, instance: bytes = bytes(16)) -> list[bytes]:
        """Greet as it should be; return what was sent."""
        greeting = Greeting(Hello(chain, 1, instance, bytes(32)), dials=True)
        sent = [greeting.opening()]
        self.writer.write(sent[0])
        while not greeting.is_complete:
            answer = greeting.take(*await self.frame())
            self.writer.write(answer)
            sent.append(answer)
        return sent

    async def is_cut(self) -> bool:
        """Wait for the end of the connection."""
        try:
            while await asyncio.wait_for(self.reader.read(1 << 16), 10):
                pass
        except ConnectionError:
            pass
        return True


@asynccontextmanager
async def calling(net: Net, index: int, key: SigningKey) -> AsyncIterator[Peer]:
    members = [*COMMITTEE.public_keys, STRANGER.public]
    context = make_contexts(key, members).dial
    reader, writer = await asyncio.open_connection(*net.addresses[index], ssl=context, server_hostname="")
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - counters have no event, and need none
            await asyncio.sleep(0.001)


async def frame_of(transport: TcpTransport) -> Frame:
    return await asyncio.wait_for(transport.receive(), 10)


# Strangers


async def test_a_stranger_is_refused_counted_and_harms_nobody(net):
    async with net.running(2, QUIET) as two, calling(net, 2, KEYS[1]) as member:
        await member.greet()
        assert (await frame_of(two)).is_connection
        async with calling(net, 2, STRANGER) as stranger:
            assert await stranger.is_cut()
        await until(lambda: two.counters.refused[None, Refusal.STRANGER] == 1)
        member.writer.write(encode_frame(wire.TAGS[Kind.VOTE], b"still here"))
        assert await frame_of(two) == Frame(1, b"still here")
        assert two.peers == {1}


async def test_a_caller_without_tls_is_refused(net):
    async with net.running(2, QUIET) as two:
        reader, writer = await asyncio.open_connection(*net.addresses[2])
        writer.write(b"GET / HTTP/1.1\r\nHost: validator\r\n\r\n")
        await Peer(reader, writer).is_cut()
        writer.transport.abort()
        await until(lambda: two.counters.refused[None, Refusal.NO_TLS] == 1)


async def test_a_member_that_answers_at_the_address_of_another_is_not_taken_for_it(net):
    swapped = {0: net.addresses[0], 1: net.addresses[2], 2: net.addresses[1]}
    eager = TcpLimits(redial_first_s=0.01)
    async with net.running(0, eager, addresses=swapped) as zero, net.running(2, QUIET):
        await until(lambda: zero.counters.refused[1, Refusal.ANOTHER_MEMBER] >= 1)
        assert zero.peers == frozenset()


async def test_a_validator_does_not_talk_to_itself(net):
    async with net.running(2, QUIET) as two, calling(net, 2, KEYS[2]) as myself:
        assert await myself.is_cut()
        assert two.counters.refused == {(None, Refusal.ITSELF): 1}


async def test_idle_strangers_do_not_keep_a_validator_out(net):
    limits = TcpLimits(redial_first_s=1_000.0, redial_max_s=1_000.0, greetings_max=4)
    async with net.running(2, limits) as two:
        idle = [await asyncio.open_connection(*net.addresses[2]) for _ in range(12)]
        async with calling(net, 2, KEYS[0]) as member:
            await member.greet()
            assert (await frame_of(two)).peer == 0
        assert two.counters.refused[None, Refusal.CROWDED] >= 8
        for _, writer in idle:
            writer.transport.abort()


async def test_a_caller_that_never_greets_is_cut_off(net):
    limits = TcpLimits(redial_first_s=1_000.0, redial_max_s=1_000.0, greeting_s=0.1)
    async with net.running(2, limits) as two, calling(net, 2, KEYS[1]) as member:
        _, writer = await asyncio.open_connection(*net.addresses[2])
        assert await member.is_cut()
        await until(lambda: two.counters.refused[None, Refusal.SLOW_GREETING] == 1)
        assert two.counters.refused[1, Refusal.SLOW_GREETING] == 1
        writer.transport.abort()


# Members that misbehave


async def test_another_chain_is_refused(net):
    async with net.running(2, QUIET) as two, calling(net, 2, KEYS[1]) as member:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await member.greet(chain=bytes(32))
        await until(lambda: two.counters.refused[1, Refusal.CHAIN] == 1)


async def test_a_replayed_greeting_opens_nothing(net):
    async with net.running(2, QUIET) as two:
        async with calling(net, 2, KEYS[1]) as member:
            recorded = await member.greet()
        async with calling(net, 2, KEYS[1]) as member:
            for data in recorded:
                member.writer.write(data)
            assert await member.is_cut()
        assert two.counters.refused[1, Refusal.REPLAY] == 1
        assert two.counters.connections == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param((8 * 1024 * 1024 + 2).to_bytes(4, "big"), Refusal.OVERSIZE, id="oversize"),
        pytest.param(bytes(4), Refusal.MALFORMED, id="no tag"),
        pytest.param(encode_frame(99, b"what?"), Refusal.MALFORMED, id="unknown tag"),
        pytest.param(encode_frame(wire.TAGS[Kind.VOTE]), Refusal.MALFORMED, id="empty message"),
        pytest.param(encode_frame(wire.PING, b"pong"), Refusal.MALFORMED, id="ping with a body"),
        pytest.param(encode_frame(wire.HELLO, bytes(90)), Refusal.MALFORMED, id="second hello"),
    ],
)
async def test_a_bad_frame_ends_its_own_connection_only(net, data, reason):
    async with net.running(2, QUIET) as two, calling(net, 2, KEYS[1]) as bad, calling(net, 2, KEYS[0]) as good:
        await bad.greet()
        await good.greet()
        bad.writer.write(encode_frame(wire.TAGS[Kind.VOTE], b"good until here") + data)
        assert await bad.is_cut()
        good.writer.write(encode_frame(wire.TAGS[Kind.VOTE], b"unharmed"))
        received = [await frame_of(two) for _ in range(4)]
        assert [frame.data for frame in received if frame.peer == 1] == [b"", b"good until here"]
        assert [frame.data for frame in received if frame.peer == 0] == [b"", b"unharmed"]
        assert two.counters.refused == {(1, reason): 1}
        assert two.peers == {0}


async def test_a_frame_too_large_to_be_taken_is_not_sent(net):
    async with net.running(2, QUIET) as two, calling(net, 2, KEYS[1]) as member:
        await member.greet()
        await frame_of(two)
        two.send(1, Kind.BLOCKS, bytes(8 * 1024 * 1024 + 1))
        two.send(1, Kind.VOTE, b"next")
        assert await member.frame() == (wire.TAGS[Kind.VOTE], b"next")
        assert two.counters.too_large == 1


# Connections that die without a word


async def test_a_half_open_connection_is_noticed(net):
    limits = TcpLimits(redial_first_s=1_000.0, redial_max_s=1_000.0, ping_s=0.05, silent_s=0.2)
    async with net.running(2, limits) as two, calling(net, 2, KEYS[1]) as member:
        await member.greet()
        tag, body = await member.frame()
        assert (tag, body) == (wire.PING, b"")
        assert await member.is_cut()
        assert two.counters.refused == {(1, Refusal.SILENT): 1}


async def test_pings_keep_a_quiet_connection(net):
    limits = TcpLimits(redial_first_s=1_000.0, redial_max_s=1_000.0, ping_s=0.05, silent_s=0.2)
    async with net.running(2, limits) as two, calling(net, 2, KEYS[1]) as member:
        await member.greet()
        for _ in range(10):
            assert await member.frame() == (wire.PING, b"")
            member.writer.write(encode_frame(wire.PING))
        assert two.peers == {1}


async def test_a_peer_that_takes_nothing_is_cut_off_and_its_queue_stays_bounded(net):
    limits = TcpLimits(redial_first_s=1_000.0, redial_max_s=1_000.0, ping_s=0.05, silent_s=1_000.0, stuck_s=0.2)
    async with net.running(2, limits) as two, calling(net, 2, KEYS[1]) as member:
        await member.greet()
        await frame_of(two)
        member.reader._transport.pause_reading()
        for _ in range(200):
            two.send(1, Kind.BLOCKS, bytes(1024 * 1024))
        assert two.lost >= 100
        await until(lambda: two.peers == frozenset())
        assert two.counters.refused == {(1, Refusal.STUCK): 1}


async def test_a_new_process_of_a_peer_replaces_the_connection_of_the_former_one(net):
    # Nobody told two that the first one is dead: its host lost power.
    async with net.running(2, QUIET) as two, calling(net, 2, KEYS[1]) as former, calling(net, 2, KEYS[1]) as later:
        await former.greet(instance=b"a" * 16)
        assert (await frame_of(two)).is_connection
        await later.greet(instance=b"b" * 16)
        assert (await frame_of(two)).is_connection
        assert await former.is_cut()
        two.send(1, Kind.VOTE, b"to the later one")
        assert await later.frame() == (wire.TAGS[Kind.VOTE], b"to the later one")


# Two that call each other


async def test_when_both_call_at_once_both_keep_the_same_connection(net):
    eager = TcpLimits(redial_first_s=0.0)
    for _ in range(10):
        async with net.running(0, eager) as zero, net.running(1, eager) as one:
            await until(lambda zero=zero, one=one: zero.peers == {1} and one.peers == {0})
            word = b"do you hear me"
            async with asyncio.timeout(10):
                while True:  # a spare connection takes with it what was sent on it
                    zero.send(1, Kind.VOTE, word)
                    one.send(0, Kind.VOTE, word)
                    heard = (await zero.receive(), await one.receive())
                    if heard == (Frame(1, word), Frame(0, word)):
                        break
            assert zero.counters.refused == one.counters.refused == {}


async def test_validators_find_each_other_whoever_starts_first(net):
    eager = TcpLimits(redial_first_s=0.01, redial_max_s=0.05)
    async with net.running(2, eager) as two:
        assert two.peers == frozenset()
        async with net.running(0, eager) as zero, net.running(1, eager) as one:
            await until(lambda: (zero.peers, one.peers, two.peers) == ({1, 2}, {0, 2}, {0, 1}))
        await until(lambda: two.peers == frozenset())


# Bytes


def read_all(reader: FrameReader, data: bytes) -> list[tuple[int, bytes]]:
    return list(reader.feed(data))


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=256)), max_size=8), st.lists(st.integers(0, 2_000)))
def test_frames_survive_any_cut_of_the_stream(sent, cuts):
    stream = b"".join(encode_frame(tag, body) for tag, body in sent)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader()
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert [frame for piece in pieces for frame in read_all(reader, piece)] == sent


@given(st.binary(max_size=600))
def test_any_bytes_are_frames_or_refused_with_a_reason(data):
    found = FrameReader().feed(data)
    while True:
        try:
            _, body = next(found)
        except (StopIteration, RefusedError):
            break
        assert len(body) <= wire.GREETING_BODY_MAX


@given(st.booleans(), st.lists(st.tuples(st.sampled_from([wire.HELLO, wire.CONFIRM, 2]), st.binary(max_size=120)), max_size=3))
def test_no_greeting_completes_without_the_nonce_of_this_connection(dials, frames):
    greeting = Greeting(Hello(CHAIN, 1, bytes(16), b"n" * 32), dials=dials)
    good = Hello(CHAIN, 1, bytes(16), b"m" * 32).encode()
    try:
        for tag, body in [(wire.HELLO, good), *frames]:
            greeting.take(tag, body)
    except RefusedError:
        pass
    assert not greeting.is_complete


@pytest.mark.parametrize("length", [0, 1, 2, 89, 91])
def test_a_hello_of_another_length_is_malformed_unless_it_is_of_another_version(length):
    ours = Hello(CHAIN, 1, bytes(16), bytes(32)).encode()
    assert Hello.decode(ours).chain_id == CHAIN
    with pytest.raises(RefusedError) as refused:
        Hello.decode((ours + bytes(10))[:length])
    assert refused.value.reason is Refusal.MALFORMED
    with pytest.raises(RefusedError) as refused:
        Hello.decode(b"\x00\x02" + bytes(length))
    assert refused.value.reason is Refusal.VERSION


def forged() -> x509.Certificate:
    """A certificate that names a member as its issuer and is signed by a stranger."""
    stranger = Ed25519PrivateKey.from_private_bytes(STRANGER.seed)
    return tls._builder(KEYS[0].public, tls._name(KEYS[1].public), stranger.public_key()).sign(stranger, None)


async def test_a_certificate_that_only_names_a_member_is_refused(net):
    context = make_contexts(KEYS[0], COMMITTEE.public_keys).dial
    secret = Ed25519PrivateKey.from_private_bytes(STRANGER.seed).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    tls._show(context, forged().public_bytes(Encoding.PEM) + secret)
    async with net.running(2, QUIET) as two:
        reader, writer = await asyncio.open_connection(*net.addresses[2], ssl=context, server_hostname="")
        await Peer(reader, writer).is_cut()
        writer.transport.abort()
        await until(lambda: two.counters.refused == {(None, Refusal.STRANGER): 1})


def test_a_certificate_belongs_to_the_member_that_signed_it():
    members = COMMITTEE.public_keys
    tls_key = Ed25519PrivateKey.generate().public_key()
    for index, key in enumerate(KEYS):
        assert member_of(tls._leaf(key, tls_key).public_bytes(Encoding.DER), members) == index
    assert member_of(tls._leaf(STRANGER, tls_key).public_bytes(Encoding.DER), members) is None
    assert member_of(forged().public_bytes(Encoding.DER), members) is None
    assert member_of(b"not a certificate", members) is None
    assert member_of(None, members) is None
