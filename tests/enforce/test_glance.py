"""A look at the whole firewall keeps no decision waiting, and what is decided during it is neither drift nor hides any."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from cybermesh.enforce.backends import Audit
from cybermesh.enforce.decisions import Mode
from cybermesh.enforce.state import State
from tests.enforce.test_enforcer import Clumsy, Host, event


class Listed(Clumsy):
    """A firewall whose listing is taken at once and arrives when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.looking, self.told = asyncio.Event(), asyncio.Event()
        self.audits = 0

    async def glance(self, now_ms: int) -> Audit | None:
        listed = dict(self._mirror.view())
        self.looking.set()
        await self.told.wait()
        return Audit(listed)

    async def audit(self, now_ms: int) -> Audit:
        self.audits += 1
        return await super().audit(now_ms)

    def lose(self, address: str) -> None:
        """Let somebody else remove an element."""
        for match in [match for match in self._mirror.points if str(match.network.network_address) == address]:
            del self._mirror.points[match]


async def _opened(folder: Path) -> tuple[Host, Listed]:
    host = Host(folder)
    backend = Listed()
    host.backend = backend
    host.state.order_mode(Mode.ENFORCE)
    host.enforcer = host.make()
    await host.enforcer.open()
    await host.enforcer.handle([event("p1", 1, target={"ips": ["203.0.113.1"]})])
    return host, backend


async def test_decisions_go_on_while_the_firewall_is_listed(tmp_path: Path) -> None:
    host, backend = await _opened(tmp_path)
    before = backend.audits
    async with asyncio.TaskGroup() as group:
        look = group.create_task(host.enforcer.reconcile(), name="look")
        await backend.looking.wait()
        await host.enforcer.handle([event("p2", 2, target={"ips": ["203.0.113.2"]})])
        await host.enforcer.handle([event("p1", 3, "remove", target={"ips": ["203.0.113.1"]})])
        await host.enforcer.handle([event("p4", 4, target={"cidrs": ["198.51.100.0/28"]})])
        assert not look.done()
        backend.told.set()
    assert (look.result().drift, backend.audits) == (0, before)
    assert list(host.installed()) == ["drop from 198.51.100.0/28", "drop from 203.0.113.2"]


async def test_drift_is_found_and_repaired_beside_what_is_decided_meanwhile(tmp_path: Path) -> None:
    host, backend = await _opened(tmp_path)
    backend.lose("203.0.113.1")
    async with asyncio.TaskGroup() as group:
        look = group.create_task(host.enforcer.reconcile(), name="look")
        await backend.looking.wait()
        await host.enforcer.handle([event("p2", 2, target={"ips": ["203.0.113.2"]})])
        backend.told.set()
    assert look.result().drift == 1
    assert list(host.installed()) == ["drop from 203.0.113.1", "drop from 203.0.113.2"]


async def test_leaving_enforcement_while_the_firewall_is_listed_brings_nothing_back(tmp_path: Path) -> None:
    host, backend = await _opened(tmp_path)
    async with asyncio.TaskGroup() as group:
        look = group.create_task(host.enforcer.reconcile(), name="look")
        await backend.looking.wait()
        with contextlib.closing(State(tmp_path / "agent.sqlite")) as desk:
            desk.order_mode(Mode.OFF)
        await host.enforcer.tick()
        backend.told.set()
    assert look.result().problem == ""
    assert host.installed() == {}
