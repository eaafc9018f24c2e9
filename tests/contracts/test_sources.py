"""One suite over every source of files and pipes: batches, positions, masks, counters, and inputs that are not sound."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cybermesh.cli import flow_rows
from cybermesh.telemetry.dns import DnsBatch
from cybermesh.telemetry.events import EventBatch
from cybermesh.telemetry.features import COLUMN
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.meter import FlowMeter
from cybermesh.telemetry.packets import PacketBatch
from cybermesh.telemetry.sources import Batch, Source, SourceError, newest_us
from cybermesh.telemetry.sources.choose import open_source
from tests.telemetry import frames
from tests.telemetry.sources import captures

COUNT = 40  # records in an example
Header: TypeAlias = Callable[[], bytes]
Table: TypeAlias = Callable[[FlowBatch], bytes]


def _pcap() -> bytes:
    def packet(n: int) -> bytes:
        return frames.ethernet(frames.ipv4(17, frames.udp(1000 + n % 7, 53, b"q" * n)))

    return captures.pcap([(1_700_000_000_000_000 + n * 1000, packet(n)) for n in range(COUNT)])


def _pcapng() -> bytes:
    frame = frames.ethernet(frames.ipv4(17, frames.udp(1000, 53, b"q")))
    blocks = [captures.enhanced(1_700_000_000_000_000 + n, frame) for n in range(COUNT)]
    return captures.section() + captures.interface() + b"".join(blocks)


def _web() -> bytes:
    line = '203.0.113.{} - - [20/Nov/2026:21:16:{:02d} +0000] "GET /{} HTTP/1.1" 404 153 "-" "curl"\n'
    return "".join(line.format(n, n, n) for n in range(COUNT)).encode()


def _csv(tmp_path: Path, header: Header = flow_rows.csv_header, table: Table = flow_rows.csv_rows) -> bytes:
    path = tmp_path / "for-csv.pcap"

    def packet(n: int) -> bytes:
        return frames.ethernet(frames.ipv4(17, frames.udp(1000 + n // 2, 53, b"q" * n)))

    path.write_bytes(captures.pcap([(1_700_000_000_000_000 + n * 1000, packet(n)) for n in range(2 * COUNT)]))
    meter = FlowMeter(retain=1 << 16)
    with contextlib.closing(open_source(str(path))) as source:
        for batch in source.batches():
            assert isinstance(batch, PacketBatch)
            meter.add(batch)
    path.unlink()
    return header() + table(meter.flush())


def _zeek(n: int) -> dict[str, object]:
    record: dict[str, object] = {"ts": 1_700_000_000.25 + n, "uid": f"C{n}", "id.orig_h": "192.0.2.7", "id.orig_p": 40_000 + n}
    record |= {"id.resp_h": "2001:db8::1", "id.resp_p": 443, "proto": "tcp", "conn_state": "SF", "orig_pkts": 5, "resp_pkts": 4}
    if n % 10 != 3:  # what Zeek does not know now and then
        record |= {"duration": 0.5, "orig_bytes": 100, "resp_bytes": 2000}
    return record


def _zeek_tsv() -> bytes:
    names = list(_zeek(0))
    head = "#separator \\x09\n#set_separator\t,\n#empty_field\t(empty)\n#unset_field\t-\n#path\tconn\n"
    head += "\t".join(["#fields", *names])
    rows = ["\t".join(str(_zeek(n).get(name, "-")) for name in names) for n in range(COUNT)]
    return "\n".join([head, "#types\ttime", *rows, "#close\t2026", ""]).encode()


def _zeek_dns() -> bytes:
    def record(n: int) -> dict[str, object]:
        made: dict[str, object] = {"_path": "dns", "ts": 1_700_000_000.5 + n, "id.orig_h": "192.0.2.7", "id.orig_p": 5353}
        made |= {"id.resp_h": "192.0.2.53", "id.resp_p": 53, "proto": "udp", "query": f"n{n}.example", "qtype": 16, "rcode": 3}
        return made

    return b"".join(json.dumps(record(n)).encode() + b"\n" for n in range(COUNT))


def _eve() -> bytes:
    lines = []
    for n in range(COUNT):
        record: dict[str, object] = {
            "timestamp": f"2026-11-20T21:16:{n:02d}.000001+0000",
            "src_ip": "192.0.2.7",
            "src_port": 4000 + n,
        }
        record |= {"dest_ip": "192.0.2.53", "dest_port": 53, "proto": "UDP", "event_type": ("flow", "dns", "alert")[n % 3]}
        record["flow"] = {"pkts_toserver": 1, "pkts_toclient": 1, "start": record["timestamp"], "end": record["timestamp"]}
        record["dns"] = {"type": "query", "rrname": f"n{n}.example", "rrtype": "A"}
        record["alert"] = {"signature": "ET TEST", "severity": 2}
        lines.append(json.dumps(record))
    return "\n".join([*lines, ""]).encode()


def _log() -> bytes:
    line = "Nov 20 21:16:{:02d} gate sshd[{}]: Failed password for root from 203.0.113.{} port 41022 ssh2\n"
    return "".join(line.format(n, n, n) for n in range(COUNT)).encode()


@dataclass(frozen=True)
class Kind:
    """One kind of input: an example of ``COUNT`` records, and what it yields."""

    name: str
    content: Callable[[Path], bytes]
    yields: tuple[type, ...]
    is_text: bool = True


KINDS = [
    Kind("pcap", lambda _: _pcap(), (PacketBatch,), is_text=False),
    Kind("csv", _csv, (FlowBatch,)),
    Kind("zeek", lambda _: _zeek_tsv(), (FlowBatch,)),
    Kind("zeek", lambda _: b"".join(json.dumps(_zeek(n)).encode() + b"\n" for n in range(COUNT)), (FlowBatch,)),
    Kind("zeek", lambda _: _zeek_dns(), (DnsBatch,)),
    Kind("eve", lambda _: _eve(), (FlowBatch, DnsBatch, EventBatch)),
    Kind("logs", lambda _: _log(), (EventBatch,)),
    Kind("logs", lambda _: _web(), (EventBatch,)),
    Kind("csv", lambda folder: _csv(folder, flow_rows.cic_header, flow_rows.cic_rows), (FlowBatch,)),
    Kind("csv", lambda folder: _csv(folder, flow_rows.original_header, flow_rows.original_rows), (FlowBatch,)),
    Kind("pcap", lambda _: _pcapng(), (PacketBatch,), is_text=False),
]
IDS = ["pcap", "csv", "zeek-tsv", "zeek-json", "zeek-dns", "eve", "logs", "web", "csv-2022", "csv-2017", "pcapng"]
TEXT = [kind for kind in KINDS if kind.is_text]
TEXT_IDS = IDS[1:-1]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=IDS)


def write(kind: Kind, folder: Path, name: str = "input") -> Path:
    path = folder / name
    path.write_bytes(kind.content(folder))
    return path


@contextlib.contextmanager
def opened(spec: str, **options: object) -> Iterator[Source]:
    with contextlib.closing(open_source(spec, **options)) as source:  # type: ignore[arg-type]
        yield source


def rows(batch: Batch) -> list[tuple[object, ...]]:
    """Every row of a batch with all its columns, for comparing; payload places are the buffer's."""
    left_out = {"data", "payload_at", "known"}
    columns = [getattr(batch, field.name) for field in fields(batch) if field.name not in left_out]
    known = getattr(batch, "known", None)
    tag = type(batch).__name__, (known.tobytes() if known is not None else b"")
    return [
        (*tag, *(column[n] if column.dtype == object else np.asarray(column[n]).tobytes() for column in columns))
        for n in range(len(batch))
    ]


