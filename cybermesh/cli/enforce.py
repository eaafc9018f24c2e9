"""``cybermesh enforce``: look at and steer this host's firewall rules, with the cluster up, down or gone.

Every command works on the agent's database and on the firewall directly. A running agent notices an order within a second;
where none runs, the command does the work itself. Nothing here signs anything: what is held is left to the agent.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.enforce.backends import Backend
    from cybermesh.enforce.enforcer import Enforcer
    from cybermesh.enforce.state import State

T = TypeVar("T")

enforce = typer.Typer(no_args_is_help=True, help="Look at and steer this host's firewall rules.")
ConfigOption = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file of the agent.")]
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DAY_S = 86_400
_SHOWN_MAX = 50


@dataclass(frozen=True, slots=True)
class _Desk:
    """What a command works with; an enforcer serves one look or one reconciliation."""

    state: State
    backend: Backend
    make_enforcer: Callable[[], Enforcer]


@contextmanager
def _desk(config: Path | None) -> Iterator[_Desk]:
    """Open the agent's database and firewall as the agent's settings name them."""
    from cybermesh.config import ConfigError, load
    from cybermesh.enforce.acks import Place
    from cybermesh.enforce.backends import BackendError
    from cybermesh.enforce.decisions import Mode, ProofError, Proven
    from cybermesh.enforce.enforcer import Enforcer, Ports
    from cybermesh.enforce.guard import Protected
    from cybermesh.enforce.state import FILE_NAME, State
    from cybermesh.enforce.surroundings import Places, look
    from cybermesh.messages import PolicyUpdate
    from cybermesh.roles import firewall

    settings = load(config).settings

    def surroundings() -> Protected:
        # Without its genesis this command knows less than the agent did, and says so; switching off must work all the same.
        try:
            genesis = firewall.read_genesis(settings.node.genesis)
        except ConfigError as fault:
            found = look(Places(), firewall.configured(settings))
            return Protected(found.networks, (*found.problems, str(fault)))
        return firewall.Shield(settings, genesis, _now_ms)()

    def prove(update: PolicyUpdate) -> Proven:
        raise ProofError("NO_PROOF", f"{update.policy_id}: the command line takes no decisions")

    try:
        backend = firewall.open_backend(settings.enforce.backend, settings.enforce.namespaces)
    except BackendError as fault:
        raise output.CommandError(str(fault)) from None
    state = State(settings.node.state_dir / FILE_NAME, Mode(settings.enforce.mode))
    try:
        ports = Ports(prove=prove, seal=None, look=surroundings, now_ms=_now_ms)
        yield _Desk(state, backend, lambda: Enforcer(state, backend, ports, Place("", "")))
    finally:
        state.close()
        backend.close()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _run(work: Callable[[], Awaitable[T]]) -> T:
    async def call() -> T:
        return await work()

    return asyncio.run(call())


def _seconds(text: str, option: str) -> int:
    found = re.fullmatch(r"([0-9]{1,6})([smhd]?)", text)
    seconds = int(found[1]) * _UNITS_S[found[2] or "s"] if found else 0
    if not 1 <= seconds <= _DAY_S:
        raise output.CommandError(f"{option} {text!r}: give a time from 1s to 24h, as 120s, 10m or 1h", 2)
    return seconds


@enforce.command()
def status(
    config: ConfigOption = None, form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False
) -> None:
    """Show the mode, what is installed, drift, and what waits.

    Example: cybermesh enforce status --json
    """
    with _desk(config) as desk:
        orders = desk.state.orders()
        enforcer = desk.make_enforcer()
        difference, audit = _run(enforcer.difference)
        report = desk.state.report()
        found: dict[str, object] = {
            **report,
            **{key: value for key, value in enforcer.status().items() if key not in ("drift", "drift_total", "damage")},
            "mode": orders.mode.value,
            "rules": len(audit.elements),
            "drift_now": difference.drift,
            "missing_now": "; ".join(audit.damage) if orders.mode == "enforce" else "",
            "counters": dict(audit.counters),
            "acks_waiting": desk.state.acks_waiting(),
            "exceptions": [str(exemption.address) for exemption in orders.exemptions],
        }
    if json or form is not output.Format.HUMAN:
        output.emit_one(found, output.Format.JSON if json else form)
        return
    width = max(map(len, found))
    for key in sorted(found):
        sys.stdout.write(f"{key:<{width}}  {found[key]}\n")


@enforce.command()
def diff(config: ConfigOption = None, form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False) -> None:
    """Show what a reconciliation would change in the firewall, and change nothing."""
    with _desk(config) as desk:
        difference, _ = _run(desk.make_enforcer().difference)
    lines = [
        *(("add", element) for element in difference.adds),
        *(("remove", element) for element in difference.removes),
        *(("renew", after) for _, after in difference.renewals),
    ]
    if json or form is not output.Format.HUMAN:
        rows = [{"change": sign, "rule": str(item.match), "expires_at_ms": item.expires_at_ms} for sign, item in lines]
        output.emit(rows, output.Format.JSON if json else form)
        return
    for sign, item in lines[:_SHOWN_MAX]:
        sys.stdout.write(f"{sign:<7} {item.match}\n")
    if len(lines) > _SHOWN_MAX:
        sys.stdout.write(f"… and {len(lines) - _SHOWN_MAX} more (--json shows all)\n")
    output.note(f"{difference.drift} differences")


@enforce.command()
def off(config: ConfigOption = None) -> None:
    """Remove every rule of ours and nothing else; stays off over restarts, until ``enforce on``."""
    from cybermesh.enforce.decisions import Mode

    with _desk(config) as desk:
        # The order first: an agent that is installing something at this moment must find it afterwards.
        desk.state.order_mode(Mode.OFF)
        _run(desk.backend.remove_all)
    output.note("enforcement is off; no rule of ours is left")


@enforce.command()
def on(
    config: ConfigOption = None,
    confirm_within: Annotated[
        str, typer.Option(help="Revert to observe unless 'enforce confirm' comes in time, as 120s; the kernel reverts too.")
    ] = "",
) -> None:
    """Enforce what is decided, now and after restarts.

    Example: cybermesh enforce on --confirm-within 120s
    """
    from cybermesh.enforce.decisions import Mode

    seconds = _seconds(confirm_within, "--confirm-within") if confirm_within else 0
    with _desk(config) as desk:
        desk.state.order_mode(Mode.ENFORCE, _now_ms() + 1_000 * seconds if seconds else 0)
        _reconcile(desk)
    if seconds:
        output.note(f"run 'cybermesh enforce confirm' within {seconds} s, or it goes back to observing")


@enforce.command()
def confirm(config: ConfigOption = None) -> None:
    """Make 'enforce on --confirm-within' permanent."""
    with _desk(config) as desk:
        orders = desk.state.orders()
        if not orders.confirm_by_ms:
            raise output.CommandError(f"nothing waits for confirmation; the mode is {orders.mode}")
        if orders.confirm_by_ms <= _now_ms():
            raise output.CommandError("too late: the time to confirm is over; run 'cybermesh enforce on' again")
        desk.state.confirm()
        _reconcile(desk)


@enforce.command()
def reconcile(config: ConfigOption = None) -> None:
    """Compare the firewall with what is decided, and repair it."""
    with _desk(config) as desk:
        _reconcile(desk)


@enforce.command("except")
def except_(
    address: Annotated[str, typer.Argument(help="Address whose bans are lifted on this host.")],
    duration: Annotated[str, typer.Option("--for", help="How long, as 30m or 1h; at most 24h.")],
    reason: Annotated[str, typer.Option(help="Why; kept and reported.")],
    config: ConfigOption = None,
) -> None:
    """Lift every ban of an address on this host for a while.

    Example: cybermesh enforce except 203.0.113.9 --for 1h --reason "customer called"
    """
    from cybermesh.addresses import AddressError, parse_address
    from cybermesh.enforce.state import Exemption

    seconds = _seconds(duration, "--for")
    try:
        lifted = parse_address(address)
    except AddressError as fault:
        raise output.CommandError(str(fault), 2) from None
    with _desk(config) as desk:
        now_ms = _now_ms()
        desk.state.exempt(Exemption(lifted, now_ms + 1_000 * seconds, reason, now_ms))
        _reconcile(desk)
    output.note(f"{lifted} is not blocked on this host for {seconds} s")


@enforce.command()
def janitor(config: ConfigOption = None) -> None:
    """End what has ended in Kubernetes' NetworkPolicies, which do not end by themselves; for a CronJob.

    Needs no database and no cluster of ours. See config/kubernetes/janitor.yaml.
    """
    from cybermesh.config import load
    from cybermesh.enforce.backends import BackendError
    from cybermesh.roles import firewall

    settings = load(config).settings.enforce
    try:
        backend = firewall.open_backend("kubernetes", settings.namespaces)
        ended = _run(lambda: firewall.expire(backend, _now_ms()))
    except BackendError as fault:
        raise output.CommandError(str(fault)) from None
    output.note(f"{ended} blocks had ended")


@enforce.command("kill-switch")
def kill_switch(state: Annotated[str, typer.Argument(help="on or off")], config: ConfigOption = None) -> None:
    """Stop new rules (on) or allow them again (off); what is installed ends on time in both."""
    if state not in ("on", "off"):
        raise output.CommandError(f"kill-switch {state!r}: say on or off", 2)
    with _desk(config) as desk:
        desk.state.order_kill_switch(state == "on")
    output.note("new rules are stopped on this host" if state == "on" else "new rules are allowed on this host")


def _reconcile(desk: _Desk) -> None:
    difference, _ = _run(desk.make_enforcer().difference)
    enforcer = desk.make_enforcer()
    found = _run(enforcer.open)
    if found.problem:
        raise output.CommandError(f"the firewall is not as it should be: {found.problem}")
    figures = enforcer.status()
    output.note(f"mode {figures['mode']}, {figures['rules']} rules, {difference.drift} changed")
