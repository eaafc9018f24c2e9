"""``cybermesh consensus status``: where a running validator stands, from its own health port."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cybermesh.cli import output

app = typer.Typer(no_args_is_help=True)

_PATIENCE_S: Final = 5.0
_ANSWER_MAX: Final = 1024 * 1024
_PREFIX: Final = "cybermesh_validator_"


@app.callback()
def consensus() -> None:
    """Look at consensus."""


@app.command()
def status(
    config: Annotated[Path | None, typer.Option("-c", "--config", help="Settings file of the validator.")] = None,
    url: Annotated[str | None, typer.Option(help="Its health port instead, as http://HOST:PORT.")] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show round, height, leader and what keeps a validator from voting; exit code 1 when something does.

    Example: cybermesh consensus status --url http://127.0.0.1:8440
    """
    where = url or _address(config)
    ready = json.loads(_get(f"{where}/api/v1/ready"))
    figures = read_figures(_get(f"{where}/api/v1/metrics"))
    if "round" not in figures:
        raise output.CommandError(f"{where}: no validator runs there, or it is still starting")
    blocks = figures.get("blocks_total", 0)
    latency_ms = figures.get("commit_latency_milliseconds_total", 0) / blocks if blocks else None
    problem = ready["problems"].get("validator")
    result: dict[str, Any] = {
        "round": int(figures["round"]),
        "height": int(figures["height_blocks"]),
        "leader": int(figures["leader"]),
        "votes": int(figures["votes_total"]),
        "proposals": int(figures["proposals_total"]),
        "timeouts": int(figures["timeouts_total"]),
        "commit_latency_ms": None if latency_ms is None else round(latency_ms, 1),
        "mempool_transactions": int(figures["mempool_transactions"]),
        "peers_connected": int(figures.get("peers_connected", 0)),
        "problem": problem,
    }
    if as_json:
        output.emit_one(result)
    else:
        for name, value in result.items():
            sys.stdout.write(f"{name:22} {'-' if value is None else value}\n")
    if problem:
        raise typer.Exit(1)


def read_figures(text: str) -> dict[str, float]:
    """Return a validator's figures, by name without prefix, from Prometheus' text format."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith(_PREFIX):
            found[name.removeprefix(_PREFIX)] = float(value)
    return found


def _address(config: Path | None) -> str:
    from cybermesh.config import load

    http = load(config).settings.http
    return f"http://{http.host}:{http.port}"


def _get(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise output.CommandError(f"{url}: write http://HOST:PORT", 2)
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:  # noqa: S310 - http only, checked above
            body: bytes = answer.read(_ANSWER_MAX)
    except urllib.error.HTTPError as error:
        if error.code != 503:  # "not ready", with the reasons in its body
            raise output.CommandError(f"{url}: {error.code} {error.reason}") from error
        body = error.read(_ANSWER_MAX)
    except OSError as error:
        raise output.CommandError(f"{url}: {error}; is the validator running, and is this its health port?") from error
    return body.decode()
