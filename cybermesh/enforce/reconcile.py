"""Reconcile: what should be in the firewall against what is, as a plan that a backend applies in one transaction.

Listing 100,000 elements takes a firewall most of a second, so plans are made against our own mirror, and the mirror is compared
with the kernel slowly, in the background. The rules:

- Overlaps are ours to resolve. A firewall refuses overlapping areas, or merges them and loses the longer time: so areas of a
  lane are cut into disjoint pieces, each with the latest end (or, for rates, the strictest rate) among those that cover it.
- Several policies may want one element; it ends with the last of them, and when that one is revoked, with the next.
- A plan never gives an element a later end than some decision asked for: re-assertion repairs absence, it does not extend.
- Every change is computed from the touched matches and lanes alone; ``plan`` over everything gives the same result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from cybermesh.enforce.rules import Effect, Element, Lane, Match, Rule

AREAS_PER_LANE_MAX: Final = 4_096


class LaneFullError(Exception):
    """A lane would need more disjoint areas than fit; the message gives the headroom."""


@dataclass(slots=True)
class Touched:
    """What a change concerns: points one by one, areas by whole lanes. Grows in place with ``|=``."""

    points: set[Match] = field(default_factory=set)
    lanes: set[Lane] = field(default_factory=set)

    def __ior__(self, other: Touched) -> Touched:
        self.points |= other.points
        self.lanes |= other.lanes
        return self


@dataclass(frozen=True, slots=True)
class Plan:
    """The difference to apply, all or nothing.

    ``adds``, ``removes`` and ``renewals`` (before, after) hold points and areas alike. ``areas`` repeats, for each lane in
    which an area changes, all areas that must be in it afterwards: a backend may replace them instead of editing.
    """

    adds: tuple[Element, ...] = ()
    removes: tuple[Element, ...] = ()
    renewals: tuple[tuple[Element, Element], ...] = ()
    areas: tuple[tuple[Lane, tuple[Element, ...]], ...] = ()

    @property
    def drift(self) -> int:
        """How many elements differ."""
        return len(self.adds) + len(self.removes) + len(self.renewals)

    def beside(self, touched: Touched) -> bool:
        """Say whether it changes anything that ``touched`` does not concern."""
        found = _matches(self.adds, self.removes, self.renewals)
        return any(match.lane not in touched.lanes if match.area else match not in touched.points for match in found)

    def wanted(self) -> Iterator[Element]:
        """Yield the elements that must be there afterwards and were not, or not so."""
        yield from self.adds
        for _, after in self.renewals:
            yield after


def plan(desired: Mapping[Match, Element], installed: Mapping[Match, Element], now_ms: int, tolerance_ms: int = 0) -> Plan:
    """Compare what should be with what is; both mappings hold complete lanes as far as areas go.

    Installed elements whose time is up count as gone. Ends that differ by at most ``tolerance_ms`` count as equal, because
    firewalls tell and keep time in whole seconds: what ends that soon may be gone already. All tuples are sorted by match.
    """
    adds: list[Element] = []
    renewals: list[tuple[Element, Element]] = []
    for match, want in desired.items():
        have = installed.get(match)
        if want.expires_at_ms <= now_ms:
            continue
        if have is None or have.expires_at_ms <= now_ms:
            if want.expires_at_ms - now_ms > tolerance_ms:
                adds.append(want)
        elif have.rate != want.rate or abs(have.expires_at_ms - want.expires_at_ms) > tolerance_ms:
            renewals.append((have, want))
    removes = [
        have
        for match, have in installed.items()
        if have.expires_at_ms > now_ms and (match not in desired or desired[match].expires_at_ms <= now_ms)
    ]
    changed = {match for match in _matches(adds, removes, renewals) if match.area}
    lanes = {match.lane: list[Element]() for match in changed}
    if lanes:
        for match, want in desired.items():
            if match.area and match.lane in lanes and want.expires_at_ms > now_ms:
                lanes[match.lane].append(want)
    return Plan(
        tuple(sorted(adds)),
        tuple(sorted(removes)),
        tuple(sorted(renewals)),
        tuple((lane, tuple(sorted(lanes[lane]))) for lane in sorted(lanes)),
    )


def _matches(
    adds: Iterable[Element], removes: Iterable[Element], renewals: Iterable[tuple[Element, Element]]
) -> Iterator[Match]:
    for element in (*adds, *removes):
        yield element.match
    for _, element in renewals:
        yield element.match


@dataclass(slots=True)
class Mirror:
    """What we believe is installed; only the enforcer changes it, after a backend has succeeded."""

    points: dict[Match, Element] = field(default_factory=dict)
    areas: dict[Lane, dict[Match, Element]] = field(default_factory=dict)

    def view(self, touched: Touched | None = None) -> dict[Match, Element]:
        """Return the elements that ``touched`` concerns, or all of them."""
        if touched is None:
            points = dict(self.points)
            lanes: Iterable[Lane] = tuple(self.areas)
        else:
            points = {match: self.points[match] for match in touched.points if match in self.points}
            lanes = touched.lanes
        for lane in lanes:
            points.update(self.areas.get(lane, {}))
        return points

    def apply(self, done: Plan) -> None:
        """Record that ``done`` has been applied."""
        for element in done.removes:
            self._of(element.match).pop(element.match, None)
        for element in done.wanted():
            self._of(element.match)[element.match] = element

    def replace(self, elements: Iterable[Element]) -> None:
        """Record that exactly ``elements`` are installed."""
        self.points.clear()
        self.areas.clear()
        for element in elements:
            self._of(element.match)[element.match] = element

    def forget_ended(self, now_ms: int) -> int:
        """Drop what has ended by its own timeout; return how many that were."""
        ended = 0
        for kept in (self.points, *self.areas.values()):
            for match in [match for match, element in kept.items() if element.expires_at_ms <= now_ms]:
                del kept[match]
                ended += 1
        return ended

    def __len__(self) -> int:
        return len(self.points) + sum(map(len, self.areas.values()))

    def _of(self, match: Match) -> dict[Match, Element]:
        return self.points if not match.area else self.areas.setdefault(match.lane, {})


class Desired:
    """The rules of all active policies, indexed so that one policy's change costs that policy and not all of them."""

    def __init__(self) -> None:
        self._rules: dict[str, tuple[Rule, ...]] = {}
        self._points: dict[Match, tuple[Rule, ...]] = {}
        self._areas: dict[Lane, dict[tuple[str, Match], Rule]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Return the number of rules (a match that two policies want counts twice)."""
        return self._count

    def __contains__(self, policy_id: str) -> bool:
        return policy_id in self._rules

    def snapshot(self) -> Desired:
        """Return what is desired now, for looking (``view``) from another thread while this one changes."""
        copy = Desired()
        copy._points = dict(self._points)
        copy._areas = {lane: dict(rules) for lane, rules in self._areas.items()}
        copy._count = self._count
        return copy

    def rules_of(self, policy_id: str) -> tuple[Rule, ...]:
        """Return the rules of one policy, none if it is not here."""
        return self._rules.get(policy_id, ())

    def put(self, policy_id: str, rules: tuple[Rule, ...]) -> Touched:
        """Set the rules of ``policy_id``, in place of those it had; return what is concerned."""
        touched = self.remove(policy_id)
        if not rules:
            return touched
        self._rules[policy_id] = rules
        self._count += len(rules)
        for rule in rules:
            match = rule.element.match
            if match.area:
                touched.lanes.add(match.lane)
                self._areas.setdefault(match.lane, {})[policy_id, match] = rule
            else:
                touched.points.add(match)
                self._points[match] = (*self._points.get(match, ()), rule)
        return touched

    def fill(self, policy_id: str, rules: tuple[Rule, ...]) -> None:
        """Set the rules of a policy that has none yet, where everything will be installed anew."""
        assert policy_id not in self._rules
        if not rules:
            return
        self._rules[policy_id] = rules
        self._count += len(rules)
        for rule in rules:
            match = rule.element.match
            if match.area:
                self._areas.setdefault(match.lane, {})[policy_id, match] = rule
            else:
                known = self._points.get(match)
                self._points[match] = rules if known is None and len(rules) == 1 else (*(known or ()), rule)

    def remove(self, policy_id: str) -> Touched:
        """Forget the rules of ``policy_id``; return what is concerned."""
        touched = Touched()
        gone = self._rules.pop(policy_id, ())
        self._count -= len(gone)
        for rule in gone:
            match = rule.element.match
            if match.area:
                touched.lanes.add(match.lane)
                del self._areas[match.lane][policy_id, match]
                continue
            touched.points.add(match)
            left = tuple(kept for kept in self._points[match] if kept.policy_id != policy_id)
            if left:
                self._points[match] = left
            else:
                del self._points[match]
        return touched

    def view(self, now_ms: int, touched: Touched | None = None) -> dict[Match, Element]:
        """Return the elements that should be installed now, of what ``touched`` concerns or of everything.

        Raises:
            LaneFullError: The areas of a lane do not fit.
        """
        points = self._points if touched is None else {match: self._points.get(match, ()) for match in touched.points}
        found: dict[Match, Element] = {}
        for match, rules in points.items():
            if len(rules) == 1:
                if rules[0].element.expires_at_ms > now_ms:
                    found[match] = rules[0].element
                continue
            element = _winner(rule.element for rule in rules if rule.element.expires_at_ms > now_ms)
            if element is not None:
                found[match] = element
        for lane in self._areas if touched is None else touched.lanes:
            # Ended areas stay in the cut, so that the pieces do not change merely because time passes; a rate that has ended
            # must give way to the next one.
            wanted = (rule.element for rule in self._areas.get(lane, {}).values())
            if lane.effect is Effect.LIMIT:
                wanted = (element for element in wanted if element.expires_at_ms > now_ms)
            areas = [element for element in disjoint(wanted) if element.expires_at_ms > now_ms]
            if len(areas) > AREAS_PER_LANE_MAX:
                raise LaneFullError(f"{len(areas)} disjoint areas, {AREAS_PER_LANE_MAX} fit: {lane.effect} {lane.direction}")
            found.update((element.match, element) for element in areas)
        return found


def disjoint(elements: Iterable[Element]) -> list[Element]:
    """Cut the areas of one lane into disjoint ones that do the same, each until the latest end that covers it."""
    by_protocol: dict[int, dict[Match, Element]] = {}
    for element in elements:
        same = by_protocol.setdefault(element.match.protocol, {})
        known = same.get(element.match)
        same[element.match] = element if known is None else _stronger(known, element)
    return [piece for same in by_protocol.values() for piece in _cut(same)]


def _cut(areas: dict[Match, Element]) -> Iterator[Element]:
    """Cut areas of equal protocol: first by prefix, then within each piece by port."""
    lengths = sorted({match.length for match in areas})
    by_prefix: dict[tuple[int, int], list[Element]] = {}
    for element in areas.values():
        by_prefix.setdefault((element.match.base, element.match.length), []).append(element)
    roots: dict[tuple[int, int], list[Element]] = {}
    for match, element in sorted(areas.items(), key=lambda item: item[0].length):
        prefixes = [(_base(match, length), length) for length in lengths if length <= match.length]
        if any(_dominates(other, element) for prefix in prefixes for other in by_prefix.get(prefix, ())):
            continue
        root = next((prefix for prefix in prefixes if prefix in roots), prefixes[-1])
        roots.setdefault(root, []).append(element)
    for (base, length), inside in roots.items():
        yield from _by_prefix(base, length, inside, [])


def _dominates(wide: Element, narrow: Element) -> bool:
    """Say whether ``narrow``, whose prefix lies in that of ``wide``, adds nothing to it."""
    if wide is narrow or not (wide.match.first <= narrow.match.first and narrow.match.last <= wide.match.last):
        return False
    return _stronger(wide, narrow) is wide and wide.expires_at_ms >= narrow.expires_at_ms


def _by_prefix(base: int, length: int, inside: list[Element], around: list[Element]) -> Iterator[Element]:
    """Yield the pieces of one prefix; ``inside`` lies within it (or is it), ``around`` covers all of it."""
    around = around + [element for element in inside if element.match.length == length]
    inside = [element for element in inside if element.match.length > length]
    if not inside:
        yield from _by_port(around[0].match._replace(base=base, length=length), around)
        return
    step = 1 << (inside[0].match.bits - length - 1)
    for half in (base, base + step):
        within = [element for element in inside if half <= element.match.base < half + step]
        yield from _by_prefix(half, length + 1, within, around)


def _by_port(shape: Match, covering: list[Element]) -> Iterator[Element]:
    """Yield the pieces of one prefix by port range, neighbours with equal effect joined."""
    starts = sorted({port for element in covering for port in (element.match.first, element.match.last + 1)})
    pending: Element | None = None
    for first, after in itertools.pairwise(starts):
        best = _winner(element for element in covering if element.match.first <= first and after - 1 <= element.match.last)
        if best is None:
            continue
        piece = Element(shape._replace(first=first, last=after - 1), best.expires_at_ms, best.rate)
        if pending is not None and pending.match.last + 1 == first and pending[1:] == piece[1:]:
            pending = pending._replace(match=pending.match._replace(last=after - 1))
            continue
        if pending is not None:
            yield pending
        pending = piece
    if pending is not None:
        yield pending


def _base(match: Match, length: int) -> int:
    shift = match.bits - length
    return match.base >> shift << shift


def _winner(elements: Iterable[Element]) -> Element | None:
    best: Element | None = None
    for element in elements:
        best = element if best is None else _stronger(best, element)
    return best


def _stronger(left: Element, right: Element) -> Element:
    """Return the one that decides: the stricter rate, then the later end."""
    if left.match.effect is Effect.LIMIT and left.rate != right.rate:
        assert left.rate is not None
        assert right.rate is not None
        return left if left.rate.strictness > right.rate.strictness else right
    return left if left.expires_at_ms >= right.expires_at_ms else right
