"""``cybermesh version``."""

from __future__ import annotations

import sys

from cybermesh import __version__
from cybermesh.cli import output


def version(form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False) -> None:
    """Print the version."""
    if json or form is not output.Format.HUMAN:
        output.emit_one({"version": __version__, "python": sys.version.split()[0]}, form)
    else:
        sys.stdout.write(f"cybermesh {__version__}\n")
