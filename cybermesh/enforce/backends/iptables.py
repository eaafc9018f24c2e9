"""iptables, ip6tables and ipset as a backend, for hosts that do not use nftables: chains ``CYBERMESH-*`` and sets ``cm…``.

How changes stay whole, though ipset has no transactions:

- A rebuild fills sets of another *generation*, then one ``iptables-restore --noflush`` per family lets the chains look those
  up, then the old sets go. Until the switch nothing has changed; when the second family fails, the first is switched back.
- An edit adds before it deletes, so no address is free in between, and is taken back member by member when a line fails.

Nothing of others is flushed, renamed or reordered; what is ours is known by its name. Texts are in ``ipt_rules``, ``ipt_sets``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from cybermesh.enforce.backends import Audit, BackendError, ipt_rules, ipt_sets, netlink, programs, watch
from cybermesh.enforce.backends.ipt_rules import Chains
from cybermesh.enforce.backends.ipt_sets import GENERATIONS, Group, group_of, name_of, read_name
from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Effect, Element, Match
from cybermesh.policy import Direction

_ERROR_CHARS_MAX: Final = 300
_GROUPS_MAX: Final = 1_024
_LOCK_WAIT_S: Final = "5"
# The kernel lets go of a set some milliseconds after the last rule that looked it up.
_DESTROY_TRIES: Final = 40
_DESTROY_PAUSE_S: Final = 0.025
_ALLOWED: Final = tuple(Group(Effect.ALLOW, direction, version, "h") for direction in Direction for version in (4, 6))
_TABLES: Final = {4: "iptables", 6: "ip6tables"}


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the programs are, by what they do; the keys of ``restore`` and ``save`` are families."""

    restore: dict[int, str]
    save: dict[int, str]
    ipset: str

    @classmethod
    def find(cls, variant: str = "") -> Programs:
        """Look for the system's choice, or for a ``variant`` (``nft``, ``legacy``) of it.

        Raises:
            BackendError: One of them is not installed.
        """
        dash = f"-{variant}" if variant else ""
        names = {version: f"{table}{dash}" for version, table in _TABLES.items()}
        return cls(
            {version: _found(f"{name}-restore") for version, name in names.items()},
            {version: _found(f"{name}-save") for version, name in names.items()},
            _found("ipset"),
        )


def _found(name: str) -> str:
    place = programs.find(name)
    if place is None:
        raise BackendError("NO_FIREWALL", f"no program {name}; install the packages iptables and ipset")
    return place


@dataclass(slots=True)
class _Found:
    """What is there: chains by family, names of our sets, elements, and what is wrong."""

    chains: dict[int, Chains]
    names: set[str] = field(default_factory=set)
    elements: dict[Match, Element] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)


