"""Counts per entity over sliding windows, in bounded memory.

Every addition is applied to the running totals of all window lengths and remembered in a log; when its hop leaves a window,
the same numbers are subtracted. So the totals are exact integers, whatever the order of additions within a hop.

What an entity touched (ports, counterparts, networks) is kept as items with their own windowed counts: exact up to
``EXACT_ITEMS`` per entity and kind, beyond that as cells of a linear-counting sketch (Whang et al. 1990) in the same table.

Overflow answers, all counted in ``Overflow``:
- entities: a full table forgets a quarter, the least recently active first; one that was active in three hops or completed a
  handshake ranks as if it had been active ten minutes later, so a flood of one-packet sources only evicts its like.
- items: no more are remembered (distinct counts are then too low, never too high).
- log: the oldest additions leave the windows early (long windows get shorter).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.windows import COUNTS
from cybermesh.telemetry.windows_keys import Slots, as_bytes, group, grown
from cybermesh.telemetry.windows_timeline import JUMP_US

EXACT_ITEMS = 1024
SKETCH_CELLS = 4096
_SETTLED_HOPS = 3
_SETTLED_BONUS_HOPS = 600
_KEY_BYTES = 40
_ITEM_BYTES = 24
_VALUE_BYTES = 16
_NEVER = np.iinfo(np.int64).max
_CELL = np.uint8(0x80)  # in an item's kind: a cell of the sketch, not a value
_ESTABLISHED = COUNTS.index("established")


@dataclass(slots=True)
class Overflow:
    """What the bounds made a table forget, counted since its start."""

    entities: int = 0
    items: int = 0
    additions: int = 0


@dataclass(frozen=True, slots=True)
class Additions:
    """Rows to add in one hop: ``keys`` uint8[n, 40]; per kind of item a value uint8[n, 16]; what each row weighs."""

    keys: npt.NDArray[np.uint8]
    items: tuple[npt.NDArray[np.uint8], ...]
    attempts: npt.NDArray[np.int64]
    packets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    service: npt.NDArray[np.uint8]
    first_us: npt.NDArray[np.int64]
    last_us: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Logged:
    """One addition, as needed to take it back: sparse counts, items, and the slots' generations at that time."""

    hop: int
    slots: npt.NDArray[np.int64]
    born: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    amount: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    items_born: npt.NDArray[np.int64]
    item_weights: npt.NDArray[np.int64]  # [items, 2]: packets, attempts

    @property
    def size(self) -> int:
        return len(self.row) + len(self.items)


