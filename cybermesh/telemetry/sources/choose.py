"""Open the input that a user names: ``KIND:WHERE``, or just a path, recognised by its content.

| kind | where | yields |
|---|---|---|
| pcap | a capture, a folder of captures, ``-`` | packets |
| live | a network interface, and after a blank a filter as tcpdump takes it: ``live:eth0 tcp port 22`` | packets |
| csv | a flow table of the CIC family or our own, a folder of them, ``-`` | flows |
| zeek | conn.log or dns.log, a folder of logs, ``-`` | flows, DNS rows |
| eve | Suricata's eve.json, a folder of them, ``-`` | flows, DNS rows, events |
| logs | authentication and web access logs, a folder of them, ``-``, or ``journald`` | events |
| kafka | a topic of flow features | flows |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cybermesh.telemetry.sources import DEFAULT_BLOCK, Source, SourceError
from cybermesh.telemetry.sources.capture import CaptureSource
from cybermesh.telemetry.sources.folder import FolderSource
from cybermesh.telemetry.sources.lines import Pace, Reading
from cybermesh.telemetry.sources.pcap import is_pcap
from cybermesh.telemetry.sources.pcapng import is_pcapng
from cybermesh.telemetry.sources.pieces import open_piece
from cybermesh.telemetry.sources.records import Decoder, LineSource

KINDS = frozenset({"pcap", "live", "csv", "zeek", "eve", "logs", "kafka"})
_JOURNAL = "journald"
_MAGIC_BYTES = 16
_LOOKED_AT = 64  # lines in which a log must show itself


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How an input is to be read."""

    block: int
    rows: int
    compiled: bool
    follow: bool


class Input(NamedTuple):
    """A named input: what the user wrote, of which kind it is, and where."""

    spec: str
    kind: str
    where: str


def name_input(spec: str) -> Input:
    """Return kind and place of an input; what has no kind is recognised by its content, and is a capture if it is nothing else.

    Raises:
        SourceError: It names no place.
    """
    kind, colon, where = spec.partition(":")
    if not colon or kind not in KINDS or Path(spec).exists():
        kind, where = _recognise(spec), spec
    if not where:
        raise SourceError(f"{spec}: names no input; write {kind}:WHERE, for example {_EXAMPLES[kind]}")
    return Input(spec, kind, where)


def open_source(
    spec: str,
    *,
    block: int = DEFAULT_BLOCK,
    rows: int | None = None,
    position: str = "",
    compiled: bool = False,
    follow: bool = False,
) -> Source:
    """Open an input.

    Args:
        spec: ``KIND:WHERE`` with a kind of ``KINDS``, a path, or ``-`` for a capture on standard input. A file whose own name
            looks like ``KIND:WHERE`` is taken as the file.
        block: Most packets in a batch.
        rows: Most flows, events or DNS rows in a batch; ``block`` by default.
        position: Where to go on, as told by ``Source.position`` earlier; empty for the beginning.
        compiled: Read packets with compiled kernels; ``compile_cache.load_kernels`` must have been called.
        follow: Read a file on and on, also where it rotates; a network interface always is. Not for folders.

    Raises:
        SourceError: The input is missing or cannot be read as what it is said to be.
    """
    wanted = _Wanted(block, block if rows is None else rows, compiled, follow)
    _, kind, where = name_input(spec)
    if kind == "live":
        from cybermesh.telemetry.sources.live import LiveSource

        interface, _, expression = where.partition(" ")
        return LiveSource(interface, block=block, expression=expression.strip(), compiled=compiled)
    if kind == "kafka":
        raise SourceError(f"{spec}: a topic is read by the ai role (telemetry.inputs); give a file or an interface")
    if kind == "logs" and where == _JOURNAL and not Path(where).exists():
        from cybermesh.telemetry.sources.journald import JournalSource

        return JournalSource(block=wanted.rows, position=position, follow=follow)
    if where != "-" and Path(where).is_dir():
        if follow:
            raise SourceError(f"{where}: a folder cannot be followed; name the files that grow")
        one = replace(wanted, follow=False)
        return FolderSource(
            Path(where), lambda path, at: _open_file(kind, path, at, one), position=position, by_time=kind == "logs"
        )
    return _open_file(kind, where, position, wanted)


