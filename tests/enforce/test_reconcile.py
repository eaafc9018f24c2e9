"""Plans: whatever policies want, what is installed does exactly that, with disjoint areas and no time gained or lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cybermesh.enforce import reconcile
from cybermesh.enforce.reconcile import Desired, LaneFullError, Mirror, Plan, disjoint, plan
from cybermesh.enforce.rules import Effect, Element, Match, Rate, Rule
from cybermesh.policy import Direction

IN = Direction.INGRESS
BASE = 0xC6336400  # 198.51.100.0


def area(base: int, length: int, first: int = 0, last: int = 0, effect: Effect = Effect.DROP) -> Match:
    """Return an area in 198.51.100.0/24; with ports it is TCP."""
    return Match(effect, IN, 4, BASE + base, length, 6 if first else 0, first, last, True)


def point(host: int, effect: Effect = Effect.DROP) -> Match:
    return Match(effect, IN, 4, BASE + host, 32)


@st.composite
def prefixes(draw: st.DrawFn) -> tuple[int, int]:
    length = draw(st.integers(24, 32))
    return draw(st.integers(0, 255)) >> (32 - length) << (32 - length), length


ends = st.integers(1, 20).map(lambda second: second * 1_000)
rates = st.sampled_from([Rate(5, 1, 5), Rate(1, 1, 1), Rate(30, 60, 30)])
port_spans = st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda pair: (min(pair), max(pair)))
plain_areas = st.builds(lambda prefix, end: Element(area(prefix[0], prefix[1]), end), prefixes(), ends)
port_areas = st.builds(
    lambda prefix, span, end: Element(area(prefix[0], prefix[1], span[0], span[1]), end), prefixes(), port_spans, ends
)
limit_areas = st.builds(
    lambda prefix, end, rate: Element(area(prefix[0], prefix[1], 0, 0, Effect.LIMIT), end, rate), prefixes(), ends, rates
)


def covering(elements: list[Element], host: int, port: int) -> list[Element]:
    """Return the elements that hit one packet, by looking at each."""
    return [
        element
        for element in elements
        if element.match.base <= BASE + host < element.match.base + (1 << (32 - element.match.length))
        and element.match.first <= port <= element.match.last
    ]


@given(st.lists(st.one_of(plain_areas), max_size=8) | st.lists(port_areas, max_size=8) | st.lists(limit_areas, max_size=6))
def test_cut_areas_are_disjoint_and_end_when_the_last_that_covers_them_does(elements: list[Element]) -> None:
    pieces = disjoint(elements)
    hosts = sorted({element.match.base - BASE + edge for element in elements for edge in (-1, 0, 1, 3, 9)})
    ports = sorted({port + step for element in elements for port in element.match[6:8] for step in (-1, 0, 1)})
    for host, port in itertools.product([host for host in hosts if 0 <= host < 256], ports):
        wanted, got = covering(elements, host, port), covering(pieces, host, port)
        assert len(got) == (1 if wanted else 0)
        if not wanted:
            continue
        if wanted[0].rate is not None:
            strictest = max(element.rate.strictness for element in wanted if element.rate)
            assert got[0].rate is not None
            assert got[0].rate.strictness == strictest
            wanted = [element for element in wanted if element.rate == got[0].rate]
        assert got[0].expires_at_ms == max(element.expires_at_ms for element in wanted)


def test_a_longer_ban_inside_a_prefix_keeps_its_time_and_a_shorter_one_costs_nothing() -> None:
    wide, longer, shorter = Element(area(0, 24), 5_000), Element(area(64, 26), 9_000), Element(area(128, 26), 2_000)
    assert sorted(
        (piece.match.base - BASE, piece.match.length, piece.expires_at_ms) for piece in disjoint([wide, longer, shorter])
    ) == [
        (0, 26, 5_000),
        (64, 26, 9_000),
        (128, 25, 5_000),
    ]


def test_a_host_with_a_longer_ban_inside_a_prefix_is_an_element_of_its_own() -> None:
    desired = Desired()
    desired.put("wide", (Rule("wide", Element(area(0, 24), 5_000)),))
    desired.put("host", (Rule("host", Element(point(7), 9_000)),))
    assert {str(match): element.expires_at_ms for match, element in desired.view(0).items()} == {
        "drop from 198.51.100.0/24": 5_000,
        "drop from 198.51.100.7": 9_000,
    }


def test_a_lane_that_overflows_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "AREAS_PER_LANE_MAX", 3)
    desired = Desired()
    desired.put("p", tuple(Rule("p", Element(area(8 * n, 29), 5_000)) for n in range(4)))
    with pytest.raises(LaneFullError, match="4 disjoint areas, 3 fit"):
        desired.view(0)


def test_a_plan_names_what_differs_and_nothing_else() -> None:
    same, late, gone, new = (Element(point(n), 5_000) for n in range(4))
    desired = {element.match: element for element in (same, late, new)}
    installed = {element.match: element for element in (same, late._replace(expires_at_ms=9_000), gone)}
    made = plan(desired, installed, 0)
    assert made == Plan((new,), (gone,), ((late._replace(expires_at_ms=9_000), late),))
    assert made.drift == 3
    assert plan(desired, installed, 0, tolerance_ms=4_000).renewals == ()


def test_a_changed_area_brings_its_whole_lane() -> None:
    kept, new = Element(area(0, 25), 5_000), Element(area(128, 25), 5_000)
    made = plan({kept.match: kept, new.match: new}, {kept.match: kept}, 0)
    assert made.adds == (new,)
    assert made.areas == ((kept.match.lane, (kept, new)),)


def test_what_has_ended_is_neither_added_nor_removed() -> None:
    ended = Element(point(1), 1_000)
    assert plan({ended.match: ended}, {}, 1_000) == Plan()
    assert plan({}, {ended.match: ended}, 1_000) == Plan()
    mirror = Mirror()
    mirror.replace([ended, Element(area(0, 24), 2_000)])
    assert mirror.forget_ended(1_000) == 1
    assert len(mirror) == 1


points = st.builds(lambda host, end: Element(point(host), end), st.integers(0, 5), ends)


class Reconciling(RuleBasedStateMachine):
    """Policies come, are renewed, end and are revoked; a firewall that follows the small plans equals the large plan."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0
        self.desired = Desired()
        self.mirror = Mirror()
        self.wanted: dict[str, list[Element]] = {}

    @rule(name=st.sampled_from("abcd"), elements=st.lists(st.one_of(points, plain_areas, port_areas), min_size=1, max_size=4))
    def opens_or_renews(self, name: str, elements: list[Element]) -> None:
        unique = list({element.match: element for element in elements}.values())
        self.wanted[name] = unique
        self.follow(self.desired.put(name, tuple(Rule(name, element) for element in unique)))

    @rule(name=st.sampled_from("abcd"))
    def revokes(self, name: str) -> None:
        self.wanted.pop(name, None)
        self.follow(self.desired.remove(name))

    @rule(step_ms=st.integers(1, 4_000))
    def time_passes(self, step_ms: int) -> None:
        self.now_ms += step_ms
        self.mirror.forget_ended(self.now_ms)

    @rule(data=st.data())
    def somebody_removes_an_element(self, data: st.DataObject) -> None:
        installed = sorted(self.mirror.view())
        if installed:
            lost = data.draw(st.sampled_from(installed))
            self.mirror.apply(Plan(removes=(self.mirror.view()[lost],)))
            repair = plan(self.desired.view(self.now_ms), self.mirror.view(), self.now_ms)
            assert repair.drift <= 1
            self.mirror.apply(repair)

    def follow(self, touched: reconcile.Touched) -> None:
        step = plan(self.desired.view(self.now_ms, touched), self.mirror.view(touched), self.now_ms)
        latest = max((element.expires_at_ms for elements in self.wanted.values() for element in elements), default=0)
        for element in step.wanted():
            assert self.now_ms < element.expires_at_ms <= latest
        self.mirror.apply(step)

    @invariant()
    def nothing_is_left_to_plan(self) -> None:
        assert plan(self.desired.view(self.now_ms), self.mirror.view(), self.now_ms).drift == 0

    @invariant()
    def every_wanted_point_is_installed_until_its_last_policy_ends(self) -> None:
        ends: dict[Match, int] = {}
        for element in itertools.chain.from_iterable(self.wanted.values()):
            if not element.match.area and element.expires_at_ms > self.now_ms:
                ends[element.match] = max(ends.get(element.match, 0), element.expires_at_ms)
        installed = {match: element.expires_at_ms for match, element in self.mirror.view().items() if not match.area}
        assert installed == ends


TestReconciling = Reconciling.TestCase
