"""Packets built by hand, and strategies for sound, odd, cut and damaged ones."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

V4_A, V4_B = b"\x0a\0\0\1", b"\x0a\0\0\2"
V6_A, V6_B = b"\x20\x01" + bytes(13) + b"\1", b"\x20\x01" + bytes(13) + b"\2"


def tcp(sport: int, dport: int, flags: int, payload: bytes, *, window: int = 1024, offset: int = 5) -> bytes:
    options = bytes(max(0, offset * 4 - 20))
    return struct.pack(">HHIIBBHHH", sport, dport, 1, 2, offset << 4, flags, window, 0, 0) + options + payload


def udp(sport: int, dport: int, payload: bytes) -> bytes:
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload


def icmp(kind: int, code: int, payload: bytes) -> bytes:
    return struct.pack(">BBHI", kind, code, 0, 7) + payload


def ipv4(
    proto: int,
    l4: bytes,
    *,
    src: bytes = V4_A,
    dst: bytes = V4_B,
    fragment: int = 0,
    total: int | None = None,
    options: int = 0,
) -> bytes:
    size = 20 + 4 * options
    total = size + len(l4) if total is None else total
    head = struct.pack(">BBHHHBBH", 0x45 + options, 0, total & 0xFFFF, 9, fragment, 64, proto, 0)
    return head + src + dst + bytes(4 * options) + l4


def ipv6(proto: int, rest: bytes, *, src: bytes = V6_A, dst: bytes = V6_B, length: int | None = None) -> bytes:
    length = len(rest) if length is None else length
    return struct.pack(">IHBB", 6 << 28, length & 0xFFFF, proto, 64) + src + dst + rest


def ethernet(packet: bytes, *, tags: int = 0, ethertype: int | None = None) -> bytes:
    ethertype = (0x86DD if packet[:1] >= b"\x60" else 0x0800) if ethertype is None else ethertype
    return bytes(12) + b"\x81\x00\x00\x05" * tags + struct.pack(">H", ethertype) + packet


def tunnel(kind: str, packet: bytes) -> bytes:
    """Wrap an IP packet; the carrier is IPv4."""
    if kind == "gre":
        return ipv4(47, struct.pack(">HHII", 0xA000, 0x86DD if packet[:1] >= b"\x60" else 0x0800, 0, 7) + packet)
    if kind == "gre-bridged":
        return ipv4(47, struct.pack(">HH", 0, 0x6558) + ethernet(packet, tags=1))
    if kind == "vxlan":
        return ipv4(17, udp(50_000, 4789, struct.pack(">II", 0x08 << 24, 5 << 8) + ethernet(packet)))
    return ipv4(17, udp(50_000, 6081, struct.pack(">BBHI", 1, 0, 0x6558, 0) + bytes(4) + ethernet(packet)))


ports = st.sampled_from([0, 22, 80, 4789, 6081, 65535])
bodies = st.binary(max_size=40)


@st.composite
def transports(draw: st.DrawFn) -> tuple[int, bytes]:
    """Draw (protocol number, L4 bytes)."""
    which = draw(st.integers(0, 4))
    if which == 0:
        offset = draw(st.sampled_from([5, 5, 6, 15, 4, 0]))
        return 6, tcp(draw(ports), draw(ports), draw(st.integers(0, 255)), draw(bodies), offset=offset)
    if which == 1:
        return 17, udp(draw(ports), draw(ports), draw(bodies))
    if which == 2:
        return draw(st.sampled_from([1, 58])), icmp(draw(st.integers(0, 255)), draw(st.integers(0, 3)), draw(bodies))
    if which == 3:
        return 47, struct.pack(
            ">HH", draw(st.integers(0, 0xFFFF)), draw(st.sampled_from([0x0800, 0x86DD, 0x6558, 0x88BE]))
        ) + draw(bodies)
    return draw(st.integers(0, 255)), draw(bodies)


@st.composite
def extensions(draw: st.DrawFn, last: int) -> tuple[int, bytes]:
    """Draw (first header number, bytes) of a chain of IPv6 extension headers in front of protocol ``last``."""
    chain = draw(st.lists(st.sampled_from([0, 43, 44, 44, 51, 60, 135, 139, 140]), max_size=4))
    raw = b""
    for kind, following in zip(chain, [*chain, last][1:], strict=True):
        units = draw(st.integers(0, 2))
        if kind == 44:
            raw += struct.pack(">BBHI", following, 0, draw(st.sampled_from([0, 1, 8, 9, 0, 0])), 1)
        else:
            size = (units + 2) * 4 if kind == 51 else (units + 1) * 8
            raw += bytes([following, units]) + bytes(size - 2)
    return (chain[0] if chain else last), raw


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """Draw an IP packet, sound or with odd lengths and fragments."""
    proto, l4 = draw(transports())
    if draw(st.booleans()):
        fragment = draw(st.sampled_from([0, 0, 0, 0x4000, 0x2000, 1, 0x2001]))
        total = draw(st.sampled_from([None, None, None, 0, 10, 21, 60_000]))
        return ipv4(proto, l4, fragment=fragment, total=total, options=draw(st.sampled_from([0, 0, 1, 10])))
    first, chain = draw(extensions(proto))
    return ipv6(first, chain + l4, length=draw(st.sampled_from([None, None, None, 0, 4, 60_000])))


@st.composite
def records(draw: st.DrawFn) -> tuple[int, int, bytes, int]:
    """Draw (time in µs, link type, captured bytes, length on the wire)."""
    packet = draw(packets())
    for kind in draw(st.lists(st.sampled_from(["gre", "gre-bridged", "vxlan", "geneve"]), max_size=3)):
        packet = tunnel(kind, packet)
    link, frame = draw(framed(packet))
    wire = len(frame) + draw(st.sampled_from([0, 0, 4, 100]))
    cut = draw(st.integers(0, len(frame)))
    frame = frame if draw(st.booleans()) else frame[:cut]
    if frame and draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(frame) - 1))
        frame = frame[:at] + bytes([draw(st.integers(0, 255))]) + frame[at + 1 :]
    return draw(st.integers(0, 10**9)), link, frame, wire


@st.composite
def framed(draw: st.DrawFn, packet: bytes) -> tuple[int, bytes]:
    """Draw (link type, frame) around an IP packet."""
    six = packet[:1] >= b"\x60"
    ethertype = struct.pack(">H", 0x86DD if six else 0x0800)
    link = draw(st.sampled_from([0, 1, 1, 1, 12, 14, 101, 108, 113, 228, 229, 276]))
    if link in (0, 108):
        family = draw(st.sampled_from([24, 28, 30])) if six else 2
        return link, struct.pack(draw(st.sampled_from("<>")) + "I", family) + packet
    if link == 1:
        return link, ethernet(packet, tags=draw(st.integers(0, 3))) + bytes(draw(st.sampled_from([0, 6])))
    if link == 113:
        return link, bytes(14) + ethertype + packet
    if link == 276:
        return link, ethertype + bytes(18) + packet
    return link, packet
