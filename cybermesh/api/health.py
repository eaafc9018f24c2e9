"""Health, readiness and metrics of a process, for supervisors and Prometheus; loopback by default, nothing to configure.

``/api/v1/health`` says that the process answers, ``/api/v1/ready`` whether it does its work and if not why,
``/api/v1/metrics`` its figures. None of them tells addresses or secrets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from cybermesh import __version__
from cybermesh.metrics import Figures, render

BODY_MAX = 1024


@dataclass(frozen=True, slots=True)
class Probes:
    """What a process tells of itself: reasons why it is not ready (empty when it is), by role, and its figures."""

    problems: Callable[[], Mapping[str, str]]
    figures: Callable[[], Figures]


async def serve(host: str, port: int, probes: Probes) -> None:
    """Serve until cancelled; port 0 takes any.

    Raises:
        OSError: The address cannot be bound.
    """
    app = web.Application(client_max_size=BODY_MAX)
    app.add_routes(_routes(probes))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _routes(probes: Probes) -> list[web.RouteDef]:
    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "up", "version": __version__})

    async def ready(_request: web.Request) -> web.Response:
        problems = dict(probes.problems())
        return web.json_response({"ready": not problems, "problems": problems}, status=503 if problems else 200)

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=render(probes.figures()), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    handlers = {"health": health, "ready": ready, "metrics": metrics}
    return [web.get(f"/api/v1/{name}", handler) for name, handler in handlers.items()]
