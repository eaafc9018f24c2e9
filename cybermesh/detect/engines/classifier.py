"""The classifier: boosted trees over flow features, believed only where they were calibrated.

Rules:

- every row of a batch is scored, in pieces of 1,000, by one thread;
- while a stream of flows metered elsewhere shows that another extractor makes it, none of its rows is judged;
- a row the guard refuses is an abstention: it is no vote, neither for an attack nor for benign, and it is counted by reason;
- scores are calibrated probabilities, never above what the calibration rows support;
- flows of one source and one type become one finding, whose score is their mean, once there are enough of them
  (``corroboration``);
- benign is a vote only of a model that was calibrated on the site's own traffic: on a network it has not seen, the shipped
  model calls most attacks benign, and that must not silence the other engines. For the same reason such a model alone raises
  alerts but no policies: its severity stays below what a policy needs.

Only flows are judged; windows are other engines' work.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from cybermesh.detect import calibration, guard
from cybermesh.detect.corroboration import Corroboration
from cybermesh.detect.engines import Finding
from cybermesh.detect.engines.rules import address_text
from cybermesh.detect.extractor import ForeignStream
from cybermesh.detect.guard import Reason
from cybermesh.detect.modelfile import Model, ModelError, load, shipped_directory
from cybermesh.telemetry.features import COLUMN
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.windows import WindowBatch

BATCH_ROWS = 1_000
FINDINGS_MAX = 256  # of one batch; more (source, type) pairs than that are counted, not listed
BENIGN = "benign"
_SEVERITY = {"ddos": 9, "dos": 8, "port_scan": 7, "brute_force": 8, "botnet": 8, "web_attack": 7, "infiltration": 8}
_SEVERITY_OTHERWISE = 7
_SEVERITY_OF_STRANGERS_MAX = 7  # a policy needs 8
_FLOODS = frozenset({"ddos", "dos"})
_SHOWN_FEATURES = 6
_EXPLAINED_FEATURES = 3


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the model says of n flows, and which of it counts.

    ``probabilities`` is float64[n, classes], calibrated, in the order of the model's classes. ``claimed`` (intp[n]) is the
    likeliest class; ``decided`` the same, or benign where an attack stays below its threshold. ``confidence`` (float64[n])
    belongs to ``decided``. ``reasons`` (uint8[n]) are ``guard.Reason`` bits, 0 where the row is judged.
    """

    probabilities: npt.NDArray[np.float64]
    claimed: npt.NDArray[np.intp]
    decided: npt.NDArray[np.intp]
    confidence: npt.NDArray[np.float64]
    reasons: npt.NDArray[np.uint8]

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """Mark of rows that count, bool[n]."""
        marked: npt.NDArray[np.bool_] = self.reasons == 0
        return marked


@dataclass(frozen=True, slots=True)
class _Seen:
    """Some flows of a batch as lists, which are many times faster than columns to look at one by one."""

    src: list[bytes]
    dst: list[bytes]
    sport: list[int]
    dport: list[int]
    start_us: list[int]
    end_us: list[int]

    @classmethod
    def of(cls, flows: FlowBatch, rows: npt.NDArray[np.intp]) -> _Seen:
        src, dst = (addresses[rows].view("V16").ravel().tolist() for addresses in (flows.src, flows.dst))
        columns = (flows.sport, flows.dport, flows.start_us, flows.end_us)
        return cls(src, dst, *(column[rows].tolist() for column in columns))


