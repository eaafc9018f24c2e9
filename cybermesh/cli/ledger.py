"""``cybermesh ledger head|blocks|audit|export|import|prune``: a validator's stored chain, looked at, checked and moved."""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.genesis import Genesis
    from cybermesh.roles.audit import Report
    from cybermesh.store.records import StoredBlock
    from cybermesh.store.store import Store

T = TypeVar("T")

_PARALLEL_FROM = 2_000  # transactions; starting another process costs half a second
app = typer.Typer(no_args_is_help=True, help="Look at, check, back up and prune a validator's stored chain.")
FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file of the validator.")]
FirstHeight = Annotated[int, typer.Option("--from", min=1, help="First height.")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="How many.")]
KnownHead = Annotated[
    str | None, typer.Option("--head", metavar="HEIGHT:HASH", help="A block that you know the chain has, from an earlier look.")
]
OutFile = Annotated[Path, typer.Argument(metavar="FILE", help="Where the export goes; it must not exist.")]
InFile = Annotated[Path, typer.Argument(metavar="FILE", help="An export.")]
KeepDays = Annotated[int, typer.Option("--keep-days", min=0, help="Keep the bodies of the last so many days.")]


@app.command()
def head(config: FileOption = None, form: output.FormatOption = output.Format.HUMAN, json: output.JsonOption = False) -> None:
    """Show the newest block. Keep its height and hash: `ledger audit --head` later finds a rewritten or shortened chain."""
    found = _with_store(config, lambda store, _: store.chain.head())
    if found is None:
        raise output.CommandError("the store holds no block yet")
    _print([found], form, json, one=True)


@app.command()
def blocks(
    config: FileOption = None,
    first: FirstHeight = 1,
    limit: Limit = 100,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
) -> None:
    """List blocks, lowest first."""
    _print(list(_with_store(config, lambda store, _: store.chain.blocks(first, limit))), form, json, one=False)


@app.command()
def audit(
    config: FileOption = None,
    known_head: KnownHead = None,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
) -> None:
    """Execute the stored chain again and compare every row with it; exit 1 and the first row that is not what it must be.

    Example: cybermesh ledger audit -c validator.toml --head 1200:5f0c…
    """
    known = _parse_head(known_head)

    async def work(store: Store, genesis: Genesis) -> Report:
        from cybermesh.roles.audit import Auditor

        large = (await store.chain.counts())["transactions"] >= _PARALLEL_FROM
        workers = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), initializer=_ignore_interrupt) if large else None
        try:
            return await Auditor(store.rows, genesis, workers, _progress()).run(known)
        finally:
            if workers is not None:
                workers.shutdown(cancel_futures=True)

    began = time.perf_counter()
    report = _with_store(config, work)
    _report(report, time.perf_counter() - began, form, json)
    if report.finding is not None:
        raise output.CommandError(str(report.finding))


@app.command()
def export(file: OutFile, config: FileOption = None) -> None:
    """Write the whole ledger to a file that `ledger import` restores. No key and no safety state is in it.

    Example: cybermesh ledger export backup.ndjson -c validator.toml
    """
    from cybermesh.roles.backup import export_lines

    async def work(store: Store, genesis: Genesis) -> int:
        lines = 0
        scratch = file.with_name(f".{file.name}.part")
        try:
            with scratch.open("xb") as sink:
                os.fchmod(sink.fileno(), 0o600)
                async for line in export_lines(store, genesis):
                    sink.write(line)
                    lines += 1
                sink.flush()
                os.fsync(sink.fileno())
            os.link(scratch, file)  # unlike a rename, this replaces nothing
        except FileExistsError as error:
            raise output.CommandError(f"{error.filename2 or error.filename}: exists already; name another file") from error
        finally:
            scratch.unlink(missing_ok=True)
        return lines

    lines = _with_store(config, work)
    output.note(f"{file}: {lines} lines")


@app.command("import")
def import_(
    file: InFile,
    config: FileOption = None,
    joins: Annotated[bool, typer.Option("--join", help="FILE is another validator's; a new one starts here.")] = False,
) -> None:
    """Restore an export into an empty store: every block is executed and every certificate checked on the way.

    The validator then catches up with the others. Its safety file is not part of a backup and stays as it is. Of another
    validator's export say --join: a key that operators have added, and that has not signed anything yet, gets an empty one.
    """
    from cybermesh.config import load
    from cybermesh.keystore import load_key
    from cybermesh.roles.backup import import_lines
    from cybermesh.roles.joining import join
    from cybermesh.roles.validator import safety_file_of

    settings = load(config).settings
    key_file = settings.keys.validator or settings.node.state_dir / "validator.key"
    key = (load_key(key_file), safety_file_of(key_file)) if joins else None

    async def work(store: Store, genesis: Genesis) -> int:
        try:
            with file.open("rb") as source:
                if key is not None:
                    return await join(store, genesis, key, source, _progress())
                return (await import_lines(store, genesis, source, _progress())).height
        except OSError as error:
            raise output.CommandError(f"{file}: {error.strerror}", 2) from error

    output.note(f"{file}: restored up to height {_with_store(config, work, must_exist=False)}")


