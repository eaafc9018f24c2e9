"""Finished flows as columns: what the meter emits and the engines score."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

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

    def take(self, rows: npt.NDArray[np.intp] | slice) -> FlowBatch:
        """Return the flows chosen by an index array or a slice."""
        columns = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "known"}
        return FlowBatch(**columns, known=self.known)

    @property
    def single_packet(self) -> npt.NDArray[np.bool_]:
        """Mark of flows with exactly one packet, bool[n]."""
        marked: npt.NDArray[np.bool_] = (self.features[:, 4] + self.features[:, 5]) == 1  # tot_fwd_pkts + tot_bwd_pkts
        return marked

    @property
    def flow_id(self) -> npt.NDArray[np.uint64]:
        """Digest of the flow's endpoints, protocol and start: the same flow has the same number wherever it is metered."""
        ends = [np.ascontiguousarray(address).view(">u8").astype(np.uint64) for address in (self.src, self.dst)]
        small = (self.sport, self.dport, self.proto, self.icmp_type, self.icmp_code)
        words = [*ends[0].T, *ends[1].T, *(column.astype(np.uint64) for column in small), self.start_us.view(np.uint64)]
        digest = np.zeros(len(self), np.uint64)
        for word in words:  # the finaliser of splitmix64 (Steele, Lea, Flood 2014) after each word
            digest = digest + word + np.uint64(0x9E3779B97F4A7C15)
            digest = (digest ^ digest >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            digest = (digest ^ digest >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            digest ^= digest >> np.uint64(31)
        return digest
