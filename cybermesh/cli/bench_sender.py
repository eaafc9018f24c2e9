"""Send the frames of a capture on an interface as fast as one core can, or at a given rate: what ``bench live`` offers.

The kernel takes up to 1,024 frames in a call of sendmmsg, straight from the mapped file: no byte is copied or looked at here,
so the kernel's own work bounds the speed. What the kernel refuses is counted and not sent again, as on a real link. Linux on a
64-bit machine only; the structures are those of its C library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry.counters import Counters
from cybermesh.telemetry.sources.pcap import PcapReader
from cybermesh.telemetry.sources.stream import ByteStream

I64 = npt.NDArray[np.int64]

_MOST = 1_024  # frames in a call: UIO_MAXIOV
_SHORT_CALL = 64  # when a rate is kept
_PATIENCE = 50  # refusals in a row
_PCAP_HEADER, _RECORD_HEADER = 24, 16
_ALLOWANCE_S = 0.01  # a sender that was kept from sending catches up with so much at most in one go


class _Buffer(ctypes.Structure):
    """Struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """Struct mmsghdr, with its msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("buffers", ctypes.c_void_p),
        ("buffer_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("sent", ctypes.c_uint),
        ("", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of the frames; ``refused`` those that the kernel did not take (its queue was full)."""

    frames: int
    refused: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class FrameFile:
    """The frames of a pcap file: the file's bytes, and offset and length of each frame in it."""

    data: npt.NDArray[np.uint8]
    at: I64
    size: I64


def load(path: Path) -> FrameFile:
    """Map a pcap file and find its frames."""
    stream = ByteStream(str(path))
    reader = PcapReader(stream, Counters())
    sizes = []
    while (frames := reader.read(65_536)) is not None:
        sizes.append(frames.captured)
    stream.close()
    size = np.concatenate(sizes)
    at = _PCAP_HEADER + np.cumsum(size + _RECORD_HEADER) - size
    return FrameFile(np.memmap(path, np.uint8, "r"), at, size)


def send(interface: str, frames: FrameFile, packets_per_s: float = 0.0) -> Sent:
    """Send all frames in order on an interface.

    Args:
        interface: Its name, in the network namespace of the calling thread.
        frames: What to send.
        packets_per_s: How fast; 0 for as fast as possible.

    Raises:
        OSError: The interface does not take frames at all.
    """
    call = ctypes.CDLL(None, use_errno=True).sendmmsg
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
    buffers, messages = np.zeros(_MOST, np.dtype(_Buffer)), np.zeros(_MOST, np.dtype(_Message))
    messages["buffers"] = buffers.ctypes.data + buffers.itemsize * np.arange(_MOST)
    messages["buffer_count"] = 1
    where = frames.data.ctypes.data + frames.at
    total, done, refused, in_a_row = len(where), 0, 0, 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        out.bind((interface, 0))
        began, cpu = time.perf_counter(), time.thread_time()
        while done < total:
            count = min(total - done, _due(packets_per_s, time.perf_counter() - began, done))
            buffers["base"][:count], buffers["length"][:count] = where[done : done + count], frames.size[done : done + count]
            taken = call(out.fileno(), messages.ctypes.data, count, 0) if count else 0
            if taken < 0:
                code = ctypes.get_errno()
                in_a_row += 1
                if code not in (errno.ENOBUFS, errno.EAGAIN, errno.EINTR) or in_a_row > _PATIENCE:
                    raise OSError(code, os.strerror(code), interface)
                taken = int(code != errno.EINTR)
                refused += taken
            elif taken:
                in_a_row = 0
            done += taken
        return Sent(total - refused, refused, time.perf_counter() - began, time.thread_time() - cpu)


def _due(packets_per_s: float, elapsed_s: float, done: int) -> int:
    """Return how many frames the next call should send to keep the rate, at least 0."""
    if not packets_per_s:
        return _MOST
    due = int(elapsed_s * packets_per_s) - done
    return max(0, min(due, _SHORT_CALL + int(packets_per_s * _ALLOWANCE_S), _MOST))
