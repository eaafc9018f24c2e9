"""From the tables' integers to the rows engines read: distinct counts, shares and entropies appear only here, as floats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.windows import COLUMN, COUNTS, DNS_NAMES, EVENT_COUNTS, NAMES, Scope, WindowBatch
from cybermesh.telemetry.windows_table import SKETCH_CELLS, SlidingTable

KINDS: Mapping[Scope, tuple[str, ...]] = {  # the items each scope's table keeps, in order
    Scope.SOURCE: ("ports", "peers", "networks"),
    Scope.DESTINATION: ("ports", "peers"),
    Scope.PAIR: ("ports",),
    Scope.FANOUT: ("peers", "networks"),
    Scope.DOMAIN: ("names",),
    Scope.RESOLVER: ("names", "nx_domains"),
    Scope.SERVICE: (),
}
_CELL = 0x80
_PACKETS_OUT = COUNTS.index("packets_out")
_TCP, _UDP = 6, 17
_UNUSUAL = np.ones(256, np.bool_)
_UNUSUAL[[1, _TCP, _UDP, 58]] = False
_OF_TCP = ("tcp_opened", "tcp_answered", "established", "refused")
_COMPANY_PORTS = 5  # whoever tries fewer ports is not yet like a scanner


def window_rows(table: SlidingTable, scope: Scope, window: int, slots: npt.NDArray[np.int64], end_us: int) -> WindowBatch:
    """Return the rows of ``slots`` (at least one) for the table's window number ``window``, evaluated at ``end_us``."""
    window_s, kinds = table.windows_s[window], KINDS[scope]
    keys = table.keys[slots]
    values = np.zeros((len(slots), len(NAMES)), np.float64)
    values[:, : len(COUNTS)] = table.totals[window][slots]
    last_us = table.last_us[slots]
    first_us = np.maximum(table.first_us[window][slots], last_us - window_s * 1_000_000)
    _derive(values)
    values[:, COLUMN["span_s"]] = (last_us - first_us) / 1e6
    port, protocol = _big_endian(keys[:, 32:34]), keys[:, 34].copy()
    peer = np.zeros((len(slots), 16), np.uint8)
    tops = _items(table, kinds, window, slots, values)
    if scope not in (Scope.FANOUT, Scope.SERVICE) and "ports" in tops:
        port, protocol = _big_endian(tops["ports"][:, :2]), tops["ports"][:, 2].copy()
    if "peers" in tops:
        peer = tops["peers"]
    known = np.ones(len(NAMES), np.bool_)
    known[[COLUMN[name] for name in EVENT_COUNTS | DNS_NAMES]] = False
    for name in ("ports", "peers", "networks"):
        known[COLUMN[name]] = name in kinds
    known[COLUMN["company"]] = scope is Scope.PAIR
    if scope is Scope.PAIR:
        _company(table, window, slots, values)
    for name in ("port_entropy", "port_share", "protocols"):
        known[COLUMN[name]] = "ports" in kinds
    for name in ("peer_entropy", "peer_share"):
        known[COLUMN[name]] = "peers" in kinds
    return WindowBatch(
        scope=scope,
        window_s=window_s,
        end_us=end_us,
        source=keys[:, :16].copy(),
        destination=keys[:, 16:32].copy(),
        port=port,
        protocol=protocol,
        service=table.service[slots],
        peer=peer,
        first_us=first_us,
        last_us=last_us,
        values=values,
        known=known,
    )


