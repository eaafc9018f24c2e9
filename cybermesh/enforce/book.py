"""The book: every decision an agent knows, standing, held or ended, with the rules they ask for. Pure; taken back on failure.

A batch of decisions changes the book first and the firewall second. When the firewall or the database refuses, ``restore`` puts
the book back to what it was, entry by entry, so that memory, database and kernel never tell different stories.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cybermesh.enforce.decisions import TOMBSTONE_MS, Decision, Tombstone
from cybermesh.enforce.reconcile import Desired, Touched
from cybermesh.enforce.rules import Rule

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """What the book says about one policy."""

    decision: Decision | None
    tombstone: Tombstone | None
    rules: tuple[Rule, ...]


@dataclass(slots=True)
class Book:
    """Decisions and tombstones by policy, and the rules that should be installed."""

    decisions: dict[str, Decision] = field(default_factory=dict)
    tombstones: dict[str, Tombstone] = field(default_factory=dict)
    desired: Desired = field(default_factory=Desired)

    def known_seq(self, policy_id: str) -> int | None:
        """Return the last decision_seq known of a policy."""
        decision, tombstone = self.decisions.get(policy_id), self.tombstones.get(policy_id)
        known = [item.decision_seq for item in (decision, tombstone) if item is not None]
        return max(known, default=None)

    def entry(self, policy_id: str) -> Entry:
        """Return what ``restore`` needs to undo a change of one policy."""
        return Entry(self.decisions.get(policy_id), self.tombstones.get(policy_id), self.desired.rules_of(policy_id))

    def restore(self, entries: Mapping[str, Entry]) -> Touched:
        """Put policies back to earlier entries; return what that concerns."""
        touched = Touched()
        for policy_id, entry in entries.items():
            _put(self.decisions, policy_id, entry.decision)
            _put(self.tombstones, policy_id, entry.tombstone)
            touched |= self.desired.put(policy_id, entry.rules)
        return touched

    def install(self, decision: Decision, rules: tuple[Rule, ...]) -> Touched:
        """Let a decision stand with these rules (none for a dry run), in place of what its policy had."""
        self.decisions[decision.policy_id] = replace(decision, held="")
        self.tombstones.pop(decision.policy_id, None)
        return self.desired.put(decision.policy_id, rules)

    def hold(self, decision: Decision, code: str, *, withdraw: bool) -> Touched:
        """Keep a decision for later; rules of an earlier one stay unless ``withdraw``."""
        self.decisions[decision.policy_id] = replace(decision, held=code)
        self.tombstones.pop(decision.policy_id, None)
        return self.desired.remove(decision.policy_id) if withdraw else Touched()

    def refuse(self, policy_id: str, decision_seq: int, until_ms: int) -> None:
        """Remember that a decision was refused for good; what stood before stays, under the newer sequence number."""
        before = self.decisions.get(policy_id)
        if before is not None:
            self.decisions[policy_id] = replace(before, decision_seq=decision_seq)
        else:
            self.tombstones[policy_id] = Tombstone(policy_id, decision_seq, until_ms + TOMBSTONE_MS)

    def end(self, policy_id: str, decision_seq: int, until_ms: int) -> Touched:
        """End a policy and keep a tombstone until ten minutes after ``until_ms``, its last possible end."""
        before = self.decisions.pop(policy_id, None)
        latest_ms = max(until_ms, before.ends_at_ms if before else 0)
        self.tombstones[policy_id] = Tombstone(policy_id, decision_seq, latest_ms + TOMBSTONE_MS)
        return self.desired.remove(policy_id)

    def ended(self, now_ms: int) -> list[Decision]:
        """Return the decisions whose time is up."""
        return [decision for decision in self.decisions.values() if decision.ends_at_ms <= now_ms]

    def held(self) -> list[Decision]:
        """Return the decisions that wait, in the order they were made."""
        waiting = [decision for decision in self.decisions.values() if decision.held]
        return sorted(waiting, key=lambda decision: decision.decision_seq)

    def standing(self) -> Iterator[Decision]:
        """Yield the decisions that are not held."""
        return (decision for decision in self.decisions.values() if not decision.held)

    def forget_tombstones(self, now_ms: int) -> None:
        """Drop tombstones whose time is up."""
        for policy_id in [item.policy_id for item in self.tombstones.values() if item.until_ms <= now_ms]:
            del self.tombstones[policy_id]

    def lighten(self, policy_ids: Iterable[str]) -> None:
        """Forget the ``rule_data`` of decisions that a database has by now."""
        for policy_id in policy_ids:
            decision = self.decisions.get(policy_id)
            if decision is not None and decision.rule_data:
                self.decisions[policy_id] = replace(decision, rule_data=b"")

    def changes(self, policy_ids: Iterable[str]) -> tuple[tuple[Decision, ...], tuple[Tombstone, ...]]:
        """Return what a database must store for these policies."""
        ids = sorted(set(policy_ids))
        decisions = tuple(self.decisions[item] for item in ids if item in self.decisions)
        tombstones = tuple(self.tombstones[item] for item in ids if item in self.tombstones and item not in self.decisions)
        return decisions, tombstones


def _put(kept: dict[str, T], key: str, value: T | None) -> None:
    if value is None:
        kept.pop(key, None)
    else:
        kept[key] = value
