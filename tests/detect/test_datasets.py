"""Every variant's header is read into the same vector, and what cannot be read says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cybermesh.detect import datasets
from cybermesh.detect.datasets import DatasetError, label_class, read, split_by_time
from cybermesh.telemetry.cic_columns import OTHER_MEANING, VARIANTS, recognise
from cybermesh.telemetry.features import COLUMN, NAMES
from tests.detect import flow_rows
from tests.detect.flow_rows import LABELS, PERTURBATIONS, as_improved, flows, many, variant, write_table

KINDS = many(15)
NAMED = [LABELS[kind] for kind in KINDS]


@pytest.mark.parametrize("of", VARIANTS, ids=lambda of: of.name)
def test_every_variant_gives_the_same_vector(of, tmp_path: Path) -> None:
    rows = flows(KINDS)
    dataset = read(write_table(tmp_path / "t.csv", of, as_improved(rows) if "improved" in of.name else rows, NAMED))
    assert dataset.variant == of.name
    for name, index in COLUMN.items():
        known = name in of.columns and name not in of.other_meaning
        assert dataset.known[index] == known, name
        np.testing.assert_array_equal(dataset.features[:, index], rows[:, index] if known else 0.0, err_msg=name)
    assert dataset.labels.tolist() == KINDS
    assert not dataset.foreign.any()
    assert dataset.features.shape == (60, len(NAMES))


def test_the_2018_spelling_and_blanks_around_names_are_recognised() -> None:
    spelled = ["Dst Port", "Protocol", "Timestamp", "Flow Duration", "Tot Fwd Pkts", "TotLen Fwd Pkts", "Flow Byts/s"]
    named = [name for name in NAMES if name != "src_port"]
    header = spelled + [name.replace("_", " ").title() for name in named]
    found = recognise([f" {name} " for name in header])
    assert found is not None
    assert found.name.startswith("CSE-CIC-IDS2018")


def test_gzip_reads_like_plain_text_and_the_digest_is_the_files(tmp_path: Path) -> None:
    rows = as_improved(flows(KINDS))
    plain = read(write_table(tmp_path / "t.csv", variant("improved"), rows, NAMED))
    packed = read(write_table(tmp_path / "t.csv.gz", variant("improved"), rows, NAMED))
    np.testing.assert_array_equal(plain.features, packed.features)
    assert plain.digest != packed.digest
    assert len(plain.digest) == 64


def test_an_unknown_header_names_the_nearest_variant_and_what_differs(tmp_path: Path) -> None:
    of = variant("improved")
    gone = [f"{side}_pkt_len_{what}" for side in ("fwd", "bwd") for what in ("max", "min", "mean", "std")]
    columns = {name: column for name, column in of.columns.items() if name not in {*gone, "idle_min"}}
    columns |= {"extra": "Idle Minimum"}
    path = tmp_path / "t.csv"
    path.write_text(",".join([*columns.values(), "Label"]) + "\n" + ",".join(["0"] * (len(columns) + 1)) + "\n")
    with pytest.raises(DatasetError, match=r"nearest: CIC improved.*'Fwd Packet Length Max'.*'Idle Minimum'"):
        read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"\x1f\x8bbroken", "gzip"), (b"a,b\n1,2\n", "not a known flow table")],
    ids=["empty", "broken gzip", "foreign"],
)
def test_a_bad_file_is_one_clear_error(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=reason):
        read(path)


def test_a_missing_file_and_a_missing_label_say_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        read(tmp_path / "none.csv")
    of = variant("CyberMesh")
    path = write_table(tmp_path / "t.csv", of, flows(KINDS), NAMED)
    path.write_text(path.read_text().replace("Label", "Verdict"))
    with pytest.raises(DatasetError, match="no label column"):
        read(path)


def test_the_en_dash_of_2017_is_read_in_code_page_1252_and_in_utf_8(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", variant("improved"), as_improved(flows(KINDS)), ["Web Attack - XSS"] * len(KINDS))
    text = path.read_text()
    for encoding in ("cp1252", "utf-8", "utf-8-sig"):
        path.write_bytes(text.replace("Web Attack - XSS", " Web Attack \u2013 XSS ").encode(encoding))
        dataset = read(path)
        assert set(dataset.labels.tolist()) == {"web_attack"}
        assert set(dataset.names.tolist()) == {"Web Attack \u2013 XSS"}


def test_a_few_missing_columns_are_unknown_features(tmp_path: Path) -> None:
    of = variant("improved")
    columns = {name: column for name, column in of.columns.items() if name not in {"src_port", "dst_port", "idle_min"}}
    dataset = read(write_table(tmp_path / "t.csv", of, as_improved(flows(KINDS)), NAMED, header=columns))
    assert not dataset.known[[COLUMN["src_port"], COLUMN["dst_port"], COLUMN["idle_min"]]].any()
    assert dataset.known[COLUMN["flow_duration"]]
    assert not dataset.foreign.any()


def test_unknown_labels_and_attempts_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = as_improved(flows(KINDS))
    labels = ["DoS Hulk - Attempted", *NAMED[1:]]
    dataset = read(write_table(tmp_path / "t.csv", variant("improved"), rows, labels))
    assert len(dataset) == len(rows) - 1
    assert dataset.skipped == {"attempted attack without effect": 1}
    labels = [*NAMED[:2], "Bananas", *NAMED[3:]]
    dataset = read(write_table(tmp_path / "t.csv", variant("improved"), rows, labels))
    assert (len(dataset), dataset.skipped) == (len(rows) - 1, {"unknown label 'Bananas'": 1})
    nothing = [f"fruit {number}" for number in range(len(rows))]
    with pytest.raises(DatasetError, match=r"no usable row .*unknown label 'fruit 0'.*known classes"):
        read(write_table(tmp_path / "t.csv", variant("improved"), rows, nothing))


def test_a_file_in_pieces_is_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "t.csv", variant("improved"), as_improved(flows(KINDS)), NAMED)
    whole = read(path)
    monkeypatch.setattr(datasets, "PIECE_ROWS", 3)
    pieces = list(datasets.stream(path))
    assert max(map(len, pieces)) == 3
    np.testing.assert_array_equal(read(path).features, whole.features)
    np.testing.assert_array_equal(read(path).order, whole.order)
    assert {piece.digest for piece in pieces} == {whole.digest}


def test_not_a_number_infinity_and_empty_cells_stand_for_rates_that_do_not_exist(tmp_path: Path) -> None:
    rows = as_improved(flows(["port_scan"] * 3))
    for name in ("flow_duration", "flow_iat_mean", "flow_iat_max", "flow_iat_min", "fwd_iat_tot", "bwd_iat_tot"):
        rows[:, COLUMN[name]] = 0
    for name in ("flow_byts_s", "flow_pkts_s", "fwd_pkts_s", "bwd_pkts_s"):
        rows[:, COLUMN[name]] = [np.nan, np.inf, -1]
    path = write_table(tmp_path / "t.csv", variant("improved"), rows, ["Portscan"] * 3)
    path.write_text(path.read_text().replace("nan", "").replace("inf", " Infinity"))
    dataset = read(path)
    assert len(dataset) == 3
    assert not dataset.foreign.any()
    assert (dataset.features[:, COLUMN["flow_byts_s"]] == 0).all()


def test_rows_can_be_presumed_benign_whatever_their_label_column_says(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", variant("improved"), as_improved(flows(KINDS)), NAMED)
    path.write_text(path.read_text().replace("Label", "Verdict"))
    assert set(read(path, presumed="benign").labels.tolist()) == {"benign"}


def test_broken_rows_are_counted_not_fatal(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", variant("improved"), as_improved(flows(KINDS)), NAMED)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "1,2,3", lines[-1].replace("29200.0", "many")]) + "\n")
    dataset = read(path)
    assert len(dataset) == len(KINDS)
    assert dataset.skipped == {"wrong number of columns": 1, "not a number": 1}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("BENIGN", "benign"),
        ("DDoS", "ddos"),
        ("DDOS attack-HOIC", "ddos"),
        ("DrDoS_NTP", "ddos"),
        ("DoS Slowloris", "dos"),
        ("DoS attacks-Hulk", "dos"),
        ("Heartbleed", "dos"),
        ("Portscan", "port_scan"),
        ("PortScan", "port_scan"),
        ("Infiltration - Portscan", "port_scan"),
        ("Infiltration - NMAP Portscan", "port_scan"),
        ("Infiltration", "infiltration"),
        ("Infilteration", "infiltration"),
        ("FTP-Patator", "brute_force"),
        ("SSH-Bruteforce", "brute_force"),
        ("Bot", "botnet"),
        ("Botnet Ares", "botnet"),
        ("Web Attack \x96 XSS", "web_attack"),
        ("Web Attack - Brute Force", "web_attack"),
        ("Brute Force -Web", "web_attack"),
        ("SQL Injection", "web_attack"),
        ("dns_tunnel", "dns_tunnel"),
        ("no such thing", None),
    ],
)
def test_labels_of_all_tables_map_to_classes(label: str, expected: str | None) -> None:
    assert label_class(label) == expected


def test_known_deviations_are_undone(tmp_path: Path) -> None:
    rows = as_improved(flows(KINDS))
    scan = KINDS.index("port_scan")
    times = [i for name, i in COLUMN.items() if "iat" in name or name in {"flow_duration", "flow_byts_s"}]
    rows[scan, times] = 0
    for name in ("flow_byts_s", "flow_pkts_s", "fwd_pkts_s", "bwd_pkts_s"):
        rows[scan, COLUMN[name]] = -1
    packets = 3000
    rows[0, COLUMN["fwd_header_len"]] = 20 * packets - 65536
    rows[0, COLUMN["tot_fwd_pkts"]] = packets
    dataset = read(write_table(tmp_path / "t.csv", variant("improved"), rows, NAMED))
    assert dataset.features[scan, COLUMN["flow_pkts_s"]] == 0
    assert not dataset.foreign[scan]
    assert dataset.features[0, COLUMN["fwd_header_len"]] == 20 * packets


def test_no_known_feature_of_a_cic_table_is_one_of_other_meaning(tmp_path: Path) -> None:
    dataset = read(write_table(tmp_path / "t.csv", variant("improved"), as_improved(flows(KINDS)), NAMED))
    assert not any(dataset.known[COLUMN[name]] for name in OTHER_MEANING)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_file_of_another_extractor_is_recognised_as_a_whole(name: str, tmp_path: Path) -> None:
    rows = as_improved(flows(many(40)))
    udp = np.arange(len(rows)) % 4 == 0
    rows = np.where(udp[:, None], _as_udp(rows), rows)
    labels = [LABELS[kind] for kind in many(40)]
    assert not read(write_table(tmp_path / "clean.csv", variant("improved"), rows, labels)).foreign_file
    assert read(write_table(tmp_path / "t.csv", variant("improved"), PERTURBATIONS[name](rows), labels)).foreign_file


def _as_udp(rows: np.ndarray) -> np.ndarray:
    out = rows.copy()
    for name, index in COLUMN.items():
        if name.endswith(("flag_cnt", "flag_count", "_flags")) or name.startswith("init_"):
            out[:, index] = 0
    out[:, COLUMN["protocol"]] = 17
    for side in ("fwd", "bwd"):
        out[:, COLUMN[f"{side}_header_len"]] = 8 * out[:, COLUMN[f"tot_{side}_pkts"]]
    return out


def test_a_split_by_time_keeps_every_label_on_both_sides_and_the_order(tmp_path: Path) -> None:
    dataset = flow_rows.synthetic()
    early = split_by_time(dataset, 0.7)
    for name in np.unique(dataset.names):
        own = dataset.names == name
        assert early[own].sum() == round(0.7 * own.sum())
        assert dataset.order[own & early].max() < dataset.order[own & ~early].min()


def test_a_table_without_readable_times_keeps_the_row_order() -> None:
    assert datasets._microseconds(["", ""]) is None
    assert datasets._microseconds(["5/7/2017 8:55"]) is None
    assert datasets._microseconds(["1499072261826651", "1499072261826652"]).tolist() == [1499072261826651, 1499072261826652]
