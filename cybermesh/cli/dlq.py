"""``cybermesh dlq list|show|replay``: what validators refused and why, read from the dead-letter topic of the settings' bus.

Every validator writes its own letter about a message; they are shown as one message with the nodes that refused it. Reading
marks nothing as read. The topic has no end while validators run: reading stops when no letter has come for ``--wait`` seconds
(five more for the first).
"""

from __future__ import annotations

import asyncio
import datetime
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.bus import Bus, Delivery
    from cybermesh.bus.topics import Topics
    from cybermesh.config import Settings
    from cybermesh.messages import DeadLetter

T = TypeVar("T")

JOIN_S = 5.0  # what brokers may take until they hand out the first letter

dlq = typer.Typer(no_args_is_help=True, help="List, show and replay messages that validators refused.")
FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file that names the bus.")]
WaitOption = Annotated[float, typer.Option(min=0.1, max=600, help="Stop when nothing has arrived for so many seconds.")]
CodeOption = Annotated[list[str] | None, typer.Option("--code", help="Only letters with this code; repeat it for several.")]
Identifier = Annotated[str, typer.Argument(metavar="ID", help="SHA-256 of the message, or enough of its beginning.")]


@dataclass(slots=True)
class _Refused:
    """A message that was refused: the newest letter about it, and who has written one."""

    letter: DeadLetter
    nodes: set[str] = field(default_factory=set)

    def as_object(self) -> dict[str, object]:
        letter = self.letter
        return {
            "id": letter.raw_sha256.hex(),
            "code": letter.code,
            "text": letter.text,
            "time": _iso(letter.time_ms),
            "topic": letter.topic,
            "partition": letter.partition,
            "offset": letter.offset,
            "nodes": sorted(self.nodes),
            "length": letter.raw_length,
            "is_whole": len(letter.raw) == letter.raw_length,
        }


@dlq.command("list")
def list_(
    config: FileOption = None,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
    code: CodeOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many messages, the newest.")] = 1_000,
    wait: WaitOption = 3.0,
) -> None:
    """List refused messages, oldest first.

    Example: cybermesh dlq list --code UNKNOWN_PRODUCER -c /etc/cybermesh/validator.toml
    """
    found = _read(config, wait, lambda letter: not code or letter.code in code, limit)
    if json or form is not output.Format.HUMAN:
        output.emit((entry.as_object() for entry in found), output.Format.JSON if json else form)
        return
    for entry in found:
        letter = entry.letter
        nodes = ", ".join(sorted(entry.nodes))
        what = f"{letter.raw_sha256.hex()[:16]}  {_iso(letter.time_ms)}  {letter.code:<16}"
        sys.stdout.write(f"{what} {letter.topic}  {letter.text}  ({nodes})\n")


@dlq.command()
def show(
    identifier: Identifier,
    config: FileOption = None,
    raw: Annotated[Path | None, typer.Option(help="Write the message's bytes into this file.")] = None,
    wait: WaitOption = 3.0,
) -> None:
    """Show one refused message: why, where it was, and as far as it can be read, what it says."""
    entry = _one(config, wait, identifier)
    if raw is not None:
        raw.write_bytes(entry.letter.raw)
    output.emit_one(entry.as_object() | {"message": _readable(config, entry.letter)})


@dlq.command()
def replay(
    identifiers: Annotated[list[str], typer.Argument(metavar="ID...", help="Messages, by enough of their SHA-256.")],
    config: FileOption = None,
    wait: WaitOption = 3.0,
) -> None:
    """Publish refused messages again, byte for byte, on the topic they came from; validators verify them as any other.

    It helps where the reason has gone, as when a sensor's key was added. It changes no message: what was too old stays so.
    """
    for identifier in identifiers:
        letter = _one(config, wait, identifier).letter
        if len(letter.raw) != letter.raw_length:
            raise output.CommandError(
                f"{identifier}: the letter holds {len(letter.raw)} of {letter.raw_length} bytes; send it again from its source"
            )
        settings = _settings(config)
        if letter.topic not in _topics(settings).of_transactions():
            raise output.CommandError(f"{identifier}: {letter.topic!r} is no topic of signed messages here; nothing was sent")

        async def publish(bus: Bus, letter: DeadLetter = letter) -> None:
            await bus.publish(letter.topic, letter.raw_sha256, letter.raw)

        _with_bus(settings, publish)
        output.note(f"{letter.raw_sha256.hex()[:16]}: published on {letter.topic} again")


