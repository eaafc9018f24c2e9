"""Makes feeds of the inputs that the settings name, and chooses the meter for them.

Text inputs (logs, tables, Zeek, Suricata) are followed as ``telemetry.follow`` says, captures as ``telemetry.follow_captures``
does; a network interface and a topic always go on. Folders and standard input are read to their end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cybermesh.bus import Bus
from cybermesh.config import ConfigError, Settings, Telemetry
from cybermesh.roles.feeds import BusFeed, Feed, Marks, SourceFeed
from cybermesh.telemetry.metering import Metering, choose, compiled
from cybermesh.telemetry.sources import Source, SourceError
from cybermesh.telemetry.sources.choose import Input, name_input


def metering_of(telemetry: Telemetry) -> Metering:
    """Return the meter for the inputs; for those that go on for ever the compiled one, loaded or compiled before they are read.

    Raises:
        ConfigError: An input names nothing.
    """
    inputs = _inputs(telemetry)
    endless = any(each.kind == "live" or (each.kind == "pcap" and _is_followed(each, telemetry)) for each in inputs)
    if endless and sys.byteorder == "little":
        return compiled()
    return choose([each.spec for each in inputs])


def feeds_of(settings: Settings, metering: Metering, bus: Bus, marks: Marks) -> Sequence[Feed]:
    """Return a feed for each input.

    Raises:
        ConfigError: There is none, one is named twice or names nothing, or a topic is to be read from a memory bus.
    """
    telemetry = settings.telemetry
    inputs = _inputs(telemetry)
    if not inputs:
        raise ConfigError("telemetry.inputs: the ai role has nothing to read; name at least one input")
    if len({each.spec for each in inputs}) != len(inputs):
        raise ConfigError("telemetry.inputs: each input once")
    return [_feed(each, settings, metering, bus, marks) for each in inputs]


def _feed(each: Input, settings: Settings, metering: Metering, bus: Bus, marks: Marks) -> Feed:
    telemetry = settings.telemetry
    if each.kind == "kafka":
        if settings.bus.kind == "memory":
            raise ConfigError(f"telemetry.inputs: {each.spec}: nobody else is on a memory bus; set bus.kind to kafka or local")
        return BusFeed(each.spec, bus, each.where, telemetry.batch_size)
    follow = _is_followed(each, telemetry)

    def open_at(position: str) -> Source:
        return metering.open_source(
            each.spec, block=telemetry.block_packets, rows=telemetry.batch_size, follow=follow, position=position
        )

    return SourceFeed(each.spec, open_at, marks, is_endless=follow or each.kind == "live")


def _inputs(telemetry: Telemetry) -> list[Input]:
    try:
        return [name_input(spec) for spec in telemetry.inputs]
    except SourceError as error:
        raise ConfigError(f"telemetry.inputs: {error}") from error


def _is_followed(each: Input, telemetry: Telemetry) -> bool:
    """Return whether an input is read on and on; a folder, a pipe and a compressed file have an end."""
    path = Path(each.where)
    if each.kind == "live" or path.is_dir() or each.where == "-" or path.suffix in (".gz", ".zst"):
        return False
    return telemetry.follow_captures if each.kind == "pcap" else telemetry.follow
