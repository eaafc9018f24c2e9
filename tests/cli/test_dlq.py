"""The dead-letter commands, on a bus that validators have written to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cybermesh.bus.local import LocalBus
from cybermesh.bus.topics import Topics
from cybermesh.cli import main
from cybermesh.envelope import Code, EnvelopeError
from cybermesh.messages import TxKind
from cybermesh.roles.clock import SystemClock
from cybermesh.wire.codec import encode
from cybermesh.wire.unsigned import DEAD_LETTER_RAW_MAX, make_dead_letter
from tests.wire import test_faults as wire

TOPICS = Topics()
READABLE = wire.raw(wire.ANOMALY, severity=8)[1]
NONSENSE = b"\xff\xff"
LONG = b"x" * (DEAD_LETTER_RAW_MAX + 1)
REFUSED = (
    (READABLE, Code.FIELD_MISMATCH, "validator-1"),
    (READABLE, Code.FIELD_MISMATCH, "validator-2"),
    (NONSENSE, Code.MALFORMED, "validator-1"),
    (LONG, Code.MALFORMED, "validator-3"),
)


@pytest.fixture
async def settings(tmp_path: Path) -> Path:
    """Settings of a local bus on which there are letters."""
    path = tmp_path / "validator.toml"
    path.write_text(f'[bus]\nkind = "local"\npath = "{tmp_path}/bus.db"\n')
    async with LocalBus(tmp_path / "bus.db", SystemClock().wall_ms) as bus:
        for number, (raw, code, node) in enumerate(REFUSED):
            place = (TOPICS.ai_anomalies, 0, number)
            letter = make_dead_letter(place, EnvelopeError(code, "here", "is wrong"), raw, wire.NOW_MS + number, node)
            await bus.publish(TOPICS.ai_dlq, letter.raw_sha256, encode(letter))
        await bus.publish(TOPICS.ai_dlq, b"k", b"\x01no letter")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["dlq", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == exit_code, said.err
    return said.out, said.err


def listed(capsys: pytest.CaptureFixture[str], settings: Path, *options: str) -> Sequence[dict[str, object]]:
    return json.loads(run(capsys, "list", "--json", "--wait", "0.5", "-c", str(settings), *options)[0])


def test_a_list_joins_what_several_validators_say_of_one_message(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, settings)
    assert [(entry["code"], entry["nodes"], entry["is_whole"]) for entry in found] == [
        ("FIELD_MISMATCH", ["validator-1", "validator-2"], True),
        ("MALFORMED", ["validator-1"], True),
        ("MALFORMED", ["validator-3"], False),
    ]
    assert listed(capsys, settings) == found, "reading marks nothing as read"
    assert listed(capsys, settings, "--code", "FIELD_MISMATCH") == found[:1]
    assert listed(capsys, settings, "--limit", "1") == found[2:]
    out, err = run(capsys, "list", "--wait", "0.5", "-c", str(settings))
    assert out.count("\n") == 3
    assert "here: is wrong  (validator-1, validator-2)" in out
    assert "not a dead letter" in err


def test_show_reads_the_message_as_far_as_it_can_be_read(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = (str(entry["id"]) for entry in listed(capsys, settings))
    told = json.loads(run(capsys, "show", first[:12], "--wait", "0.5", "-c", str(settings))[0])
    assert (told["message"]["severity"], told["message"]["pubkey"]) == (8, wire.KEY.public.hex())
    assert json.loads(told["message"]["payload"])["severity"] == 7
    raw = tmp_path / "raw"
    told = json.loads(run(capsys, "show", second, "--raw", str(raw), "--wait", "0.5", "-c", str(settings))[0])
    assert (told["message"], raw.read_bytes()) == (None, NONSENSE)


async def test_replay_publishes_the_same_bytes_on_the_same_topic(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, third = (str(entry["id"]) for entry in await asyncio.to_thread(listed, capsys, settings))
    await asyncio.to_thread(run, capsys, "replay", first, "--wait", "0.5", "-c", str(settings))
    async with (
        LocalBus(settings.parent / "bus.db", SystemClock().wall_ms) as bus,
        bus.subscribe((TOPICS.of_kind(TxKind.ANOMALY),), "reader") as deliveries,
        asyncio.timeout(10),
    ):
        assert (await anext(aiter(deliveries))).value == READABLE
    arguments = ("replay", third, "--wait", "0.5", "-c", str(settings))
    _, err = await asyncio.to_thread(lambda: run(capsys, *arguments, exit_code=1))
    assert f"{DEAD_LETTER_RAW_MAX} of {DEAD_LETTER_RAW_MAX + 1} bytes" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "0" * 64], 1, "no such dead letter"),
        (["show", ""], 1, "several messages begin so"),
    ],
)
def test_an_id_that_names_no_letter_or_several_is_said(
    settings: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert words in run(capsys, *arguments, "--wait", "0.5", "-c", str(settings), exit_code=code)[1]


def test_a_memory_bus_and_a_switched_off_topic_have_no_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "memory bus" in run(capsys, "list", exit_code=2)[1]
    path = tmp_path / "off.toml"
    path.write_text(f'[bus]\nkind = "local"\npath = "{tmp_path}/bus.db"\n[topics]\nai_dlq = ""\n')
    assert "switched off" in run(capsys, "list", "-c", str(path), exit_code=2)[1]
