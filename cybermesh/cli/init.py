"""``cybermesh init``: a new deployment in a directory, ready to be spread over hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.roles.deployment import Deployment

_HTTP_PORT_FIRST = 8440


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
    """Make genesis.json, peers.toml, a private key for everybody (mode 0600) and a settings file for every role.

    Everything is set up for one host, on a bus in a file. On several hosts the bus is Kafka ([bus] and [kafka] of every
    settings file), and peers.toml says where each validator listens.

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
    output.note(f"on this host: one `cybermesh run --role ROLE -c {directory}/NAME.toml` for each settings file")
    output.note(
        "on several: give every host genesis.json, peers.toml, its own settings file, its own key with what lies beside it, "
        "and no other key"
    )


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
    from cybermesh.roles.peers import encode_peers
    from cybermesh.roles.validator import create_safety_file, safety_file_of

    genesis = deployment.genesis
    (directory / "keys").mkdir(parents=True, mode=0o700)
    (directory / "genesis.json").write_bytes(genesis.encode() + b"\n")
    (directory / "peers.toml").write_text(encode_peers(member.name for member in genesis.validators), encoding="utf-8")
    http_port = _HTTP_PORT_FIRST
    for name, key in deployment.keys.items():
        key_file = directory / "keys" / f"{name}.key"
        save_key(key_file, key)
        role, number = name.rsplit("-", 1)
        if role == "validator":
            create_safety_file(safety_file_of(key_file), genesis, key)
        if role != "operator":
            _write_settings(directory, _Node(name, {role: name}, int(number), "local", http_port))
            http_port += 1
    if len(genesis.validators) == 1:
        everything = {role: f"{role}-1" for role in ("ai", "validator", "agent") if f"{role}-1" in deployment.keys}
        _write_settings(directory, _Node("all", everything, 1, "memory", _HTTP_PORT_FIRST))


@dataclass(frozen=True, slots=True)
class _Node:
    """One settings file; ``roles`` maps each role of the process to the name of its key."""

    name: str
    roles: Mapping[str, str]
    number: int
    bus: str
    http_port: int


def _write_settings(directory: Path, node: _Node) -> None:
    (directory / f"{node.name}.toml").write_text(_settings(directory.resolve(), node), encoding="utf-8")


def _settings(directory: Path, node: _Node) -> str:
    keys = "".join(f'{role} = "{directory / "keys" / key}.key"\n' for role, key in node.roles.items())
    return (
        f"# Settings of {node.name}; `cybermesh config show -c FILE` prints every key with its default.\n"
        "[node]\n"
        f"id = {node.number}\n"
        f'genesis = "{directory / "genesis.json"}"\n'
        f'state_dir = "{directory / "state" / node.name}"\n'
        f"\n[keys]\n{keys}"
        f'\n[bus]\nkind = "{node.bus}"\npath = "{directory / "state" / "bus.db"}"\n'
        f"\n[http]\nport = {node.http_port}\n"
    ) + (f'\n[consensus]\npeers = "{directory / "peers.toml"}"\n' if "validator" in node.roles else "")
