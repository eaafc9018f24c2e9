"""How processes that share a local bus wake each other and see that one has died: a Unix datagram socket for each.

Rules:

- the sockets lie in one directory, named by random tokens; a byte sent to one means "look again" and carries nothing else, so a
  lost or forged wake-up costs a look, never a record;
- a socket whose process has ended refuses connections: that is seen at once, without any timeout;
- a process that is alive but stands still (stopped, swapped out) is seen by its socket file's time stamp, which it renews. The
  stamp is CLOCK_MONOTONIC, which all processes of the host share and nobody sets;
- paths go through /proc/self/fd, because a socket's path may not be longer than 107 bytes and a state directory may.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DRAIN_BYTES = 64


class WakeSocket:
    """This process' socket and its view of the others.

    Args:
        directory: Where the sockets of one bus lie; made with mode 0700 when it is not there.

    Raises:
        OSError: the directory cannot be made or used.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.name = secrets.token_hex(8)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self._path(self.name))
        self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._kick, select.POLLIN)
        self.touch()

    def close(self) -> None:
        """Remove the socket; the others see this process as gone."""
        with suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self._directory)
        self._socket.close()
        os.close(self._kick)
        os.close(self._directory)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the directory's lock: for set-up, which two processes must not do at once."""
        fcntl.flock(self._directory, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._directory, fcntl.LOCK_UN)

    def kick(self) -> None:
        """End this process' own ``wait``, from any thread."""
        os.eventfd_write(self._kick, 1)

    def wait(self, timeout_s: float | None) -> None:
        """Return when somebody sent a wake-up since the last call, at the latest after ``timeout_s``."""
        # Rounded up, because a remainder below a millisecond would otherwise be waited out by spinning.
        ready = self._poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000) + 1))
        for descriptor, _ in ready:
            with suppress(BlockingIOError):
                if descriptor == self._kick:
                    os.eventfd_read(self._kick)
                else:
                    for _ in range(_DRAIN_BYTES):
                        self._socket.recv(1)

    def wake(self, names: Iterable[str]) -> None:
        """Wake other processes; one that is gone, or has wake-ups enough, is passed over."""
        for name in names:
            if name != self.name:
                with suppress(BlockingIOError, ConnectionRefusedError, FileNotFoundError):
                    self._socket.sendto(b"\0", self._path(name))

    def everyone(self) -> list[str]:
        """Return the tokens of all sockets, of dead processes too."""
        return os.listdir(self._directory)  # noqa: PTH208 (pathlib does not list open directories)

    def touch(self) -> None:
        """Renew the time stamp that shows that this process moves."""
        now_ns = time.monotonic_ns()
        with suppress(FileNotFoundError):  # somebody cleaned the directory; the others then take this process for dead
            os.utime(self.name, ns=(now_ns, now_ns), dir_fd=self._directory)

    def is_alive(self, name: str, lease_s: float) -> bool:
        """Return whether the process still has its socket and has renewed the stamp within ``lease_s``."""
        if name == self.name:
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._path(name))
                stamp_ns = os.stat(name, dir_fd=self._directory).st_mtime_ns
            except (ConnectionRefusedError, FileNotFoundError):
                return False
        return time.monotonic_ns() - stamp_ns < lease_s * 1_000_000_000

    def sweep(self) -> None:
        """Remove the socket files of processes that ended without doing so."""
        for name in self.everyone():
            if not self.is_alive(name, lease_s=float("inf")):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._directory)

    def _path(self, name: str) -> str:
        return f"/proc/self/fd/{self._directory}/{name}"
