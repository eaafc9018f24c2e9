"""Every metric in one place: its name, its kind, what it means. Names end in their unit; no label ever holds an address.

A role tells its figures as plain numbers when it is asked (``Figures``); nothing is counted twice, once here and once there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

Figures = Mapping[str, float]
Family = CounterMetricFamily | GaugeMetricFamily


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's meaning; a total only grows while the process lives."""

    meaning: str
    is_total: bool


METRICS: Mapping[str, Metric] = {
    "ai_packets_total": Metric("Packets read.", is_total=True),
    "ai_flows_total": Metric("Flows metered.", is_total=True),
    "ai_anomalies_total": Metric("Anomalies published.", is_total=True),
    "ai_policies_total": Metric("Policies proposed.", is_total=True),
    "ai_signed_anew_total": Metric("Messages signed again because they could not leave for two minutes.", is_total=True),
    "ai_feedback_refused_total": Metric("Feedback messages refused.", is_total=True),
    "validator_round": Metric("Current consensus round.", is_total=False),
    "validator_height_blocks": Metric("Committed height.", is_total=False),
    "validator_leader": Metric("Leader of the current round, by order of public keys.", is_total=False),
    "validator_proposals_total": Metric("Blocks proposed by this node.", is_total=True),
    "validator_votes_total": Metric("Votes sent.", is_total=True),
    "validator_timeouts_total": Metric("Rounds given up, repetitions included.", is_total=True),
    "validator_blocks_total": Metric("Blocks committed since the start.", is_total=True),
    "validator_commit_latency_milliseconds_total": Metric("Sum over blocks, from their stamp to their commit.", is_total=True),
    "validator_consensus_refused_total": Metric("Consensus messages refused.", is_total=True),
    "validator_mempool_transactions": Metric("Transactions waiting for a block.", is_total=False),
    "validator_voting": Metric("1 when this node votes, 0 when it cannot.", is_total=False),
    "validator_admitted_total": Metric("Messages admitted.", is_total=True),
    "validator_duplicates_total": Metric("Messages that were known already.", is_total=True),
    "validator_refused_total": Metric("Messages refused.", is_total=True),
    "validator_dead_letters_left_out_total": Metric("Refused messages of a flood that got no dead letter.", is_total=True),
    "validator_equivocations_total": Metric("Proofs that a validator signed twice.", is_total=True),
    "validator_acks_total": Metric("Acks of agents stored.", is_total=True),
    "validator_peers_connected": Metric("Validators connected to this one.", is_total=False),
    "validator_connections_refused_total": Metric("Connections refused or cut off.", is_total=True),
    "validator_frames_lost_total": Metric(
        "Consensus messages dropped because a peer or this node was too slow.", is_total=True
    ),
    "agent_acks_published_total": Metric("Acks published.", is_total=True),
    "agent_refused_total": Metric("Decisions refused before their proof was looked at.", is_total=True),
}


class _Asked(Collector):
    """Gives the figures at the moment of the scrape."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Family]:
        for name, value in self._figures.items():
            metric = METRICS[name]
            family: Family
            if metric.is_total:
                family = CounterMetricFamily(f"cybermesh_{name.removesuffix('_total')}", metric.meaning)
            else:
                family = GaugeMetricFamily(f"cybermesh_{name}", metric.meaning)
            family.add_metric([], value)
            yield family


def render(figures: Figures) -> bytes:
    """Return the figures in Prometheus' text format; every name must be in ``METRICS``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Asked(figures))
    return generate_latest(registry)
