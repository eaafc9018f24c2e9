"""Where compiled kernels are kept between processes (shell).

Compiling takes some seconds once; loading what was compiled, a few tenths. The folder is the first of these that can be used:
``CYBERMESH_CACHE_DIR``, ``$XDG_CACHE_HOME/cybermesh``, ``~/.cache/cybermesh``. Its content is code, so it must be ours alone:
a folder of somebody else, or one that others may write to, is not used. Where there is none, kernels are compiled in every
process that wants them; that is slow, and it works.

numba notices when a kernel's own file has changed, but not the files that it takes constants and parts from. So the folder's
name ends with a digest of all of them. Folders of other versions are kept as long as they are among the last that were used:
a host may run two versions for a while, but upgrades must not fill a disk.

Processes may compile at the same time: numba puts each file in its place in one step, and what one of them loses to another is
compiled again by the next. A process whose folder is removed compiles for itself.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

_KERNELS = ("records", "clock", "headers", "table", "packets", "emission", "ring")
_SOURCES = ("features.py", "flows.py", "meter_clock.py", "meter_state.py", "packets.py")  # where kernels take constants from
_COMPLETE = "complete"
_FOLDER = re.compile(r"kernels-[0-9a-f]{16}")
_KEPT_FOLDERS = 3  # of other versions, those used last; about 2 MB each


def cache_folder() -> Path | None:
    """Make the folder for this version's kernels if need be; None if there is no place that is ours and can be written."""
    home = Path("~").expanduser()
    named = os.environ.get("CYBERMESH_CACHE_DIR")
    roots = [Path(named)] if named else []
    roots.append(Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "cybermesh")
    for root in roots:
        if (folder := _usable(root / f"kernels-{_digest()}")) is not None:
            return folder
    return None


def is_compiled() -> bool:
    """Return whether all kernels were compiled and kept by an earlier process."""
    folder = cache_folder()
    return folder is not None and (folder / _COMPLETE).exists()


def load_kernels() -> None:
    """Compile all kernels or load what an earlier process compiled; call it before kernels are imported otherwise."""
    import numba

    settings: Any = numba.config
    folder = cache_folder()
    settings.CACHE_DIR = str(folder or "")
    with _without_scipy():
        for name in _KERNELS:
            importlib.import_module(f"cybermesh.telemetry.kernels.{name}")
    # The compiler's hundred thousand objects stay until the process ends; collecting them then would take 0.25 s.
    gc.freeze()
    if folder is not None:
        try:
            is_new = not (folder / _COMPLETE).exists()
            (folder / _COMPLETE).touch()
        except OSError:  # full, or gone meanwhile: the next process finds out
            return
        if is_new:
            prune(folder)


def prune(present: Path) -> None:
    """Remove the folders of other versions beside ``present``, but for those used last."""
    others: list[tuple[int, Path]] = []
    for folder in present.parent.glob("kernels-*"):
        try:
            if folder == present or not _FOLDER.fullmatch(folder.name) or not _is_ours(folder.lstat()):
                continue
            marker = folder / _COMPLETE
            others.append(((marker if marker.exists() else folder).stat().st_mtime_ns, folder))
        except OSError:  # another process removes it
            continue
    for _, folder in sorted(others)[:-_KEPT_FOLDERS]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Keep numba from importing SciPy, where it happens to be installed, for linear algebra that kernels do not use: 0.2 s."""
    modules: dict[str, Any] = sys.modules
    if "scipy.linalg" in modules:
        yield
        return
    modules["scipy.linalg"] = None
    try:
        yield
    finally:
        del modules["scipy.linalg"]


def _digest() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256(metadata.version("numba").encode())
    for path in (*sorted((here / "kernels").glob("*.py")), *(here / name for name in _SOURCES)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _usable(folder: Path) -> Path | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder.stat()):
            return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _is_ours(status: os.stat_result) -> bool:
    """Return whether a folder (no link to one) belongs to us and only we may write to it."""
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not others
