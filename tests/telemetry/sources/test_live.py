"""The live source on a virtual link between two network namespaces: what arrives is what was sent, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from cybermesh.cli import bench_capture, bench_sender
from cybermesh.telemetry import metering
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.packets import PacketBatch, join_batches
from cybermesh.telemetry.sources import SourceError
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.telemetry.sources.live import LiveSource
from cybermesh.telemetry.sources.live_ring import RingOptions, compile_filter
from tests.enforce.namespaces import command, inside
from tests.telemetry import frames
from tests.telemetry.sources import captures
from tests.telemetry.test_compiled import assert_equal

pytestmark = pytest.mark.netns
SMALL = RingOptions(bytes_total=8 << 20, block_bytes=1 << 18)


class Link:
    """Two namespaces with a link between them that carries nothing but what tests send."""

    def __init__(self, tag: str) -> None:
        self.near, self.far = f"{tag}n", f"{tag}f"

    def send(self, sent: list[bytes], every_s: float = 0.0) -> None:
        """Put frames on the far end."""

        def work() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
                out.bind(("far", 0))
                for frame in sent:
                    out.send(frame)
                    if every_s:
                        time.sleep(every_s)

        inside(self.far, work)

    def listen(self, **options: object) -> LiveSource:
        return inside(self.near, lambda: LiveSource("near", **options))


@pytest.fixture
def link(netns: None) -> Iterator[Link]:
    del netns
    made = Link(f"cml{os.getpid() % 100_000}")
    try:
        for name in (made.near, made.far):
            command("ip", "netns", "add", name)
            quiet = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")  # no router solicitations among our frames
            inside(name, lambda quiet=quiet: quiet.write_text("1"))
        command("ip", "link", "add", "near", "netns", made.near, "type", "veth", "peer", "name", "far", "netns", made.far)
        command("ip", "-n", made.near, "link", "set", "near", "up")
        command("ip", "-n", made.far, "link", "set", "far", "up")
        yield made
    finally:
        for name in (made.near, made.far):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def receive_each(source: LiveSource, count: int, *, within_s: float = 20.0) -> Iterator[PacketBatch]:
    """Read until so many frames were seen."""
    until = time.monotonic() + within_s
    with contextlib.closing(source):
        for batch in source.batches():
            yield batch
            if source.counters.packets + source.counters.lost >= count or time.monotonic() > until:
                break


def receive(source: LiveSource, count: int, *, within_s: float = 20.0) -> list[PacketBatch]:
    return list(receive_each(source, count, within_s=within_s))


def while_sending(link: Link, sent: list[bytes], work: Callable[[], list[PacketBatch]]) -> list[PacketBatch]:
    sender = threading.Thread(target=link.send, args=(sent,), name="sender")
    sender.start()
    try:
        return work()
    finally:
        sender.join()


def conversation(number: int) -> list[bytes]:
    """Frames of many small flows, of all classes, some tagged."""
    made: list[bytes] = []
    for n in range(number):
        client = bytes([10, n >> 16 & 255, n >> 8 & 255, n & 255])
        made.append(frames.ethernet(frames.ipv4(17, frames.udp(1024 + n % 5000, 53, b"q" * (n % 200)), src=client)))
        if n % 7 == 0:
            made.append(frames.ethernet(frames.ipv4(6, frames.tcp(40_000, 80, 0x18, b"x" * (n % 900)), src=client)))
        if n % 11 == 0:
            made.append(frames.ethernet(frames.ipv4(1, b"\x08\0\0\0\0\0\0\0ping", src=client)))
    return made


@pytest.mark.parametrize("compiled", [False, True])
def test_flows_are_those_of_the_same_packets_in_a_file_and_the_kernel_drops_none(
    link: Link, tmp_path: Path, compiled: bool
) -> None:
    if compiled:
        from cybermesh.telemetry.compile_cache import load_kernels

        load_kernels()
    sent = conversation(4_000)
    before_us = time.time_ns() // 1000
    source = link.listen(compiled=compiled)
    live = join_batches(while_sending(link, sent, lambda: receive(source, len(sent))))
    assert (source.counters.lost, source.counters.packets, source.counters.skipped) == (0, len(sent), {})
    assert before_us <= live.ts_us.min() <= live.ts_us.max() <= time.time_ns() // 1000
    assert (np.diff(live.ts_us) >= 0).all()
    path = tmp_path / "same.pcap"
    path.write_bytes(captures.pcap(list(zip(live.ts_us.tolist(), sent, strict=True))))
    with contextlib.closing(CaptureSource(str(path))) as file:
        from_file = join_batches(list(file.batches()))
    for name in (field.name for field in fields(PacketBatch)):
        assert np.array_equal(getattr(live, name), getattr(from_file, name)), name
    meters = [FlowMeter(retain=1 << 20), FlowMeter(retain=1 << 20)]
    flows = []
    for meter, packets in zip(meters, (live, from_file), strict=True):
        assert len(meter.add(packets)) == 0
        flows.append(meter.flush())
    assert len(flows[0]) > 4_000
    assert np.array_equal(flows[0].features, flows[1].features)
    assert np.array_equal(flows[0].flow_id, flows[1].flow_id)


def test_at_the_senders_full_speed_the_kernel_drops_none_and_flows_are_those_of_the_file(link: Link, tmp_path: Path) -> None:
    path = tmp_path / "sent.pcap"
    total = bench_capture.write(bench_capture.usual(bench_capture.demo_capture()), path, 300_000)
    sent = bench_sender.load(path)
    how = metering.compiled()
    # Room for most of what is sent: the ring goes round, and a busy machine may keep the reader waiting for a second.
    source = link.listen(compiled=True, options=RingOptions(bytes_total=48 << 20))

    def offer() -> bench_sender.Sent:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this thread; frames of two processors may overtake each other
        return bench_sender.send("far", sent)

    sender = threading.Thread(target=inside, args=(link.far, offer), name="sender")
    sender.start()
    meter, flows, times = how.new_meter(retain=1 << 20), [], []
    for batch in receive_each(source, total):
        flows.append(meter.add(batch))
        times.append(batch.ts_us)
    sender.join()
    assert (source.counters.lost, source.counters.packets, source.counters.skipped) == (0, total, {})
    captures.set_records(path, sent.at, sent.size, np.concatenate(times))
    meter_of_file = how.new_meter(retain=1 << 20)
    with contextlib.closing(how.open_source(str(path))) as file:
        expected = [*[meter_of_file.add(batch) for batch in file.batches()], meter_of_file.flush()]
    assert_equal([*flows, meter.flush()], expected)
    assert sum(map(len, expected)) > 25_000


def test_payload_can_be_read_until_the_next_batch(link: Link) -> None:
    source = link.listen(options=SMALL)
    link.send([frames.ethernet(frames.ipv4(17, frames.udp(1, 2, b"seen")))])
    with contextlib.closing(source):
        batch = next(batch for batch in source.batches() if len(batch))
        at = int(batch.payload_at[0])
        assert batch.data[at : at + 4].tobytes() == b"seen"


def test_a_tag_that_the_kernel_took_out_is_put_back(link: Link) -> None:
    inner = frames.ipv4(17, frames.udp(1, 2, b"abc"))
    tagged = frames.ethernet(inner, tags=1)
    source = link.listen(options=SMALL)
    link.send([tagged, frames.ethernet(inner)])
    with contextlib.closing(source):
        batch = next(batch for batch in source.batches() if len(batch))
        assert batch.wire.tolist() == [len(tagged), len(tagged) - 4]
        start = int(batch.payload_at[0]) - (len(tagged) - 3)
        assert batch.data[start : start + len(tagged)].tobytes() == tagged
        assert batch.payload.tolist() == [3, 3]


def test_batches_are_bounded_and_the_ring_goes_round(link: Link) -> None:
    sent = [frames.ethernet(frames.ipv4(17, frames.udp(1, 2, bytes([n % 256]) * 900))) for n in range(12_000)]
    source = link.listen(options=SMALL, block=100)  # 8 MiB for 12 MB of frames
    sizes: list[int] = []

    def work() -> list[PacketBatch]:
        found = receive(source, len(sent))
        sizes.extend(map(len, found))
        return found

    sender = threading.Thread(target=link.send, args=(sent,), kwargs={"every_s": 0.00002}, name="sender")
    sender.start()
    live = join_batches(work())
    sender.join()
    assert max(sizes) <= 100
    assert len(live) + source.counters.lost == len(sent)
    assert source.counters.lost == 0


def test_what_finds_the_ring_full_is_counted(link: Link) -> None:
    options = RingOptions(bytes_total=1 << 17, block_bytes=1 << 16)
    source = link.listen(options=options)
    sent = [frames.ethernet(frames.ipv4(17, frames.udp(1, 2, b"x" * 1000))) for _ in range(1000)]
    link.send(sent)
    found = join_batches(receive(source, 1000, within_s=0.5))
    assert 0 < len(found) < 1000
    assert source.counters.lost > 0
    assert len(found) + source.counters.lost <= 1000


def test_a_filter_lets_only_its_packets_through(link: Link) -> None:
    source = link.listen(options=RingOptions(bytes_total=1 << 20, block_bytes=1 << 16, expression="udp dst port 7"))
    link.send([frames.ethernet(frames.ipv4(17, frames.udp(1, port, b"abc"))) for port in (6, 7, 8, 7)])
    assert join_batches(receive(source, 2)).dport.tolist() == [7, 7]


def test_silence_yields_empty_batches_and_an_interface_that_goes_away_ends_the_source(link: Link) -> None:
    source = link.listen(options=SMALL)
    with contextlib.closing(source):
        batches = source.batches()
        assert len(next(batches)) == 0
        command("ip", "-n", link.near, "link", "delete", "near")
        list(batches)
        assert "down" in source.counters.ended


def test_what_cannot_be_captured_is_a_clear_error(link: Link) -> None:
    for interface, says in (("nosuch0", "ip link"), ("x" * 40, "ip link")):
        with pytest.raises(SourceError, match=says):
            inside(link.near, lambda interface=interface: LiveSource(interface))
    with pytest.raises(SourceError, match="pcap-filter"):
        link.listen(expression="no such thing")
    assert len(compile_filter("tcp port 22")) % 8 == 0
