"""The command line: one module per noun, imported only when its command is called, so that a short command stays short.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed or a negative verification, 2 wrong usage or
configuration. A traceback appears only with ``--debug``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from cybermesh.cli import output


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives: a module of this package, and in it a function or a ``typer.Typer``."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "demo": Command("demo", "demo", "Play a capture through the whole mesh in one process."),
    "run": Command("run", "run", "Run one or more roles: ai, validator, agent."),
    "init": Command("init", "init", "Make a deployment: genesis, keys, settings."),
    "flows": Command("flows", "flows", "Meter captures: one row per flow, 79 features."),
    "detect": Command("detect", "detect", "Report the attacks in captures."),
    "alerts": Command("alerts", "alerts", "Explain alerts, and label what they were about."),
    "rules": Command("rules", "rules", "List, test and explain the detection rules."),
    "train": Command("train", "train", "Train a classifier on labelled flows."),
    "calibrate": Command("calibrate", "calibrate", "Fit a classifier's threshold to this network's ordinary traffic."),
    "adapt": Command("adapt", "adapt", "Teach a classifier this network from labelled flows."),
    "evaluate": Command("evaluate", "evaluate", "Measure a classifier on labelled flows."),
    "policy": Command("policy", "policy", "List, prove, approve, reject and revoke decisions."),
    "allowlist": Command("allowlist", "allowlist", "Networks that no policy touches."),
    "ledger": Command("ledger", "app", "Look at, audit, back up and prune the stored chain."),
    "operator": Command("operator", "app", "Approve, revoke, allow, change keys: signed orders."),
    "verify": Command("verify", "verify", "Check a decision proof offline."),
    "enforce": Command("enforce", "enforce", "Look at and steer this host's firewall rules."),
    "dlq": Command("dlq", "dlq", "List, show and replay messages that validators refused."),
    "consensus": Command("consensus", "app", "Show where a running validator stands."),
    "simulate": Command("simulate", "simulate", "Run consensus against seeded faults."),
    "migrate": Command("migrate", "app", "Bring a shared database to this version's schema."),
    "keys": Command("keys", "keys", "Generate and show keys."),
    "config": Command("config", "config", "Check and show the settings."),
    "bench": Command("bench", "app", "Measure this machine, beside the tool that users know."),
    "version": Command("version", "version", "Print the version."),
}


def _application(called: str | None) -> typer.Typer:
    """Build the command tree; only the called command's module is imported, all of them for the list of commands."""
    app = typer.Typer(
        name="cybermesh", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )
    app.callback()(_root)
    for name in [called] if called in COMMANDS else COMMANDS:
        command = COMMANDS[name]
        target = getattr(importlib.import_module(f"cybermesh.cli.{command.module}"), command.attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=command.summary)
        else:
            app.command(name, short_help=command.summary)(target)
    return app


def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    color: Annotated[output.Color, typer.Option(help="Colour on a terminal, always, or never.")] = output.Color.AUTO,
) -> None:
    """Network telemetry in, signed detections, agreement among validators, provable firewall rules out."""
    output.configure(color=color, debug=debug)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with the documented exit codes."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    called = next((word for word in argv if not word.startswith("-") and word in COMMANDS), None)
    try:
        _application(called)(args=argv, prog_name="cybermesh")
    except output.CommandError as error:
        output.complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone; that is its right. Keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # supervisor: the last place that can turn an error into one clear line
        if "--debug" in argv:
            raise
        ours = type(error).__module__.startswith("cybermesh.")
        output.complain(str(error) if ours else f"internal error: {type(error).__name__}: {error} (--debug shows where)")
        sys.exit(2 if type(error).__name__ in {"ConfigError", "GenesisError"} else 1)
