"""Windows over DNS messages: per client and parent domain, and per client and server, in packet time and bounded memory.

A tunnel shows in its names: many of them, each new, long, and without the letters of any language, below one domain or, where
its server is asked directly, below none. The parent domain is the last two labels, three below suffixes like "co.uk": not a
list of public suffixes, which would have to be kept up to date, but good enough to bring a tunnel's names together.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.dns import NXDOMAIN, DnsBatch
from cybermesh.telemetry.windows import COUNTS, DNS_NAMES, DNS_SCOPES, Scope, WindowBatch
from cybermesh.telemetry.windows_reports import Tables
from cybermesh.telemetry.windows_sliding import CAPACITY
from cybermesh.telemetry.windows_table import Additions

LONG_NAME = 52  # more than nearly all names of hosts
_AT = {name: index for index, name in enumerate(COUNTS)}
_ODD_TYPES = (10, 25)  # NULL, KEY
_PRIVATE_TYPES = 65_280
_DATA_TYPES = (5, 10, 15, 16, 25, 33)  # CNAME NULL MX TXT KEY SRV
_LABELS_REMEMBERED = 65_536


class _Name(NamedTuple):
    digest: bytes
    parent: str
    parent_digest: bytes
    bits: int  # entropy of the characters below the parent domain
    is_forward: bool


class DnsWindows:
    """Windows of scopes DOMAIN and RESOLVER."""

    def __init__(self, wanted: Mapping[Scope, tuple[int, ...]], capacity: int = CAPACITY) -> None:
        chosen = {scope: lengths for scope, lengths in wanted.items() if scope in DNS_SCOPES}
        self._tables = Tables(chosen, DNS_NAMES | {"span_s"}, capacity)
        self._labels: OrderedDict[bytes, tuple[str, bytes]] = OrderedDict()

    def update(self, messages: DnsBatch) -> list[WindowBatch]:
        """Count a batch; return the rows of every second that ended with it. Messages without a name are left out."""
        named = np.array([name not in ("", ".") for name in messages.name.tolist()], np.bool_)
        messages = messages.take(np.nonzero(named & messages.client.any(axis=1))[0])
        if len(messages) == 0:
            return []
        found: list[WindowBatch] = []
        parts, ts_us = self._tables.hops(messages.ts_us)
        messages = replace(messages, ts_us=ts_us)
        for hop, part in parts:
            chosen = messages.take(part)
            found += self._tables.enter(hop, int(chosen.ts_us.max()))
            names = [_name(name) for name in chosen.name.tolist()]
            self._remember(names, chosen)
            for scope, table in self._tables.tables.items():
                table.add(hop, _additions(scope, chosen, names))
        return self._labelled(found)

    def prompt(self) -> list[WindowBatch]:
        """Return the rows of entities that grew, without waiting for the second to end."""
        return self._labelled(self._tables.prompt())

    def finish(self) -> list[WindowBatch]:
        """End the current second; call it when the input has ended."""
        return self._labelled(self._tables.end())

    def _remember(self, names: list[_Name], messages: DnsBatch) -> None:
        for name, server in zip(names, messages.server, strict=True):
            self._labels.pop(name.parent_digest, None)
            self._labels[name.parent_digest] = name.parent, server.tobytes()
        while len(self._labels) > _LABELS_REMEMBERED:
            self._labels.popitem(last=False)

    def _labelled(self, found: list[WindowBatch]) -> list[WindowBatch]:
        """Put the domain's name and its server where the key has only a digest."""
        out = []
        for rows in found:
            if rows.scope is Scope.DOMAIN:
                labels = [self._labels.get(digest.tobytes(), ("", bytes(16))) for digest in rows.destination]
                peer = np.frombuffer(b"".join(server for _, server in labels), np.uint8).reshape(-1, 16)
                domain = np.array([name for name, _ in labels], np.object_)
                rows = replace(rows, destination=np.zeros_like(rows.destination), peer=peer, domain=domain)
            out.append(rows)
        return out


def parent_of(name: str) -> str:
    """Return the domain that a name is counted under."""
    labels = name.split(".")
    short = len(labels) > 2 and len(labels[-1]) == 2 and len(labels[-2]) <= 3  # co.uk, com.au
    return ".".join(labels[-3 if short else -2 :])


@functools.lru_cache(maxsize=65_536)
def _name(name: str) -> _Name:
    parent = parent_of(name)
    below = name[: -len(parent)].replace(".", "") or parent
    total = len(below)
    if parent.endswith("arpa"):  # reverse names are long and spelled in digits by nature
        return _Name(_digest(name), parent, _digest(parent), 0, False)
    bits = sum(count * math.log2(total / count) for count in Counter(below).values())
    return _Name(_digest(name), parent, _digest(parent), round(bits), True)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _additions(scope: Scope, messages: DnsBatch, names: list[_Name]) -> Additions:
    """Return what one second's messages add to a scope's table."""
    n = len(messages)
    keys = np.zeros((n, 40), np.uint8)
    keys[:, :16] = messages.client
    keys[:, 16:32] = _columns([name.parent_digest for name in names]) if scope is Scope.DOMAIN else messages.server
    keys[:, 32], keys[:, 33] = messages.port >> np.uint16(8), messages.port & np.uint16(0xFF)
    keys[:, 34] = messages.protocol
    asked, answered = messages.asked, messages.rcode >= 0
    nowhere = messages.rcode == NXDOMAIN
    forward = np.array([name.is_forward for name in names], np.bool_)
    odd = np.isin(messages.qtype, _ODD_TYPES) | (messages.qtype >= _PRIVATE_TYPES)
    counts = np.zeros((n, len(COUNTS)), np.int64)
    for name, values in (
        ("packets_out", asked | answered),  # the table wants packets
        ("dns_questions", asked),
        ("dns_answers", answered),
        ("dns_nxdomain", nowhere),
        ("dns_odd", asked & odd),
        ("dns_data_types", asked & (odd | np.isin(messages.qtype, _DATA_TYPES))),
        ("dns_long", asked & forward & (messages.name_length >= LONG_NAME)),
        ("dns_name_bytes", np.where(asked, messages.name_length, 0)),
        ("dns_name_bits", np.where(asked, np.array([name.bits for name in names], np.int64), 0)),
        ("dns_answer_bytes", np.where(answered, messages.size, 0)),
    ):
        counts[:, _AT[name]] = values
    items = [_columns([name.digest for name in names])]
    if scope is Scope.RESOLVER:
        items.append(np.where(nowhere[:, None], _columns([name.parent_digest for name in names]), np.uint8(0)))
    return Additions(
        keys=keys,
        items=tuple(items),
        attempts=np.ones(n, np.int64),
        packets=np.ones(n, np.int64),
        counts=counts,
        service=np.zeros(n, np.uint8),
        first_us=messages.ts_us,
        last_us=messages.ts_us,
    )


def _columns(digests: list[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
