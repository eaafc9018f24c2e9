"""Decoded packets as columns: what sources yield, the meter and the windows read.

A batch keeps file order. Rows are only those packets that are metered (``spec`` of the feature vector, section 7); what was not
metered is counted by reason in ``Counters`` of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

# Traffic classes: with both endpoints and the protocol number (and ICMP type and code) they make the flow key.
OTHER, TCP, UDP, ICMP = 0, 1, 2, 3

# TCP flag bits.
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80


@dataclass(frozen=True, slots=True)
class PacketBatch:
    """Columns of n packets in file order.

    Addresses are 16 bytes, IPv4 as IPv4-mapped (``::ffff:a.b.c.d``) with ``family`` 4; ``family`` is 4 or 6. ``klass`` is
    OTHER, TCP, UDP or ICMP; ``proto`` the IP protocol number (where a header could not be read, the number of that header).
    Ports are 0 unless TCP or UDP. ``icmp_type``/``icmp_code`` are as on the wire (replies are mapped by the meter's key).
    ``payload`` is L4 payload bytes, ``header`` L4 header bytes (0 for OTHER), ``wire`` the frame's length on the wire.
    ``data`` is the buffer the packets were read from, ``payload_at`` the offset of the captured L4 payload in it (-1: none) and
    ``payload_captured`` how much of it was captured; they are valid until the source yields its next batch. The other columns
    are the batch's own and stay.
    """

    ts_us: npt.NDArray[np.int64]  # microseconds since 1970, as captured
    src: npt.NDArray[np.uint8]  # [n, 16]
    dst: npt.NDArray[np.uint8]  # [n, 16]
    family: npt.NDArray[np.uint8]
    sport: npt.NDArray[np.uint16]
    dport: npt.NDArray[np.uint16]
    proto: npt.NDArray[np.uint8]
    klass: npt.NDArray[np.uint8]
    icmp_type: npt.NDArray[np.uint8]
    icmp_code: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    payload: npt.NDArray[np.int64]
    header: npt.NDArray[np.int32]
    window: npt.NDArray[np.uint16]
    wire: npt.NDArray[np.uint32]
    payload_at: npt.NDArray[np.int64]
    payload_captured: npt.NDArray[np.int32]
    data: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ts_us)

    def take(self, rows: npt.NDArray[np.intp] | slice) -> PacketBatch:
        """Return the batch's rows chosen by an index array or a slice, over the same ``data``."""
        columns = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "data"}
        return PacketBatch(**columns, data=self.data)


def join_batches(batches: Sequence[PacketBatch]) -> PacketBatch:
    """Return the rows of several batches as one, in order, without their payload bytes (``payload_at`` is -1 throughout)."""
    assert batches, "nothing to join"
    columns = {f.name: np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(PacketBatch) if f.name != "data"}
    columns["payload_at"] = np.full(len(columns["ts_us"]), -1, np.int64)
    columns["payload_captured"] = np.zeros(len(columns["ts_us"]), np.int32)
    return PacketBatch(**columns, data=np.empty(0, np.uint8))
