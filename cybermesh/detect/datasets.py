"""Labelled flow tables as numbers: reads the CIC family of CSV files into the order of ``features.NAMES``.

Rules:

- the header decides the variant; an unknown header is refused with the nearest known one and the columns that differ;
- what a variant does not have, or means otherwise, is 0 and marked unknown, never guessed;
- known deviations of the tools are undone (features specification, section 8): -1 and infinity where a rate does not exist
  become 0, header lengths that overflowed 16 bits get their 65,536 back;
- a row that contradicts the definitions its header promises is kept and marked ``foreign``: another extractor wrote it. An
  extractor is a property of a file, so when more than 2 % of the rows are marked, or more than 10 % are what no TCP
  stack sends, the file is (``foreign_file``);
- attempts without effect ("... - Attempted") are neither attack nor benign and are left out, counted; so are rows with an
  unknown label or something that is no number. A few missing columns are unknown features, not an error;
- a file is read in pieces, so that its size does not matter to who needs only figures.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from cybermesh.detect import guard
from cybermesh.detect.engines import TYPES
from cybermesh.telemetry.cic_columns import IMPROVED, Variant, clean, explain_unknown, recognise, recognise_partly
from cybermesh.telemetry.features import NAMES

FOREIGN_FILE_SHARE = 0.02
FOREIGN_FILE_ROWS_MIN = 5
IMPLAUSIBLE_FILE_SHARE = 0.1
BENIGN = "benign"
CLASSES = frozenset({BENIGN, *TYPES})
_GZIP_MAGIC = b"\x1f\x8b"
PIECE_ROWS = 20_000
_SHOWN_LABEL = 60
_REASONS_MAX = 20  # of rows left out, told apart
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
    def odd(self) -> int:
        """Rows that no ordinary TCP stack produces."""
        return int(guard.implausible(self.features, self.known).sum())

    @property
    def foreign_file(self) -> bool:
        """Whether so many rows contradict the definitions that the whole file must be another extractor's."""
        return is_foreign_file(int(self.foreign.sum()), self.odd, len(self))

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


def is_foreign_file(foreign: int, odd: int, rows: int) -> bool:
    """Return whether ``foreign`` rows that contradict the definitions, or ``odd`` ones, give a file of ``rows`` away."""
    return (foreign >= FOREIGN_FILE_ROWS_MIN and foreign > FOREIGN_FILE_SHARE * rows) or (
        odd >= FOREIGN_FILE_ROWS_MIN and odd > IMPLAUSIBLE_FILE_SHARE * rows
    )


def read(path: Path, *, presumed: str | None = None) -> Dataset:
    """Read a CSV file of any known variant, plain or gzip, with its labels.

    Args:
        path: The file.
        presumed: A class that all rows are taken for; labels, if there are any, are not read then.

    Raises:
        DatasetError: no such file, broken compression, unknown header, no label column, or no usable row.
    """
    return joined(list(stream(path, presumed=presumed)))


def stream(path: Path, *, presumed: str | None = None) -> Iterator[Dataset]:
    """Read a file as ``read`` does, in pieces of at most ``PIECE_ROWS`` rows; ``order`` of untimed ones is within the piece.

    Raises:
        DatasetError: as ``read``; what is found wrong later in the file is raised after the pieces before it.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            packed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            data = gzip.GzipFile(fileobj=file) if packed else file
            # The labels of 2017 hold an en dash of code page 1252; it is mended where labels are read.
            text = io.TextIOWrapper(cast("IO[bytes]", data), encoding="utf-8-sig", errors="surrogateescape", newline="")
            yield from _pieces(path, csv.reader(text), digest, presumed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: broken gzip: {error}") from error
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}; name a readable CSV or CSV.gz file") from error


def joined(pieces: Sequence[Dataset]) -> Dataset:
    """Return pieces of one file as one; row numbers stand for times unless every piece is timed."""
    first, timed = pieces[0], all(piece.timed for piece in pieces)
    skipped: Counter[str] = Counter()
    for piece in pieces:
        skipped.update(piece.skipped)
    rows = sum(len(piece) for piece in pieces)
    return replace(
        first,
        features=np.concatenate([piece.features for piece in pieces]),
        labels=np.concatenate([piece.labels for piece in pieces]),
        names=np.concatenate([piece.names for piece in pieces]),
        order=np.concatenate([piece.order for piece in pieces]) if timed else np.arange(rows, dtype=np.int64),
        timed=timed,
        foreign=np.concatenate([piece.foreign for piece in pieces]),
        skipped=dict(skipped),
    )


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


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where in a row what is used lies; ``label`` and ``detail`` are None where every row is ``presumed`` to be of a class."""

    variant: Variant
    width: int
    places: dict[str, int]
    label: int | None
    detail: int | None
    time: int | None
    presumed: str


