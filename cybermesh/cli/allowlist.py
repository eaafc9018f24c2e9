"""``cybermesh allowlist add|remove``: ``cybermesh operator allow`` under the name by which people look for it."""

from __future__ import annotations

import typer

from cybermesh.cli import operator

allowlist = typer.Typer(no_args_is_help=True, help="Networks that no policy touches: add and remove, as an operator.")


@allowlist.command()
def add(
    networks: operator.Networks,
    key: operator.KeyFile,
    config: operator.FileOption = None,
    reason: operator.Reason = "",
    no_wait: operator.NoWait = False,
) -> None:
    """Put networks on the allow list, which ends the decisions that meet them.

    Example: cybermesh allowlist add 192.0.2.0/28 --key operator-1.key -c validator.toml
    """
    operator.allow(networks, key, config, False, reason, no_wait)


@allowlist.command()
def remove(
    networks: operator.Networks,
    key: operator.KeyFile,
    config: operator.FileOption = None,
    reason: operator.Reason = "",
    no_wait: operator.NoWait = False,
) -> None:
    """Take networks off the allow list."""
    operator.allow(networks, key, config, True, reason, no_wait)
