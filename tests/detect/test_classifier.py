"""The classifier loads only what it may, judges only what it knows, and says what it saw."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from cybermesh.detect import modelfile
from cybermesh.detect.corroboration import FLOWS_MIN, WINDOW_US, Corroboration
from cybermesh.detect.engines.classifier import Classifier, _answered, open_classifier
from cybermesh.detect.modelfile import ModelError
from cybermesh.keys import SigningKey
from cybermesh.telemetry.features import COLUMN, NAMES
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.sources.choose import open_source
from cybermesh.telemetry.windows import WindowBatch
from tests.detect.flow_rows import PERTURBATIONS, flows, many, seconds, trained

ATTACKER, VICTIM = "203.0.113.9", "10.0.0.1"
SITE = SigningKey(b"\x07" * 32)
# Captures of ordinary traffic; from none of them may the classifier raise anything.
BENIGN_CAPTURES = (
    *(
        f"nDPI__{name}.pcap"
        for name in ("instagram", "teams", "netflix", "1kxun", "zoom", "gnutella", "webex", "quic", "http_ipv6")
    ),
    *(f"pcapplusplus__{name}.pcap" for name in ("tls2", "example", "sll", "four_ipv6_http_streams", "raw_ip", "VlanPackets")),
    *("zeek__irc-dcc-send.pcapng", "zeek__ssh.pcap", "zeek__modbusBig.pcap", "zeek__gre-within-gre.pcap"),
)


def mapped(address: str) -> np.ndarray:
    return np.array([0] * 10 + [255, 255, *map(int, address.split("."))], dtype=np.uint8)


def batch(features: np.ndarray, sources: list[str] | None = None, at_us: int = 0) -> FlowBatch:
    n = len(features)
    zeros = np.zeros(n, dtype=np.uint8)
    start = at_us + np.arange(n, dtype=np.int64) * 1_000
    return FlowBatch(
        start_us=start,
        end_us=start + features[:, COLUMN["flow_duration"]].astype(np.int64),
        src=np.stack([mapped(source) for source in sources or [ATTACKER] * n]),
        dst=np.stack([mapped(VICTIM)] * n),
        family=np.full(n, 4, dtype=np.uint8),
        sport=(40_000 + np.arange(n)).astype(np.uint16),
        dport=(1 + np.arange(n)).astype(np.uint16),
        proto=np.full(n, 6, dtype=np.uint8),
        klass=np.ones(n, dtype=np.uint8),
        icmp_type=zeros,
        icmp_code=zeros,
        end_reason=np.full(n, EndReason.TCP_END, dtype=np.uint8),
        features=features,
        known=np.ones(len(NAMES), dtype=np.bool_),
    )


def classifier(**options: bool) -> Classifier:
    return Classifier(trained().model, trained().onnx, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    modelfile.save(tmp_path / "model", trained().model, trained().onnx)
    return tmp_path / "model"


def test_a_scan_is_one_finding_with_its_source_targets_and_explanation() -> None:
    engine = classifier()
    scan = batch(flows(["port_scan"] * 40))
    (finding,) = engine.score_flows(scan)
    assert (finding.type, finding.entity, finding.victim, finding.port) == ("port_scan", ATTACKER, VICTIM, None)
    assert finding.count == int(engine.judged(scan).sum()) >= 36
    assert 0.5 <= finding.score <= trained().model.ceilings["port_scan"] + 1e-9 < 1
    assert finding.rule_id == "flow-classifier/port_scan"
    shown = [name for name in trained().model.important["port_scan"] if name in finding.details]
    assert shown
    assert "benign" in finding.explanation
    assert engine.name == "classifier"


def test_sources_and_types_are_told_apart() -> None:
    kinds = ["port_scan"] * 30 + ["brute_force"] * 30
    found = classifier().score_flows(batch(flows(kinds), ["10.9.9.1"] * 30 + ["10.9.9.2"] * 30))
    assert {(finding.entity, finding.type) for finding in found} == {("10.9.9.1", "port_scan"), ("10.9.9.2", "brute_force")}


def test_a_lone_flow_is_no_finding_but_many_batches_of_one_become_one() -> None:
    engine = classifier()
    rows = flows(["port_scan"] * 30)
    found = [engine.score_flows(batch(rows[i : i + 1], at_us=i * 1_000)) for i in range(3)]
    assert found == [[], [], []]
    assert engine.uncorroborated == 3
    later = [engine.score_flows(replace(batch(rows[i : i + 1]), dport=np.array([i], dtype=np.uint16))) for i in range(3, 30)]
    assert any(later)


def test_a_scan_needs_targets() -> None:
    flood = batch(flows(["port_scan"] * 60))
    assert classifier().score_flows(replace(flood, dport=np.full(60, 80, dtype=np.uint16))) == []


def test_one_packet_and_masked_inputs_and_other_extractors_are_abstentions() -> None:
    engine = classifier()
    rows = flows(many(10))
    single = rows.copy()
    single[:, COLUMN["tot_fwd_pkts"]], single[:, COLUMN["tot_bwd_pkts"]] = 1, 0
    assert engine.score_flows(batch(single)) == []
    assert engine.abstained["single_packet"] == len(rows)
    masked = batch(rows)
    masked.known[COLUMN["flow_duration"]] = False
    assert engine.score_flows(masked) == []
    assert not engine.judged(masked).any()
    assert engine.abstained["unknown_input"] == len(rows)
    assert engine.score_flows(batch(seconds(rows))) == []
    assert engine.abstained["contradiction"] > 0
    assert engine.judged_rows == 0
    assert engine.rows == 3 * len(rows)


def test_a_stream_of_another_extractor_is_refused_as_a_whole_and_believed_again_when_mended() -> None:
    engine = classifier(knows_site=True)
    scans = flows(["port_scan"] * 200)
    twice = PERTURBATIONS["first packet twice"](np.concatenate([scans, flows(["benign"] * 40)]))
    elsewhere = replace(batch(twice), end_reason=np.full(len(twice), EndReason.EXTERNAL, dtype=np.uint8))
    by_row = ~engine.assess(twice, elsewhere.known).judged
    assert 0.1 < by_row.mean() < 0.9  # an empty first packet changes nothing when it is counted twice
    assert engine.score_flows(elsewhere) == []
    assert not engine.judged(elsewhere).any()
    assert engine.abstained["foreign_file"] == len(twice)
    assert engine.score_flows(batch(scans))  # metered here
    mended = replace(elsewhere, features=np.concatenate([scans, flows(["benign"] * 40)]))
    for _ in range(150):
        engine.score_flows(mended)
    assert engine.judged(mended).any()


def test_evidence_holds_every_input_and_replays() -> None:
    engine = classifier()
    (finding,) = engine.score_flows(batch(flows(["port_scan"] * 40)))
    kind, confidence = engine.replay({name: float(finding.details[name]) for name in engine.model.inputs})
    assert (kind, confidence) == (finding.type, finding.details["strongest_score"])


def test_benign_is_a_vote_only_of_a_model_that_knows_the_site() -> None:
    calm = batch(flows(["benign"] * 40))
    stranger, resident = classifier(), classifier(knows_site=True)
    assert stranger.score_flows(calm) == resident.score_flows(calm) == []
    assert not stranger.judged(calm).any()
    assert resident.judged(calm).mean() > 0.9


def test_a_model_that_does_not_know_the_site_alone_reaches_no_policy() -> None:
    guesses = batch(flows(["brute_force"] * 30))
    (strange,), (known,) = classifier().score_flows(guesses), classifier(knows_site=True).score_flows(guesses)
    assert strange.severity < 8 <= known.severity


def test_a_flow_that_stayed_alone_is_an_abstention() -> None:
    engine = classifier(knows_site=True)
    lone = batch(flows(["port_scan"]))
    assert engine.score_flows(lone) == []
    assert not engine.judged(lone).any()


def test_every_row_of_a_long_batch_is_scored_as_it_would_be_alone() -> None:
    engine = classifier()
    rows = flows(many(300))
    known = np.ones(len(NAMES), dtype=np.bool_)
    whole = engine.assess(np.vstack([rows, rows]), known)
    for row in (0, 999, 1000, 1199, 1200, 2399):
        alone = engine.assess(np.vstack([rows, rows])[row : row + 1], known)
        np.testing.assert_allclose(whole.probabilities[row], alone.probabilities[0], atol=1e-6)
        assert whole.reasons[row] == alone.reasons[0]
    assert len(engine.assess(rows[:0], known).reasons) == 0


def test_windows_are_left_to_the_other_engines() -> None:
    assert classifier().score_windows(WindowBatch.__new__(WindowBatch)) == []


def test_a_flood_that_anybody_can_forge_says_so() -> None:
    rows = flows(["ddos"] * 20)
    engine = classifier()
    (finding,) = engine.score_flows(batch(rows))
    assert finding.type == "ddos"
    assert finding.spoofable is False  # data both ways after the handshake
    single = rows.copy()
    single[:, COLUMN["tot_bwd_pkts"]] = 0
    assert not _answered(batch(single), np.arange(20)).any()


def test_corroboration_forgets_after_its_window_and_stays_bounded() -> None:
    memory = Corroboration(keys_max=10)
    enough = FLOWS_MIN["brute_force"]
    assert not memory.add(b"a", "brute_force", set(range(enough - 1)), 0)
    assert not memory.add(b"a", "brute_force", {99}, WINDOW_US + 1)
    assert memory.add(b"a", "brute_force", set(range(enough)), WINDOW_US + 2)
    for key in range(100):
        memory.add(bytes([key]), "dos", {1}, 5)
    assert len(memory) == 10


def test_a_model_that_is_neither_pinned_nor_signed_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="neither pinned"):
        open_classifier(saved)
    assert open_classifier(saved, allow_unsigned=True).model.inputs == trained().model.inputs


def test_the_sites_signature_opens_its_model_and_no_other(saved: Path) -> None:
    modelfile.sign(saved, SITE)
    opened = open_classifier(saved, site_key=SITE.public)
    assert opened.knows_site
    with pytest.raises(ModelError, match="neither pinned"):
        open_classifier(saved, site_key=SigningKey(b"\x08" * 32).public)
    (saved / modelfile.SIGNATURE).write_text("not hex")
    with pytest.raises(ModelError, match="neither pinned"):
        open_classifier(saved, site_key=SITE.public)


@pytest.mark.parametrize("name", [modelfile.ONNX, modelfile.METADATA])
def test_one_changed_byte_is_refused(name: str, saved: Path) -> None:
    modelfile.sign(saved, SITE)
    data = bytearray((saved / name).read_bytes())
    for place in range(0, len(data), max(1, len(data) // 25)):
        changed = bytearray(data)
        changed[place] ^= 1
        (saved / name).write_bytes(changed)
        with pytest.raises(ModelError):
            open_classifier(saved, site_key=SITE.public)
        with pytest.raises(ModelError):
            open_classifier(saved, allow_unsigned=True)


def rewritten(saved: Path, **changes: object) -> Path:
    """Change the metadata as somebody would who also mends its digest."""
    body = orjson.loads((saved / modelfile.METADATA).read_bytes())
    body.pop("sha256")
    body |= changes
    body["sha256"] = hashlib.sha256(modelfile._dump(body)).hexdigest()
    (saved / modelfile.METADATA).write_bytes(modelfile._dump(body) + b"\n")
    return saved


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"definition_hash": "0" * 64}, "other feature definitions"),
        ({"inputs": ["flow_duration", "no_such_feature"]}, "the meter does not have"),
        ({"inputs": ["dst_port"]}, "ports are never inputs"),
        ({"inputs": ["flow_duration"]}, "other inputs"),
        ({"format": 99}, "format 99"),
        ({"classes": 3}, "not a model's metadata"),
    ],
    ids=["definitions", "unknown", "port", "width", "format", "type"],
)
def test_a_model_of_other_features_is_refused(changes: dict, reason: str, saved: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        open_classifier(rewritten(saved, **changes), allow_unsigned=True)


def test_missing_and_foreign_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        open_classifier(tmp_path / "nowhere")
    (saved / modelfile.METADATA).write_bytes(b"{}")
    with pytest.raises(ModelError, match="not a model's metadata"):
        open_classifier(saved, allow_unsigned=True)
    with pytest.raises(ModelError, match="not an ONNX model"):
        Classifier(trained().model, b"bytes of something else")


def test_the_shipped_model_is_pinned_small_and_documented() -> None:
    directory = modelfile.shipped_directory()
    model = open_classifier().model
    assert (directory / modelfile.ONNX).stat().st_size <= 1_000_000
    card = (directory / modelfile.CARD).read_text(encoding="utf-8")
    assert model.record["data_sha256"] in card
    assert model.record["terms"] in card
    assert not open_classifier().knows_site


def test_the_shipped_model_raises_the_shipped_scan_and_no_bystander() -> None:
    capture = Path(str(modelfile.shipped_directory().parents[1] / "demo.pcap"))
    labels = orjson.loads(capture.with_name("demo.labels.json").read_bytes())
    found = findings(open_classifier(), capture)
    attackers = {source for attack in labels["attacks"] for source in attack["sources"]}
    assert "port_scan" in {finding.type for finding in found}
    assert {finding.entity for finding in found} <= attackers


@pytest.mark.shared
@pytest.mark.parametrize("name", BENIGN_CAPTURES)
def test_the_shipped_model_raises_nothing_on_ordinary_traffic(name: str, shared_data: Path) -> None:
    assert findings(open_classifier(), shared_data / "pcaps" / name) == []


def findings(engine: Classifier, capture: Path) -> list:
    meter, found = FlowMeter(), []
    with closing(open_source(str(capture))) as source:
        for packets in source.batches():
            found += engine.score_flows(meter.add(packets))
    found += engine.score_flows(meter.flush())
    logging.getLogger(__name__).info("%s: %d of %d flows judged", capture.name, engine.judged_rows, engine.rows)
    return found