def everything(source: Source) -> list[tuple[object, ...]]:
    return [row for batch in source.batches() for row in rows(batch)]


@each_kind
def test_all_records_are_handed_on_in_batches_of_at_most_the_block(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    for block in (1, 7, 1000):
        with opened(f"{kind.name}:{path}", block=block) as source:
            batches = list(source.batches())
            assert all(isinstance(batch, kind.yields) for batch in batches)
            assert max(map(len, batches)) <= block
            assert sum(map(len, batches)) == COUNT == source.counters.metered == source.counters.packets
            assert (source.counters.skipped, source.counters.ended) == ({}, "")
            assert source.name == str(path)
            assert source.progress in {None, 1.0}


@each_kind
def test_what_is_read_does_not_depend_on_the_block(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    found = []
    for block in (1, 7, 1000):
        with opened(f"{kind.name}:{path}", block=block) as source:
            found.append(sorted(map(repr, everything(source))))
    assert found[0] == found[1] == found[2]


@each_kind
def test_a_position_after_any_batch_repeats_and_skips_nothing(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    with opened(f"{kind.name}:{path}", block=6) as source:
        whole = [(rows(batch), source.position) for batch in source.batches()]
    for stop in range(len(whole)):
        before = [row for batch, _ in whole[: stop + 1] for row in batch]
        with opened(f"{kind.name}:{path}", block=6, position=whole[stop][1]) as source:
            after = everything(source)
        assert sorted(map(repr, before + after)) == sorted(repr(row) for batch, _ in whole for row in batch)
    assert after == []


@each_kind
def test_a_path_is_recognised_by_its_content_packed_or_not(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path, "plain")
    packed = [tmp_path / "gz", tmp_path / "zst"]
    packed[0].write_bytes(gzip.compress(path.read_bytes()))
    packed[1].write_bytes(zstandard.compress(path.read_bytes()))
    found = []
    for each in (path, *packed):
        with opened(str(each)) as source:
            found.append(everything(source))
    assert len(found[0]) == COUNT
    assert found[0] == found[1] == found[2]


@each_kind
def test_a_folder_is_read_file_by_file_and_what_is_foreign_in_it_is_counted(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b", "a", "d"):
        write(kind, folder, name)
    (folder / "c").write_bytes(b"\0\1\2 something else")
    for spec in (f"{kind.name}:{folder}", str(folder)):
        with opened(spec, block=7) as source:
            whole = [(rows(batch), source.position) for batch in source.batches()]
            assert source.counters.metered == 3 * COUNT
            assert source.counters.skipped == {"file of another kind": 1}
            assert str(folder / "c") in source.counters.ended
    for stop in range(0, len(whole), 3):
        with opened(f"{kind.name}:{folder}", block=7, position=whole[stop][1]) as source:
            after = sum(len(batch) for batch in source.batches())
        assert sum(len(batch) for batch, _ in whole[: stop + 1]) + after == 3 * COUNT


@each_kind
def test_missing_empty_and_foreign_inputs_are_one_source_error_that_names_them(kind: Kind, tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    empty.write_bytes(b"")
    foreign.write_bytes(b"\x7fELF\0\0\0" + bytes(range(256)) * 30)
    for path in (empty, foreign, tmp_path / "missing"):
        with pytest.raises(SourceError, match=path.name) as caught:
            open_source(f"{kind.name}:{path}")
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="names no input"):
        open_source(f"{kind.name}:")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(SourceError, match="nothing in it"):
        open_source(f"{kind.name}:{nothing}")


@pytest.mark.parametrize("kind", TEXT, ids=TEXT_IDS)
def test_damaged_records_are_counted_by_reason_and_the_rest_is_read(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[-3] = lines[-3][: len(lines[-3]) // 2]
    lines[-2] = b"\xff\xfe garbage"
    path.write_bytes(b"\n".join(lines))
    with opened(f"{kind.name}:{path}") as source:
        found = sum(map(len, source.batches()))
        counters = source.counters
    lost = sum(counters.skipped.values())
    assert 1 <= lost <= 3
    assert all(isinstance(reason, str) and reason for reason in counters.skipped)
    assert counters.packets == counters.metered + lost
    assert found == counters.metered >= COUNT - 3


@pytest.mark.parametrize("kind", KINDS[:7], ids=IDS[:7])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_bytes_never_raise_past_the_source(kind: Kind, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(_content(kind, tmp_path))
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "end"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 200))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=20) | st.sampled_from(AWKWARD))
            case _:
                del content[at:]
        if not content:
            break
    path = tmp_path / "hostile"
    path.write_bytes(content)
    try:
        source = open_source(f"{kind.name}:{path}", block=data.draw(st.sampled_from([1, 5, 1000])))
    except SourceError:
        return
    with contextlib.closing(source):
        for batch in source.batches():
            assert len(rows(batch)) == len(batch)
            newest_us(batch)
            if isinstance(batch, FlowBatch):
                assert np.isfinite(batch.features).all()
                assert (batch.end_us >= batch.start_us).all()
                assert (batch.features[:, ~batch.known] == 0).all()
        assert source.counters.packets == source.counters.metered + sum(source.counters.skipped.values())


AWKWARD = [b"\n", b"\r\n", b"\0", b'"', b"nan", b"inf", b"-1", b"1e400", b"9" * 30, b"\xef\xbb\xbf"]
AWKWARD += [b"{}", b"[]", b"null", b"\t", b",", b"#"]
NO_POSITIONS = ("nonsense", "[1]", '{"place": 7}', '{"lines": -1}', '{"lines": 3, "done": 9}', '{"place": {"inode": "x"}}')
_CONTENT: dict[str, bytes] = {}


def _content(kind: Kind, folder: Path) -> bytes:
    key = f"{kind.name} {KINDS.index(kind)}"
    if key not in _CONTENT:
        _CONTENT[key] = kind.content(folder)
    return _CONTENT[key]


@each_kind
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_standard_input_is_read_to_its_end(kind: Kind, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(kind, tmp_path)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    with path.open() as standard:
        monkeypatch.setattr("sys.stdin", standard)
        with opened(f"{kind.name}:-", block=7) as source:
            batches = list(source.batches())
    assert sum(map(len, batches)) == COUNT == source.counters.metered
    assert max(map(len, batches)) <= 7
    assert (source.name, source.counters.ended) == ("standard input", "")


@each_kind
def test_rows_and_packets_have_limits_of_their_own(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    with opened(f"{kind.name}:{path}", block=1000, rows=7) as source:
        sizes = list(map(len, source.batches()))
    assert sum(sizes) == COUNT
    assert max(sizes) <= (7 if kind.is_text else 1000)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_followed_capture_or_text_goes_on_where_it_was_after_a_restart(kind: Kind, tmp_path: Path) -> None:
    content, path = kind.content(tmp_path), tmp_path / "growing"
    cut = len(content) * 2 // 3
    path.write_bytes(content[:cut])
    found, position = 0, ""
    for more in (b"", content[cut : cut + 10], content[cut + 10 :]):
        with path.open("ab") as file:
            file.write(more)
        with opened(f"{kind.name}:{path}", follow=True, position=position) as source:
            found += sum(map(len, itertools.takewhile(len, source.batches())))
            position = source.position
    assert found == COUNT


@pytest.mark.parametrize("kind", TEXT, ids=TEXT_IDS)
def test_a_followed_text_goes_on_with_what_is_appended_and_yields_empty_batches_meanwhile(kind: Kind, tmp_path: Path) -> None:
    content = kind.content(tmp_path)
    lines = content.splitlines(keepends=True)
    path = tmp_path / "growing"
    path.write_bytes(b"".join(lines[:-5]))
    with opened(f"{kind.name}:{path}", follow=True) as source:
        batches = source.batches()
        first = sum(map(len, itertools.takewhile(len, batches)))
        with path.open("ab") as file:
            file.write(b"".join(lines[-5:]))
        assert first + sum(map(len, itertools.takewhile(len, batches))) == COUNT
        assert json.loads(source.position)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_what_is_no_position_is_a_source_error(kind: Kind, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    for position in (
        "nonsense",
        "[1]",
        '{"place": 7}',
        '{"lines": -1}',
        '{"lines": 3, "done": 9}',
        '{"place": {"inode": "x"}}',
    ):
        with pytest.raises(SourceError, match="position"):
            open_source(f"{kind.name}:{path}", position=position)


def test_masks_say_what_each_kind_can_know(tmp_path: Path) -> None:
    known: dict[str, set[str]] = {}
    for kind, name in zip(KINDS, IDS, strict=True):
        with opened(f"{kind.name}:{write(kind, tmp_path, name)}") as source:
            for batch in source.batches():
                if isinstance(batch, FlowBatch) and name not in known:
                    known[name] = {feature for feature, index in COLUMN.items() if batch.known[index]}
                    external = batch.end_reason == EndReason.EXTERNAL
                    assert external.all() or name == "csv"
    assert len(known["csv"]) == 79
    assert known["zeek-tsv"] == known["zeek-json"]
    assert {"flow_duration", "tot_bwd_pkts", "totlen_fwd_pkts", "pkt_len_mean"} <= known["zeek-json"]
    assert not known["zeek-json"] & {"syn_flag_cnt", "fwd_pkt_len_std", "init_fwd_win_byts", "fwd_header_len"}
    assert {"flow_duration", "tot_bwd_pkts", "down_up_ratio"} <= known["eve"]
    assert not known["eve"] & {"totlen_fwd_pkts", "pkt_len_mean", "flow_byts_s"}


def test_a_flow_whose_numbers_are_unset_is_masked_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "conn.log"
    path.write_bytes(_zeek_tsv())
    with opened(str(path)) as source:
        batches = [batch for batch in source.batches() if isinstance(batch, FlowBatch)]
    unknown = [batch for batch in batches if not batch.known[COLUMN["flow_duration"]]]
    others = [batch for batch in batches if batch.known[COLUMN["flow_duration"]]]
    assert sum(map(len, unknown)) == 4
    assert not any(batch.features[:, COLUMN["flow_duration"]].any() for batch in unknown)
    assert all((batch.features[:, COLUMN["flow_duration"]] == 500_000).all() for batch in others)