class Classifier:
    """Scores flows with a model; make it with ``open_classifier``, which checks where the model comes from.

    ``abstained`` counts rows by reason (a row can have several), ``judged_rows`` and ``rows`` are totals,
    ``uncorroborated`` counts flows taken for an attack that stayed alone, ``unlisted`` findings beyond ``FINDINGS_MAX`` of one
    batch. ``knows_site`` says whether the model was trained or calibrated on this site's traffic.

    Raises:
        ModelError: the trees are no ONNX model or do not take the inputs that the metadata names.
    """

    def __init__(self, model: Model, onnx: bytes, *, knows_site: bool = False) -> None:
        self.model = model
        self.knows_site = knows_site
        self.abstained: Counter[str] = Counter()
        self.rows = 0
        self.judged_rows = 0
        self.unlisted = 0
        self.uncorroborated = 0
        self._corroboration = Corroboration()
        self._stream = ForeignStream()
        self._session = _session(model, onnx)
        self._columns = np.array([COLUMN[name] for name in model.inputs], dtype=np.intp)
        self._benign = model.classes.index(BENIGN)
        self._thresholds = np.array([model.thresholds.get(name, 0.0) for name in model.classes])
        self._ceilings = np.array([model.ceilings.get(name, 1.0) for name in model.classes])
        self._last: tuple[FlowBatch, Assessment] | None = None
        self._reported = np.empty(0, dtype=np.intp)  # rows of the last batch that are in findings

    @property
    def name(self) -> str:
        """``classifier``."""
        return "classifier"

    def assess(self, features: npt.NDArray[np.float64], known: npt.NDArray[np.bool_]) -> Assessment:
        """Return what the model says of features float64[n, 79] whose columns ``known`` (bool[79]) the source could fill."""
        raw = np.empty((len(features), len(self.model.classes)), dtype=np.float64)
        reasons = np.empty(len(features), dtype=np.uint8)
        unknown = not known[self._columns].all()
        for start in range(0, len(features), BATCH_ROWS):
            piece = slice(start, start + BATCH_ROWS)
            rows = features[piece]
            scored = self._session.run(["probabilities"], {"features": rows[:, self._columns].astype(np.float32)})[0]
            raw[piece] = calibration.shift(scored.astype(np.float64), self._benign, self.model.benign_shift)
            reasons[piece] = guard.reasons(self.model.density, rows, known, raw[piece].argmax(axis=1))
        if unknown:
            reasons |= np.uint8(Reason.UNKNOWN_INPUT)
        probabilities = calibration.soften(raw, self.model.temperature)
        claimed = probabilities.argmax(axis=1)
        each = np.arange(len(features))
        decided = np.where(probabilities[each, claimed] >= self._thresholds[claimed], claimed, self._benign)
        confidence = np.minimum(probabilities[each, decided], self._ceilings[decided])
        return Assessment(probabilities, claimed, decided, confidence, reasons)

    def score_flows(self, flows: FlowBatch) -> list[Finding]:
        """Return one finding for each source and attack type among the judged flows; the others are counted."""
        assessment = self._without_foreign(flows, self.assess(flows.features, flows.known))
        self._last = (flows, assessment)
        self._count(assessment)
        attacks = np.flatnonzero(assessment.judged & (assessment.decided != self._benign))
        seen = _Seen.of(flows, attacks)
        groups: defaultdict[tuple[bytes, int], list[int]] = defaultdict(list)
        for place, source_and_kind in enumerate(zip(seen.src, assessment.decided[attacks].tolist(), strict=True)):
            groups[source_and_kind].append(place)
        enough = [
            (kind, attacks[places])
            for (source, kind), places in sorted(groups.items())
            if self._is_corroborated(seen, source, kind, places)
        ]
        self.uncorroborated += len(attacks) - sum(len(rows) for _, rows in enough)
        enough.sort(key=lambda item: -len(item[1]))
        self.unlisted += max(len(enough) - FINDINGS_MAX, 0)
        self._reported = np.concatenate([np.empty(0, dtype=np.intp), *(rows for _, rows in enough)])
        return [self._finding(flows, assessment, kind, rows) for kind, rows in enough[:FINDINGS_MAX]]

    def _without_foreign(self, flows: FlowBatch, assessment: Assessment) -> Assessment:
        """Refuse all rows metered elsewhere while their stream is another extractor's."""
        elsewhere = flows.end_reason == EndReason.EXTERNAL
        if not elsewhere.any():
            return assessment
        contradictions = (assessment.reasons & np.uint8(Reason.CONTRADICTION)).astype(np.bool_)
        self._stream.add(int(elsewhere.sum()), int((elsewhere & contradictions).sum()))
        if not self._stream.is_foreign:
            return assessment
        reasons = np.where(elsewhere, assessment.reasons | np.uint8(Reason.FOREIGN_FILE), assessment.reasons)
        return replace(assessment, reasons=reasons.astype(np.uint8))

    def replay(self, values: Mapping[str, float]) -> tuple[str, float]:
        """Judge again the flow of which evidence holds every input; return the type and the confidence it has.

        Raises:
            KeyError: a value is missing.
        """
        features = np.zeros((1, len(COLUMN)))
        for name in self.model.inputs:
            features[0, COLUMN[name]] = values[name]
        assessment = self.assess(features, np.ones(len(COLUMN), dtype=np.bool_))
        return self.model.classes[int(assessment.decided[0])], float(assessment.confidence[0])

    def score_windows(self, windows: WindowBatch) -> list[Finding]:
        """Return nothing: the classifier judges flows."""
        return []

    def judged(self, flows: FlowBatch) -> npt.NDArray[np.bool_]:
        """Mark the flows on which the classifier votes, bool[n]; the others are abstentions. Asked after ``score_flows``.

        A flow it votes on and that is in no finding is a vote for benign.
        """
        assert self._last is not None
        assert self._last[0] is flows, "score the batch first"
        assessment = self._last[1]
        votes: npt.NDArray[np.bool_] = assessment.judged & (assessment.decided == self._benign) & self.knows_site
        votes[self._reported] = True
        return votes

    def _is_corroborated(self, seen: _Seen, source: bytes, kind: int, places: list[int]) -> bool:
        """Record a source's flows of one class; whether they are enough to report. A scan needs targets, the others flows."""
        type_ = self.model.classes[kind]
        end_us = max([seen.end_us[place] for place in places])
        marks: set[Hashable]
        if type_ == "ddos":  # many sources, few flows of each: their common victim tells
            marks = {(source, seen.sport[place]) for place in places}
            enough = False
            for victim in sorted({seen.dst[place] for place in places}):
                enough |= self._corroboration.add(victim, type_, marks, end_us)
            return enough
        if type_ == "port_scan":
            marks = {(seen.dst[place], seen.dport[place]) for place in places}
        else:
            marks = {(seen.start_us[place], seen.sport[place]) for place in places}
        return self._corroboration.add(source, type_, marks, end_us)

    def _count(self, assessment: Assessment) -> None:
        self.rows += len(assessment.reasons)
        self.judged_rows += int(assessment.judged.sum())
        for reason in Reason:
            if marked := int((assessment.reasons & np.uint8(reason)).astype(np.bool_).sum()):
                self.abstained[(reason.name or str(int(reason))).lower()] += marked

    def _finding(self, flows: FlowBatch, assessment: Assessment, kind: int, rows: npt.NDArray[np.intp]) -> Finding:
        """Describe the flows ``rows`` of one source that the model gives the class ``kind``."""
        type_ = self.model.classes[kind]
        strongest = int(rows[np.argmax(assessment.confidence[rows])])
        everything = dict(zip(self.model.inputs, flows.features[strongest, self._columns].tolist(), strict=True))
        # The important ones first; all of them, so that it replays.
        values = {name: everything[name] for name in self.model.important.get(type_, ())[:_SHOWN_FEATURES]} | everything
        score = float(assessment.confidence[rows].mean())
        severity = _SEVERITY.get(type_, _SEVERITY_OTHERWISE)
        details: dict[str, float | int | str] = {
            "model": self.model.digest[:16],
            "flows": len(rows),
            "strongest_score": float(assessment.confidence[strongest]),
            "spread": float(assessment.confidence[rows].std()),
            **values,
        }
        return Finding(
            engine=self.name,
            type=type_,
            entity=address_text(flows.src[strongest]),
            victim=_single_victim(flows, rows),
            port=_single(flows.dport[rows]),
            protocol=_single(flows.proto[rows]),
            score=score,
            severity=severity if self.knows_site else min(severity, _SEVERITY_OF_STRANGERS_MAX),
            first_us=int(flows.start_us[rows].min()),
            last_us=int(flows.end_us[rows].max()),
            count=len(rows),
            spoofable=type_ in _FLOODS and not _answered(flows, rows).any(),
            explanation=self._explain(type_, len(rows), score, values),
            rule_id=f"{self.model.name}/{type_}",
            details=details,
        )

    def _explain(self, type_: str, count: int, score: float, values: dict[str, float]) -> str:
        """Say what was seen, and what benign flows of the training data look like in the same features."""
        shown = []
        for name in list(values)[:_EXPLAINED_FEATURES]:
            low, _, high = self.model.typical[name]
            shown.append(f"{name} {values[name]:.4g} (benign {low:.4g} to {high:.4g})")
        return f"{count} flow(s) look like {type_} with mean confidence {score:.2f}; the strongest: {', '.join(shown)}"


