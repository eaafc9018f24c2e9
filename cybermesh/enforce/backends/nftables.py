"""nftables as a backend: the table ``inet cybermesh`` and nothing else.

Two ways to the kernel behind one small port: libnftables through its Python binding (one process-long handle for writing, which
never lists and so never caches a large set, and one for reading), or the ``nft`` program with the script on its standard input.
No shell is involved in either. The text of the scripts is in ``nft_script``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import orjson

from cybermesh.enforce.backends import Audit, BackendError, netlink, nft_script, programs, watch
from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Element, Match

_LIST: Final = f"list table {nft_script.TABLE}"
_ABSENT: Final = f"there is no table {nft_script.TABLE}"
_GONE: Final = "No such file or directory"
_ERROR_CHARS_MAX: Final = 300
# A listing begins again whenever the table changes under it; in a long burst it would never end.
_GLANCE_MAX_S: Final = 20.0
# Unused limit objects are harmless but stay until the table is rebuilt.
_STALE_LIMITS_MAX: Final = 1_000


class Channel(Protocol):
    """A way to nftables."""

    async def run(self, script: str) -> None:
        """Run ``script`` as one transaction; BackendError leaves everything as it was."""
        ...

    async def list_table(self) -> bytes | None:
        """Return nft's JSON of our table, None if there is no such table."""
        ...

    def announce(self, started: Callable[[int], None]) -> None:
        """Have ``started`` told the id of the thread or process that makes a transaction, before it does where possible."""
        ...


class LibraryChannel:
    """libnftables in this process; calls run in a thread and release the interpreter lock."""

    def __init__(self) -> None:
        """Open the handles.

        Raises:
            BackendError: The binding or the system's library is not there.
        """
        try:
            import nftables  # optional extra "nftables"; the library comes from the system

            self._writer: Any = nftables.Nftables()
            self._reader: Any = nftables.Nftables()
        except (ImportError, OSError) as fault:
            raise BackendError("NO_FIREWALL", f"libnftables: {fault}") from fault
        self._reader.set_json_output(True)
        self._reader.set_numeric_proto_output(True)
        self._started: Callable[[int], None] | None = None

    async def run(self, script: str) -> None:
        """Run ``script`` as one transaction."""
        code, _, error = await asyncio.to_thread(self._write, script)
        if code != 0:
            raise _translated(error)

    def _write(self, script: str) -> Any:
        # The kernel calls whoever makes a transaction by the number of its thread.
        if self._started is not None:
            self._started(threading.get_native_id())
        return self._writer.cmd(script)

    async def list_table(self) -> bytes | None:
        """Return nft's JSON of our table."""
        code, output, error = await asyncio.to_thread(self._reader.cmd, _LIST)
        if code != 0:
            if _GONE in error:
                return None
            raise _translated(error)
        return str(output).encode()

    def announce(self, started: Callable[[int], None]) -> None:
        """Tell ``started`` the number of the thread that makes a transaction, before it does."""
        self._started = started


class ProcessChannel:
    """The ``nft`` program, for hosts without the binding."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._started: Callable[[int], None] | None = None

    def announce(self, started: Callable[[int], None]) -> None:
        """Tell ``started`` the process id of every program."""
        self._started = started

    async def run(self, script: str) -> None:
        """Run ``script`` as one transaction."""
        ended = await programs.run(self._program, "-f", "-", text=script, started=self._started)
        if ended.code != 0:
            raise _translated(ended.error)

    async def list_table(self) -> bytes | None:
        """Return nft's JSON of our table."""
        ended = await programs.run(self._program, "-j", "-p", *_LIST.split())
        if ended.code == 0:
            return ended.output
        if _GONE in ended.error:
            return None
        raise _translated(ended.error)


def open_channel() -> Channel:
    """Return the library if it is there, else the program.

    Raises:
        BackendError: Neither is there.
    """
    try:
        return LibraryChannel()
    except BackendError as fault:
        program = programs.find("nft")
        if program is None:
            raise BackendError("NO_FIREWALL", f"{fault.detail}, and no nft program; install the package nftables") from fault
        return ProcessChannel(program)


class NftablesBackend:
    """The kernel's nftables in this process's network namespace; needs CAP_NET_ADMIN."""

    name = "nftables"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        # libnftables promises nothing about threads, so whoever reads while others write is a process.
        program = programs.find("nft")
        self._reader = None if program is None else ProcessChannel(program)
        # The sets we know to exist; None until the table has been built or read.
        self._sets: frozenset[str] | None = None
        self._questions = netlink.Questions(netlink.element_question)
        self._watch = watch.Watch()
        channel.announce(self._watch.own)

    async def apply(self, plan: Plan, now_ms: int) -> None:
        """Make the changes of ``plan`` in one transaction."""
        if not plan.drift:
            return
        if self._sets is None:
            await self.audit(now_ms)
        if self._sets is None:
            raise BackendError("APPLY_FAILED", _ABSENT)
        script, sets = nft_script.change(plan, now_ms, self._sets)
        await self._run(script)
        self._sets = sets

    async def rebuild(self, elements: Collection[Element], now_ms: int) -> None:
        """Replace the table in one transaction."""
        script, sets = nft_script.rebuild(elements, now_ms)
        await self._run(script)
        self._sets = sets

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        """Ask the kernel for single elements."""
        return await asyncio.to_thread(self._questions.present, tuple(matches))

    async def audit(self, now_ms: int) -> Audit:
        """List our table."""
        listed = await self._channel.list_table()
        if listed is None:
            self._sets = None
            return Audit({}, (_ABSENT,))
        listing = await asyncio.to_thread(lambda: nft_script.read(orjson.loads(listed), now_ms))
        self._sets = listing.sets
        return _found(listing)

    async def glance(self, now_ms: int) -> Audit | None:
        """List our table in a process of its own, beside whatever else goes on."""
        if self._reader is None:
            return None
        try:
            async with asyncio.timeout(_GLANCE_MAX_S):
                listed = await self._reader.list_table()
        except (TimeoutError, BackendError):
            return None
        if listed is None:
            return Audit({}, (_ABSENT,))
        listing = await asyncio.to_thread(lambda: nft_script.read(orjson.loads(listed), now_ms))
        return _found(listing)

    def close(self) -> None:
        """Give back what is open; the firewall stays as it is."""
        self._questions.close()
        self._watch.close()

    async def wait_changed(self) -> None:
        """Return when another process has changed nftables."""
        await self._watch.wait()

    async def remove_all(self) -> None:
        """Delete our table, whether it is there or not."""
        await self._run(nft_script.REMOVE)
        self._sets = None

    async def _run(self, script: str) -> None:
        try:
            await self._channel.run(script)
        except asyncio.CancelledError:
            # It may have happened: look before the next change.
            self._sets = None
            raise


def _found(listing: nft_script.Listing) -> Audit:
    live = sum(1 for element in listing.elements.values() if element.rate is not None)
    if listing.limits > 2 * live + _STALE_LIMITS_MAX:
        listing.damage.append(f"{listing.limits - live} unused limit objects")
    return Audit(listing.elements, tuple(listing.damage), listing.counters)


def _translated(error: str) -> BackendError:
    text = " ".join(error.split())[:_ERROR_CHARS_MAX]
    if "Too many open files in system" in error:
        return BackendError("SET_FULL", f"a set of {nft_script.TABLE} is full: {text}")
    if "Operation not permitted" in error:
        return BackendError("NO_RIGHTS", f"changing nftables needs CAP_NET_ADMIN: {text}")
    return BackendError("APPLY_FAILED", text)
