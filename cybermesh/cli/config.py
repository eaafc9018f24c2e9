"""``cybermesh config check|show``: the settings as a process would see them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import output

config = typer.Typer(no_args_is_help=True, help="Check and show the settings.")
FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="TOML file; NAME.local.toml beside it goes over it.")]


@config.command()
def check(file: FileOption = None) -> None:
    """Read the settings as a role would; exit 2 with the reason when they are not usable."""
    from cybermesh.config import load

    load(file)
    output.note("the settings are usable")


@config.command()
def show(file: FileOption = None, form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False) -> None:
    """Print every setting with the source of its value; secrets are masked."""
    from cybermesh.config import load, masked

    loaded = load(file)
    rows = [
        {"key": f"{section}.{key}", "value": value, "source": loaded.origins.get(f"{section}.{key}", "default")}
        for section, table in masked(loaded.settings).items()
        for key, value in table.items()
    ]
    if json or form is not output.Format.HUMAN:
        output.emit(rows, output.Format.JSON if json else form)
        return
    width = max(len(str(row["key"])) for row in rows)
    for row in rows:
        sys.stdout.write(f"{row['key']:<{width}}  {row['value']!s:<40}  {row['source']}\n")
