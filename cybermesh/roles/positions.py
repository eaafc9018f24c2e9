"""Where inputs go on after a restart of the role that reads them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from cybermesh.config import ConfigError


class Positions:
    """Where each input goes on after a restart, in a small file that is replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._positions: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            self._positions = self._read()

    def _read(self) -> dict[str, str]:
        try:
            tree = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(tree, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ConfigError(f"{self._path}: not a positions file; move it away to read from the start") from error
        return {str(name): str(position) for name, position in tree.items()}

    def of(self, name: str) -> str:
        """Return the kept position of an input, empty for its start."""
        return self._positions.get(name, "")

    def keep(self, name: str, position: str) -> None:
        """Keep a position durably."""
        self._positions[name] = position
        scratch = self._path.with_suffix(".new")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(self._positions, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._path)


class Nowhere:
    """Keeps nothing: every input begins at its start."""

    def of(self, name: str) -> str:
        """Return the start."""
        del name
        return ""

    def keep(self, name: str, position: str) -> None:
        """Forget the position."""
