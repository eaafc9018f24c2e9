"""Open the input that a user names: ``KIND:WHERE``, or just a path, recognised by its content."""

from __future__ import annotations

from pathlib import Path

from cybermesh.telemetry.sources import DEFAULT_BLOCK, Source, SourceError
from cybermesh.telemetry.sources.capture import CaptureSource

KINDS = frozenset({"pcap", "live", "csv", "zeek", "eve", "logs", "kafka"})


def open_source(spec: str, *, block: int = DEFAULT_BLOCK, position: str = "", compiled: bool = False) -> Source:
    """Open an input.

    Args:
        spec: ``KIND:WHERE`` with a kind of ``KINDS``, a path, or ``-`` for a capture on standard input. A file whose own name
            looks like ``KIND:WHERE`` is taken as the file.
        block: Most packets in a batch.
        position: Where to go on, as told by ``Source.position`` earlier; empty for the beginning.
        compiled: Read captures with compiled kernels; ``compile_cache.load_kernels`` must have been called.

    Raises:
        SourceError: The input is missing or cannot be read as what it is said to be.
    """
    kind, colon, where = spec.partition(":")
    if not colon or kind not in KINDS or Path(spec).exists():
        kind, where = "pcap", spec
    if kind != "pcap":
        raise SourceError(f"{spec}: inputs of the kind '{kind}' are not read by this version; give a capture (pcap or pcapng)")
    if not where:
        raise SourceError(f"{spec}: names no file; write pcap:FILE, or pcap:- for standard input")
    if compiled:
        from cybermesh.telemetry.sources.capture_compiled import CompiledCaptureSource  # here: it needs numba

        return CompiledCaptureSource(where, block=block, position=position)
    return CaptureSource(where, block=block, position=position)