class IptablesBackend:
    """The kernel's iptables in this process's network namespace; needs CAP_NET_ADMIN."""

    name = "iptables"

    def __init__(self, found: Programs) -> None:
        self._programs = found
        # The names of the sets that our chains look up; None until they have been built or read.
        self._names: frozenset[str] | None = None
        self._questions = netlink.Questions(_question)
        self._watch = watch.Watch()

    async def apply(self, plan: Plan, now_ms: int) -> None:
        """Make the changes of ``plan``; when a line fails, take back those before it."""
        if not plan.drift:
            return
        if self._names is None:
            await self.audit(now_ms)
        if not self._names:
            raise BackendError("APPLY_FAILED", "there are no chains of ours")
        generation = _generation(self._names)
        added = {name_of(group_of(element), generation) for element in plan.wanted()} - self._names
        if len(self._names) + len(added) > _GROUPS_MAX:
            headroom = _GROUPS_MAX - len(self._names)
            raise BackendError("SET_FULL", f"{len(added)} more combinations of service and rate, headroom {headroom}")
        names = self._names | added
        try:
            await self._ipset("".join(_edit(plan, generation, names, added, now_ms)))
            await self._append(added)
        except (BackendError, asyncio.CancelledError):
            self._names = None
            await asyncio.shield(self._undo(plan, generation, names, added, now_ms))
            raise
        self._names = frozenset(names)

    async def rebuild(self, elements: Collection[Element], now_ms: int) -> None:
        """Fill sets of a new generation, switch the chains to them, and drop the old ones."""
        found = await self._read(now_ms, with_elements=False)
        used = {known[0] for known in map(read_name, found.names) if known is not None}
        live = {generation for chains in found.chains.values() for generation in chains.generations()}
        generation = next((item for item in GENERATIONS if item not in used), None)
        if generation is None:
            generation = next((item for item in GENERATIONS if item not in live), GENERATIONS[0])
            await self._destroy(name for name in found.names if name.startswith(f"cm{generation}-"))
        groups = dict.fromkeys((*_ALLOWED, *(group_of(e) for e in elements if e.expires_at_ms > now_ms)))
        names = {group: name_of(group, generation) for group in groups}
        if len(names) > _GROUPS_MAX:
            raise BackendError("SET_FULL", f"{len(names)} combinations of service and rate, {_GROUPS_MAX} fit")
        self._names = None
        try:
            await self._ipset("".join(_fill(names, elements, now_ms)))
            await self._switch(found, names.values())
        except (BackendError, asyncio.CancelledError):
            await asyncio.shield(self._destroy(names.values()))
            raise
        self._names = frozenset(names.values())
        await self._destroy(found.names)

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        """Ask the kernel for single members."""
        return await asyncio.to_thread(self._present, matches)

    async def audit(self, now_ms: int) -> Audit:
        """List our chains and sets."""
        found = await self._read(now_ms, with_elements=True)
        self._names = frozenset(found.names) if not found.damage else None
        counters = sum((chains.counters for chains in found.chains.values()), start=Chains().counters)
        return Audit(found.elements, tuple(found.damage), dict(counters))

    async def glance(self, now_ms: int) -> Audit | None:
        """Return None: several questions make up the answer, and a change between them would look like drift."""
        return None

    async def wait_changed(self) -> None:
        """Return when somebody has changed nftables, which iptables of the variant nft does; legacy tables tell nobody."""
        await self._watch.wait()

    def close(self) -> None:
        """Give back what is open; the firewall stays as it is."""
        self._questions.close()
        self._watch.close()

    async def remove_all(self) -> None:
        """Remove our jumps, chains and sets, whatever is left of them."""
        found = await self._read(0, with_elements=False)
        self._names = None
        for version, chains in found.chains.items():
            text = ipt_rules.remove(chains)
            if text:
                await self._restore(version, text)
        left = await self._destroy(found.names)
        if left:
            raise BackendError("APPLY_FAILED", f"rules of others use {len(left)} of our sets, as {min(left)}")

    # Reading

    async def _read(self, now_ms: int, *, with_elements: bool) -> _Found:
        chains: dict[int, Chains] = {}
        for version, program in self._programs.save.items():
            ended = await programs.run(program, "-c", "-t", "filter")
            if ended.code != 0:
                raise _translated(ended.error)
            chains[version] = ipt_rules.read(ended.output.decode(errors="replace"))
        found = _Found(chains)
        if with_elements:
            ended = await programs.run(self._programs.ipset, "save")
            if ended.code != 0:
                raise _translated(ended.error)
            await asyncio.to_thread(_read_sets, ended.output.decode(errors="replace"), now_ms, found)
            _judge(found)
        else:
            ended = await programs.run(self._programs.ipset, "list", "-n")
            if ended.code != 0:
                raise _translated(ended.error)
            found.names.update(name for name in ended.output.decode().split() if read_name(name) is not None)
        return found

    def _present(self, matches: Collection[Match]) -> frozenset[Match]:
        groups = {name: known[1] for name in self._names or () if (known := read_name(name)) is not None}
        places: dict[Match, list[str]] = {}
        asked: list[tuple[Match, str]] = []
        for match in matches:
            # Matches that differ in their address alone have one place, and there are few places.
            kind = match._replace(base=0)
            if kind not in places:
                places[kind] = [name for name, group in groups.items() if _could_hold(group, match)]
            # A match tells nothing of its rate: a limit is asked for in every set that could hold it.
            asked += [(match, name) for name in places[kind]]
        return frozenset(match for match, _ in self._questions.present(asked))

    # Writing

    async def _ipset(self, text: str) -> None:
        ended = await programs.run(self._programs.ipset, "restore", "-exist", text=text)
        if ended.code != 0:
            raise _translated(ended.error)

    async def _restore(self, version: int, text: str) -> None:
        ended = await programs.run(
            self._programs.restore[version], "--noflush", "-w", _LOCK_WAIT_S, text=text, started=self._watch.own
        )
        if ended.code != 0:
            raise _translated(ended.error)

    async def _switch(self, found: _Found, names: Collection[str]) -> None:
        switched: list[int] = []
        try:
            for version, chains in found.chains.items():
                await self._restore(version, ipt_rules.switch(chains, names, version))
                switched.append(version)
        except (BackendError, asyncio.CancelledError):
            for version in switched:
                await asyncio.shield(self._switch_back(version, found.chains[version]))
            raise

    async def _switch_back(self, version: int, before: Chains) -> None:
        lines = [rule for rules in before.ours.values() for rule in rules]
        text = ipt_rules.replace(Chains(), lines)
        ended = await programs.run(
            self._programs.restore[version], "--noflush", "-w", _LOCK_WAIT_S, text=text, started=self._watch.own
        )
        if ended.code != 0 or not before.ours:
            now = await self._read(0, with_elements=False)
            await self._restore(version, ipt_rules.remove(now.chains[version]))

    async def _append(self, names: Collection[str]) -> None:
        done: dict[int, str] = {}
        texts = ipt_rules.append(names)
        try:
            for version, text in texts.items():
                await self._restore(version, text)
                done[version] = text
        except BackendError:
            for version, text in ipt_rules.take_back(done).items():
                await self._restore(version, text)
            raise

    async def _undo(self, plan: Plan, generation: str, names: Collection[str], added: Collection[str], now_ms: int) -> None:
        """Take back an edit of which some lines may have been done; the next audit finds what this cannot."""
        back = Plan(adds=plan.removes, removes=plan.adds, renewals=tuple((after, before) for before, after in plan.renewals))
        text = "".join(line for line in _edit(back, generation, set(names) - set(added), (), now_ms))
        ended = await programs.run(self._programs.ipset, "restore", "-exist", text=text)
        await self._destroy(added)
        if ended.code == 0:
            self._names = frozenset(names) - set(added)

    async def _destroy(self, names: Iterable[str]) -> set[str]:
        """Destroy sets; return those that somebody still uses."""
        left = set(names)
        for attempt in range(_DESTROY_TRIES):
            text = "".join(f"destroy {name}\n" for name in sorted(left))
            if (await programs.run(self._programs.ipset, "restore", text=text)).code == 0:
                return set()
            for name in sorted(left):
                ended = await programs.run(self._programs.ipset, "destroy", name)
                if ended.code == 0 or "does not exist" in ended.error:
                    left.discard(name)
            if not left or attempt == _DESTROY_TRIES - 1:
                break
            await asyncio.sleep(_DESTROY_PAUSE_S)
        return left


