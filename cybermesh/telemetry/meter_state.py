"""The state of a flow: one row of int64 columns, the whole memory of the meter about it.

Integers only, so that a flow's numbers do not depend on how its packets were cut into blocks. Times are microseconds relative
to ``START`` (at most 120,000,000), corrected so that they never run backwards. Columns named ``…_MIN`` hold ``NOTHING`` until
there is a value. What is per direction appears twice: at ``FORWARD`` and at ``BACKWARD``, in the order of ``Side``.

Squares of payloads are kept in two columns (the low 32 bits of each square, and the rest), because a hostile length can make
one square as large as 2**64. Squares of gaps fit: all gaps of a flow together are at most 120 s, so the sum is below 1.44e16.
"""

from __future__ import annotations

import enum

NOTHING = 1 << 62  # in a minimum's column: no value yet


class Flow(enum.IntEnum):
    """Columns of the flow as a whole."""

    START = 0  # µs since 1970, the first packet's own time
    SERIAL = enum.auto()  # number of the first packet among all the meter was given
    FORWARD_SIDE = enum.auto()  # which endpoint of the key is the forward one, 0 or 1
    LATEST = enum.auto()  # time of the latest packet
    IAT_SQ = enum.auto()
    IAT_MAX = enum.auto()
    IAT_MIN = enum.auto()
    FIN = enum.auto()  # packets with the flag
    SYN = enum.auto()
    RST = enum.auto()
    ACK = enum.auto()
    ECE = enum.auto()
    CWR = enum.auto()
    FORWARD_FIN = enum.auto()  # 1 once that side has sent a FIN
    BACKWARD_FIN = enum.auto()
    ENDED = enum.auto()  # 1 once the TCP connection is over
    PAUSES = enum.auto()  # gaps above 1 s
    ACTIVE_FROM = enum.auto()  # where the present active period began
    ACTIVE_N = enum.auto()
    ACTIVE_SUM = enum.auto()
    ACTIVE_SQ = enum.auto()
    ACTIVE_MAX = enum.auto()
    ACTIVE_MIN = enum.auto()
    IDLE_N = enum.auto()
    IDLE_SUM = enum.auto()
    IDLE_SQ = enum.auto()
    IDLE_MAX = enum.auto()
    IDLE_MIN = enum.auto()
    RUN_FORWARD = enum.auto()  # the present run of data packets, perhaps a bulk: its direction
    RUN_N = enum.auto()  # packets; 0: no run
    RUN_BYTES = enum.auto()
    RUN_FIRST = enum.auto()
    RUN_LAST = enum.auto()


class Side(enum.IntEnum):
    """Columns of one direction, relative to ``FORWARD`` or ``BACKWARD``."""

    N = 0  # packets
    BYTES = enum.auto()  # payload
    SQ_LOW = enum.auto()  # sum of (payload² mod 2**32)
    SQ_HIGH = enum.auto()  # sum of (payload² div 2**32)
    LEN_MAX = enum.auto()
    LEN_MIN = enum.auto()
    FIRST = enum.auto()  # time of its first and last packet
    LAST = enum.auto()
    IAT_SQ = enum.auto()
    IAT_MAX = enum.auto()
    IAT_MIN = enum.auto()
    PSH = enum.auto()
    URG = enum.auto()
    DATA = enum.auto()  # packets with payload
    HEADER = enum.auto()  # sum of L4 header bytes
    HEADER_MIN = enum.auto()
    WINDOW = enum.auto()  # of its first packet
    BULKS = enum.auto()  # closed runs of at least four data packets
    BULK_N = enum.auto()
    BULK_BYTES = enum.auto()
    BULK_US = enum.auto()


FORWARD = len(Flow)
BACKWARD = FORWARD + len(Side)
WIDTH = BACKWARD + len(Side)

MINIMA = (
    Flow.IAT_MIN,
    Flow.ACTIVE_MIN,
    Flow.IDLE_MIN,
    *(base + column for base in (FORWARD, BACKWARD) for column in (Side.LEN_MIN, Side.IAT_MIN, Side.HEADER_MIN)),
)

# The rulings' times, in microseconds.
CUT_US = 120_000_000
IDLE_US = 5_000_000
PAUSE_US = 1_000_000  # ends a sub-flow and a bulk
BULK_PACKETS = 4
