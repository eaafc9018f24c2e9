"""Hears from the kernel that somebody has changed nftables, so that a wiped table is repaired at once, not half a minute later.

The kernel announces every committed transaction with the thread that made it (linux/netfilter/nf_tables.h, NFT_MSG_NEWGEN).
Our own are left out. The announcements of single elements, thousands in a large transaction, are filtered out by the kernel, so
that they push nothing out of the buffer; should that happen all the same, the kernel says so, and it counts as a change.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import socket
import struct
from collections import deque
from collections.abc import Container
from typing import Final

from cybermesh.enforce.backends import BackendError

_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NFNLGRP_NFTABLES: Final = 7
_NEWGEN: Final = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
_GEN_PROC_PID: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_FAMILY_BYTES: Final = 4
_ATTRIBUTE: Final = struct.Struct("=HH")
_SO_ATTACH_FILTER: Final = 26
# Classic BPF: load the type of the message, read in network order; keep the datagram if it is NEWGEN, else drop it.
_ONLY_NEWGEN: Final = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (0x28, 0, 0, 4),
        (0x15, 0, 1, int.from_bytes(struct.pack("=H", _NEWGEN), "big")),
        (0x06, 0, 0, 0xFFFF_FFFF),
        (0x06, 0, 0, 0),
    )
)
_BUFFER_BYTES: Final = 1 << 16
_OWN_MAX: Final = 64


class Watch:
    """A socket that hears changes, opened with the first wait and kept."""

    def __init__(self) -> None:
        self._link: socket.socket | None = None
        self._own: deque[int] = deque(maxlen=_OWN_MAX)

    def own(self, number: int) -> None:
        """Count a thread of ours, or a program that we have started, as ourselves; may be called from any thread."""
        if number not in self._own:
            self._own.append(number)

    async def wait(self) -> None:
        """Return when another process has changed something in nftables.

        Raises:
            BackendError: The kernel lets us not listen.
        """
        loop = asyncio.get_running_loop()
        try:
            link = self._open() if self._link is None else self._link
            while True:
                if is_foreign(await loop.sock_recv(link, _BUFFER_BYTES), self._own):
                    return
        except OSError as fault:
            if fault.errno == errno.ENOBUFS:
                return
            self.close()
            raise BackendError("NO_RIGHTS", f"listening to changes of nftables: {fault}") from fault

    def close(self) -> None:
        """Stop listening."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _open(self) -> socket.socket:
        link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
        program = ctypes.create_string_buffer(_ONLY_NEWGEN)
        filters = struct.pack("HP", len(_ONLY_NEWGEN) // 8, ctypes.addressof(program))
        link.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filters)
        link.bind((0, 0))
        link.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        self._link = link
        return link


def is_foreign(datagram: bytes, own: Container[int | None]) -> bool:
    """Say whether a datagram announces a transaction of another process."""
    offset = 0
    while offset + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, offset)
        if length < _HEADER.size:
            return True
        if kind == _NEWGEN and _maker(datagram[offset + _HEADER.size + _FAMILY_BYTES : offset + length]) not in own:
            return True
        offset += length + (-length % 4)
    return False


def _maker(attributes: bytes) -> int | None:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, offset)
        if length < _ATTRIBUTE.size:
            return None
        if kind == _GEN_PROC_PID and length == _ATTRIBUTE.size + 4:
            return int.from_bytes(attributes[offset + _ATTRIBUTE.size : offset + length], "big")
        offset += length + (-length % 4)
    return None
