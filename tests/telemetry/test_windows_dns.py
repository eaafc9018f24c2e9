"""Windows over DNS: whose names, below which domain, how many, and how they are spelled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.dns import NO_ANSWER, NXDOMAIN, DnsRow, dns_batch
from cybermesh.telemetry.windows import COLUMN, DNS_NAMES, Scope
from cybermesh.telemetry.windows_dns import DnsWindows, parent_of
from tests.telemetry.packet_batches import packed

CLIENT, SERVER = packed("10.0.0.1"), packed("10.0.0.53")
BOTH = {Scope.DOMAIN: (60,), Scope.RESOLVER: (60,)}


def row(
    at_s: float, name: str, *, asked: bool = True, rcode: int = NO_ANSWER, qtype: int = 1, client: bytes = CLIENT
) -> DnsRow:
    return DnsRow(round(at_s * 1e6), client, SERVER, 53, 17, asked, rcode, qtype, 0, 60, len(name) + 1, name)


@pytest.mark.parametrize(
    ("name", "parent"),
    [("www.lab.test", "lab.test"), ("a.b.c.example.co.uk", "example.co.uk"), ("test", "test"), ("x.y.com", "y.com")],
)
def test_names_are_counted_under_their_parent_domain(name: str, parent: str) -> None:
    assert parent_of(name) == parent


def test_questions_and_answers_are_counted_once_and_names_as_often_as_they_differ() -> None:
    windows = DnsWindows(BOTH)
    rows = [row(0, "a.x.test"), row(0.1, "a.x.test", asked=False, rcode=0), row(0.2, "b.x.test", qtype=10)]
    rows += [row(0.3, "b.x.test", asked=False, rcode=NXDOMAIN), row(0.4, "c.y.test", asked=False, rcode=NXDOMAIN)]
    rows += [row(0.5, ""), row(0.6, ".")]
    assert windows.update(dns_batch(rows)) == []
    found = {batch.scope: batch for batch in windows.finish()}
    resolver = found[Scope.RESOLVER]
    told = {name: float(resolver.values[0, COLUMN[name]]) for name in sorted(DNS_NAMES | {"names"})}
    assert (told["dns_questions"], told["dns_answers"], told["dns_nxdomain"]) == (2, 3, 2)
    assert (told["names"], told["nx_domains"], told["dns_odd"]) == (3, 2, 1)
    assert resolver.destination[0].tobytes() == SERVER
    domains = found[Scope.DOMAIN]
    assert domains.domain is not None
    assert sorted(domains.domain.tolist()) == ["x.test", "y.test"]
    assert not domains.destination.any()
    assert domains.peer[0].tobytes() == SERVER


def test_what_packets_tell_is_unknown_here() -> None:
    windows = DnsWindows(BOTH)
    windows.update(dns_batch([row(0, "a.x.test")]))
    for batch in windows.finish():
        assert {name for name, at in COLUMN.items() if batch.known[at]} == DNS_NAMES | {"span_s"}
        assert np.isfinite(batch.values).all()


def test_the_spelling_of_reverse_names_means_nothing() -> None:
    windows = DnsWindows(BOTH)
    windows.update(dns_batch([row(0, ".".join("0123456789abcdef" * 2) + ".ip6.arpa")]))
    values = windows.finish()[0].values[0]
    assert values[COLUMN["dns_name_bits"]] == values[COLUMN["dns_long"]] == 0


def test_a_flood_of_domains_leaves_an_established_client_known() -> None:
    windows = DnsWindows(BOTH, capacity=64)
    for second in range(10):
        windows.update(dns_batch([row(second, "www.lab.test", client=packed("10.0.0.9"))]))
    flood = [row(10 + n / 1000, f"n{n}.d{n}.test") for n in range(900)]
    windows.update(dns_batch([*flood, row(11.5, "www.lab.test", client=packed("10.0.0.9"))]))
    (kept,) = [batch for batch in windows.finish() if batch.scope is Scope.DOMAIN]
    assert kept.values[0, COLUMN["dns_questions"]] == 11


@given(st.lists(st.tuples(st.integers(0, 200), st.text(max_size=30), st.booleans()), max_size=40), st.integers(1, 9))
def test_any_names_give_finite_rows_whatever_the_blocks(messages: list[tuple[int, str, bool]], size: int) -> None:
    rows = [row(at, name, asked=asked, rcode=-1 if asked else 0) for at, name, asked in sorted(messages)]
    whole, cut = DnsWindows(BOTH), DnsWindows(BOTH)
    first = whole.update(dns_batch(rows)) + whole.finish()
    parts = [cut.update(dns_batch(rows[start : start + size])) for start in range(0, len(rows), size)]
    second = [batch for part in parts for batch in part] + cut.finish()
    assert [sorted(batch.values.tolist()) for batch in first] == [sorted(batch.values.tolist()) for batch in second]
    assert all(np.isfinite(batch.values).all() for batch in first)
