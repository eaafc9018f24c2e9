"""Traffic in general, as packets: what attacks and busy benign hosts look like, for tests of windows and detectors."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator

from cybermesh.telemetry.packets import ACK, FIN, PSH, RST, SYN
from tests.telemetry.packet_batches import Packet

ATTACKER, VICTIM = "198.51.100.7", "10.0.0.5"
OPEN = frozenset({22, 80, 443})  # ports of the victim that scans find open


def session(
    at: float,
    client: str,
    server: str,
    sport: int,
    dport: int,
    *,
    sent: int = 300,
    got: int = 3000,
    lasts: float = 0.2,
    greeting: bytes = b"",
    messages: int = 1,
) -> Iterator[Packet]:
    """A whole TCP connection; the server greets first if there is a greeting; what is sent goes in so many messages."""
    step = lasts / 8

    def out(n: int, flags: int, payload: bytes = b"") -> Packet:
        return Packet(at + n * step, client, server, sport, dport, 6, flags, payload)

    def back(n: int, flags: int, payload: bytes = b"") -> Packet:
        return Packet(at + n * step, server, client, dport, sport, 6, flags, payload)

    yield out(0, SYN)
    yield back(1, SYN | ACK)
    yield out(2, ACK)
    if greeting:
        yield back(3, PSH | ACK, greeting)
    if sent:
        for number in range(messages):
            yield out(4, PSH | ACK, b"x" * (sent // messages + (sent % messages if number == 0 else 0)))
    if got:
        yield back(5, PSH | ACK, b"y" * got)
    yield out(6, FIN | ACK)
    yield back(7, FIN | ACK)
    yield out(8, ACK)


def refused(at: float, client: str, server: str, sport: int, dport: int) -> Iterator[Packet]:
    yield Packet(at, client, server, sport, dport, 6, SYN)
    yield Packet(at + 0.0005, server, client, dport, sport, 6, RST | ACK)


def syn_scan(
    at: float, ports: Iterable[int], gap: float = 0.01, source: str = ATTACKER, victim: str = VICTIM
) -> Iterator[Packet]:
    """As nmap's: what is open answers, and the scanner's own kernel, which knows of nothing, resets it."""
    for number, port in enumerate(ports):
        if port in OPEN:
            yield from half_open(at + number * gap, source, victim, 40_000, port)
        else:
            yield from refused(at + number * gap, source, victim, 40_000, port)


def half_open(at: float, client: str, server: str, sport: int, dport: int, *, resets: bool = True) -> Iterator[Packet]:
    yield Packet(at, client, server, sport, dport, 6, SYN)
    yield Packet(at + 0.0005, server, client, dport, sport, 6, SYN | ACK)
    if resets:
        yield Packet(at + 0.001, client, server, sport, dport, 6, RST)


def forged_scan(at: float, ports: Iterable[int], gap: float = 0.01) -> Iterator[Packet]:
    """Under the address of somebody who is away: nobody resets what opens, and the victim answers again."""
    for number, port in enumerate(ports):
        if port in OPEN:
            for again in (0.0, 1.0, 3.0):
                yield from list(half_open(at + number * gap + again, ATTACKER, VICTIM, 40_000, port, resets=False))[again > 0 :]
        else:
            yield from refused(at + number * gap, ATTACKER, VICTIM, 40_000, port)


def decoy_scan(at: float, ports: Iterable[int], decoys: Iterable[str]) -> Iterator[Packet]:
    """Each probe comes from everybody's address, innocents' whose kernels reset what opens too."""
    sources = [ATTACKER, *decoys]
    for number, port in enumerate(ports):
        for turn, source in enumerate(sources):
            yield from syn_scan(at + number * 0.02 + turn * 0.0001, (port,), 0, source)


def forged_flood_on_random_ports(at: float, count: int, per_s: int) -> Iterator[Packet]:
    """One innocent's address, thousands of ports: it looks like a scan but for its speed."""
    for number in range(count):
        yield from syn_scan(at + number / per_s, ((number * 7919) % 60_000 + 1,))


def connect_scan_of_open_host(at: float, ports: Iterable[int], gap: float = 0.05) -> Iterator[Packet]:
    for number, port in enumerate(ports):
        yield from session(at + number * gap, ATTACKER, VICTIM, 41_000 + number, port, sent=0, got=0, lasts=0.02)


