"""What each engine lately found, so that engines that see the same attack at different times vote in the same election.

Windows show an attack while it runs, flows only when they end. A finding keeps its vote for ``HORIZON_S`` seconds of packet
time; per engine the newest one counts. Bounded: the election longest without a finding makes room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cybermesh.detect.engines import Finding
from cybermesh.detect.ensemble import vote_key

HORIZON_S = 120
ELECTIONS_MAX = 10_000


class RecentFindings:
    """The votes that still count, per election and engine."""

    def __init__(self, horizon_s: int = HORIZON_S, elections_max: int = ELECTIONS_MAX) -> None:
        self._horizon_us = horizon_s * 1_000_000
        self._elections_max = elections_max
        self._votes: dict[tuple[str, ...], dict[str, list[Finding]]] = {}

    def __len__(self) -> int:
        return len(self._votes)

    def with_new(self, findings: Sequence[Finding]) -> Iterator[list[Finding]]:
        """Take new findings; yield each election that has one, with the other engines' votes that still count."""
        fresh: dict[tuple[str, ...], list[Finding]] = {}
        for finding in findings:
            fresh.setdefault(vote_key(finding), []).append(finding)
        for key, group in fresh.items():
            votes = self._votes.pop(key, {})
            now_us = max(finding.last_us for finding in group)
            engines = {finding.engine for finding in group}
            old = [
                finding
                for engine, earlier in votes.items()
                if engine not in engines
                for finding in earlier
                if now_us - finding.last_us <= self._horizon_us
            ]
            self._votes[key] = {**votes, **{engine: [f for f in group if f.engine == engine][:1] for engine in engines}}
            if len(self._votes) > self._elections_max:
                del self._votes[next(iter(self._votes))]
            yield group + old
