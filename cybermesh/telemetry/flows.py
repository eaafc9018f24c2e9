"""Finished flows as columns: what the meter emits and the engines score."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class EndReason(enum.IntEnum):
    """Why a flow was emitted."""

    CAPTURE_END = 0  # still open when the input ended
    TCP_END = 1  # RST, or both FINs and the last ACK
    CUT = 2  # 120 s from its start, or a clock step
    WATERMARK = 3  # no packet can belong to it any more
    EVICTED = 4  # pushed out by the hard cap
    EXTERNAL = 5  # metered elsewhere (flow CSV, Zeek, Suricata, Kafka)


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """Columns of n flows in order of their first packet within the batch.

    ``src_*`` is the forward endpoint. Addresses as in ``PacketBatch``. ``features`` is float64[n, 79] in the order of
    ``features.NAMES``, always finite; where ``known`` (bool[79], the same for the whole batch) is false the column holds 0
    and the source could not know the value.
    """

    start_us: npt.NDArray[np.int64]
    end_us: npt.NDArray[np.int64]
    src: npt.NDArray[np.uint8]  # [n, 16]
    dst: npt.NDArray[np.uint8]  # [n, 16]
    family: npt.NDArray[np.uint8]  # 4 or 6
    sport: npt.NDArray[np.uint16]
    dport: npt.NDArray[np.uint16]
    proto: npt.NDArray[np.uint8]  # the real IP protocol number
    klass: npt.NDArray[np.uint8]
    icmp_type: npt.NDArray[np.uint8]
    icmp_code: npt.NDArray[np.uint8]
    end_reason: npt.NDArray[np.uint8]
    features: npt.NDArray[np.float64]  # [n, 79]
    known: npt.NDArray[np.bool_]  # [79]

    def __len__(self) -> int:
        return len(self.start_us)

    @property
    def single_packet(self) -> npt.NDArray[np.bool_]:
        """Mark of flows with exactly one packet, bool[n]."""
        marked: npt.NDArray[np.bool_] = (self.features[:, 4] + self.features[:, 5]) == 1  # tot_fwd_pkts + tot_bwd_pkts
        return marked
