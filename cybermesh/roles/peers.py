"""Where the validators listen: ``peers.toml``, one file for all hosts.

    [validators]
    validator-1 = "10.0.0.1:8601"
    validator-2 = "[2001:db8::2]:8601"

A validator that came later is named by its public key, 64 hex digits.

Addresses are no secret and no identity: who answers at one must prove the validator's key, so a wrong file costs connections
and nothing else.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from cybermesh.config import ConfigError
from cybermesh.genesis import Genesis

Address = tuple[str, int]
PORT_FIRST = 8601
_KEY = re.compile("[0-9a-f]{64}")


def parse_address(text: str, where: str) -> Address:
    """Return host and port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        ConfigError: The text is no address; the error begins with ``where``.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= 65_535):
        raise ConfigError(f'{where}: {text!r} is no address; write "HOST:PORT", an IPv6 address in brackets')
    return host, int(port)


def read_peers(path: Path, genesis: Genesis) -> dict[bytes, Address]:
    """Return every validator's address, by public key.

    Raises:
        ConfigError: The file cannot be read, or lacks a validator of the genesis, or names what is neither one nor a key.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; consensus.peers names the file with the validators' addresses") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    table = tree.get("validators")
    if not isinstance(table, Mapping) or len(tree) != 1:
        raise ConfigError(f"{path}: expected one table, [validators]")
    names = {member.name: member.pubkey for member in genesis.validators}
    names |= {name: bytes.fromhex(name) for name in table if _KEY.fullmatch(name)}
    for name in sorted(names.keys() ^ table.keys()):
        problem = "is not in the genesis; remove it" if name in table else "is missing; say where it listens"
        raise ConfigError(f"{path}: validators.{name}: {problem}")
    return {names[name]: parse_address(str(text), f"{path}: validators.{name}") for name, text in table.items()}


def encode_peers(names: Iterable[str]) -> str:
    """Return a peers file for validators of one host, each with a port of its own."""
    lines = [f'"{name}" = "127.0.0.1:{PORT_FIRST + number}"\n' for number, name in enumerate(names)]
    return "# Where each validator listens; the same file on every host.\n[validators]\n" + "".join(lines)