def _open_file(kind: str, where: str, position: str, wanted: _Wanted) -> Source:
    if kind == "pcap":
        pace = Pace() if wanted.follow and Path(where).is_file() else None
        if wanted.compiled:
            from cybermesh.telemetry.sources.capture_compiled import CompiledCaptureSource  # here: it needs numba

            return CompiledCaptureSource(where, block=wanted.block, position=position, follow=pace)
        return CaptureSource(where, block=wanted.block, position=position, follow=pace)
    decoder, unit, longest = _decoder(kind)
    reading = Reading(follow=wanted.follow, longest=longest) if longest else Reading(follow=wanted.follow)
    return LineSource(where, decoder, unit=unit, block=wanted.rows, position=position, reading=reading)


def _decoder(kind: str) -> tuple[Decoder, str, int]:
    """Return the decoder of a kind of text, what its lines are called, and how long they may be (0: as usual)."""
    match kind:
        case "csv":
            from cybermesh.telemetry.sources.flowcsv import FlowCsvDecoder

            return FlowCsvDecoder(), "rows", 0
        case "zeek":
            from cybermesh.telemetry.sources.zeek import ZeekDecoder

            return ZeekDecoder(), "records", 0
        case "eve":
            from cybermesh.telemetry.sources.suricata import EveDecoder

            return EveDecoder(), "records", 0
        case _:
            from cybermesh.telemetry.sources.logs import LONGEST, LogDecoder

            return LogDecoder(), "lines", LONGEST


def _recognise(spec: str) -> str:
    """Return the kind of a path's content; what is none of them is left to the reader of captures to refuse."""
    path = Path(spec)
    if spec == "-" or not path.exists():
        return "pcap"
    if path.is_dir():
        kinds = (_recognise(str(each)) for each in sorted(path.iterdir())[:_LOOKED_AT] if each.is_file())
        return next((kind for kind in kinds if kind), "pcap")
    if not path.is_file():
        return "pcap"
    try:
        piece = open_piece(path)
    except SourceError:
        return "pcap"
    begin = piece.begin
    piece.close()
    if is_pcap(begin[:_MAGIC_BYTES]) or is_pcapng(begin[:_MAGIC_BYTES]) or not begin or b"\0" in begin:
        return "pcap"
    return next((kind for kind, is_it in _LOOKS.items() if is_it(begin)), "pcap")


def _begins(kind: str) -> Callable[[bytes], bool]:
    """Return a test whether a text begins as the kind's decoder wants it."""

    def is_it(begin: bytes) -> bool:
        try:
            _decoder(kind)[0].begin("", begin, None)
        except SourceError:
            return False
        return True

    return is_it


def _is_table(begin: bytes) -> bool:
    """Return whether a text is a flow table, or so nearly one that its refusal should say what differs."""
    from cybermesh.telemetry.cic_columns import nearest

    header = begin.partition(b"\n")[0].decode("utf-8-sig", "replace").split(",")
    variant = nearest(header)
    return 2 * len(variant.places(header)) > len(variant.columns)


def _is_log(begin: bytes) -> bool:
    from cybermesh.telemetry.sources.logs import is_log

    return is_log(begin.split(b"\n", _LOOKED_AT)[:_LOOKED_AT])


_LOOKS = {"zeek": _begins("zeek"), "eve": _begins("eve"), "csv": _is_table, "logs": _is_log}
_EXAMPLES = {
    "pcap": "pcap:trace.pcap or pcap:-",
    "live": "live:eth0",
    "csv": "csv:flows.csv",
    "zeek": "zeek:conn.log",
    "eve": "eve:eve.json",
    "logs": "logs:/var/log/auth.log",
    "kafka": "kafka:telemetry.features.v1",
}
