"""Who proposes in a round: a pure function of the round and of committed headers, so that honest nodes agree on it.

Disagreement costs time only: a vote needs the voter's own leader, and a round without a quorum of votes is given up.

Reputation (after Carousel, arXiv 2110.00960, and DiemBFT v4) looks only at what was committed at least ``lag`` rounds ago,
which nodes that take part have in common:

* every round belongs to a validator in turn, its owner. The owner leads it unless it is benched;
* benched is who owned a skipped round and has signed no certificate and made no block since, and who did neither in a whole
  window of blocks. So a dead validator costs two or three timeouts and then none, and a slow one, whose votes come too late for
  every certificate, keeps its place because it makes blocks;
* a benched validator comes back by voting. One whose votes are always the last gets to lead again twice a minute of block time;
* for a benched owner leads somebody else, drawn from those that are neither benched nor among the last f authors;
* when more than f would be benched, or nothing was committed for long, every owner leads: a wrong bench never stops the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import BlockHash, Header, Round

_ORDER_DOMAIN: Final = b"cm/order/1"
_DRAW_DOMAIN: Final = b"cm/leader/1"
_SECOND_CHANCE_MS: Final = 30_000


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


class Reputation:
    """In turn, but not those who were seen to be dead."""

    def __init__(self, committee: Committee) -> None:
        self._turns = RoundRobin(committee)
        self._n = committee.n
        self._f = committee.f
        self._seed = _DRAW_DOMAIN + committee.chain_id + committee.epoch.to_bytes(4, "big")
        self._looks_at = 4 * committee.n
        self._lag = committee.n + 4
        self._known: tuple[Round, BlockHash, int] | None = None

    @property
    def window(self) -> int:
        """What is looked at, and what may be committed above it."""
        return self._looks_at + self._lag + self._n

    def leader(self, round_: Round, committed: Sequence[Header]) -> int:
        """Return the owner of the round, or whoever leads for it."""
        if not committed:
            return self._turns.leader(round_, committed)
        if self._known is None or self._known[:2] != (round_, committed[-1].hash):
            self._known = (round_, committed[-1].hash, self._choose(round_, committed))
        return self._known[2]

    def _choose(self, round_: Round, committed: Sequence[Header]) -> int:
        owner = self._turns.leader(round_, committed)
        seen = [header for header in committed if header.round <= round_ - self._lag][-self._looks_at :]
        if len(seen) < self._n or seen[-1].round < round_ - self._lag - 2 * self._n or _has_second_chance(seen[-self._n - 1 :]):
            return owner
        benched = self.benched(seen)
        if owner not in benched or len(benched) > self._f:
            return owner
        recent = dict.fromkeys(header.author for header in reversed(seen))
        candidates = [each for each in range(self._n) if each not in benched]
        fresh = [each for each in candidates if each not in list(recent)[: self._f]] or candidates
        drawn = hashlib.sha256(self._seed + round_.to_bytes(8, "big") + seen[-1].hash).digest()
        return fresh[int.from_bytes(drawn[:8], "big") % len(fresh)]

    def benched(self, seen: Sequence[Header]) -> set[int]:
        """Return who does not lead, judged by these consecutive committed headers, oldest first."""
        is_whole = len(seen) >= self._looks_at
        benched = set(range(self._n)) if is_whole else set()
        for header in seen:
            # The parent was signed before the rounds that this block skips, and this block was made after them.
            benched = {each for each in benched if not header.parent_signers >> each & 1}
            skipped = range(header.parent_round + 1, header.round)[: self._n]
            benched.update(self._turns.leader(Round(each), ()) for each in skipped)
            benched.discard(header.author)
        return benched


def _has_second_chance(newest: Sequence[Header]) -> bool:
    """Return whether half a minute of block time ended among these headers."""
    return newest[0].time_ms // _SECOND_CHANCE_MS != newest[-1].time_ms // _SECOND_CHANCE_MS