def flag_scan(at: float, flags: int, ports: Iterable[int]) -> Iterator[Packet]:
    for number, port in enumerate(ports):
        yield Packet(at + number * 0.01, ATTACKER, VICTIM, 40_000, port, 6, flags)


def ack_scan(at: float, ports: Iterable[int]) -> Iterator[Packet]:
    for number, port in enumerate(ports):
        yield Packet(at + number * 0.01, ATTACKER, VICTIM, 61_000, port, 6, ACK)
        yield Packet(at + number * 0.01 + 0.001, VICTIM, ATTACKER, port, 61_000, 6, RST)


def unreachable(at: float, probe: Packet) -> Packet:
    """The ICMP port unreachable that answers a UDP probe."""
    quoted = bytes([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0])
    quoted += bytes(map(int, probe.src.split("."))) + bytes(map(int, probe.dst.split(".")))
    quoted += probe.sport.to_bytes(2, "big") + probe.dport.to_bytes(2, "big") + bytes(4)
    return Packet(at, probe.dst, probe.src, proto=1, payload=quoted, icmp=(3, 3))


def udp_scan(at: float, ports: Iterable[int], gap: float = 0.4) -> Iterator[Packet]:
    for number, port in enumerate(ports):
        probe = Packet(at + number * gap, ATTACKER, VICTIM, 50_000, port, 17)
        yield probe
        if number % 2:
            yield unreachable(probe.at + 0.001, probe)


def sweep(at: float, port: int, hosts: Iterable[int], gap: float = 0.02) -> Iterator[Packet]:
    for number, host in enumerate(hosts):
        yield Packet(at + number * gap, ATTACKER, f"10.0.9.{host}", 42_000 + number, port, 6, SYN)


def ping_sweep(at: float, hosts: Iterable[int], alive: int) -> Iterator[Packet]:
    for number, host in enumerate(hosts):
        yield Packet(at + number * 0.01, ATTACKER, f"10.0.9.{host}", proto=1, icmp=(8, 0))
        if number < alive:
            yield Packet(at + number * 0.01 + 0.001, f"10.0.9.{host}", ATTACKER, proto=1, icmp=(0, 0))


def syn_flood(at: float, count: int, per_s: int, sources: Iterable[str] = (ATTACKER,)) -> Iterator[Packet]:
    addresses = list(sources)
    for number in range(count):
        yield Packet(at + number / per_s, addresses[number % len(addresses)], VICTIM, 1024 + number % 60_000, 80, 6, SYN)


def udp_flood(at: float, count: int, per_s: int, fixed: bool = False) -> Iterator[Packet]:
    for number in range(count):
        yield Packet(at + number / per_s, ATTACKER, VICTIM, 2000 if fixed else 1024 + number % 60_000, 53, 17, payload=b"f")


def ping_flood(at: float, count: int, per_s: int, payload: bytes = b"") -> Iterator[Packet]:
    for number in range(count):
        yield Packet(at + number / per_s, ATTACKER, VICTIM, proto=1, icmp=(8, 0), payload=payload)


def flag_flood(at: float, count: int, per_s: int, flags: int, *, reset: bool = False) -> Iterator[Packet]:
    """TCP packets of no connection to one port; the victim resets them, or is not heard."""
    for number in range(count):
        when, sport = at + number / per_s, 1024 + number % 60_000
        yield Packet(when, ATTACKER, VICTIM, sport, 80, 6, flags)
        if reset:
            yield Packet(when + 0.0001, VICTIM, ATTACKER, 80, sport, 6, RST)


def udp_flood_on_random_ports(at: float, count: int, per_s: int) -> Iterator[Packet]:
    for number in range(count):
        yield Packet(at + number / per_s, ATTACKER, VICTIM, 2000, number * 7919 % 60_000 + 1, 17, payload=b"f" * 400)


def worm(at: float, count: int, port: int, proto: int, gap: float) -> Iterator[Packet]:
    """An infected host that tries any address."""
    for number in range(count):
        target = f"{20 + number % 180}.{number * 7 % 250}.{number * 13 % 250}.{number % 200 + 1}"
        yield Packet(
            at + number * gap, ATTACKER, target, 43_000, port, proto, SYN if proto == 6 else 0, b"w" * 300 * (proto == 17)
        )


