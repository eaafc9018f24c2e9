"""The chains ``CYBERMESH-*`` as text for iptables-restore, and as they come back from iptables-save. Pure.

INPUT, FORWARD and OUTPUT of the filter table each get one jump, as their first rule: whatever accepts established connections
comes later, so those of a banned host are cut too. ``CYBERMESH-IN`` asks for the source, ``CYBERMESH-OUT`` for the destination;
``CYBERMESH-FWD`` asks both. Rules belong to groups (``ipt_sets``), never to policies. A forwarded packet is seen after DNAT, so
a port behind DNAT is the container's.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cybermesh.enforce.backends.ipt_sets import PROTOCOL_NAMES, Group, name_of, read_name
from cybermesh.enforce.rules import PROTOCOL_NUMBERS, Effect
from cybermesh.policy import Direction

IN, OUT, FORWARD = "CYBERMESH-IN", "CYBERMESH-OUT", "CYBERMESH-FWD"
JUMPS: Final = {"INPUT": IN, "FORWARD": FORWARD, "OUTPUT": OUT}
_CHAINS: Final = {Direction.INGRESS: IN, Direction.EGRESS: OUT}
_FORWARD_RULES: Final = (f"-A {FORWARD} -j {IN}", f"-A {FORWARD} -j {OUT}")
_UNITS: Final = {1: "sec", 60: "min", 3_600: "hour", 86_400: "day"}
# iptables-save tells these in its own words; the rule's other parts name the same rate.
_VARYING: Final = frozenset({"--hashlimit-above", "--hashlimit-htable-expire"})
_EXPIRE_MS_MAX: Final = 86_400_000
_TCP: Final = 6


@dataclass(slots=True)
class Chains:
    """What iptables-save says of one family's filter table.

    ``ours`` are the rules of our chains as they were told, ``jumps`` how often a built-in chain jumps to ours, ``misplaced``
    those built-in chains whose first rule is not that jump alone. ``counters`` are packets by what happened to them.
    """

    ours: dict[str, list[str]] = field(default_factory=dict)
    jumps: Counter[str] = field(default_factory=Counter)
    misplaced: set[str] = field(default_factory=set)
    counters: Counter[str] = field(default_factory=Counter)

    def generations(self) -> set[str]:
        """Return the generations of sets that the rules look up."""
        words = (word for rules in self.ours.values() for rule in rules for word in rule.split())
        return {found[0] for found in map(read_name, words) if found is not None}


def read(text: str) -> Chains:
    """Read what ``iptables-save -c -t filter`` says."""
    found = Chains()
    first: set[str] = set()
    for line in text.splitlines():
        if line.startswith(":CYBERMESH-"):
            found.ours.setdefault(line[1:].split()[0], [])
        if not line.startswith("["):
            continue
        counts, _, rule = line.partition("] ")
        words = rule.split()
        chain = words[1]
        if chain in found.ours or chain.startswith("CYBERMESH-"):
            found.ours.setdefault(chain, []).append(rule)
            found.counters[_outcome(words)] += int(counts[1:].split(":")[0])
        elif chain in JUMPS:
            if words[2:] == ["-j", JUMPS[chain]]:
                found.jumps[chain] += 1
                if chain in first:
                    found.misplaced.add(chain)
            first.add(chain)
    found.misplaced.update(chain for chain in JUMPS if found.jumps[chain] != 1)
    found.counters.pop("", None)
    return found


def _outcome(words: list[str]) -> str:
    if "hashlimit" in words:
        return "limited"
    return {"DROP": "dropped", "REJECT": "rejected", "RETURN": "allowed"}.get(words[words.index("-j") + 1], "")


def damage(found: Chains, groups: Iterable[str]) -> list[str]:
    """Return what is not as we would have left it, given the names of the sets that exist."""
    told = [f"{chain} does not jump to {JUMPS[chain]} first, and once" for chain in sorted(found.misplaced)]
    wanted: dict[str, list[str]] = {IN: [], OUT: [], FORWARD: list(_FORWARD_RULES)}
    for name in _ordered(groups):
        known = read_name(name)
        assert known is not None
        wanted[_CHAINS[known[1].direction]].extend(rules(known[1], name))
    for chain, expected in wanted.items():
        listed = [_normal(rule) for rule in found.ours.get(chain, ())]
        ours = [_normal(rule) for rule in expected]
        exceptions = sum(1 for rule in ours if "RETURN" in rule) if chain != FORWARD else len(ours)
        if listed[:exceptions] != ours[:exceptions] or sorted(listed) != sorted(ours):
            told.append(f"the rules of chain {chain} are not ours alone")
    return told + [f"chain {chain} is not ours" for chain in sorted(set(found.ours) - set(wanted))]


def _ordered(names: Iterable[str]) -> list[str]:
    """Exceptions come first, because the rules of a chain are asked in order."""
    return sorted(names, key=lambda name: ("-allow-" not in name, name))


def _normal(rule: str) -> tuple[str, ...]:
    words = shlex.split(rule)
    kept: list[str] = []
    skip = False
    for before, word in zip(["", *words], words, strict=False):
        if skip:
            skip = False
        elif word in _VARYING:
            skip = True
        elif before == "-p":
            kept.append(str((PROTOCOL_NUMBERS | {"ipv6-icmp": 58}).get(word, word)))
        else:
            kept.append(word)
    return tuple(kept)


def rules(group: Group, name: str) -> list[str]:
    """Return the rules that look a group's set up, in the words and order of iptables-save."""
    is_ingress = group.direction is Direction.INGRESS
    address = "src" if is_ingress else "dst"
    look_up = f"-m set --match-set {name} {address}{',dst' if group.kind == 'p' else ''}"
    protocol = f"-p {PROTOCOL_NAMES[group.protocol]} " if group.protocol else ""
    if group.first:
        ports = str(group.first) if group.first == group.last else f"{group.first}:{group.last}"
        protocol += f"-m {PROTOCOL_NAMES[group.protocol]} --dport {ports} "
    head = f"-A {_CHAINS[group.direction]} {protocol}{look_up}"
    if group.effect is Effect.ALLOW:
        return [f"{head} -j RETURN"]
    if group.effect is Effect.DROP:
        return [f"{head} -j DROP"]
    if group.effect is Effect.LIMIT:
        return [f"{head} {_rate(group, 'src' if is_ingress else 'dst')} -j DROP"]
    refusal = "icmp-admin-prohibited" if group.version == 4 else "icmp6-adm-prohibited"
    reset = f"-A {_CHAINS[group.direction]} {protocol or '-p tcp '}{look_up} -j REJECT --reject-with tcp-reset"
    other = f"{head} -j REJECT --reject-with {refusal}"
    if group.protocol:
        return [reset] if group.protocol == _TCP else [other]
    return [reset, other]


