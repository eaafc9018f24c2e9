"""``cybermesh init``: a new deployment in a directory, ready to be spread over hosts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.roles.deployment import Deployment


def init(
    directory: Annotated[Path, typer.Argument(help="New or empty directory.")],
    validators: Annotated[int, typer.Option(min=1, max=64, help="Validators; n of them survive (n-1)//3 faulty ones.")] = 4,
    ai: Annotated[int, typer.Option(min=1, max=1000, help="Detectors, each a site of its own.")] = 1,
    agents: Annotated[int, typer.Option(min=0, max=10_000, help="Enforcement points.")] = 1,
    operators: Annotated[int, typer.Option(min=0, max=64, help="Operator keys.")] = 1,
    chain: Annotated[str, typer.Option(help="Name of the chain.")] = "cybermesh",
    budget: Annotated[
        bool | None,
        typer.Option("--budget/--no-budget", help="Let a detector block single hosts for 15 minutes without a second site."),
    ] = None,
) -> None:
    """Make genesis.json, a private key for everybody (mode 0600) and a settings file for every role.

    With one detector nobody can corroborate what it sees, so somebody must decide: grant it a small budget (a hacked
    detector can then block up to 20 single hosts for 15 minutes each), or have an operator approve every policy.

    Example: cybermesh init mesh --validators 4 --ai 1 --agents 1 --no-budget
    """
    from cybermesh.genesis import Budget
    from cybermesh.roles.deployment import Roster, create

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise output.CommandError(f"{directory}: exists and is not an empty directory; name a new one", 2)
    granted = _decide_budget(budget, detectors=ai)
    deployment = create(Roster(chain, validators, ai, agents, operators, Budget() if granted else None))
    _write(directory, deployment)
    output.note(
        f"{directory}: chain {deployment.genesis.chain_id.hex()[:16]}, {validators} validators, {ai} ai, {agents} agents"
    )
    output.note("give every host genesis.json, its own settings file, its own key with what lies beside it, and no other key")


def _decide_budget(choice: bool | None, *, detectors: int) -> bool:
    """Return whether detectors get a budget; with a single one this must be said, for both answers have a price."""
    if choice is not None:
        return choice
    if detectors > 1:
        return False
    import sys

    if not sys.stdin.isatty():
        raise output.CommandError("one detector and no terminal to ask on: say --budget or --no-budget (see --help)", 2)
    return typer.confirm("Only one detector: may it block single hosts for 15 minutes on its own (20 at most)?", default=False)


def _write(directory: Path, deployment: Deployment) -> None:
    from cybermesh.keystore import save_key
    from cybermesh.roles.validator import create_safety_file, safety_file_of

    genesis = deployment.genesis
    (directory / "keys").mkdir(parents=True, mode=0o700)
    (directory / "genesis.json").write_bytes(genesis.encode() + b"\n")
    for name, key in deployment.keys.items():
        key_file = directory / "keys" / f"{name}.key"
        save_key(key_file, key)
        role, number = name.rsplit("-", 1)
        if role == "validator":
            create_safety_file(safety_file_of(key_file), genesis, key)
        if role != "operator":
            _write_settings(directory, name, {role: name}, int(number))
    if len(genesis.validators) == 1:
        everything = {role: f"{role}-1" for role in ("ai", "validator", "agent") if f"{role}-1" in deployment.keys}
        _write_settings(directory, "all", everything, 1)


def _write_settings(directory: Path, name: str, roles: dict[str, str], number: int) -> None:
    text = _settings(directory.resolve(), name, roles, number)
    (directory / f"{name}.toml").write_text(text, encoding="utf-8")


def _settings(directory: Path, name: str, roles: dict[str, str], number: int) -> str:
    """Return a settings file; ``roles`` maps each role of the process to the name of its key."""
    keys = "".join(f'{role} = "{directory / "keys" / key}.key"\n' for role, key in roles.items())
    return (
        f"# Settings of {name}; `cybermesh config show -c FILE` prints every key with its default.\n"
        "[node]\n"
        f"id = {number}\n"
        f'genesis = "{directory / "genesis.json"}"\n'
        f'state_dir = "{directory / "state" / name}"\n'
        f"\n[keys]\n{keys}"
    )