def spraying(at: float, hosts: int, rounds: int) -> Iterator[Packet]:
    """One password after the other, on many ssh servers."""
    for number in range(hosts * rounds):
        yield from session(
            at + number,
            ATTACKER,
            f"10.0.3.{number % hosts + 1}",
            40_000 + number,
            22,
            sent=1800,
            got=2100,
            lasts=2,
            greeting=b"SSH-2.0-x\r\n",
            messages=7,
        )


def _peers(count: int) -> Iterator[str]:
    return (f"{20 + n * 7 % 180}.{n * 31 % 250}.{n * 57 % 250}.{n % 200 + 1}" for n in range(count))


def p2p_client(at: float) -> Iterator[Packet]:
    """Peers anywhere, half of them gone, some on the ports of the web."""
    ports = (443, 80, 8080, 51_413, 6881)
    for number, peer in enumerate(_peers(600)):
        start, port = at + number * 0.1, ports[number % len(ports)]
        if number % 9 < 5:
            yield Packet(start, "10.7.0.5", peer, 30_000 + number, port, 6, SYN)
        else:
            yield from session(start, "10.7.0.5", peer, 30_000 + number, port, sent=5000, got=9000)


def mail_server(at: float) -> Iterator[Packet]:
    """Deliveries, two thirds of them to servers that are gone; and a relay's small messages."""
    for number, peer in enumerate(_peers(400)):
        start = at + number * 0.2
        yield from session(start, "10.7.0.4", VICTIM, 20_000 + number, 25, sent=2600, got=500, greeting=b"220 mx ESMTP\r\n")
        if number % 3:
            yield Packet(start, VICTIM, peer, 20_000 + number, 25, 6, SYN)
        else:
            yield from session(start, VICTIM, peer, 20_000 + number, 25, sent=9000, got=900, greeting=b"220 mx ESMTP\r\n")


def stray_answers(at: float) -> Iterator[Packet]:
    """Somebody forged a host's address: servers answer it what it never sent."""
    for number in range(400):
        server = f"104.16.{number % 20}.{number % 9 + 1}"
        yield Packet(at + number * 0.05, server, VICTIM, 443, 1024 + number, 6, SYN | ACK)


def broken_ipv6(at: float) -> Iterator[Packet]:
    """A browser whose IPv6 leads nowhere and whose QUIC is filtered: it tries both first."""
    for number in range(150):
        start = at + number * 0.3
        yield Packet(start, "2001:db8::4", f"2606:4700:{number:x}::1", 20_000 + number, 443, 6, SYN)
        yield Packet(
            start, "10.7.0.4", f"142.250.{number % 30}.{number % 7 + 1}", 20_000 + number, 443, 17, payload=b"q" * 1200
        )
        yield from session(start + 0.1, "10.7.0.4", f"104.16.{number}.1", 20_000 + number, 443, got=50_000)