def _generation(names: Iterable[str]) -> str:
    known = read_name(next(iter(names)))
    assert known is not None
    return known[0]


def _could_hold(group: Group, match: Match) -> bool:
    if (group.effect, group.direction, group.version) != (match.effect, match.direction, match.version):
        return False
    if group.kind == "p":
        return match.first != 0 and not match.area
    if (group.kind == "n") != match.area or group.length not in (0, match.length):
        return False
    return (group.protocol, group.first, group.last) == (match.protocol, match.first, match.last)


def _question(sequence: int, asked: tuple[Match, str]) -> bytes:
    match, name = asked
    known = read_name(name)
    return netlink.member_question(sequence, match, name, with_port=known is not None and known[1].kind == "p")


def _fill(names: dict[Group, str], elements: Iterable[Element], now_ms: int) -> Iterator[str]:
    for group, name in names.items():
        yield ipt_sets.create(group, name)
    for element in elements:
        if element.expires_at_ms > now_ms:
            yield ipt_sets.add(element, names[group_of(element)], now_ms)


def _edit(plan: Plan, generation: str, names: Collection[str], added: Iterable[str], now_ms: int) -> Iterator[str]:
    """Yield the lines of an edit: new sets, additions and renewals, then what goes."""
    for name in sorted(added):
        known = read_name(name)
        assert known is not None
        yield ipt_sets.create(known[1], name)
    moved = ((before, after) for before, after in plan.renewals if before.rate != after.rate)
    for element in plan.wanted():
        name = name_of(group_of(element), generation)
        if name in names:
            yield ipt_sets.add(element, name, now_ms)
    for element in itertools.chain(plan.removes, (before for before, _ in moved)):
        name = name_of(group_of(element), generation)
        if name in names:
            yield ipt_sets.delete(element, name)


def _read_sets(text: str, now_ms: int, found: _Found) -> None:
    known: dict[str, Group] = {}
    foreign = 0
    for line in text.splitlines():
        words = line.split()
        named = read_name(words[1])
        if named is None:
            continue
        group = named[1]
        if words[0] == "create":
            found.names.add(words[1])
            known[words[1]] = group
            family = "inet" if group.version == 4 else "inet6"
            if words[2] != group.set_type or family not in words or "timeout" not in words:
                found.damage.append(f"the set {words[1]} is not as we make it")
            continue
        try:
            match = ipt_sets.read_member(group, words[2])
            left_s = int(words[words.index("timeout") + 1])
        except (ValueError, KeyError, IndexError):
            foreign += 1
            continue
        if left_s == 0:
            foreign += 1  # without an end; an ended member is not listed
            continue
        found.elements[match] = Element(match, now_ms + 1_000 * left_s, group.rate)
    if foreign:
        found.damage.append(f"{foreign} members of our sets are not ours")


def _judge(found: _Found) -> None:
    for version, chains in found.chains.items():
        ours = [name for name in found.names if (known := read_name(name)) is not None and known[1].version == version]
        found.damage += [f"{_TABLES[version]}: {what}" for what in ipt_rules.damage(chains, ours)]
    generations = {known[0] for known in map(read_name, found.names) if known is not None}
    if len(generations) > 1:
        found.damage.append(f"sets of {len(generations)} generations")
    if not found.names:
        found.damage.append("there are no sets of ours")


def _translated(error: str) -> BackendError:
    text = " ".join(error.split())[:_ERROR_CHARS_MAX]
    if "is full" in error:
        return BackendError("SET_FULL", f"a set is full ({ipt_sets.SET_SIZE_MAX} members fit): {text}")
    if "ermission denied" in error or "not permitted" in error:
        return BackendError("NO_RIGHTS", f"changing iptables needs CAP_NET_ADMIN: {text}")
    return BackendError("APPLY_FAILED", text)
