"""Kubernetes as a backend: one NetworkPolicy for each direction in each of the configured namespaces, by server-side apply.

- Field manager and label are ours; nothing else in a namespace is touched, and policies without the label are never changed.
- Where others isolate pods in a direction, our policy would allow what theirs does not: there a block is refused (CONFLICT),
  because a block must never turn into an allow.
- An edit that finds somebody else's hand in our policy is refused; the rebuild that follows takes the fields back.
- All namespaces hold the same. A call that fails after some of them writes those back.
- NetworkPolicies do not end by themselves. ``expire`` ends what has ended: with every audit of an agent, and from a janitor
  (``cybermesh enforce janitor``, ``config/kubernetes/janitor.yaml``) where no agent is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from kubernetes_asyncio import config, watch
from kubernetes_asyncio.client import ApiClient, NetworkingV1Api
from kubernetes_asyncio.client.exceptions import OpenApiException

from cybermesh.enforce.backends import Audit, BackendError
from cybermesh.enforce.backends.k8s_policy import (
    ELEMENTS,
    LABEL,
    MANAGER,
    InexpressibleError,
    policy_name,
    read_elements,
    render,
)
from cybermesh.enforce.packed import PackedError
from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Element, Match
from cybermesh.policy import Direction

_APPLY: Final = "application/apply-patch+yaml"
_OURS: Final = f"{LABEL}={MANAGER}"
_CONFLICT: Final = 409
_GONE: Final = 404
_FORBIDDEN: Final = (401, 403)
_TIMEOUT_S: Final = 10
_WRITTEN_MAX: Final = 256
_VERSION: Final = "networking.k8s.io/v1"

Connect = Callable[[], Awaitable[Any]]
Place = tuple[str, Direction]


async def connect() -> Any:
    """Return an API client as a pod has it, or as kubectl has it.

    Raises:
        BackendError: There is neither.
    """
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config()
        except (config.ConfigException, OSError) as fault:
            raise BackendError("NO_FIREWALL", f"neither in a pod nor with a kubeconfig: {fault}") from fault
    return ApiClient()


class KubernetesBackend:
    """The NetworkPolicies of some namespaces; connections are opened for each call."""

    name = "kubernetes"

    def __init__(self, namespaces: Sequence[str], open_client: Connect = connect) -> None:
        assert namespaces
        self._namespaces = tuple(namespaces)
        self._open_client = open_client
        self._written: deque[str] = deque(maxlen=_WRITTEN_MAX)

    async def apply(self, plan: Plan, now_ms: int) -> None:
        """Write the policies that change; refused when somebody else has changed them."""
        if not plan.drift:
            return
        async with self._session() as api:
            found = await self._read(api)
            elements = dict(self._agreed(found))
            for element in plan.removes:
                elements.pop(element.match, None)
            elements.update((element.match, element) for element in plan.wanted())
            await self._write(api, found, elements, now_ms, force=False)

    async def rebuild(self, elements: Collection[Element], now_ms: int) -> None:
        """Write all policies, whoever has changed them."""
        async with self._session() as api:
            found = await self._read(api)
            await self._write(api, found, {element.match: element for element in elements}, now_ms, force=True)

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        """Return what every namespace blocks."""
        async with self._session() as api:
            return frozenset(set(matches) & self._agreed(await self._read(api)).keys())

    async def audit(self, now_ms: int) -> Audit:
        """Read our policies and compare each with what its own annotation asks for; end first what has ended."""
        await self.expire(now_ms)
        async with self._session() as api:
            found = await self._read(api)
        damage = [
            f"{namespace}: {policy_name(direction)} is not as we wrote it"
            for (namespace, direction), policy in found.ours.items()
            if not _is_as_written(policy, namespace, direction)
        ]
        if len({frozenset(found.elements(namespace)) for namespace in self._namespaces}) > 1:
            damage.append("the namespaces do not hold the same")
        live = {match: element for match, element in self._agreed(found).items() if element.expires_at_ms > now_ms}
        return Audit(live, tuple(damage))

    async def expire(self, now_ms: int) -> int:
        """Write the policies without what has ended; return how many elements that were."""
        async with self._session() as api:
            found = await self._read(api)
            elements = self._agreed(found)
            live = {match: element for match, element in elements.items() if element.expires_at_ms > now_ms}
            if len(live) < len(elements):
                await self._write(api, found, live, now_ms, force=True)
            return len(elements) - len(live)

    async def glance(self, now_ms: int) -> Audit | None:
        """Return None: several questions make up the answer, and a change between them would look like drift."""
        return None

    async def wait_changed(self) -> None:
        """Return when one of our policies has been changed or deleted by somebody else."""
        async with self._session() as api:
            hearing = watch.Watch()
            listing = api.list_network_policy_for_all_namespaces
            async with hearing.stream(listing, label_selector=_OURS, _request_timeout=3_600) as events:
                async for event in events:
                    metadata = event["raw_object"]["metadata"]
                    if event["type"] != "ADDED" and metadata["resourceVersion"] not in self._written:
                        return

    async def remove_all(self) -> None:
        """Delete our policies, in whatever namespace they are."""
        async with self._session() as api:
            found = await api.list_network_policy_for_all_namespaces(label_selector=_OURS, _request_timeout=_TIMEOUT_S)
            for policy in found.items:
                await self._delete(api, policy.metadata.namespace, policy.metadata.name)

    def close(self) -> None:
        """Nothing is kept open."""

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Any]:
        opened = await self._open_client()
        try:
            async with opened:
                yield NetworkingV1Api(opened)
        except OpenApiException as fault:
            raise _translated(getattr(fault, "status", None), getattr(fault, "reason", None) or fault) from fault
        except (aiohttp.ClientError, TimeoutError) as fault:
            raise BackendError("NO_FIREWALL", f"the API server: {type(fault).__name__} {fault}") from fault

    async def _read(self, api: Any) -> _Found:
        found = _Found()
        for namespace in self._namespaces:
            listed = await api.list_namespaced_network_policy(namespace, _request_timeout=_TIMEOUT_S)
            for policy in api.api_client.sanitize_for_serialization(listed).get("items") or ():
                metadata, spec = policy["metadata"], policy.get("spec") or {}
                ours = {policy_name(direction): direction for direction in Direction}
                if metadata["name"] in ours and (metadata.get("labels") or {}).get(LABEL) == MANAGER:
                    found.ours[namespace, ours[metadata["name"]]] = policy
                else:
                    found.isolated.update((namespace, direction) for direction in _isolates(spec))
        return found

    def _agreed(self, found: _Found) -> dict[Match, Element]:
        """Return what all namespaces hold."""
        first, *others = [found.elements(namespace) for namespace in self._namespaces]
        return {match: element for match, element in first.items() if all(match in other for other in others)}

    async def _write(self, api: Any, found: _Found, elements: Mapping[Match, Element], now_ms: int, *, force: bool) -> None:
        """Write what differs, place by place; when one fails, write back those before it."""
        done: list[Place] = []
        try:
            for place, wanted in self._wanted(elements, now_ms):
                before = found.ours.get(place)
                if wanted is None and before is None:
                    continue
                if wanted is not None and place in found.isolated:
                    namespace, direction = place
                    detail = f"{namespace}: others isolate pods for {direction}, and a block would let in what they keep out"
                    raise BackendError("CONFLICT", detail)
                if wanted is not None and before is not None and is_written(before, wanted):
                    continue
                done.append(place)
                await self._put(api, place, wanted, force=force)
        except (BackendError, OpenApiException, aiohttp.ClientError, TimeoutError, asyncio.CancelledError):
            for place in done:
                await asyncio.shield(self._put_back(api, place, found.ours.get(place)))
            raise

    def _wanted(self, elements: Mapping[Match, Element], now_ms: int) -> list[tuple[Place, dict[str, Any] | None]]:
        wanted: list[tuple[Place, dict[str, Any] | None]] = []
        for namespace in self._namespaces:
            for direction in Direction:
                live = [e for e in elements.values() if e.match.direction is direction and e.expires_at_ms > now_ms]
                try:
                    wanted.append(((namespace, direction), render(live, direction, namespace) if live else None))
                except InexpressibleError as fault:
                    raise BackendError("NOT_EXPRESSIBLE", str(fault)) from fault
        return wanted

    async def _put(self, api: Any, place: Place, body: dict[str, Any] | None, *, force: bool) -> None:
        namespace, direction = place
        if body is None:
            await self._delete(api, namespace, policy_name(direction))
            return
        written = await api.patch_namespaced_network_policy(
            policy_name(direction),
            namespace,
            body,
            field_manager=MANAGER,
            force=force,
            _content_type=_APPLY,
            _request_timeout=_TIMEOUT_S,
        )
        self._written.append(written.metadata.resource_version)

    async def _put_back(self, api: Any, place: Place, before: dict[str, Any] | None) -> None:
        kept = None
        if before is not None:
            metadata = {name: before["metadata"][name] for name in ("name", "namespace", "labels", "annotations")}
            kept = {"apiVersion": _VERSION, "kind": "NetworkPolicy", "metadata": metadata, "spec": before["spec"]}
        # What fails here as well is found by the next audit.
        with contextlib.suppress(OpenApiException, aiohttp.ClientError, TimeoutError):
            await self._put(api, place, kept, force=True)

    async def _delete(self, api: Any, namespace: str, name: str) -> None:
        try:
            await api.delete_namespaced_network_policy(name, namespace, _request_timeout=_TIMEOUT_S)
        except OpenApiException as fault:
            if getattr(fault, "status", None) != _GONE:
                raise


@dataclass(slots=True)
class _Found:
    """Our policies by place, as the API tells them, and the places where others isolate pods."""

    ours: dict[Place, dict[str, Any]] = field(default_factory=dict)
    isolated: set[Place] = field(default_factory=set)

    def elements(self, namespace: str) -> dict[Match, Element]:
        """Return what a namespace's policies say they hold; what somebody else has written says nothing."""
        held: dict[Match, Element] = {}
        for direction in Direction:
            policy = self.ours.get((namespace, direction))
            if policy is not None and _is_as_written(policy, namespace, direction):
                held.update(_annotated(policy))
        return held