@dataclass(slots=True)
class _Table:
    """The cells of some rows that are used, as they were read."""

    values: list[list[float]]
    names: list[str]
    classes: list[str]
    times: list[str]
    skipped: Counter[str]

    @classmethod
    def empty(cls) -> _Table:
        return cls([], [], [], [], Counter())

    def add(self, layout: _Layout, row: Sequence[str]) -> None:
        """Take a row, or count why not."""
        if len(row) != layout.width:
            self.skipped["wrong number of columns"] += bool(row)
            return
        name = label = layout.presumed
        if layout.label is not None and layout.detail is not None:
            name = _mended(row[layout.detail]).strip()
            if name.lower().endswith("attempted"):
                self.skipped["attempted attack without effect"] += 1
                return
            told = _mended(row[layout.label]).strip()
            known = label_class(told)
            if known is None:
                self._count_label(told)
                return
            label = known
        try:
            # An empty cell is how many programs write "not a number", which a rate over no time is.
            values = [float(row[place] or "nan") for place in layout.places.values()]
        except ValueError:
            self.skipped["not a number"] += 1
            return
        self.values.append(values)
        self.names.append(name)
        self.classes.append(label)
        self.times.append(row[layout.time] if layout.time is not None else "")

    def _count_label(self, label: str) -> None:
        reason = f"unknown label {label[:_SHOWN_LABEL]!r}"
        many = len(self.skipped) >= _REASONS_MAX and reason not in self.skipped
        self.skipped["other unknown labels" if many else reason] += 1


def _layout(path: Path, header: Sequence[str], presumed: str | None) -> _Layout:
    variant = recognise(header) or recognise_partly(header)
    if variant is None:
        raise DatasetError(f"{path}: {explain_unknown(header)}")
    places = variant.places(header)
    names = [name.strip() for name in header]
    labels = [names.index(column) for column in _LABEL_COLUMNS if column in names] if presumed is None else []
    if not labels and presumed is None:
        raise DatasetError(f"{path}: no label column; one of {', '.join(_LABEL_COLUMNS)} is needed")
    label = labels[0] if labels else None
    return _Layout(
        variant=variant,
        width=len(header),
        places={name: places[name] for name in NAMES if name in places},
        label=label,
        detail=names.index("Label") if label is not None and "Label" in names else label,
        time=names.index(variant.time) if variant.time in names else None,
        presumed=presumed or "",
    )


def _pieces(path: Path, rows: Iterator[list[str]], digest: str, presumed: str | None) -> Iterator[Dataset]:
    try:
        header = next(rows, None)
        if header is None:
            raise DatasetError(f"{path}: empty")
        layout = _layout(path, header, presumed)
        table, some = _Table.empty(), False
        for row in rows:
            table.add(layout, row)
            if len(table.values) == PIECE_ROWS:
                yield _assemble(layout, table, digest)
                table, some = _Table.empty(), True
    except csv.Error as error:
        raise DatasetError(f"{path}: not a CSV file: {error}") from error
    if table.values:
        yield _assemble(layout, table, digest)
    elif not some:
        left_out = f"{dict(table.skipped)}; known classes: {sorted(CLASSES)}" if table.skipped else "only a header"
        raise DatasetError(f"{path}: no usable row ({left_out})")


def _assemble(layout: _Layout, table: _Table, digest: str) -> Dataset:
    variant = layout.variant
    present = np.array([name in layout.places for name in NAMES])
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


def _mended(text: str) -> str:
    """Return a cell with bytes that are no UTF-8 read as code page 1252."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252" if _has_surrogate(text) else "utf-8", "replace")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
