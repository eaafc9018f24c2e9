"""Clear-text web traffic: what counts as a request, a login, an attack, a refusal; the same for packets and log lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cybermesh.telemetry.web_requests import Web, request_mark, web_marks
from tests.telemetry.packet_batches import Packet, batch


@pytest.mark.parametrize(
    ("line", "mark"),
    [
        (b"GET / HTTP/1.1", Web.REQUEST),
        (b"GET /login HTTP/1.1", Web.REQUEST),
        (b"POST /wp-login.php HTTP/1.1", Web.REQUEST | Web.LOGIN),
        (b"POST /api/v2/sign-in?next=/ HTTP/1.1", Web.REQUEST | Web.LOGIN),
        (b"POST /catalogue?q=login HTTP/1.1", Web.REQUEST),
        (b"GET /docs/nikto.html HTTP/1.1\r\nUser-Agent: Mozilla/5.0\r\n", Web.REQUEST),
        (b"GET / HTTP/1.1\r\nUser-Agent: Mozilla/5.00 (Nikto/2.1.6)\r\n", Web.REQUEST | Web.EXPLOIT),
        (b"GET / HTTP/1.1\r\nX: ${jndi:ldap://a/b}", Web.REQUEST | Web.EXPLOIT),
        (b"GET /..%2f..%2fetc/hosts HTTP/1.1", Web.REQUEST | Web.EXPLOIT),
        (b"GET /?id=1%20UNION%20SELECT%20a HTTP/1.1", Web.REQUEST | Web.EXPLOIT),
        (b"GET /a/../b.css HTTP/1.1", Web.REQUEST),
        (b"GET /union-select-committee?order=1 HTTP/1.1", Web.REQUEST),
    ],
)
def test_a_request_line_is_what_it_asks_for(line: bytes, mark: Web) -> None:
    assert request_mark(line) == mark


@pytest.mark.parametrize(
    ("payload", "mark"),
    [
        (b"GET / HTTP/1.1\r\n", Web.REQUEST),
        (b"HTTP/1.1 200 OK\r\n", 0),
        (b"HTTP/1.0 404 Not Found", Web.ERROR),
        (b"HTTP/1.1 403 Forbidden", Web.ERROR | Web.REFUSED),
        (b"HTTP/1.1 \xff\xff\xff", 0),
        (b"HTTP/1.1", 0),
        (b"GETTING somewhere", 0),
    ],
)
def test_a_payload_is_a_request_or_an_answer_by_its_first_bytes(payload: bytes, mark: int) -> None:
    packets = [
        Packet(0, "10.0.0.1", "10.0.0.2", 5, 80, 6, 0, payload),
        Packet(0, "10.0.0.1", "10.0.0.2", 5, 80, 17, 0, payload),
    ]
    assert web_marks(batch(packets)).tolist() == [mark, 0]


@given(st.lists(st.binary(max_size=40) | st.binary(max_size=30).map(b"HTTP/1.1 ".__add__), max_size=20))
def test_any_payload_is_read_without_an_error(payloads: list[bytes]) -> None:
    marks = web_marks(batch([Packet(0, "::1", "::2", 5, 80, 6, 0, payload) for payload in payloads]))
    assert len(marks) == len(payloads)


def test_a_hostile_request_takes_time_in_proportion_to_its_length() -> None:
    for part in (b"POST /" + b"l" * 2000, b"GET /" + b"../" * 700, b"User-Agent: " * 200, b"'or" * 700):
        assert request_mark(part) & Web.REQUEST
