"""Runs the firewall's own programs: no shell, input on stdin, everything they say comes back."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from typing import Final, NamedTuple

from cybermesh.enforce.backends import BackendError

_SYSTEM_PLACES: Final = "/usr/sbin:/sbin:/usr/local/sbin"


class Ended(NamedTuple):
    """How a program ended and what it said."""

    code: int
    output: bytes
    error: str


def find(name: str) -> str | None:
    """Return where a program is; the places of system programs count even where PATH leaves them out."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_PLACES)


async def run(program: str, *arguments: str, text: str = "", started: Callable[[int], None] | None = None) -> Ended:
    """Run a program to its end; when cancelled it is killed, and may have done its work or not.

    ``started`` is told its process id.

    Raises:
        BackendError: NO_FIREWALL, it cannot be started.
    """
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(program, *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as fault:
        raise BackendError("NO_FIREWALL", f"{program}: {fault}") from fault
    if started is not None:
        started(process.pid)
    try:
        output, error = await process.communicate(text.encode())
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    return Ended(process.returncode or 0, output, error.decode(errors="replace"))
