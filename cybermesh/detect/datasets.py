"""Labelled flow tables as numbers: reads the CIC family of CSV files into the order of ``features.NAMES``.

Rules:

- the header decides the variant; an unknown header is refused with the nearest known one and the columns that differ;
- what a variant does not have, or means otherwise, is 0 and marked unknown, never guessed;
- known deviations of the tools are undone (features specification, section 8): -1 and infinity where a rate does not exist
  become 0, header lengths that overflowed 16 bits get their 65,536 back;
- a row that contradicts the definitions its header promises is kept and marked ``foreign``: another extractor wrote it. An
  extractor is a property of a file, so when more than 2 % of the rows are marked, or more than 10 % are what no TCP
  stack sends, the file is (``foreign_file``);
- attempts without effect ("... - Attempted") are neither attack nor benign and are left out, counted.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cybermesh.detect import guard
from cybermesh.detect.engines import TYPES
from cybermesh.telemetry.cic_columns import IMPROVED, Variant, clean, explain_unknown, recognise
from cybermesh.telemetry.features import NAMES

FOREIGN_FILE_SHARE = 0.02
FOREIGN_FILE_ROWS_MIN = 5
IMPLAUSIBLE_FILE_SHARE = 0.1
BENIGN = "benign"
CLASSES = frozenset({BENIGN, *TYPES})
_GZIP_MAGIC = b"\x1f\x8b"
_LABEL_COLUMNS = ("label_class", "Label", "label", "Label_multi")

# The first prefix that fits decides; names of the 2017, 2018 and 2019 tables, original and improved, in lower case.
_LABEL_PREFIXES = (
    ("benign", BENIGN),
    ("normal", BENIGN),
    ("ddos", "ddos"),
    ("drdos", "ddos"),
    ("tftp", "ddos"),
    ("syn", "ddos"),
    ("udp", "ddos"),
    ("webddos", "ddos"),
    ("ldap", "ddos"),
    ("mssql", "ddos"),
    ("netbios", "ddos"),
    ("portmap", "ddos"),
    ("dos", "dos"),
    ("heartbleed", "dos"),
    ("infiltration - portscan", "port_scan"),
    ("infiltration - nmap", "port_scan"),
    ("portscan", "port_scan"),
    ("ftp-", "brute_force"),
    ("ssh-", "brute_force"),
    ("bot", "botnet"),
    ("web attack", "web_attack"),
    ("brute force", "web_attack"),
    ("sql injection", "web_attack"),
    ("infil", "infiltration"),
)


class DatasetError(Exception):
    """A flow table cannot be used; the text says which file, where, and why."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """n labelled flows.

    ``features`` is float64[n, 79] in the order of ``features.NAMES``, finite, 0 where ``known`` (bool[79]) is false. ``labels``
    are class names, ``names`` the labels as the file has them. ``order`` (int64[n]) rises with time: microseconds since 1970
    where ``timed``, else the row's number. ``foreign`` (bool[n]) marks rows of another extractor. ``digest`` is the file's
    SHA-256. ``skipped`` counts rows left out, by reason.
    """

    variant: str
    features: npt.NDArray[np.float64]
    known: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    order: npt.NDArray[np.int64]
    timed: bool
    foreign: npt.NDArray[np.bool_]
    digest: str
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def foreign_file(self) -> bool:
        """Whether so many rows contradict the definitions that the whole file must be another extractor's."""
        foreign, odd = int(self.foreign.sum()), int(guard.implausible(self.features, self.known).sum())
        return (foreign >= FOREIGN_FILE_ROWS_MIN and foreign > FOREIGN_FILE_SHARE * len(self)) or (
            odd >= FOREIGN_FILE_ROWS_MIN and odd > IMPLAUSIBLE_FILE_SHARE * len(self)
        )

    def take(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Dataset:
        """Return the rows selected by a mask or by indices, with the same digest."""
        return Dataset(
            self.variant,
            self.features[rows],
            self.known,
            self.labels[rows],
            self.names[rows],
            self.order[rows],
            self.timed,
            self.foreign[rows],
            self.digest,
            self.skipped,
        )


def read(path: Path) -> Dataset:
    """Read a CSV file of any known variant, plain or gzip, with its labels.

    Raises:
        DatasetError: no such file, broken compression, unknown header, no label column, unknown label, or no usable row.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}; name a readable CSV or CSV.gz file") from error
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DatasetError(f"{path}: broken gzip: {error}") from error
    rows = csv.reader(io.StringIO(_text(data), newline=""))
    header = next(rows, None)
    if header is None:
        raise DatasetError(f"{path}: empty")
    variant = recognise(header)
    if variant is None:
        raise DatasetError(f"{path}: {explain_unknown(header)}")
    return _assemble(path, variant, header, _Table.parse(path, variant, header, rows), digest)


def label_class(label: str) -> str | None:
    """Return the class of a label as a CIC table has it (or of a class name), or None for one that is not known."""
    plain = label.strip().lower().replace("\u2013", "-").replace("\x96", "-").replace("\ufffd", "-")
    if plain in CLASSES:
        return plain
    return next((name for prefix, name in _LABEL_PREFIXES if plain.startswith(prefix)), None)


def split_by_time(dataset: Dataset, share: float) -> npt.NDArray[np.bool_]:
    """Return bool[n]: the first ``share`` by time of each label as the file names it, so that no attack is only on one side."""
    first = np.zeros(len(dataset), dtype=np.bool_)
    for name in np.unique(dataset.names):
        rows = np.flatnonzero(dataset.names == name)
        rows = rows[np.argsort(dataset.order[rows], kind="stable")]
        first[rows[: int(np.floor(share * len(rows) + 1e-9))]] = True
    return first


@dataclass(slots=True)
class _Table:
    """The cells of a file that are used, as they were read."""

    values: list[list[float]]
    names: list[str]
    classes: list[str]
    times: list[str]
    skipped: Counter[str]

    @classmethod
    def parse(cls, path: Path, variant: Variant, header: Sequence[str], rows: Iterator[list[str]]) -> _Table:
        places = variant.places(header)
        features = [places[name] for name in NAMES if name in places]
        names = [name.strip() for name in header]
        labels = [names.index(column) for column in _LABEL_COLUMNS if column in names]
        if not labels:
            raise DatasetError(f"{path}: no label column; one of {', '.join(_LABEL_COLUMNS)} is needed")
        detail = names.index("Label") if "Label" in names else labels[0]
        time = names.index(variant.time) if variant.time in names else -1
        table = cls([], [], [], [], Counter())
        for line, row in enumerate(rows, start=2):
            if len(row) != len(header):
                table.skipped["wrong number of columns"] += bool(row)
                continue
            if row[detail].strip().lower().endswith("attempted"):
                table.skipped["attempted attack without effect"] += 1
                continue
            label = label_class(row[labels[0]])
            if label is None:
                raise DatasetError(f"{path}: line {line}: unknown label {row[labels[0]]!r}; known classes: {sorted(CLASSES)}")
            try:
                table.values.append([float(row[place]) for place in features])
            except ValueError:
                table.skipped["not a number"] += 1
                continue
            table.names.append(row[detail].strip())
            table.classes.append(label)
            table.times.append(row[time] if time >= 0 else "")
        if not table.values:
            raise DatasetError(f"{path}: no usable row ({dict(table.skipped) or 'only a header'})")
        return table


def _assemble(path: Path, variant: Variant, header: Sequence[str], table: _Table, digest: str) -> Dataset:
    places = variant.places(header)
    present = np.array([name in places for name in NAMES])
    raw = np.zeros((len(table.values), len(NAMES)))
    raw[:, present] = np.array(table.values)
    values, foreign = clean(raw, present)
    known = present & np.array([name not in variant.other_meaning for name in NAMES])
    if variant.name == IMPROVED:
        foreign |= _contradicts_improved(values)
    values[:, ~known] = 0.0
    foreign |= guard.contradictions(values, known)
    order = _microseconds(table.times)
    return Dataset(
        variant=variant.name,
        features=values,
        known=known,
        labels=np.array(table.classes),
        names=np.array(table.names),
        order=np.arange(len(values), dtype=np.int64) if order is None else order,
        timed=order is not None,
        foreign=foreign,
        digest=digest,
        skipped=dict(table.skipped),
    )


def _contradicts_improved(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Mark rows whose columns of other meaning are not what the fixed tool writes there, in 2022 or after its later fixes."""
    of = {name: values[:, index] for index, name in enumerate(NAMES)}
    forward, backward = of["tot_fwd_pkts"], of["tot_bwd_pkts"]
    packets = np.maximum(forward + backward, 1)
    totals = np.stack([forward, of["totlen_fwd_pkts"], backward, of["totlen_bwd_pkts"]])
    sub = np.stack([of[f"subflow_{part}"] for part in ("fwd_pkts", "fwd_byts", "bwd_pkts", "bwd_byts")])
    floored = (sub == np.floor(totals / packets)).all(axis=0)
    # The later tool divides by the number of sub-flows, and writes 0 where there is only one.
    count = np.rint(forward / np.where(sub[0] > 0, sub[0], np.inf))
    divided = np.isclose(sub * count, totals, rtol=1e-6, atol=1e-6).all(axis=0) & (count >= 2)
    later = np.where(of["flow_iat_max"] > 1e6, divided, (sub == 0).all(axis=0))
    data = of["fwd_act_data_pkts"]
    # One fewer when the first packet carries data; exactly the packets with data otherwise.
    counted = np.where(of["fwd_pkt_len_min"] > 0, (data >= forward - 1) & (data <= forward), data <= np.maximum(forward - 1, 0))
    windows = (of["protocol"] == guard.TCP) | ((of["init_fwd_win_byts"] == 0) & (of["init_bwd_win_byts"] == 0))
    contradicts: npt.NDArray[np.bool_] = ~((floored | later) & counted & windows)
    return contradicts


def _microseconds(times: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """Return int64 microseconds since 1970, or None where the file has no time that can be read without guessing."""
    if times[0].isdecimal():
        return np.array(times).astype(np.int64) if all(time.isdecimal() for time in times) else None
    try:
        parsed = np.array([time.strip().replace(" ", "T", 1) for time in times], dtype="datetime64[us]")
    except ValueError:
        return None
    return None if np.isnat(parsed).any() else parsed.astype(np.int64)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")  # the 2017 labels hold an en dash of that code page