@app.command()
def prune(keep_days: KeepDays, config: FileOption = None) -> None:
    """Drop bodies (of transactions and evidence) and old acks, lifecycle steps and audit entries. Proofs stay valid.

    Blocks, certificates, receipts, decisions and their proofs are kept. Bodies go only below a snapshot, so the chain can
    still be executed from there; what is pruned cannot be exported or served to a validator that starts empty, so never prune
    on all of them.
    """
    before_ms = time.time_ns() // 1_000_000 - keep_days * 86_400_000

    async def work(store: Store, _: Genesis) -> dict[str, int]:
        snapshot = await store.node.newest_snapshot()
        height = min(await store.rows.height_before(before_ms), snapshot.height if snapshot is not None else 0)
        transactions, evidence = await store.rows.prune_bodies(height) if height else (0, 0)
        others = await store.rows.prune_feedback(before_ms)
        return {"height": height, "transactions": transactions, "evidence": evidence, **others}

    pruned = _with_store(config, work)
    output.note("pruned " + ", ".join(f"{name} {count}" for name, count in pruned.items()))


def _with_store(config: Path | None, work: Callable[[Store, Genesis], Awaitable[T]], *, must_exist: bool = True) -> T:
    from cybermesh import genesis as genesis_file
    from cybermesh.config import load
    from cybermesh.roles.process import store_location
    from cybermesh.store.store import open_store

    settings = load(config).settings
    where = store_location(settings)
    if must_exist and isinstance(where, Path) and not where.exists():
        raise output.CommandError(f"{where}: no store here; name the validator's settings with -c", 2)
    path = settings.node.genesis
    try:
        genesis = genesis_file.parse(path.read_bytes())
    except OSError as error:
        raise output.CommandError(f"{path}: {error.strerror}; node.genesis names the deployment's genesis file", 2) from error
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def run() -> T:
        async with open_store(where) as store:
            return await work(store, genesis)

    return asyncio.run(run())


def _parse_head(text: str | None) -> tuple[int, bytes] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]*):([0-9a-f]{64})", text)
    if match is None:
        raise output.CommandError(f"--head {text}: not HEIGHT:HASH with 64 lower-case hex digits; `ledger head` prints one", 2)
    return int(match[1]), bytes.fromhex(match[2])


def _ignore_interrupt() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _progress() -> Callable[[int], None]:
    """Return what says every second how far the work is, when somebody watches."""
    if not sys.stderr.isatty():
        return lambda _height: None
    said = time.monotonic()

    def say(height: int) -> None:
        nonlocal said
        if time.monotonic() - said >= 1:
            said = time.monotonic()
            output.note(f"height {height}")

    return say


def _report(report: Report, seconds: float, form: output.Format, json: bool) -> None:
    finding = report.finding
    result = {
        "valid": finding is None,
        "first_height": report.first_height,
        "executed_from": report.executed_from,
        "last_height": report.last_height,
        "blocks": report.blocks,
        "transactions": report.transactions,
        "receipts": report.receipts,
        "state_root": report.state_root.hex(),
        "seconds": round(seconds, 3),
        "finding": None
        if finding is None
        else {
            "table": finding.table,
            "row": {name: value.hex() if isinstance(value, bytes) else value for name, value in finding.row.items()},
            "change": finding.change,
            "height": finding.height,
            "reason": finding.reason,
        },
    }
    if json or form is not output.Format.HUMAN:
        output.emit_one(result, output.Format.NDJSON if form is output.Format.NDJSON and not json else output.Format.JSON)
    elif finding is None:
        pruned = f" (executed from {report.executed_from}: bodies below are pruned)" if report.executed_from > 1 else ""
        sys.stdout.write(
            f"heights {report.first_height} to {report.last_height}{pruned}: {report.transactions} transactions, "
            f"{report.receipts} receipts, all as they must be\nstate root {report.state_root.hex()}\n"
        )


def _print(rows: list[StoredBlock], form: output.Format, json: bool, *, one: bool) -> None:
    objects = [_as_object(row) for row in rows]
    if json or form is not output.Format.HUMAN:
        chosen = output.Format.JSON if json else form
        if one:
            output.emit_one(objects[0], chosen)
        else:
            output.emit(objects, chosen)
        return
    for row in rows:
        when = datetime.datetime.fromtimestamp(row.time_ms / 1000, tz=datetime.UTC).isoformat(timespec="milliseconds")
        sys.stdout.write(f"{row.height:>8}  round {row.round:<8} {when}  {row.transaction_count:>5} tx  {row.hash.hex()}\n")


def _as_object(row: StoredBlock) -> dict[str, object]:
    names = ("height", "epoch", "round", "time_ms", "author", "decision_seq", "transaction_count", "receipt_count")
    return {name: getattr(row, name) for name in names} | {"hash": row.hash.hex(), "state_root": row.state_root.hex()}
