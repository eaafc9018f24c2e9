"""``cybermesh keys generate|show``: Ed25519 keys in files of mode 0600."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(no_args_is_help=True, help="Generate and show keys.")
KeyFile = Annotated[Path, typer.Argument(help="Key file, mode 0600.")]


@keys.command()
def generate(file: KeyFile) -> None:
    """Make a new private key; an existing file is never overwritten. Prints the public key."""
    from cybermesh.keystore import generate_key, save_key

    key = generate_key()
    save_key(file, key)
    sys.stdout.write(f"{key.public.hex()}\n")


@keys.command()
def show(file: KeyFile) -> None:
    """Print the public key of a key file."""
    from cybermesh.keystore import load_key

    sys.stdout.write(f"{load_key(file).public.hex()}\n")
