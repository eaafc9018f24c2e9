"""``cybermesh consensus status`` tells what the health port of a validator tells, in a person's words and in JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cybermesh.cli import main
from cybermesh.consensus.driver import Counters, Status
from cybermesh.metrics import render
from cybermesh.roles.validator import consensus_figures


class Port:
    """A process's health port with given problems and figures."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.figures: dict[str, float] = {}
        port = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_ready = self.path.endswith("/ready")
                body = json.dumps({"problems": port.problems}).encode() if is_ready else render(port.figures)
                self.send_response(503 if is_ready and port.problems else 200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["consensus", "status", *arguments])
    return int(caught.value.code or 0)


def figures() -> dict[str, float]:
    counters = Counters(blocks=4, commit_latency_ms=30)
    counters.sent.update(vote=9, timeout=1)
    found = consensus_figures(counters, Status(round=12, leader=2, height=10, high_round=11, mempool=3, problem=None))
    return dict(found)


def test_a_voting_validator_is_shown_with_exit_code_zero(port: Port, capsys: pytest.CaptureFixture[str]):
    port.figures = figures()
    assert status("--url", port.url, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["round"], shown["height"], shown["leader"], shown["votes"], shown["timeouts"]) == (12, 10, 2, 9, 1)
    assert shown["commit_latency_ms"] == 7.5
    assert shown["problem"] is None


def test_a_lost_quorum_is_shown_with_exit_code_one(port: Port, capsys: pytest.CaptureFixture[str]):
    port.figures = figures()
    port.problems = {"validator": "waiting for a quorum"}
    assert status("--url", port.url) == 1
    assert "waiting for a quorum" in capsys.readouterr().out


def test_a_port_without_a_validator_is_one_clear_error(port: Port, capsys: pytest.CaptureFixture[str]):
    assert status("--url", port.url) == 1
    assert "no validator runs there" in capsys.readouterr().err
    assert status("--url", "http://127.0.0.1:1") == 1
    assert "health port" in capsys.readouterr().err
    assert status("--url", "file:///etc/passwd") == 2
