"""Who proposes in a round: a pure function of the round and of committed headers, so that honest nodes agree on it.

Disagreement costs time only: a vote needs the voter's own leader, and a round without a quorum of votes is given up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import Header, Round

_ORDER_DOMAIN: Final = b"cm/order/1"


class LeaderElection(Protocol):
    """Chooses leaders. ``window`` is how many committed headers it wants to see."""

    @property
    def window(self) -> int:
        """How many of the newest committed headers ``leader`` looks at."""
        ...

    def leader(self, round_: Round, committed: Sequence[Header]) -> int:
        """Return the leader of a round; ``committed`` are the newest committed headers of this epoch, oldest first."""
        ...


class RoundRobin:
    """Every validator in turn, in an order drawn anew for each epoch."""

    def __init__(self, committee: Committee) -> None:
        seed = _ORDER_DOMAIN + committee.chain_id + committee.epoch.to_bytes(4, "big")
        keys = committee.public_keys
        self._order = sorted(range(committee.n), key=lambda index: hashlib.sha256(seed + keys[index]).digest())

    @property
    def window(self) -> int:
        """No header is needed."""
        return 0

    def leader(self, round_: Round, committed: Sequence[Header]) -> int:
        """Return ``order[round mod n]``."""
        return self._order[round_ % len(self._order)]