def _one(config: Path | None, wait_s: float, identifier: str) -> _Refused:
    prefix = identifier.lower()
    found = _read(config, wait_s, lambda letter: letter.raw_sha256.hex().startswith(prefix), 2)
    if not found:
        raise output.CommandError(f"{identifier}: no such dead letter; `cybermesh dlq list` shows those there are")
    if len(found) > 1:
        raise output.CommandError(f"{identifier}: several messages begin so; give more of the id")
    return found[0]


def _read(config: Path | None, wait_s: float, is_wanted: Callable[[DeadLetter], bool], limit: int) -> list[_Refused]:
    """Return the newest messages that are wanted, oldest first; at most ``limit`` are kept in memory."""
    from cybermesh.envelope import EnvelopeError
    from cybermesh.wire import codec

    settings = _settings(config)
    topic = settings.topics.ai_dlq
    if not topic:
        raise output.CommandError("topics.ai_dlq: dead letters are switched off in these settings", 2)
    found: dict[bytes, _Refused] = {}

    def keep(delivery: Delivery) -> None:
        try:
            letter = codec.decode_dead_letter(delivery.value)
        except EnvelopeError as error:
            output.note(f"{delivery.topic}/{delivery.partition}/{delivery.offset}: not a dead letter: {error}")
            return
        if not is_wanted(letter):
            return
        known = found.pop(letter.raw_sha256, None)
        nodes = (known.nodes if known else set()) | {letter.node}
        newest = known.letter if known and known.letter.time_ms > letter.time_ms else letter
        found[letter.raw_sha256] = _Refused(newest, nodes)
        if len(found) > limit:
            del found[min(found, key=lambda digest: found[digest].letter.time_ms)]

    async def read(bus: Bus) -> None:
        # A group of its own that acknowledges nothing: every call begins with the oldest letter.
        async with bus.subscribe((topic,), f"cybermesh-dlq-{uuid.uuid4().hex}") as deliveries:
            arriving, patience_s = aiter(deliveries), JOIN_S + wait_s
            while True:
                try:
                    async with asyncio.timeout(patience_s):
                        keep(await anext(arriving))
                except (TimeoutError, StopAsyncIteration):
                    return
                patience_s = wait_s

    _with_bus(settings, read)
    return sorted(found.values(), key=lambda entry: entry.letter.time_ms)


def _settings(config: Path | None) -> Settings:
    from cybermesh.config import load

    settings = load(config).settings
    if settings.bus.kind == "memory":
        raise output.CommandError("bus.kind: a memory bus ends with its process; name the settings of a deployment with -c", 2)
    return settings


def _topics(settings: Settings) -> Topics:
    from cybermesh.bus.topics import Topics

    return Topics(**settings.topics.model_dump())


def _with_bus(settings: Settings, work: Callable[[Bus], Awaitable[T]]) -> T:
    from cybermesh.roles.open_bus import open_bus

    async def run() -> T:
        async with open_bus(settings) as bus:
            return await work(bus)

    return asyncio.run(run())


def _readable(config: Path | None, letter: DeadLetter) -> dict[str, object] | None:
    """Return the fields of a message whose structure is right, its bytes as text or hexadecimal; None of any other."""
    import dataclasses

    from cybermesh.envelope import EnvelopeError
    from cybermesh.wire import codec

    kind = _topics(_settings(config)).of_transactions().get(letter.topic)
    if kind is None:
        return None
    try:
        message = codec.decode_signed(kind, letter.raw)
    except EnvelopeError:
        return None
    return {entry.name: _text(getattr(message, entry.name)) for entry in dataclasses.fields(message)}


def _text(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode() if value.isascii() and value.startswith(b"{") else value.hex()
    if isinstance(value, tuple):
        return [_text(entry) for entry in value]
    return value


def _iso(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, tz=datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
