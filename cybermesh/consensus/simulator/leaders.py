"""Leaders by script: a scenario decides who leads its first rounds, so that a twin leads when it hurts most."""

from __future__ import annotations

from collections.abc import Sequence

from cybermesh.consensus.leader import LeaderElection
from cybermesh.consensus.types import Header, Round


class Scripted:
    """``leaders`` are those of rounds 1, 2, …; later rounds are for ``base`` to decide."""

    def __init__(self, leaders: Sequence[int], base: LeaderElection) -> None:
        self._leaders = tuple(leaders)
        self._base = base

    @property
    def window(self) -> int:
        """How many of the newest committed headers the election of later rounds looks at."""
        return self._base.window

    def leader(self, round_: Round, committed: Sequence[Header]) -> int:
        """Return the leader of a round."""
        if round_ <= len(self._leaders):
            return self._leaders[round_ - 1]
        return self._base.leader(round_, committed)
