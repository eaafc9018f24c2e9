"""``cybermesh simulate`` as its users call it."""

from __future__ import annotations

import json

import pytest

from cybermesh.cli import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *arguments])
    return int(caught.value.code or 0)


def test_a_good_run_prints_one_object_and_exits_zero(capsys: pytest.CaptureFixture[str]):
    assert run("--scenarios", "20", "--seed", "5", "--twins", "1", "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert set(summary) == {"scenarios", "seed", "unsafe", "stalled", "scenarios_per_s", "events", "commits"}
    assert (summary["scenarios"], summary["seed"], summary["unsafe"], summary["stalled"]) == (20, 5, 0, 0)
    assert summary["commits"] > 20
    assert printed.err == ""


def test_a_wrong_quorum_is_caught_with_a_timeline_and_the_command_that_repeats_it(capsys: pytest.CaptureFixture[str]):
    assert run("--scenarios", "200", "--validators", "5", "--quorum", "3", "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["unsafe"] > 0
    assert "proposes" in printed.err
    assert "votes" in printed.err
    *_, last = printed.err.splitlines()
    again = last.split("repeat with cybermesh simulate ")[1].split()
    assert run(*again, "--json") == 1
    assert json.loads(capsys.readouterr().out)["unsafe"] == 1


@pytest.mark.parametrize(
    "arguments", [("--validators", "0"), ("--validators", "65"), ("--twins", "9"), ("--quorum", "5"), ("--x",)]
)
def test_wrong_usage_exits_two(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert run(*arguments) == 2
    assert capsys.readouterr().out == ""
