"""DNS messages out of packets: what they say, and that nothing hostile raises."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.dns import NO_ANSWER, NXDOMAIN, DnsBatch, logged_name, qtype_of, rcode_of
from cybermesh.telemetry.dns_packets import BROKEN_NAME, NOT_DNS, OTHER_OPERATION, SHORT, DnsReader
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources.choose import open_source
from tests.telemetry import frames
from tests.telemetry.sources import captures

CLIENT, SERVER = frames.V4_A, frames.V4_B


def wire_name(*labels: bytes) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def message(name: bytes, *, qtype: int = 1, flags: int = 0x0100, answers: int = 0, questions: int = 1) -> bytes:
    body = name + struct.pack(">HH", qtype, 1) if questions else b""
    return struct.pack(">HHHHHH", 7, flags, questions, answers, 0, 0) + body + b"\xc0\x0c" * answers


def to_server(payload: bytes, *, tcp: bool = False, port: int = 5000) -> bytes:
    segment = frames.tcp(port, 53, 0x18, payload) if tcp else frames.udp(port, 53, payload)
    return frames.ethernet(frames.ipv4(6 if tcp else 17, segment, src=CLIENT, dst=SERVER))


def to_client(payload: bytes, *, tcp: bool = False, port: int = 5000) -> bytes:
    segment = frames.tcp(53, port, 0x18, payload) if tcp else frames.udp(53, port, payload)
    return frames.ethernet(frames.ipv4(6 if tcp else 17, segment, src=SERVER, dst=CLIENT))


def framed(payload: bytes) -> bytes:
    return struct.pack(">H", len(payload)) + payload


def read(folder: Path, *packets: bytes, block: int = 1000, captured: int | None = None) -> tuple[DnsBatch, DnsReader]:
    """Write a capture, and read its DNS in blocks; ``captured`` is the snap length."""
    data = captures.pcap([(1_700_000_000_000_000 + n, packet) for n, packet in enumerate(packets)])
    if captured is not None:
        (packet,) = packets
        data = data[:24] + struct.pack("<IIII", 1_700_000_000, 0, captured, len(packet)) + packet[:captured]
    path = folder / "dns.pcap"
    path.write_bytes(data)
    reader, found = DnsReader(), []
    with contextlib.closing(open_source(str(path), block=block)) as source:
        for batch in source.batches():
            assert isinstance(batch, PacketBatch)
            found.append(reader.read(batch))
    columns = [np.concatenate([getattr(batch, name) for batch in found]) for name in DnsBatch.__slots__]
    return DnsBatch(*columns), reader


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_a_question_and_its_answer_are_a_row_each_from_the_clients_side(tmp_path: Path, tcp: bool) -> None:
    frame = framed if tcp else bytes
    name = wire_name(b"WWW", b"example", b"com")
    question, answer = message(name, qtype=28), message(name, qtype=28, flags=0x8183, answers=2)
    found, reader = read(tmp_path, to_server(frame(question), tcp=tcp), to_client(frame(answer), tcp=tcp))
    assert found.name.tolist() == ["www.example.com"] * 2
    assert found.name_length.tolist() == [15, 15]
    assert (found.asked.tolist(), found.rcode.tolist()) == ([True, False], [NO_ANSWER, NXDOMAIN])
    assert (found.qtype.tolist(), found.answers.tolist()) == ([28, 28], [0, 2])
    assert found.size.tolist() == [len(question), len(answer)]
    assert found.client.tolist() == [list(bytes(10) + b"\xff\xff" + CLIENT)] * 2
    assert found.server.tolist() == [list(bytes(10) + b"\xff\xff" + SERVER)] * 2
    assert (found.port.tolist(), found.protocol.tolist()) == ([53, 53], [6 if tcp else 17] * 2)
    assert found.ts_us.tolist() == [1_700_000_000_000_000, 1_700_000_000_000_001]
    assert (reader.counters.packets, reader.counters.metered, reader.counters.skipped) == (2, 2, {})


@pytest.mark.parametrize(
    ("labels", "text", "length"),
    [
        ([], ".", 0),
        ([b"a.b", b"c\\"], "a\\046b.c\\092", 6),
        ([b"\x1b[2J", b"\xff\x00 x"], "\\027[2j.\\255\\000\\032x", 9),
        ([b"x" * 63, b"y" * 63, b"z" * 63, b"w" * 61], ".".join(("x" * 63, "y" * 63, "z" * 63, "w" * 61)), 253),
    ],
    ids=["root", "dots", "not-printable", "longest"],
)
def test_names_are_safe_to_show_and_their_length_is_that_on_the_wire(
    tmp_path: Path, labels: list[bytes], text: str, length: int
) -> None:
    found, _ = read(tmp_path, to_server(message(wire_name(*labels))))
    assert (found.name.tolist(), found.name_length.tolist()) == ([text], [length])


def test_tcp_messages_are_found_where_segments_begin_with_them(tmp_path: Path) -> None:
    one, two = (framed(message(wire_name(label, b"example"))) for label in (b"one", b"two"))
    long = framed(message(wire_name(b"long", b"example"), flags=0x8180) + bytes(600))
    found, reader = read(
        tmp_path,
        to_server(one + two, tcp=True),
        to_server(one[:2], tcp=True, port=5001),
        to_server(two, tcp=True, port=5002),
        to_server(one[2:], tcp=True, port=5001),
        to_client(long[:300], tcp=True, port=5003),
        to_client(long[300:], tcp=True, port=5003),
        block=1,
    )
    assert found.name.tolist() == [f"{name}.example" for name in ("one", "two", "two", "one", "long")]
    assert reader.counters.skipped == {NOT_DNS: 1}


def test_what_is_no_query_on_the_port_is_counted_by_reason(tmp_path: Path) -> None:
    name = wire_name(b"a", b"example")
    found, reader = read(
        tmp_path,
        to_server(b"GET / HTTP/1.1\r\n\r\n"),
        to_server(b"short"),
        to_server(message(name, questions=2)),
        to_server(message(name, flags=0x2800)),
        to_server(message(b"\xc0\x0c")),
        to_server(message(b"\x50" + b"x" * 80)),
        to_server(message(name)[:-3]),
        to_client(message(b"", flags=0x8181, questions=0)),
        to_client(message(name)),
        to_server(message(name)),
    )
    assert found.name.tolist() == ["", "a.example"]
    assert found.rcode.tolist() == [1, NO_ANSWER]
    assert reader.counters.skipped == {NOT_DNS: 4, OTHER_OPERATION: 1, BROKEN_NAME: 3}
    assert reader.counters.packets == 10 == reader.counters.metered + sum(reader.counters.skipped.values())


def test_a_short_snap_length_is_said_to_be_the_reason(tmp_path: Path) -> None:
    packet = to_server(message(wire_name(b"a" * 30, b"example")))
    found, reader = read(tmp_path, packet, captured=14 + 20 + 8 + 20)
    assert len(found) == 0
    assert reader.counters.skipped == {SHORT: 1}
    found, _ = read(tmp_path, packet, captured=len(packet))
    assert found.name_length.tolist() == [38]


def test_other_traffic_is_not_looked_at(tmp_path: Path) -> None:
    ping = frames.ethernet(frames.ipv4(1, frames.icmp(8, 0, b"x" * 40)))
    found, reader = read(tmp_path, ping, frames.ethernet(frames.ipv4(17, frames.udp(53_000, 443, b"x" * 40))))
    assert (len(found), reader.counters.packets) == (0, 0)


@given(
    payloads=st.lists(
        st.tuples(
            st.booleans(),
            st.booleans(),
            st.binary(max_size=80)
            | st.builds(
                lambda flags, questions, rest: struct.pack(">HHHHHH", 7, flags, questions, 0, 0, 0) + rest,
                st.integers(0, 0xFFFF),
                st.integers(0, 2),
                st.binary(max_size=300),
            ),
        ),
        max_size=6,
    )
)
def test_hostile_messages_never_raise_and_every_one_is_counted(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[tuple[bool, bool, bytes]]
) -> None:
    packets = [(to_client if back else to_server)(payload, tcp=tcp) for back, tcp, payload in payloads]
    packets.append(to_server(message(wire_name(b"last"))))
    found, reader = read(tmp_path_factory.getbasetemp(), *packets)
    assert found.name[-1] == "last"
    assert all(name.isascii() and name.isprintable() for name in found.name)
    assert (found.name_length <= 255).all()
    assert reader.counters.packets == len(found) + sum(reader.counters.skipped.values())


def test_names_of_types_and_codes_in_logs_are_known() -> None:
    assert [qtype_of(text) for text in ("A", "https", "TYPE65280", "28", "TYPE99999", "nonsense", "")] == [
        1,
        65,
        65280,
        28,
        0,
        0,
        0,
    ]
    assert [rcode_of(text) for text in ("NXDOMAIN", "refused", "9", "", "None")] == [3, 5, 9, NO_ANSWER, NO_ANSWER]
    assert logged_name("A.Example.") == (9, "a.example")


@pytest.mark.shared
def test_a_tunnel_shows_in_names_and_types(shared_data: Path) -> None:
    reader, names, types = DnsReader(), set(), set()
    with contextlib.closing(open_source(str(shared_data / "pcaps" / "nDPI__dns-tunnel-iodine.pcap"))) as source:
        for batch in source.batches():
            assert isinstance(batch, PacketBatch)
            found = reader.read(batch)
            names.update(found.name[found.asked].tolist())
            types.update(found.qtype.tolist())
    assert len(names) > 100
    assert 10 in types  # NULL, iodine's favourite