def answers_to_searches(at: float, minutes: int) -> Iterator[Packet]:
    """A host searches for televisions every two minutes, from a new port each time; they answer from ports of their own."""
    for number in range(minutes // 2):
        yield Packet(at + number * 120, "10.7.0.4", "239.255.255.250", 50_000 + number, 1900, 17, payload=b"s" * 120)
        for device in range(5):
            yield Packet(at + number * 120 + 0.1, f"10.7.0.{device + 50}", "10.7.0.4", 40_000 + device, 50_000 + number, 17)


def forged(packets: Iterable[Packet], sources: Iterable[str]) -> Iterator[Packet]:
    """The same packets with sources written into them in turn."""
    for packet, source in zip(packets, itertools.cycle(sources)):
        yield dataclasses.replace(packet, src=source)


def onto_ports(packets: Iterable[Packet], ports: Iterable[int]) -> Iterator[Packet]:
    """The same packets to other ports, one after the other."""
    for packet, port in zip(packets, ports, strict=True):
        yield dataclasses.replace(packet, dport=port)


def guesses(
    at: float, count: int, port: int, gap: float, *, greeting: bytes = b"", sent: int = 1500, got: int = 2500
) -> Iterator[Packet]:
    for number in range(count):
        yield from session(
            at + number * gap,
            ATTACKER,
            VICTIM,
            43_000 + number,
            port,
            sent=sent,
            got=got,
            lasts=gap * 2,
            greeting=greeting,
            messages=6,
        )


def key_exchanges(at: float, count: int, gap: float) -> Iterator[Packet]:
    """A monitor that greets, exchanges keys with an ssh server and leaves."""
    for number in range(count):
        yield from session(
            at + number * gap,
            "10.7.0.8",
            VICTIM,
            47_000 + number,
            22,
            sent=1500,
            got=1600,
            greeting=b"SSH-2.0-OpenSSH_9.2\r\n",
            messages=4,
        )


def web_requests(
    at: float, lines: Iterable[bytes], answer: bytes, gap: float = 0.1, client: str = ATTACKER
) -> Iterator[Packet]:
    """One request and its answer after the other, on one connection each."""
    for number, line in enumerate(lines):
        start, sport = at + number * gap, 20_000 + number % 40_000
        yield Packet(start, client, VICTIM, sport, 80, 6, SYN)
        yield Packet(start + 0.0001, VICTIM, client, 80, sport, 6, SYN | ACK)
        yield Packet(start + 0.0002, client, VICTIM, sport, 80, 6, ACK)
        yield Packet(start + 0.0003, client, VICTIM, sport, 80, 6, PSH | ACK, line + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        if answer:
            yield Packet(start + 0.0004, VICTIM, client, 80, sport, 6, PSH | ACK, b"HTTP/1.1 " + answer + b"\r\n\r\nno")
        yield Packet(start + 0.0005, client, VICTIM, sport, 80, 6, FIN | ACK)
        yield Packet(start + 0.0006, VICTIM, client, 80, sport, 6, FIN | ACK)


def tiny_sessions(at: float, count: int, per_s: float, port: int) -> Iterator[Packet]:
    for number in range(count):
        start, sport = at + number / per_s, 1024 + number % 60_000
        yield from session(start, ATTACKER, VICTIM, sport, port, sent=150, got=250, lasts=0.001)


def slow_headers(at: float, count: int, lines: int) -> Iterator[Packet]:
    """Connections that stay open; each sends another header line every five seconds."""
    for number in range(count):
        start, sport = at + number * 0.02, 20_000 + number
        yield Packet(start, ATTACKER, VICTIM, sport, 80, 6, SYN)
        yield Packet(start + 0.001, VICTIM, ATTACKER, 80, sport, 6, SYN | ACK)
        yield Packet(start + 0.002, ATTACKER, VICTIM, sport, 80, 6, ACK)
        for line in range(lines):
            yield Packet(start + 0.003 + line * 5, ATTACKER, VICTIM, sport, 80, 6, PSH | ACK, b"X-a: b\r\n")
            yield Packet(start + 0.004 + line * 5, VICTIM, ATTACKER, 80, sport, 6, ACK)


def waiting_clients(at: float) -> Iterator[Packet]:
    """A proxy whose server is stuck: sixty requests, whole, and no answer for a minute."""
    for number in range(60):
        start, sport = at + number * 0.1, 20_000 + number
        yield Packet(start, "10.7.0.6", VICTIM, sport, 8080, 6, SYN)
        yield Packet(start + 0.001, VICTIM, "10.7.0.6", 8080, sport, 6, SYN | ACK)
        yield Packet(start + 0.002, "10.7.0.6", VICTIM, sport, 8080, 6, ACK)
        whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        yield Packet(start + 0.003, "10.7.0.6", VICTIM, sport, 8080, 6, PSH | ACK, whole)
        yield Packet(start + 60, VICTIM, "10.7.0.6", 8080, sport, 6, FIN | ACK)


def reflection(at: float, count: int, per_s: int, reflectors: int) -> Iterator[Packet]:
    for number in range(count):
        source = f"20.{number % reflectors}.9.1"
        yield Packet(at + number / per_s, source, VICTIM, 53, 33_000 + number % 500, 17, payload=b"a" * 400)


def protocol_scan(at: float, protocols: Iterable[int]) -> Iterator[Packet]:
    for number, proto in enumerate(protocols):
        yield Packet(at + number * 0.05, ATTACKER, VICTIM, proto=proto)


def p2p_calls(at: float) -> Iterator[Packet]:
    """A client that looks for ways to its peers: many UDP ports of a few hosts, half of them silent."""
    for number in range(400):
        peer, port = f"100.65.{number % 7}.7", 40_000 + number * 13 % 20_000
        yield Packet(at + number * 0.05, "10.7.0.5", peer, 50_000 + number % 5, port, 17, payload=b"s" * 100)
        if number % 2:
            yield Packet(at + number * 0.05 + 0.03, peer, "10.7.0.5", port, 50_000 + number % 5, 17, payload=b"r" * 100)


def resetting_server(at: float) -> Iterator[Packet]:
    """A server on a high port resets connections of which the capture shows nothing else."""
    for number in range(200):
        yield Packet(at + number * 0.02, VICTIM, "10.6.0.3", 33_389, 40_000 + number * 11, 6, RST | ACK)
        yield Packet(at + number * 0.02 + 0.001, VICTIM, "10.6.0.3", 33_389, 40_000 + number * 11, 6, RST)


def web_server(at: float, clients: int) -> Iterator[Packet]:
    """Thousands of clients with a few connections each."""
    for number in range(clients):
        client = f"100.64.{number // 250}.{number % 250 + 1}"
        for extra in range(3):
            yield from session(at + number * 0.01 + extra * 0.3, client, VICTIM, 30_000 + extra, 443)


def resolver(at: float, queries: int) -> Iterator[Packet]:
    """A resolver that serves clients and asks hundreds of authorities."""
    for number in range(queries):
        authority = f"{number % 200 + 11}.{number % 17}.3.4"
        for client, server, sport in (
            (f"10.1.0.{number % 200 + 1}", VICTIM, 20_000 + number),
            (VICTIM, authority, 40_000 + number % 20_000),
        ):
            yield Packet(at + number * 0.002, client, server, sport, 53, 17, payload=b"q" * 40)
            yield Packet(at + number * 0.002 + 0.001, server, client, 53, sport, 17, payload=b"a" * 120)


def monitor(at: float, minutes: int) -> Iterator[Packet]:
    """Fifty hosts, five ports and a ping each, every minute; some checks are bare connects; two hosts are down."""
    for minute in range(minutes):
        for host in range(50):
            start, target = at + minute * 60 + host, f"10.2.0.{host + 1}"
            yield Packet(start, "10.9.9.9", target, proto=1, icmp=(8, 0))
            if host < 2:
                continue
            yield Packet(start + 0.01, target, "10.9.9.9", proto=1, icmp=(0, 0))
            for number, port in enumerate((22, 80, 443, 3306, 9100)):
                sent = 0 if port in (22, 3306) else 200
                yield from session(
                    start + 0.1 * number, "10.9.9.9", target, 20_000 + minute * 300 + host * 5 + number, port, sent=sent
                )


def browser(at: float) -> Iterator[Packet]:
    for number in range(100):
        yield from session(
            at + number * 0.03, "10.3.0.8", f"93.184.{number % 30}.{number % 9 + 1}", 50_000 + number, 443, got=50_000
        )


def health_checks(at: float, seconds: int) -> Iterator[Packet]:
    """A load balancer that opens and closes connections to a web, a mail and an ssh server every two seconds."""
    for number in range(seconds // 2):
        for port, greeting in ((80, b""), (25, b"220 mail ESMTP\r\n"), (22, b"SSH-2.0-OpenSSH_9.2\r\n")):
            yield from session(
                at + number * 2,
                "10.4.0.1",
                VICTIM,
                10_000 + number * 3 + port,
                port,
                sent=0,
                got=0,
                greeting=greeting,
                lasts=0.1,
            )


def nat_gateway(at: float) -> Iterator[Packet]:
    """Two hundred users behind one address: web, dns, some mail polls."""
    for number in range(1500):
        server = f"151.101.{number % 50}.{number % 7 + 1}"
        yield from session(at + number * 0.04, "192.0.2.1", server, 1024 + number, 993 if number % 20 == 0 else 443)


def dead_service(at: float) -> Iterator[Packet]:
    """A client that tries a stopped service again and again, five times a second."""
    for number in range(300):
        yield from refused(at + number * 0.2, "10.5.0.2", VICTIM, 30_000 + number, 5432)


def server_in_the_middle(at: float) -> Iterator[Packet]:
    """A capture that begins in the middle of a server's connections: it answers, ends and resets towards many client ports."""
    for number in range(200):
        port = 32_768 + number * 7
        yield Packet(at + number * 0.01, VICTIM, "10.6.0.3", 443, port, 6, FIN | ACK)
        yield Packet(at + number * 0.01 + 0.001, "10.6.0.3", VICTIM, port, 443, 6, RST)
        yield Packet(at + number * 0.01 + 0.002, VICTIM, "10.6.0.3", 53, port, 17, payload=b"late answer")


def deployment(at: float) -> Iterator[Packet]:
    """A tool that runs a dozen ssh commands on one host, each with output."""
    for number in range(12):
        yield from session(
            at + number * 4,
            "10.7.0.1",
            VICTIM,
            44_000 + number,
            22,
            sent=4000,
            got=9000,
            lasts=3,
            greeting=b"SSH-2.0-OpenSSH_9.2\r\n",
        )


def passive_ftp(at: float) -> Iterator[Packet]:
    """A client that fetches sixty files: it sends nothing on the data connections, each to another high port."""
    for number in range(60):
        yield from session(at + number * 0.5, "10.7.0.9", VICTIM, 41_000 + number, 50_000 + number, sent=0, got=5000)


def forgetful_client(at: float) -> Iterator[Packet]:
    """A client restarts; the server, on a high port, keeps its connections alive and ends them, and is answered by RST."""
    for number in range(40):
        flags = FIN | ACK if number % 2 else ACK
        yield Packet(at + number * 0.1, VICTIM, "10.7.0.7", 50_051, 33_000 + number * 5, 6, flags)
        yield Packet(at + number * 0.1 + 0.001, "10.7.0.7", VICTIM, 33_000 + number * 5, 50_051, 6, RST)


def ssh_monitor(at: float) -> Iterator[Packet]:
    """A monitor that logs in by key for one short command every two seconds."""
    for number in range(40):
        client, port = "10.7.0.8", 46_000 + number
        yield from session(at + number * 2, client, VICTIM, port, 22, sent=3720, got=4080, greeting=b"SSH-2.0-OpenSSH_9.2\r\n")


def backup(at: float) -> Iterator[Packet]:
    yield from session(at, "10.8.0.1", VICTIM, 45_000, 22, sent=60_000, got=60_000, lasts=50, greeting=b"SSH-2.0-x\r\n")


def traceroute(at: float) -> Iterator[Packet]:
    for number in range(90):
        yield Packet(at + number * 0.1, "10.3.0.8", "203.0.113.9", 40_123, 33_434 + number, 17, payload=b"t" * 32)


def video_stream(at: float) -> Iterator[Packet]:
    for number in range(9000):
        yield Packet(at + number * 0.001, "10.8.0.9", "10.3.0.8", 5004, 5006, 17, payload=b"v" * 600)


def dns(
    at: float, names: Iterable[str], qtype: int = 1, rcode: int = 0, gap: float = 0.3, client: str = ATTACKER
) -> Iterator[Packet]:
    """A question and its answer (without records) for each name."""
    for number, name in enumerate(names):
        question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
        question += qtype.to_bytes(2, "big") + b"\0\1"
        head, sport = number.to_bytes(2, "big"), 20_000 + number % 40_000
        ask = head + b"\x01\0\0\1" + bytes(6) + question
        answer = head + bytes([0x81, 0x80 | rcode]) + b"\0\1" + bytes(6) + question
        yield Packet(at + number * gap, client, VICTIM, sport, 53, 17, payload=ask)
        yield Packet(at + number * gap + 0.01, VICTIM, client, 53, sport, 17, payload=answer)


def noise(count: int, length: int) -> Iterator[str]:
    """Labels as encoders of base 32 write them, each new."""
    for number in range(count):
        digest = hashlib.shake_128(str(number).encode()).digest(length)
        yield "".join("abcdefghijklmnopqrstuvwxyz234567"[byte % 32] for byte in digest)


def tunnel_names(count: int, length: int, parent: str) -> Iterator[str]:
    for label in noise(count, length):
        yield ".".join((label[:60], label[60:120], parent) if length > 60 else (label, parent)).replace("..", ".")


def block_list(count: int) -> Iterator[str]:
    return (f"{n % 250}.{n // 250}.0.203.zen.blocklist.test" for n in range(count))


def reverse_names(count: int) -> Iterator[str]:
    digits = (hashlib.shake_128(str(n).encode()).hexdigest(16) for n in range(count))
    return (".".join(digit) + ".ip6.arpa" for digit in digits)


def ordered(packets: Iterable[Packet]) -> list[Packet]:
    return sorted(packets, key=lambda packet: packet.at)