def _big_endian(pairs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    return (pairs[:, 0].astype(np.uint16) << np.uint16(8)) | pairs[:, 1]


def _derive(values: npt.NDArray[np.float64]) -> None:
    opened, answered, established, refused = (values[:, COLUMN[name]] for name in _OF_TCP)
    attempts = opened + values[:, COLUMN["udp_opened"]] + values[:, COLUMN["echo_opened"]] + values[:, COLUMN["probes"]]
    replied = answered + values[:, COLUMN["udp_answered"]] + values[:, COLUMN["echo_answered"]]
    # An answer may be inside the window while its attempt has left it, so differences are floored.
    unanswered = np.maximum(attempts - replied - refused, 0)
    values[:, COLUMN["attempts"]] = attempts
    values[:, COLUMN["unanswered"]] = unanswered
    values[:, COLUMN["half_open"]] = np.maximum(answered - established, 0)
    values[:, COLUMN["open"]] = np.maximum(established - values[:, COLUMN["sessions"]], 0)
    values[:, COLUMN["failed"]] = unanswered + refused


def _company(table: SlidingTable, window: int, slots: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
    """Fill ``company``: who scans under decoys' addresses is one of several sources that do the same to one destination.

    All sources of the window count, not only those that are told of now: an innocent decoy goes on with his own work later.
    """
    ports, attempts, failed = (values[:, COLUMN[name]] for name in ("ports", "attempts", "failed"))
    alike = (ports >= _COMPANY_PORTS) & (2 * (failed + values[:, COLUMN["half_open"]]) >= attempts)
    scanned, totals = table.scanned[window], table.totals[window]
    scanned[slots] = np.where(alike, ports, 0)
    if not alike.any():
        return
    others = np.nonzero(scanned >= _COMPANY_PORTS)[0]
    others = others[totals[others, _PACKETS_OUT] > 0]
    targets = table.keys[others, 16:32].view("V16").reshape(-1)
    for row in np.nonzero(alike)[0].tolist():
        same = scanned[others[targets == table.keys[slots[row], 16:32].view("V16")[0]]]
        values[row, COLUMN["company"]] = ((2 * same >= ports[row]) & (same <= 2 * ports[row])).sum() - 1


def _items(
    table: SlidingTable, kinds: tuple[str, ...], window: int, slots: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.uint8]]:
    """Fill what is derived from items; return per kind the value with the most packets of each row, uint8[n, 16]."""
    allocated = table.items_allocated
    row_of = np.full(len(table.keys), -1, np.int64)
    row_of[slots] = np.arange(len(slots))
    row = row_of[table.item_slot[:allocated]]
    weights = table.item_weights[window][:allocated]
    mine = np.nonzero((row >= 0) & weights.any(axis=1))[0]
    row, weights = row[mine], weights[mine]
    kind_of, value_of = table.item_kind[mine], table.item_value[mine]
    tops: dict[str, npt.NDArray[np.uint8]] = {}
    for number, name in enumerate(kinds):
        exact, cell = kind_of == number, kind_of == (number | _CELL)
        if name not in ("networks", "nx_domains"):
            tops[name] = _concentration(
                name[:-1], row, weights * (exact | cell)[:, None], np.nonzero(exact)[0], value_of, values
            )
        counted = weights[:, 1] > 0
        if name == "ports":
            unusual = exact & counted & (value_of[:, 0] == 0) & (value_of[:, 1] == 0) & _UNUSUAL[value_of[:, 2]]
            values[:, COLUMN["protocols"]] = np.bincount(row[unusual], minlength=len(slots))
            counted &= cell | (value_of[:, 2] == _TCP) | (value_of[:, 2] == _UDP)
        if name == "nx_domains":  # a zero stands for an answer that was not NXDOMAIN
            counted &= cell | value_of.any(axis=1)
        cells = np.minimum(np.bincount(row[counted & cell], minlength=len(slots)), SKETCH_CELLS - 1)
        sketched = np.round(-SKETCH_CELLS * np.log1p(-cells / SKETCH_CELLS))
        values[:, COLUMN[name]] = np.bincount(row[counted & exact], minlength=len(slots)) + sketched
    return tops


def _concentration(
    name: str,
    row: npt.NDArray[np.int64],
    weights: npt.NDArray[np.int64],
    named: npt.NDArray[np.intp],
    value_of: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """Fill ``name``_entropy and ``name``_share from the packets per item; return each row's top value among ``named``."""
    n, packets = len(values), weights[:, 0]
    sent = packets > 0
    total = np.bincount(row, weights=packets, minlength=n)
    spread = np.bincount(row[sent], weights=packets[sent] * np.log2(packets[sent]), minlength=n)
    some = total > 0
    entropy = np.zeros(n)
    entropy[some] = np.log2(total[some]) - spread[some] / total[some]
    values[:, COLUMN[f"{name}_entropy"]] = np.maximum(entropy, 0)
    most = np.zeros(n, np.int64)
    np.maximum.at(most, row[named], packets[named])
    values[some, COLUMN[f"{name}_share"]] = most[some] / total[some]
    # The counterpart is the one with the most attempts: who downloads a lot is not who floods.
    first = weights[named, 1] if name == "peer" else packets[named]
    best = named[np.lexsort((packets[named], first, row[named]))]  # the last of each row is its greatest
    top = np.zeros((n, 16), np.uint8)
    top[row[best]] = value_of[best]
    return top