def open_classifier(
    directory: Path | None = None, *, site_key: bytes | None = None, allow_unsigned: bool = False
) -> Classifier:
    """Load and check a model (the shipped one by default) and return its classifier.

    Raises:
        ModelError: as ``modelfile.load``.
    """
    model, onnx = load(directory or shipped_directory(), site_key=site_key, allow_unsigned=allow_unsigned)
    return Classifier(model, onnx, knows_site=directory is not None and directory != shipped_directory())


def _session(model: Model, onnx: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except (
        onnxruntime.capi.onnxruntime_pybind11_state.Fail,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ) as error:
        raise ModelError(f"{model.name}: not an ONNX model: {error}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    fits = (
        len(inputs) == 1
        and inputs[0].name == "features"
        and inputs[0].shape[1] == len(model.inputs)
        and [output.name for output in outputs] == ["probabilities"]
        and outputs[0].shape[1] == len(model.classes)
    )
    if not fits:
        raise ModelError(f"{model.name}: the trees take other inputs or give other outputs than the metadata says; train again")
    return session


def _single_victim(flows: FlowBatch, rows: npt.NDArray[np.intp]) -> str | None:
    same = (flows.dst[rows] == flows.dst[rows[0]]).all()
    return address_text(flows.dst[rows[0]]) if same else None


def _single(values: npt.NDArray[np.uint16] | npt.NDArray[np.uint8]) -> int | None:
    return int(values[0]) or None if (values == values[0]).all() else None


def _answered(flows: FlowBatch, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Mark TCP flows whose sender must have seen the answer: data flowed after packets of both sides; nobody can forge that."""
    features = flows.features[rows]
    data = features[:, COLUMN["totlen_fwd_pkts"]] + features[:, COLUMN["totlen_bwd_pkts"]] > 0
    both = (features[:, COLUMN["tot_fwd_pkts"]] >= 2) & (features[:, COLUMN["tot_bwd_pkts"]] >= 1)
    answered: npt.NDArray[np.bool_] = (features[:, COLUMN["protocol"]] == guard.TCP) & data & both
    return answered
