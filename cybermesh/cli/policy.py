"""``cybermesh policy …``: decisions in a validator's store, their proofs, and what operators order about them.

``approve``, ``reject`` and ``revoke`` are those of ``cybermesh operator``, where people look for them first.
"""

from __future__ import annotations

import asyncio
import datetime
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import orjson
import typer

from cybermesh.cli import operator, output

if TYPE_CHECKING:
    from cybermesh.store.records import StoredDecision
    from cybermesh.store.store import Store

T = TypeVar("T")

policy = typer.Typer(no_args_is_help=True, help="List, prove, approve, reject and revoke decisions.")
for _order in (operator.approve, operator.reject, operator.revoke):
    policy.command()(_order)
FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file of the validator.")]
PolicyId = Annotated[str, typer.Argument(metavar="ID", help="Policy id, or enough of its beginning.")]
ListLimit = Annotated[int, typer.Option(min=1, max=100_000, help="How many, newest first.")]
ActiveOnly = Annotated[bool, typer.Option("--active", help="Only those in force.")]


@policy.command("list")
def list_(
    config: FileOption = None,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
    limit: ListLimit = 100,
    active: ActiveOnly = False,
) -> None:
    """List decisions, newest first."""
    rows = _with_store(config, lambda store: store.chain.decisions(limit, active_only=active))
    if json or form is not output.Format.HUMAN:
        output.emit((_as_object(row) for row in rows), output.Format.JSON if json else form)
        return
    for row in rows:
        until = _iso(row.expires_at_ms)
        targets = ", ".join(_targets(row)) or "-"
        sys.stdout.write(f"{row.decision_seq:>6}  {row.policy_id}  {row.change:<8} {row.action:<10} {targets}  until {until}\n")


@policy.command()
def show(identifier: PolicyId, config: FileOption = None) -> None:
    """Show everything that was decided about one policy, oldest first."""
    output.emit((_as_object(row) for row in _history(config, identifier)), output.Format.JSON)


@policy.command()
def prove(identifier: PolicyId, config: FileOption = None) -> None:
    """Print the proof of a policy's newest decision; `cybermesh verify` checks it anywhere.

    Example: cybermesh policy prove 1f2e3d > proof.json && cybermesh verify proof.json --genesis genesis.json
    """
    newest = _history(config, identifier)[-1]
    raw = _with_store(config, lambda store: store.outbox.event("decision", newest.decision_seq))
    if raw is None:
        raise output.CommandError(f"decision {newest.decision_seq}: no longer in this store; ask another validator")
    from cybermesh.wire import codec

    sys.stdout.write(codec.POLICY_UPDATE.decode(raw).proof.decode())


def _history(config: Path | None, identifier: str) -> list[StoredDecision]:
    async def find(store: Store) -> list[StoredDecision]:
        exact = list(await store.chain.policy_history(identifier))
        if exact:
            return exact
        candidates = {row.policy_id for row in await store.chain.decisions(100_000) if row.policy_id.startswith(identifier)}
        if len(candidates) > 1:
            raise output.CommandError(f"{identifier}: {len(candidates)} policies begin so; give more of the id")
        return list(await store.chain.policy_history(candidates.pop())) if candidates else []

    found = _with_store(config, find)
    if not found:
        raise output.CommandError(f"{identifier}: no such policy in this store; `cybermesh policy list` shows those there are")
    return found


def _with_store(config: Path | None, work: Callable[[Store], Awaitable[T]]) -> T:
    """Open the validator's store as its settings name it, and read from it; safe while the validator runs."""
    from cybermesh.config import load
    from cybermesh.roles.process import store_location
    from cybermesh.store.store import open_store

    where = store_location(load(config).settings)
    if isinstance(where, Path) and not where.exists():
        raise output.CommandError(f"{where}: no store here; name the validator's settings with -c", 2)

    async def run() -> T:
        async with open_store(where) as store:
            return await work(store)

    return asyncio.run(run())


def _as_object(row: StoredDecision) -> dict[str, object]:
    return {
        "decision_seq": row.decision_seq,
        "policy_id": row.policy_id,
        "change": row.change,
        "action": row.action,
        "targets": _targets(row),
        "height": row.height,
        "opened": _iso(row.opened_at_ms),
        "expires": _iso(row.expires_at_ms),
        "why": row.why,
        "ending": row.ending,
        "reporters": list(row.reporters),
        "approvers": list(row.approvers),
        "active": row.is_active,
    }


def _targets(row: StoredDecision) -> list[str]:
    target = orjson.loads(row.rule_data).get("target", {}) if row.rule_data else {}
    return [*target.get("ips", []), *target.get("cidrs", [])]


def _iso(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, tz=datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
