"""Bad input: one clear line with place, reason and what to do; exit code 1 or 2; no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cybermesh.cli import main


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and what it said."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    code = ended.value.code
    assert isinstance(code, int)
    return code, said.err


CAPTURES = {
    "missing": None,
    "empty": b"",
    "foreign": b"MZ" + bytes(range(256)) * 4,
    "text": b"this is no capture\n" * 20,
}


@pytest.mark.parametrize("command", ["flows", "detect"])
@pytest.mark.parametrize("kind", CAPTURES)
def test_what_is_no_capture_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    path = tmp_path / f"{kind}.pcap"
    content = CAPTURES[kind]
    if content is not None:
        path.write_bytes(content)
    code, said = _fails(capsys, command, str(path))
    assert code == 1
    assert str(path) in said
    assert len([line for line in said.splitlines() if line.startswith("cybermesh:")]) == 1


def test_the_demo_refuses_what_is_no_capture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _fails(capsys, "demo", "--capture", str(tmp_path / "none.pcap"))
    assert code == 1
    assert "none.pcap" in said


def test_an_unknown_setting_is_named_with_the_nearest_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ai.toml"
    path.write_text("[telemetry]\nbatch_sise = 4\n", encoding="utf-8")
    code, said = _fails(capsys, "config", "check", "-c", str(path))
    assert code == 2
    assert "telemetry.batch_sise" in said
    assert "telemetry.batch_size" in said


def test_a_key_that_others_may_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "node.key"
    with pytest.raises(SystemExit):
        main(["keys", "generate", str(path)])
    public = capsys.readouterr().out.strip()
    assert len(public) == 64
    path.chmod(0o644)
    code, said = _fails(capsys, "keys", "show", str(path))
    assert code == 1
    assert "chmod 600" in said
    assert path.read_text(encoding="utf-8").strip() not in said


def test_a_process_does_not_start_with_an_open_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as made:
        main(["init", str(tmp_path / "mesh"), "--validators", "1", "--no-budget"])
    assert not made.value.code
    capsys.readouterr()
    settings = tmp_path / "mesh" / "all.toml"
    settings.write_text(settings.read_text() + f'[telemetry]\ninputs = ["{tmp_path}/x"]\n', encoding="utf-8")
    (tmp_path / "mesh" / "keys" / "validator-1.key").chmod(0o640)
    code, said = _fails(capsys, "run", "--role", "validator", "--role", "agent", "-c", str(settings))
    assert code == 1
    assert "validator-1.key" in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--role", "gateway"], 2, "gateway"),
        (["verify", "none.json", "--genesis", "none-either.json"], 2, "none"),
        (["init", "{tmp}", "--no-budget"], 2, "not an empty directory"),
        (["demo", "--stop-validator", "9"], 2, "--stop-validator"),
        (["no-such-command"], 2, "no-such-command"),
        (["policy", "list", "-c", "{tmp}/none.toml"], 2, "none.toml"),
    ],
)
def test_wrong_usage_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "something").write_bytes(b"")
    got, said = _fails(capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert got == code
    assert words in said


def test_a_closed_pipe_is_not_an_error_to_shout_about() -> None:
    capture = Path(__file__).resolve().parents[2] / "cybermesh" / "data" / "demo.pcap"
    command = f"{sys.executable} -c 'from cybermesh.cli import main; main()' flows {capture} --format csv | head -1 >/dev/null"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
