"""An API server for NetworkPolicies: server-side apply with field managers and conflicts, labels, lists and watches.

It keeps what Kubernetes documents of them: a field belongs to whoever applied it last; applying another value to somebody
else's field is a conflict unless forced; every write has a new resource version and an event.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

PREFIX = "/apis/networking.k8s.io/v1"


class ApiServer:
    """Policies by (namespace, name); ``owners`` says who owns the spec and the annotations of each."""

    def __init__(self) -> None:
        self.policies: dict[tuple[str, str], dict[str, Any]] = {}
        self.owners: dict[tuple[str, str], dict[str, str]] = {}
        self.refuse_after: int | None = None
        self.version = 0
        self._watchers: list[asyncio.Queue[str]] = []
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.is_watched = asyncio.Event()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get(f"{PREFIX}/networkpolicies", self._list_all)
        app.router.add_get(f"{PREFIX}/namespaces/{{namespace}}/networkpolicies", self._list)
        app.router.add_patch(f"{PREFIX}/namespaces/{{namespace}}/networkpolicies/{{name}}", self._apply)
        app.router.add_delete(f"{PREFIX}/namespaces/{{namespace}}/networkpolicies/{{name}}", self._delete)
        self._runner = web.AppRunner(app, shutdown_timeout=5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        assert self._runner is not None
        for queue in self._watchers:
            queue.put_nowait("")
        await self._runner.cleanup()

    async def __aenter__(self) -> ApiServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def edit(self, namespace: str, name: str, spec: dict[str, Any], by: str = "kubectl-edit") -> None:
        """Write a policy's spec as somebody else does."""
        key = (namespace, name)
        known = self.policies.get(key, {"metadata": {"name": name, "namespace": namespace}})
        self._store(key, {**known, "spec": spec}, "MODIFIED" if key in self.policies else "ADDED")
        self.owners.setdefault(key, {})["spec"] = by

    def remove(self, namespace: str, name: str) -> None:
        gone = self.policies.pop((namespace, name))
        self.version += 1
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._announce("DELETED", gone)
        self.owners.pop((namespace, name), None)

    def _store(self, key: tuple[str, str], policy: dict[str, Any], event: str) -> dict[str, Any]:
        self.version += 1
        stored = json.loads(json.dumps(policy))
        stored["metadata"]["resourceVersion"] = str(self.version)
        self.policies[key] = stored
        self._announce(event, stored)
        return stored

    def _announce(self, event: str, policy: dict[str, Any]) -> None:
        for queue in self._watchers:
            queue.put_nowait(json.dumps({"type": event, "object": {"kind": "NetworkPolicy", **policy}}))

    def _selected(self, request: web.Request) -> list[dict[str, Any]]:
        label, _, value = request.query.get("labelSelector", "").partition("=")
        namespace = request.match_info.get("namespace")
        return [
            policy
            for (where, _), policy in sorted(self.policies.items())
            if namespace in (None, where) and (not label or policy["metadata"].get("labels", {}).get(label) == value)
        ]

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "NetworkPolicyList", "metadata": {}, "items": self._selected(request)})

    async def _list_all(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") not in ("true", "True"):
            return await self._list(request)
        response = web.StreamResponse()
        response.content_type = "application/json"
        queue: asyncio.Queue[str] = asyncio.Queue()
        for policy in self._selected(request):
            queue.put_nowait(json.dumps({"type": "ADDED", "object": policy}))
        self._watchers.append(queue)
        await response.prepare(request)
        self.is_watched.set()
        try:
            while line := await queue.get():
                await response.write(line.encode() + b"\n")
        finally:
            self._watchers.remove(queue)
        return response

    async def _apply(self, request: web.Request) -> web.Response:
        if request.content_type != "application/apply-patch+yaml" or "fieldManager" not in request.query:
            return _status(415, "only server-side apply is here")
        if self.refuse_after is not None:
            self.refuse_after -= 1
            if self.refuse_after < 0:
                return _status(500, "etcd is away")
        body = json.loads(await request.text())
        key = (request.match_info["namespace"], request.match_info["name"])
        known, owners = self.policies.get(key), self.owners.setdefault(key, {})
        manager = request.query["fieldManager"]
        force = request.query.get("force") in ("true", "True")
        for part, value in (("spec", body["spec"]), ("annotations", body["metadata"].get("annotations"))):
            held = None if known is None else known["spec"] if part == "spec" else known["metadata"].get("annotations")
            if not force and known is not None and owners.get(part, manager) != manager and held != value:
                return _status(409, f'Apply failed with 1 conflict: conflict with "{owners[part]}": .{part}')
            owners[part] = manager
        stored = self._store(key, body, "MODIFIED" if known else "ADDED")
        return web.json_response(stored)

    async def _delete(self, request: web.Request) -> web.Response:
        key = (request.match_info["namespace"], request.match_info["name"])
        if key not in self.policies:
            return _status(404, "not found")
        self.remove(*key)
        return web.json_response({"kind": "Status", "status": "Success"})


def _status(code: int, reason: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": reason, "code": code}, status=code)
