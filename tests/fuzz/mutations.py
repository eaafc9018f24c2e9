"""Damage that knows the structure it damages: frames, pcap and pcapng files, compression.

Random bytes die at the first check of a reader. What is made here is nearly right: whole captures of sound packets in which a
length, a type, a border or a few bytes are wrong, or which end in the wrong place. All chance comes from the ``Random`` given.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from random import Random

import zstandard

from tests.telemetry import frames, oracle
from tests.telemetry.sources import captures

Record = tuple[int, int, bytes, int]  # time in µs, link type, captured bytes, length on the wire

LINKS = (1, 1, 1, 1, 1, 0, 12, 14, 101, 108, 113, 228, 229, 276, 105, 65_535)
ETHERTYPES = (0x0800, 0x86DD, 0x8100, 0x88A8, 0x9100, 0x9200, 0x6558, 0x8847, 0x8864, 0, 0xFFFF)
PROTOCOLS = (0, 1, 4, 6, 17, 41, 43, 44, 47, 50, 51, 58, 59, 60, 135, 139, 140, 255)
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 19, 20, 27, 28, 31, 32, 39, 40, 63, 64, 127, 128, 255, 256, 1500, 4789, 6081, 32_767)
NUMBERS += (32_768, 65_535, 65_536, 262_143, 262_144, 262_145, 1 << 20, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
BLOCK_KINDS = (1, 2, 3, 4, 5, 6, 10, 0xBAD, 0x0A0D0D0A, 0x80000001)
START_US = 1_700_000_000_000_000
CORPUS_BYTES = 16_384  # taken from the beginning of a file
MOST_PACKETS = 24  # in a capture that is made


class Corpus:
    """Sound frames and capture files to begin with."""

    def __init__(self, folder: Path | None = None) -> None:
        """Take the packets made by hand, and those of the captures in a folder."""
        self.frames = _built_frames()
        self.files: dict[str, list[bytes]] = {"pcap": [], "pcapng": []}
        for path in sorted(folder.glob("*.pcap*")) if folder is not None else ():
            data = path.read_bytes()[:CORPUS_BYTES]
            self.files["pcapng" if data[:4] == b"\x0a\x0d\x0d\x0a" else "pcap"].append(data)
            self.frames += [(link, frame) for _, link, frame, _ in oracle.read_capture(data)[:40]]

    def frame(self, random: Random) -> tuple[int, bytes, int]:
        """Return link type, bytes and length on the wire of a frame, sound, damaged, or cut by a snap length."""
        link, frame = random.choice(self.frames)
        if random.random() < 0.25 and link in (12, 101):
            kind = random.choice(["gre", "gre-bridged", "vxlan", "geneve"])
            for _ in range(random.choice([1, 1, 2, 9])):
                frame = frames.tunnel(kind, frame[:1200])
        if random.random() < 0.2:
            link = random.choice(LINKS)
        if random.random() < 0.6:
            frame = damaged_frame(random, frame)
        wire = len(frame) + random.choice([0, 0, 0, 4, 1000, 1 << 31])
        if random.random() < 0.3:  # at the borders of headers above all
            border = random.choice([0, 4, 14, 16, 18]) + random.choice([0, 20, 40]) + random.choice([0, 4, 8, 16, 20])
            frame = frame[: max(border + random.choice([-1, 0, 0, 1]), 0)]
        return link, frame, wire


def _built_frames() -> list[tuple[int, bytes]]:
    payloads = (b"", b"x", bytes(range(200)))
    packets = [
        frames.ipv4(6, frames.tcp(1000, 80, flags, body, offset=5 + flags % 11))
        for flags in range(0, 256, 17)
        for body in payloads
    ]
    packets += [frames.ipv4(17, frames.udp(53, port, body)) for port in (53, 4789, 6081) for body in payloads]
    packets += [frames.ipv4(1, frames.icmp(kind, 0, body)) for kind in (0, 3, 8, 13, 14) for body in payloads]
    packets += [frames.ipv4(17, frames.udp(1, 2, bytes(64)), fragment=fragment) for fragment in (0x2000, 0x2008, 8, 0x4000)]
    packets += [frames.ipv4(6, frames.tcp(1, 2, 2, b""), options=options) for options in (1, 5, 10)]
    for kind in sorted(oracle.EXTENSIONS):
        body = bytes([6, 0]) + bytes(6) + frames.tcp(1000, 80, 16, b"abc")
        packets.append(frames.ipv6(kind, body))
        packets.append(frames.ipv6(kind, bytes([kind, 0]) + bytes(6) + body))
    packets += [frames.ipv6(58, frames.icmp(kind, 0, b"ping")) for kind in (1, 128, 129)]
    packets += [frames.tunnel(kind, packet) for kind in ("gre", "gre-bridged", "vxlan", "geneve") for packet in packets[:60:7]]
    made = [(101, packet) for packet in packets]
    made += [(1, frames.ethernet(packet, tags=n % 3)) for n, packet in enumerate(packets)]
    made += [
        (113, bytes(14) + struct.pack(">H", 0x86DD if packet[0] >> 4 == 6 else 0x0800) + packet) for packet in packets[::5]
    ]
    made += [(276, struct.pack(">H", 0x0800) + bytes(18) + packet) for packet in packets[:30:5]]
    return made + [(0, struct.pack("<I", 2) + packet) for packet in packets[:30:5]]


def damaged_frame(random: Random, frame: bytes) -> bytes:
    """Return a frame with one field or a few bytes wrong; fields are those of Ethernet and of IP behind it or at once."""
    data = bytearray(frame)
    ip = random.choice([0, 14, 14, 14, 16, 18, 20, 22])
    fields = (
        (ip - 2, "H", ETHERTYPES), (ip, "B", (0x45, 0x46, 0x4F, 0x44, 0x60, 0x00, 0x65)), (ip + 2, "H", NUMBERS),
        (ip + 4, "H", NUMBERS), (ip + 6, "H", (0, 1, 0x2000, 0x2001, 0x4000, 0x1FFF)), (ip + 6, "B", PROTOCOLS),
        (ip + 9, "B", PROTOCOLS), (ip + 20, "H", NUMBERS), (ip + 22, "H", (4789, 6081, 53)), (ip + 24, "H", NUMBERS),
        (ip + 32, "B", (0x40, 0x50, 0xF0, 0x00)), (ip + 40, "B", PROTOCOLS), (ip + 41, "B", NUMBERS), (ip + 42, "H", NUMBERS),
    )  # fmt: skip
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at, kind, values = random.choice(fields)
        value = random.choice(values) & (0xFF if kind == "B" else 0xFFFF)
        if 0 <= at <= len(data) - (1 if kind == "B" else 2):
            struct.pack_into(">" + kind, data, at, value)
    whole = bytes(data)
    return whole[: random.randrange(len(whole) + 1)] if random.random() < 0.3 else damaged_bytes(random, whole, 0.3)


def damaged_bytes(random: Random, data: bytes, share: float = 1.0) -> bytes:
    """Return bytes with some of them changed, taken out, doubled or put in; with a chance of ``share``."""
    if random.random() >= share or not data:
        return data
    made = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(made) + 1)
        size = random.choice([1, 2, 4, 8, 16, 100])
        match random.randrange(7):
            case 0:
                made[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                made[at : at + 4] = struct.pack(random.choice("<>") + "I", random.choice(NUMBERS))
            case 2:
                made[at : at + 2] = struct.pack(random.choice("<>") + "H", random.choice(NUMBERS) & 0xFFFF)
            case 3:
                del made[at : at + size]
            case 4:
                made[at:at] = made[at : at + size]
            case 5:
                made[at:at] = random.randbytes(size)
            case _:
                made[at : at + size] = bytes(len(made[at : at + size]))
    return bytes(made[: random.randrange(len(made) + 1)] if random.random() < 0.1 else made)


def records(random: Random, corpus: Corpus) -> list[Record]:
    """Return records as a reader would hand them to the decoder."""
    made, now = [], START_US
    for _ in range(random.randrange(1, MOST_PACKETS)):
        link, frame, wire = corpus.frame(random)
        now += random.choice([0, 1, 1000, 1_000_001, 5_000_001, 130_000_000, -20_000_000])
        made.append((now, link, frame, wire))
    if random.random() < 0.85:  # one link type: the compiled decoder's case
        link = made[0][1]
        made = [(time, link, frame, wire) for time, _, frame, wire in made]
    return made


def pcap(random: Random, corpus: Corpus) -> bytes:
    """Return a pcap file, nearly sound."""
    if corpus.files["pcap"] and random.random() < 0.3:
        return packed(random, damaged_bytes(random, random.choice(corpus.files["pcap"])))
    order, per_us = random.choice("<>"), random.choice([1, 1000])
    some = records(random, corpus)
    data = bytearray(captures.pcap([], order=order, per_us=per_us, link=some[0][1] | random.choice([0, 0, 0, 1 << 28])))
    for time, _, frame, wire in some:
        header = [time // 10**6 % 2**32, time % 10**6 * per_us, len(frame), wire % 2**32]
        if random.random() < 0.04:
            header[random.randrange(4)] = random.choice(NUMBERS)
        data += struct.pack(order + "IIII", *header) + frame
    return packed(random, damaged_bytes(random, bytes(data), 0.3))


def pcapng(random: Random, corpus: Corpus) -> bytes:
    """Return a pcapng file, nearly sound."""
    if corpus.files["pcapng"] and random.random() < 0.3:
        return packed(random, damaged_bytes(random, random.choice(corpus.files["pcapng"])))
    order = random.choice("<>")
    blocks = [captures.section(order=order), _interface(random, 1, order)]
    for time, link, frame, _ in records(random, corpus):
        number = random.choice([0, 0, 0, 1, 2, 70_000])
        match random.randrange(12):
            case 0:
                blocks.append(_interface(random, link, order))
            case 1:
                order = random.choice("<>")
                blocks += [captures.section(order=order), _interface(random, link, order)]
            case 2:
                blocks.append(captures.simple(frame, order=order))
            case 3:
                blocks.append(captures.obsolete(time, frame, number=number & 0xFFFF, order=order))
            case 4:
                blocks.append(
                    captures.block(random.choice(BLOCK_KINDS), random.randbytes(random.choice([0, 4, 8, 20, 300])), order=order)
                )
            case _:
                ticks = random.choice([time, time, time, random.randrange(1 << 64)])
                captured = random.choice([None, None, None, None, None, random.choice(NUMBERS)])
                blocks.append(captures.enhanced(ticks, frame, number=number, order=order, captured=captured))
        if random.random() < 0.03:
            changed = bytearray(blocks[-1])
            struct.pack_into(order + "I", changed, random.choice([0, 4, len(changed) - 4]), random.choice(NUMBERS))
            blocks[-1] = bytes(changed)
    return packed(random, damaged_bytes(random, b"".join(blocks), 0.3))


def _interface(random: Random, link: int, order: str) -> bytes:
    resolution = random.choice([None, None, 0, 3, 6, 9, 12, 25, 26, 127, 0x80 | 20, 0x80 | 64, 255])
    offset_s = random.choice([None, None, None, 0, 3600, -3600, 2**62, -(2**63)])
    return captures.interface(link=link & 0xFFFF, resolution=resolution, offset_s=offset_s, order=order)


def packed(random: Random, data: bytes) -> bytes:
    """Return the file as it is or without its very end, or compressed, perhaps damaged afterwards."""
    if random.random() < 0.1:
        data = data[: -random.choice([1, 2, 3, 4, 15, 16])]
    match random.randrange(8):
        case 0:
            cut = random.randrange(len(data) + 1)
            made = gzip.compress(data[:cut], 1, mtime=0) + gzip.compress(data[cut:], 1, mtime=0) + bytes(random.choice([0, 8]))
        case 1:
            made = zstandard.compress(data, 1)
        case _:
            return data
    return damaged_bytes(random, made, 0.5)
