"""The anomaly and evidence reducers: what detectors saw, kept as long as it can matter, and whom it wakes.

An anomaly is evidence of nothing by itself. It can be named by its producer's policy, and it lets a policy of another site pass
when both report the same. Bodies stay outside the state; of an address the receipt holds a salted digest.
"""

from __future__ import annotations

from typing import Final

from cybermesh.envelope.intrinsic import read_content
from cybermesh.ledger.draft import Draft, anomaly_reference, evidence_reference, subjects_of
from cybermesh.ledger.governance import anomaly_subject, recent_reports
from cybermesh.ledger.receipts import AnomalyEffect, Code, EvidenceEffect, entity_digest
from cybermesh.ledger.records import AnomalyRecord, EvidenceRecord
from cybermesh.ledger.requests import Verdict, wake_request
from cybermesh.messages import Anomaly, Evidence

ENTITY_CHARS_MAX: Final = 256
_PPM: Final = 1_000_000


def reduce_anomaly(draft: Draft, message: Anomaly) -> Verdict:
    """Treat an admitted AnomalyEvent."""
    key = message.producer_id + message.id.encode()
    if key in draft.anomalies:
        return Verdict(Code.DUPLICATE, "id")
    if draft.tally(message.producer_id).references >= draft.genesis.limits.references_per_producer:
        return Verdict(Code.QUEUE_FULL, "references")
    content = read_content(message)
    entity, confidence_ppm = _subject_in(content, "entity"), round(message.confidence * _PPM)
    record = AnomalyRecord(
        admitted_ms=draft.time_ms,
        confidence_ppm=confidence_ppm,
        entity=entity,
        seq=draft.next_admission(),
        severity=message.severity,
        type=message.type,
        victim=_subject_in(content, "victim"),
    )
    draft.put_anomaly(key, record)
    for policy_id in draft.waiting_for(anomaly_reference(message.producer_id, message.id)):
        wake_request(draft, policy_id)
    _wake_pending(draft, record)
    effect = AnomalyEffect(
        confidence_ppm=confidence_ppm,
        entity=entity_digest(message.signature, entity),
        id=message.id,
        producer=message.producer_id,
        severity=message.severity,
        type=message.type,
    )
    return Verdict(Code.OK, "", (effect,))


def _subject_in(content: dict[str, object], name: str) -> str:
    """Return an address or other text of the payload in its one form; what is missing or too long names nothing."""
    value = content.get(name)
    if not isinstance(value, str) or len(value) > ENTITY_CHARS_MAX:
        return ""
    return anomaly_subject(value) if value else ""


def _wake_pending(draft: Draft, record: AnomalyRecord) -> None:
    for subject in subjects_of(record):
        pending = draft.pending_on(subject)
        if not pending:
            continue
        sites = {site for _, site, _ in recent_reports(draft, subject)}
        if len(sites) >= draft.genesis.governance.corroborating_sites:
            for policy_id in pending:
                wake_request(draft, policy_id)


def reduce_evidence(draft: Draft, message: Evidence) -> Verdict:
    """Treat an admitted EvidenceEvent."""
    key = message.producer_id + message.id.encode()
    if key in draft.evidence:
        return Verdict(Code.DUPLICATE, "id")
    if draft.tally(message.producer_id).references >= draft.genesis.limits.references_per_producer:
        return Verdict(Code.QUEUE_FULL, "references")
    draft.put_evidence(key, EvidenceRecord(admitted_ms=draft.time_ms))
    for policy_id in draft.waiting_for(evidence_reference(message.producer_id, message.id)):
        wake_request(draft, policy_id)
    effect = EvidenceEffect(body=message.content_hash, id=message.id, producer=message.producer_id)
    return Verdict(Code.OK, "", (effect,))
