"""Keys and nonce counters in files: the shell around ``keys`` and ``envelope.nonces``.

Rules:

- a private key lives in a file of mode 0600 that holds 64 hex digits; a file that others may read is refused, because nobody
  can say who has read it already;
- a key is never overwritten, and a file is whole or absent: it is written beside its place, flushed, and linked into it;
- nonce counters are reserved on disk before they are used, so a crash skips some and never repeats one. The file names its
  instance: a lost file means a new instance and not old counters again. It is locked while a process uses it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from cybermesh.keys import SEED_BYTES, SigningKey

_RECORD_BYTES = 11  # ten decimal digits and a newline
_COUNTERS = 1 << 32


class KeystoreError(Exception):
    """A key or counter file that cannot be used; the text says where, why, and what to do."""


def generate_key() -> SigningKey:
    """Return a new private key from the system's randomness."""
    return SigningKey(secrets.token_bytes(SEED_BYTES))


def load_key(path: Path) -> SigningKey:
    """Read a private key.

    Raises:
        KeystoreError: the file is absent, open to others, or not a key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise KeystoreError(
                    f"{path}: private key is open to others (mode {mode:04o}); run `chmod 600 {path}`, "
                    "and replace the key if others have had access"
                )
            text = file.read(4096)
    except OSError as error:
        raise KeystoreError(
            f"{path}: cannot read the private key: {error.strerror}; `cybermesh keys generate {path}` makes one"
        ) from error
    try:
        seed = bytes.fromhex(text.decode("ascii").strip())
    except (UnicodeDecodeError, ValueError):
        seed = b""
    if len(seed) != SEED_BYTES:
        raise KeystoreError(
            f"{path}: not a private key: expected {2 * SEED_BYTES} hex digits; restore it, or generate a new key"
        )
    return SigningKey(seed)


def save_key(path: Path, key: SigningKey) -> None:
    """Write a private key, mode 0600, durably.

    Raises:
        KeystoreError: the file exists, or cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(key.seed.hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(scratch, path)  # unlike a rename, this refuses to replace a key
        finally:
            scratch.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except FileExistsError as error:
        raise KeystoreError(f"{path}: exists already; a key is never overwritten: move it away first") from error
    except OSError as error:
        raise KeystoreError(f"{path}: cannot write the private key: {error.strerror}") from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileCounters:
    """``envelope.nonces.Counters`` in a file: first the instance, then one line for each reservation's end.

    Use it as a context manager; the file stays locked until it is left.

    Raises:
        KeystoreError: the file cannot be used, or another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.instance, self._next = self._restore()
        except BlockingIOError as error:
            self.close()
            raise KeystoreError(f"{path}: in use by another process; every process needs a counter file of its own") from error
        except OSError as error:
            self.close()
            raise KeystoreError(f"{path}: cannot use the nonce counters: {error.strerror}") from error
        except KeystoreError:
            self.close()
            raise

    def _restore(self) -> tuple[int, int]:
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        whole = len(content) - len(content) % _RECORD_BYTES
        os.ftruncate(self._descriptor, whole)  # a torn record was never handed out
        self._end = whole
        records = content[:whole].splitlines()
        if any(len(record) != _RECORD_BYTES - 1 or not record.isdigit() for record in records):
            raise KeystoreError(f"{self._path}: not a nonce counter file; move it away, a new one gets a new instance")
        if not records:
            instance = secrets.randbelow(_COUNTERS)
            self._append(instance)
            _flush_folder(self._path.parent)
            return instance, 0
        return int(records[0]), max((int(record) for record in records[1:]), default=0)

    def _append(self, value: int) -> None:
        # At a known place, so that a write cut short by a full disk is overwritten by the next one.
        if os.pwrite(self._descriptor, b"%010d\n" % value, self._end) != _RECORD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._descriptor)
        self._end += _RECORD_BYTES

    def reserve(self, count: int) -> range:
        """Reserve up to ``count`` counters durably; an empty range means that the instance has none left."""
        first = self._next
        last = min(first + count, _COUNTERS)
        try:
            if last > first:
                self._append(last)
        except OSError as error:
            raise KeystoreError(f"{self._path}: cannot reserve nonces: {error.strerror}") from error
        self._next = last
        return range(first, last)

    def close(self) -> None:
        """Unlock and close the file; doing it twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
