"""``cybermesh enforce`` without a firewall: what it prints, what it refuses, and that orders are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cybermesh.cli import main
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import FILE_NAME, State


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(f'[node]\nstate_dir = "{tmp_path}"\n[enforce]\nbackend = "noop"\n')
    return path


def run(settings: Path, *words: str) -> int:
    """Call the command line in this process; return its exit code."""
    try:
        main(["enforce", *words, "-c", str(settings)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def mode(settings: Path) -> Mode:
    state = State(settings.parent / FILE_NAME)
    try:
        return state.orders().mode
    finally:
        state.close()


def test_status_and_diff_are_one_document_each(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, "status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["mode"], status["rules"], status["drift_now"], status["acks_waiting"]) == ("observe", 0, 0, 0)
    assert run(settings, "diff", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(settings, "status") == 0
    assert "mode" in capsys.readouterr().out


def test_orders_are_kept(settings: Path) -> None:
    assert mode(settings) is Mode.OBSERVE
    assert run(settings, "on") == 0
    assert mode(settings) is Mode.ENFORCE
    assert run(settings, "off") == 0
    assert mode(settings) is Mode.OFF
    assert run(settings, "reconcile") == 0
    assert mode(settings) is Mode.OFF


def test_enforcing_waits_for_its_confirmation(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, "confirm") == 1
    assert "nothing waits for confirmation" in capsys.readouterr().err
    assert run(settings, "on", "--confirm-within", "2m") == 0
    assert "within 120 s" in capsys.readouterr().err
    assert run(settings, "confirm") == 0
    state = State(settings.parent / FILE_NAME)
    assert state.orders().confirm_by_ms == 0
    state.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["on", "--confirm-within", "soon"], "give a time from 1s to 24h"),
        (["except", "203.0.113.0/24", "--for", "1h", "--reason", "x"], "is not an IP address"),
        (["except", "203.0.113.9", "--for", "2d", "--reason", "x"], "give a time from 1s to 24h"),
        (["kill-switch", "maybe"], "say on or off"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    settings: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_state_directory_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'[node]\nstate_dir = "{tmp_path}/missing"\n')
    assert run(path, "status") == 1
    assert f"{tmp_path}/missing/{FILE_NAME}: unable to open database file" in capsys.readouterr().err