def _annotated(policy: Mapping[str, Any]) -> dict[Match, Element]:
    return read_elements((policy["metadata"].get("annotations") or {}).get(ELEMENTS, ""))


def _is_as_written(policy: Mapping[str, Any], namespace: str, direction: Direction) -> bool:
    """Say whether a policy does what its annotation says."""
    try:
        elements = _annotated(policy)
        return is_written(policy, render(list(elements.values()), direction, namespace))
    except (PackedError, InexpressibleError):
        return False


def is_written(policy: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Say whether the API holds what we want; it leaves out what is empty and adds nothing that matters."""
    held = policy["metadata"].get("annotations") or {}
    asked = wanted["metadata"]["annotations"]
    same_spec: bool = _without_empty(policy.get("spec")) == _without_empty(wanted["spec"])
    return same_spec and held.get(ELEMENTS) == asked[ELEMENTS]


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: kept for key, item in value.items() if (kept := _without_empty(item)) not in (None, {}, [])}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _isolates(spec: Mapping[str, Any]) -> Iterator[Direction]:
    kinds = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    for kind, direction in (("Ingress", Direction.INGRESS), ("Egress", Direction.EGRESS)):
        if kind in kinds:
            yield direction


def _translated(status: int | None, reason: object) -> BackendError:
    if status == _CONFLICT:
        return BackendError("APPLY_FAILED", f"somebody else has changed our NetworkPolicy: {reason}")
    if status in _FORBIDDEN:
        return BackendError("NO_RIGHTS", f"the API server: {reason}; see config/kubernetes/agent.yaml")
    return BackendError("APPLY_FAILED", f"the API server: {status} {reason}")