def _rate(group: Group, side: str) -> str:
    rate = group.rate
    assert rate is not None
    # A bucket must outlive the time it takes to fill again, or a pause would give a burst for nothing.
    expire_ms = min(_EXPIRE_MS_MAX, 1_000 * (rate.unit_s * rate.burst // rate.packets + 1))
    bits = 32 if group.version == 4 else 128
    mask = f" --hashlimit-{side}mask {group.length}" if group.length != bits else ""
    bucket = "cm" + hashlib.sha256(name_of(group, "").encode()).hexdigest()[:12]
    return (
        f"-m hashlimit --hashlimit-above {rate.packets}/{_UNITS[rate.unit_s]} --hashlimit-burst {rate.burst} "
        f"--hashlimit-mode {side}ip --hashlimit-name {bucket} --hashlimit-htable-expire {expire_ms}{mask}"
    )


def switch(before: Chains, names: Iterable[str], version: int) -> str:
    """Return the text that makes our chains of a family look up exactly the sets ``names``, with one jump each."""
    lines: list[str] = []
    for name in _ordered(names):
        known = read_name(name)
        if known is not None and known[1].version == version:
            lines += rules(known[1], name)
    return replace(before, [*_FORWARD_RULES, *lines])


def replace(before: Chains, lines: Iterable[str]) -> str:
    """Return the text that gives our chains these rules, with one jump each as the first rule of its chain."""
    words = ["*filter", *(f":{chain} - [0:0]" for chain in (IN, OUT, FORWARD))]
    for chain, target in JUMPS.items():
        if chain in before.misplaced:
            words += [f"-D {chain} -j {target}"] * before.jumps[chain]
            words.append(f"-I {chain} 1 -j {target}")
    return "\n".join([*words, *lines, "COMMIT", ""])


def append(names: Iterable[str]) -> dict[int, str]:
    """Return, by family, the text that lets existing chains look up further sets."""
    lines: dict[int, list[str]] = {}
    for name in sorted(names):
        known = read_name(name)
        assert known is not None
        lines.setdefault(known[1].version, []).extend(rules(known[1], name))
    return {version: "\n".join(["*filter", *found, "COMMIT", ""]) for version, found in lines.items()}


def take_back(appended: Mapping[int, str]) -> dict[int, str]:
    """Return the text that undoes ``append``."""
    return {version: text.replace("\n-A ", "\n-D ") for version, text in appended.items()}


def remove(before: Chains) -> str:
    """Return the text that removes our jumps and chains, "" if there are none."""
    lines = [f"-D {chain} -j {target}" for chain, target in JUMPS.items() for _ in range(before.jumps[chain])]
    lines += [f"-F {chain}" for chain in sorted(before.ours)] + [f"-X {chain}" for chain in sorted(before.ours)]
    return "\n".join(["*filter", *lines, "COMMIT", ""]) if lines else ""
