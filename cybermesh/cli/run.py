"""``cybermesh run``: one or more roles in this process, until SIGINT or SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import output

RoleOption = Annotated[list[str], typer.Option("--role", help="ai, validator or agent; repeat it for several in one process.")]
FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="TOML file; NAME.local.toml beside it goes over it.")]
NodeId = Annotated[int | None, typer.Option("--node-id", min=1, help="Number of this node; over node.id and NODE_ID.")]


def run(role: RoleOption, config: FileOption = None, node_id: NodeId = None) -> None:
    """Run one or more roles until Ctrl-C.

    Example: cybermesh run --role ai --role validator --role agent -c mesh/all.toml
    """
    import asyncio
    import os

    from cybermesh import log
    from cybermesh.config import ConfigError, load
    from cybermesh.roles.process import Role
    from cybermesh.roles.process import run as run_roles

    known = [entry.value for entry in Role]
    for name in role:
        if name not in known:
            raise ConfigError(f"--role: {name!r} is none of {', '.join(known)}")
    environ = dict(os.environ) | ({"NODE_ID": str(node_id)} if node_id is not None else {})
    settings = load(config, environ=environ).settings
    log.configure(level="debug" if output.is_debug() else settings.log.level, json=settings.log.json_lines)
    asyncio.run(run_roles(settings, [Role(name) for name in role]))
