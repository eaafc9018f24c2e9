"""Kills an agent at every step of its work and starts it again, in one process that forks: run on a host's namespace.

For each step a child handles one batch (a new ban, a longer one, a revoked one) and is killed there; a second child opens the
same database, gets the batch again, as a bus delivers what was not acknowledged, and tells what the kernel holds and what was
answered. Published acks are lines of a file: what is in it has left the host.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cybermesh.enforce.acks import Place
from cybermesh.enforce.backends import Audit, Backend
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.enforcer import Enforcer, Ports
from cybermesh.enforce.guard import Protected
from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Element, Match
from cybermesh.enforce.state import FILE_NAME, Changes, State
from cybermesh.messages import Ack, PolicyUpdate
from cybermesh.roles.firewall import open_backend
from cybermesh.wire import codec
from tests.enforce.agent_process import event, now_ms, prove, seal

STEPS = (
    "proof",
    "before apply",
    "after apply",
    "after read back",
    "seal",
    "before commit",
    "inside commit",
    "after commit",
    "before publish",
    "after publish",
    "after mark",
)


class Fate:
    """Where to die; armed only for the batch under test."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.armed = False

    def at(self, step: str) -> None:
        if self.armed and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """A backend that dies where its fate is."""

    def __init__(self, inner: Backend, fate: Fate) -> None:
        self._inner, self._fate = inner, fate
        self.name = inner.name
        self.audit: Callable[[int], Any] = inner.audit
        self.glance: Callable[[int], Any] = inner.glance
        self.wait_changed, self.close, self.remove_all = inner.wait_changed, inner.close, inner.remove_all

    async def apply(self, plan: Plan, at_ms: int) -> None:
        self._fate.at("before apply")
        await self._inner.apply(plan, at_ms)
        self._fate.at("after apply")

    async def rebuild(self, elements: Collection[Element], at_ms: int) -> None:
        await self._inner.rebuild(elements, at_ms)

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        found = await self._inner.read_back(matches)
        self._fate.at("after read back")
        return found


class MortalState(State):
    """A database whose process dies before, inside or after a commit."""

    fate: Fate

    def commit(self, changes: Changes) -> None:
        self.fate.at("before commit")
        super().commit(changes)
        self.fate.at("after commit")

    def _set(self, key: str, value: str) -> None:
        super()._set(key, value)
        self.fate.at("inside commit")


def batch() -> list[PolicyUpdate]:
    return [
        event("new", 3, {"ips": ["203.0.113.3"]}, 600),
        event("longer", 4, {"ips": ["203.0.113.1"]}, 900, action="update"),
        event("revoked", 5, {"ips": ["203.0.113.2"]}, 600, action="remove"),
    ]


async def publish(enforcer: Enforcer, file: Path, fate: Fate) -> None:
    while pending := await enforcer.pending_acks():
        fate.at("before publish")
        with file.open("ab") as out:
            out.writelines(base64.b64encode(item.body) + b"\n" for item in pending)
        fate.at("after publish")
        await enforcer.acks_published(item.id for item in pending)
        fate.at("after mark")


def open_enforcer(folder: Path, kind: str, fate: Fate) -> tuple[Enforcer, Backend]:
    def proving(update: PolicyUpdate) -> Any:
        fate.at("proof")
        return prove(update)

    def sealing(ack: Ack) -> bytes:
        fate.at("seal")
        return seal(ack)

    backend = Mortal(open_backend(kind), fate)
    MortalState.fate = fate
    state = MortalState(folder / FILE_NAME, Mode.ENFORCE)
    return Enforcer(state, backend, Ports(proving, sealing, Protected, now_ms), Place("edge", "agent")), backend


async def work(folder: Path, kind: str, fate: Fate, events: list[PolicyUpdate]) -> None:
    enforcer, _ = open_enforcer(folder, kind, fate)
    await enforcer.open()
    first = [event("longer", 1, {"ips": ["203.0.113.1"]}, 600), event("revoked", 2, {"ips": ["203.0.113.2"]}, 600)]
    await enforcer.handle(first)
    await publish(enforcer, folder / "acks", fate)
    fate.armed = True
    await enforcer.handle(events)
    await publish(enforcer, folder / "acks", fate)


async def recover(folder: Path, kind: str, events: list[PolicyUpdate]) -> None:
    enforcer, backend = open_enforcer(folder, kind, Fate(""))
    await enforcer.open()
    await enforcer.handle(events)
    await publish(enforcer, folder / "acks", Fate(""))
    audit: Audit = await backend.audit(now_ms())
    acks = [codec.ACK.layout.to_value(codec.ACK.layout.parse(base64.b64decode(line))) for line in (folder / "acks").open()]
    told = {
        "kernel": {str(match): round((e.expires_at_ms - now_ms()) / 1_000) for match, e in audit.elements.items()},
        "damage": audit.damage,
        "acks": sorted({f"{ack.policy_id} {ack.decision_seq} {ack.result}" for ack in acks}),
        "drift": (await enforcer.reconcile()).drift,
    }
    await backend.remove_all()
    (folder / "told").write_text(json.dumps(told))


def fork(task: Callable[[], Any]) -> int:
    """Run ``task`` in a child; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        asyncio.run(task())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, kind: str) -> None:
    for step in STEPS:
        place = folder / step.replace(" ", "-")
        place.mkdir()
        events = batch()
        died = fork(lambda: work(place, kind, Fate(step), events))  # noqa: B023
        ended = fork(lambda: recover(place, kind, events))  # noqa: B023
        told = json.loads((place / "told").read_text()) if ended == 0 else {}
        print(json.dumps({"step": step, "died": died, "ended": ended, **told}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
