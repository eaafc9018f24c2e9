"""``cybermesh migrate``: bring a shared database to this version's schema (the embedded one migrates itself)."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import output

FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file of the validator.")]
app = typer.Typer(help="Bring the validator's database to this version's schema.")


@app.callback(invoke_without_command=True)
def migrate(
    config: FileOption = None,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
) -> None:
    """Bring the database that the settings name to this version's schema, in one transaction; twice is harmless.

    Example: cybermesh migrate -c /etc/cybermesh/validator.toml
    """
    from cybermesh.config import load
    from cybermesh.roles.process import store_location
    from cybermesh.store.database import open_database
    from cybermesh.store.migrate import migrate as upgrade

    where = store_location(load(config).settings)

    async def run() -> tuple[str | None, str]:
        database = await open_database(where)
        try:
            return await upgrade(database)
        finally:
            await database.close()

    before, after = asyncio.run(run())
    if json or form is not output.Format.HUMAN:
        output.emit_one(
            {"before": before, "after": after}, output.Format.NDJSON if form is output.Format.NDJSON else output.Format.JSON
        )
    elif before == after:
        sys.stdout.write(f"schema {after}: up to date\n")
    else:
        sys.stdout.write(f"schema {before or 'none'} migrated to {after}\n")