class SlidingTable:
    """One scope's entities. ``windows_s`` in ascending order, in hops of one second; ``kinds`` of items per entity."""

    def __init__(self, windows_s: tuple[int, ...], kinds: int, capacity: int, items_max: int, log_max: int) -> None:
        self.overflow = Overflow()
        self.windows_s = windows_s
        self.kinds = kinds
        self._slots = Slots(capacity)
        self._items = Slots(items_max)
        self._log_max = log_max
        self._log: deque[_Logged] = deque()
        self._log_size = 0
        self._dropped = 0  # entries ever removed from the log's left end
        self._tails = [0] * len(windows_s)  # absolute number of the first log entry still inside each window
        self._births = 0
        self._touched: set[int] = set()
        self._touched_longer: set[int] = set()  # since the long windows were last taken
        self.keys = np.zeros((256, _KEY_BYTES), np.uint8)
        self.totals = [np.zeros((256, len(COUNTS)), np.int64) for _ in windows_s]
        self.first_us = [np.zeros(256, np.int64) for _ in windows_s]
        self.last_us = np.zeros(256, np.int64)
        self.service = np.zeros(256, np.uint8)
        self._born = np.zeros(256, np.int64)
        self._last_hop = np.zeros(256, np.int64)
        self._hops = np.zeros(256, np.int64)
        self._reported = np.zeros(256, np.int64)
        self._handshakes = np.zeros(256, np.bool_)
        self._kind_sizes = np.zeros((256, max(1, kinds)), np.int64)
        self.scanned = [np.zeros(256, np.int64) for _ in windows_s]  # ports of what last looked like a scanner
        self.item_slot = np.zeros(256, np.int64)
        self.item_kind = np.zeros(256, np.uint8)
        self.item_value = np.zeros((256, _VALUE_BYTES), np.uint8)
        self.item_weights = [np.zeros((256, 2), np.int64) for _ in windows_s]
        self._item_born = np.zeros(256, np.int64)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def items(self) -> int:
        """How many items are remembered."""
        return len(self._items)

    @property
    def items_allocated(self) -> int:
        """The length of the item columns that may be in use; free ones weigh nothing."""
        return self._items.allocated

    def knows(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Mark the keys (uint8[n, 40]) that have an entity."""
        known: npt.NDArray[np.bool_] = self._slots.find(as_bytes(keys)) >= 0
        return known

    def add(self, hop: int, rows: Additions) -> None:
        """Add rows of one hop, which must not be before the newest hop added or advanced to."""
        if len(rows.keys) == 0:
            return
        first, inverse = group(rows.keys)
        slots = self._entities(rows.keys[first], hop)
        counts = np.zeros((len(first), len(COUNTS)), np.int64)
        np.add.at(counts, inverse, rows.counts)
        self._stamp(slots, inverse, rows, hop, counts)
        row, column = np.nonzero(counts)
        amount = counts[row, column]
        for totals in self.totals:
            totals[slots[row], column] += amount
        items, weights = self._touch(slots[inverse], rows)
        self._log.append(_Logged(hop, slots, self._born[slots], row, column, amount, items, self._item_born[items], weights))
        self._log_size += self._log[-1].size
        self._touched.update(slots.tolist())
        while self._log_size > self._log_max and len(self._log) > 1:
            self.overflow.additions += self._log[0].size
            self._shorten()

    def advance(self, hop: int) -> None:
        """Let everything before the windows that end with ``hop`` leave them."""
        for window, window_s in enumerate(self.windows_s):
            while (index := self._tails[window] - self._dropped) < len(self._log) and self._log[index].hop <= hop - window_s:
                self._take_back(window, self._log[index])
                self._tails[window] += 1
        while self._log and min(self._tails) > self._dropped:
            self._forget_first()

    def take_touched(self) -> npt.NDArray[np.int64]:
        """Return the slots added to since the last call, ascending, and start anew."""
        slots = np.array(sorted(self._touched), np.int64)
        self._touched_longer |= self._touched
        self._touched.clear()
        self._report(slots)
        return slots

    def take_touched_longer(self) -> npt.NDArray[np.int64]:
        """Return the slots that ``take_touched`` returned since the last call of this, ascending, and start anew."""
        slots = np.array(sorted(self._touched_longer), np.int64)
        self._touched_longer.clear()
        return slots

    def take_grown(self) -> npt.NDArray[np.int64]:
        """Return the slots whose packets grew by a quarter since they were last taken, ascending; they stay touched."""
        slots = np.array(sorted(self._touched), np.int64)
        packets = self.totals[-1][slots, 0] + self.totals[-1][slots, 1]
        grown_by_quarter: npt.NDArray[np.int64] = slots[4 * packets >= 5 * self._reported[slots]]
        self._report(grown_by_quarter)
        return grown_by_quarter

    def _report(self, slots: npt.NDArray[np.int64]) -> None:
        self._reported[slots] = self.totals[-1][slots, 0] + self.totals[-1][slots, 1]

    def _stamp(
        self,
        slots: npt.NDArray[np.int64],
        inverse: npt.NDArray[np.intp],
        rows: Additions,
        hop: int,
        counts: npt.NDArray[np.int64],
    ) -> None:
        """Note times, activity and service of the entities."""
        earliest = np.full(len(slots), _NEVER)
        np.minimum.at(earliest, inverse, rows.first_us)
        latest = np.full(len(slots), np.iinfo(np.int64).min)
        np.maximum.at(latest, inverse, rows.last_us)
        for first_us, totals in zip(self.first_us, self.totals, strict=True):
            was_empty = (totals[slots, 0] + totals[slots, 1]) == 0
            first_us[slots] = np.where(was_empty, earliest, np.minimum(first_us[slots], earliest))
        set_back = latest < self.last_us[slots] - JUMP_US
        self.last_us[slots] = np.where(set_back, latest, np.maximum(self.last_us[slots], latest))
        self._hops[slots] += self._last_hop[slots] != hop
        self._last_hop[slots] = hop
        self._handshakes[slots] |= counts[:, _ESTABLISHED] > 0
        np.maximum.at(self.service, slots[inverse], rows.service)

    def _entities(self, keys: npt.NDArray[np.uint8], hop: int) -> npt.NDArray[np.int64]:
        """Return the slots of distinct keys, making room and new ones as needed."""
        names = as_bytes(keys)
        slots = self._slots.find(names)
        missing = np.nonzero(slots < 0)[0]
        if len(missing) == 0:
            return slots
        if len(missing) > self._slots.room:
            self._evict(slots[slots >= 0])
        new = self._slots.insert([names[row] for row in missing.tolist()])
        self._grow(self._slots.allocated)
        self.keys[new] = keys[missing]
        self._births += 1
        self._born[new] = self._births
        self._last_hop[new] = hop - 1
        for column in (self._hops, self._handshakes, self._reported, self.service, self.last_us, self._kind_sizes):
            column[new] = 0
        for scanned in self.scanned:
            scanned[new] = 0
        slots[missing] = new
        return slots

    def _evict(self, keep: npt.NDArray[np.int64]) -> None:
        """Forget a quarter of the entities, none of ``keep``, with their totals and items."""
        used = self._slots.allocated
        settled = (self._hops[:used] >= _SETTLED_HOPS) | self._handshakes[:used]
        rank = self._last_hop[:used] + _SETTLED_BONUS_HOPS * settled
        rank[keep] = _NEVER
        rank[self._born[:used] < 0] = _NEVER  # free already
        victims = np.argsort(rank, kind="stable")[: max(1, self._slots.capacity // 4)].astype(np.int64)
        victims = victims[rank[victims] < _NEVER]
        self._slots.remove(victims)
        self.overflow.entities += len(victims)
        self._born[victims] = -1
        for totals in self.totals:
            totals[victims] = 0
        self._touched.difference_update(victims.tolist())
        self._touched_longer.difference_update(victims.tolist())
        gone = np.zeros(used, np.bool_)
        gone[victims] = True
        allocated = self._items.allocated
        alive = self._item_born[:allocated] > 0
        self._free_items(np.nonzero(alive & gone[self.item_slot[:allocated]])[0].astype(np.int64))

    def _touch(self, slots: npt.NDArray[np.int64], rows: Additions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Count what the rows' entities touched; return the distinct items and their weights int64[items, 2]."""
        if self.kinds == 0:
            return np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
        keys = np.zeros((self.kinds * len(slots), _ITEM_BYTES), np.uint8)
        keys[:, :4] = np.tile(slots.astype(np.uint32)[:, None].view(np.uint8).reshape(-1, 4), (self.kinds, 1))
        for kind, values in enumerate(rows.items):
            part = slice(kind * len(slots), (kind + 1) * len(slots))
            keys[part, 4] = kind
            keys[part, 8:] = values
        found = self._find_items(keys)
        weights = np.tile(np.stack([rows.packets, rows.attempts], axis=1), (self.kinds, 1))
        kept = found >= 0
        items, inverse = np.unique(found[kept], return_inverse=True)
        summed = np.zeros((len(items), 2), np.int64)
        np.add.at(summed, inverse, weights[kept])
        for item_weights in self.item_weights:
            item_weights[items] += summed
        return items, summed

    def _find_items(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Return the item of each key row, new ones as needed; -1 where the table is full."""
        first, inverse = group(keys)
        distinct = keys[first]
        found = self._items.find(as_bytes(distinct))
        missing = np.nonzero(found < 0)[0]
        if len(missing):
            owner = distinct[missing, :4].copy().view(np.uint32).reshape(-1).astype(np.int64)
            kind = distinct[missing, 4]
            fits = self._claim(owner, kind)
            found[missing[fits]] = self._new_items(distinct[missing[fits]])
            rest = missing[~fits]
            if len(rest):
                cells, cell_of = np.unique(_cells(distinct[rest]), axis=0, return_inverse=True)
                cells = np.ascontiguousarray(cells)
                there = self._items.find(as_bytes(cells))
                absent = np.nonzero(there < 0)[0]
                there[absent] = self._new_items(cells[absent])
                found[rest] = there[cell_of.reshape(-1)]
        return found[inverse]

    def _claim(self, owner: npt.NDArray[np.int64], kind: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Mark which new items are still kept exactly, in row order per entity and kind."""
        box = owner * self.kinds + kind
        order = np.argsort(box, kind="stable")
        ordered = box[order]
        begins = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        at = np.arange(len(box))
        nth = np.empty(len(box), np.int64)
        nth[order] = at - np.maximum.accumulate(np.where(begins, at, 0))
        fits: npt.NDArray[np.bool_] = self._kind_sizes[owner, kind] + nth < EXACT_ITEMS
        np.add.at(self._kind_sizes, (owner[fits], kind[fits]), 1)
        return fits

    def _new_items(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Insert distinct, absent items; -1 for those that no longer fit."""
        fitting = min(len(keys), self._items.room)
        self.overflow.items += len(keys) - fitting
        new = self._items.insert(as_bytes(keys[:fitting]))
        self._grow_items(self._items.allocated)
        self.item_slot[new] = keys[:fitting, :4].copy().view(np.uint32).reshape(-1)
        self.item_kind[new] = keys[:fitting, 4]
        self.item_value[new] = keys[:fitting, 8:]
        self._births += 1
        self._item_born[new] = self._births
        return np.concatenate([new, np.full(len(keys) - fitting, -1, np.int64)])

    def _free_items(self, items: npt.NDArray[np.int64]) -> None:
        self._items.remove(items)
        self._item_born[items] = 0
        for weights in self.item_weights:
            weights[items] = 0
        exact = items[self.item_kind[items] & _CELL == 0]
        np.subtract.at(self._kind_sizes, (self.item_slot[exact], self.item_kind[exact]), 1)

    def _take_back(self, window: int, entry: _Logged) -> None:
        """Subtract one addition from one window, but nothing of entities and items that were forgotten since."""
        alive = (self._born[entry.slots] == entry.born)[entry.row]
        self.totals[window][entry.slots[entry.row[alive]], entry.column[alive]] -= entry.amount[alive]
        same = self._item_born[entry.items] == entry.items_born
        items = entry.items[same]
        weights = self.item_weights[window]
        weights[items] -= entry.item_weights[same]
        if window == len(self.windows_s) - 1:
            self._free_items(items[(weights[items] == 0).all(axis=1)])

    def _shorten(self) -> None:
        """Take the oldest addition out of every window that still holds it."""
        for window in range(len(self.windows_s)):
            if self._tails[window] == self._dropped:
                self._take_back(window, self._log[0])
                self._tails[window] += 1
        self._forget_first()

    def _forget_first(self) -> None:
        self._log_size -= self._log.popleft().size
        self._dropped += 1

    def _grow(self, length: int) -> None:
        for name in ("keys", "last_us", "service", "_born", "_last_hop", "_hops", "_handshakes", "_reported", "_kind_sizes"):
            setattr(self, name, grown(getattr(self, name), length))
        self.totals = [grown(totals, length) for totals in self.totals]
        self.first_us = [grown(first_us, length) for first_us in self.first_us]
        self.scanned = [grown(scanned, length) for scanned in self.scanned]

    def _grow_items(self, length: int) -> None:
        for name in ("item_slot", "item_kind", "item_value", "_item_born"):
            setattr(self, name, grown(getattr(self, name), length))
        self.item_weights = [grown(weights, length) for weights in self.item_weights]


def _cells(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return item keys of the sketch cell each item falls in."""
    words = np.ascontiguousarray(keys[:, 8:]).view(np.uint64)
    mixed = (words[:, 0] ^ (words[:, 1] >> np.uint64(31)) ^ (words[:, 1] << np.uint64(17))) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    cell = (mixed >> np.uint64(40)) % np.uint64(SKETCH_CELLS)
    cells = np.zeros_like(keys)
    cells[:, :4] = keys[:, :4]
    cells[:, 4] = keys[:, 4] | _CELL
    cells[:, 8:16] = cell[:, None].view(np.uint8).reshape(-1, 8)
    return cells
