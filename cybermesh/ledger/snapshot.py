"""The whole state as bytes, for a node that starts far behind.

One line per entry, in order of table and key, after a line with the log's frontier: the same state gives the same bytes.
Whoever reads one sums its entries anew and compares the root with a header a quorum signed, so a snapshot needs no trust. The
index is not in it; it is made again from the entries.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Final

import immutables

from cybermesh.genesis import Genesis
from cybermesh.ledger import encoding
from cybermesh.ledger.draft import Draft
from cybermesh.ledger.encoding import EncodingError
from cybermesh.ledger.index import Index
from cybermesh.ledger.lattice import LatticeHash
from cybermesh.ledger.merkle import Frontier
from cybermesh.ledger.records import AnomalyRecord, RequestRecord
from cybermesh.ledger.state import State
from cybermesh.ledger.tables import Tables, encode_entry
from cybermesh.ledger.timers import release_due_ms

_HEAD: Final = "cm/snapshot/1"
_HASH_BYTES: Final = 32


def encode_snapshot(state: State) -> bytes:
    """Return the state's canonical bytes."""
    lines = [_encode_head(state.genesis, state.log)]
    for table in dataclasses.fields(Tables):
        entries: immutables.Map[bytes | str, object] = getattr(state.tables, table.name)
        lines += sorted(encode_entry(table.name, key, record) for key, record in entries.items())
    return b"\n".join(lines) + b"\n"


def decode_snapshot(genesis: Genesis, data: bytes, root: bytes) -> State:
    """Return the state in a snapshot whose root must be ``root``, taken from a certified header.

    Raises:
        EncodingError: not a snapshot of this chain, not canonical, or not the state with that root.
    """
    first, *lines = data.split(b"\n")
    if not lines or lines.pop():
        raise EncodingError("snapshot: does not end with a line end")
    log = _read_head(genesis, first)
    tables, entries = _read_entries(lines)
    index = _index_of(genesis, tables)
    state = State(genesis, tables, index, LatticeHash().updated((), entries), log)
    if state.root != root:
        raise EncodingError("snapshot: its entries do not have the certified root")
    return state


def _encode_head(genesis: Genesis, log: Frontier) -> bytes:
    return encoding.encode([_HEAD, log.size, list(log.peaks), genesis.chain_id])


def _read_head(genesis: Genesis, line: bytes) -> Frontier:
    value = encoding.load(line)
    if not isinstance(value, list) or len(value) != 4 or value[0] != _HEAD or value[3] != genesis.chain_id.hex():
        raise EncodingError("snapshot: is not one of this chain")
    size = encoding.restore(int, value[1], "log size")
    peaks = encoding.restore(tuple[bytes, ...], value[2], "log peaks")
    assert isinstance(size, int)
    assert isinstance(peaks, tuple)
    log = Frontier(size, peaks)
    if len(peaks) != size.bit_count() or any(len(peak) != _HASH_BYTES for peak in peaks) or _encode_head(genesis, log) != line:
        raise EncodingError("snapshot: the log's peaks do not fit its size, or the line is not canonical")
    return log


def _read_entries(lines: list[bytes]) -> tuple[Tables, list[bytes]]:
    hints = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(Tables).items()}
    found: dict[str, dict[bytes | str, object]] = {name: {} for name in hints}
    for number, line in enumerate(lines, start=2):
        value = encoding.load(line)
        if not isinstance(value, list) or len(value) != 3 or value[0] not in hints:
            raise EncodingError(f"snapshot line {number}: is not an entry")
        name: str = value[0]
        key_type, record_type = hints[name]
        key = encoding.restore(key_type, value[1], f"line {number} key")
        record = encoding.restore(record_type, value[2], f"line {number}")
        assert isinstance(key, bytes | str)
        if key in found[name] or encode_entry(name, key, record) != line:
            raise EncodingError(f"snapshot line {number}: is not canonical or there twice")
        found[name][key] = record
    maps: dict[str, typing.Any] = {name: immutables.Map(entries) for name, entries in found.items()}
    return Tables(**maps), lines


def _index_of(genesis: Genesis, tables: Tables) -> Index:
    """Make the index again: put every record into an empty draft in the order in which it was admitted."""
    draft = Draft(genesis, Tables(registers=tables.registers), Index(), height=0, time_ms=0)
    for key in sorted(tables.windows):
        draft.put_window(key, tables.windows[key])
    anomalies: list[tuple[bytes, AnomalyRecord]] = sorted(tables.anomalies.items(), key=lambda item: item[1].seq)
    for key, anomaly in anomalies:
        draft.put_anomaly(key, anomaly)
    for key in sorted(tables.evidence):
        draft.put_evidence(key, tables.evidence[key])
    requests: list[RequestRecord] = sorted(tables.requests.values(), key=lambda record: record.seq)
    for request in requests:
        draft.put_request(request)
    for name in sorted(tables.decisions):
        draft.put_decision(tables.decisions[name])
    for key in sorted(tables.offences):
        draft.put_offence(key, tables.offences[key])
    for key in sorted(tables.proposals):
        draft.put_proposal(key, tables.proposals[key])
    draft.change_protected(tables.protected)
    draft.change_allowed(tables.allowed)
    return draft.finish(release_due_ms(draft)).index
