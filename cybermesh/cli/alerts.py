"""``cybermesh alerts explain|label``: what an alert rests on, and what an operator says it was.

Alerts are read from what ``cybermesh detect`` printed (``-o json`` or ``ndjson``; with ``--evidence`` for ``explain``). Labels
go into a flow table that ``cybermesh adapt`` learns from: the alert's flows, metered again from the capture it was raised on.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cybermesh.cli import model_files, output

if TYPE_CHECKING:
    from cybermesh.detect.engines.classifier import Classifier
    from cybermesh.telemetry.flows import FlowBatch

alerts = typer.Typer(no_args_is_help=True, help="Explain alerts, and label what they were about.")

AlertsFile = Annotated[Path, typer.Argument(metavar="ALERTS", help="What cybermesh detect -o json (or ndjson) printed.")]
_FLOWS_MAX = 200  # of one label: more equal flows teach nothing
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@alerts.command()
def explain(
    file: AlertsFile,
    alert_id: Annotated[str, typer.Argument(metavar="[ID]", help="Beginning of the alert's id; all alerts without it.")] = "",
    rules: Annotated[Path | None, typer.Option("--rules", help="Folder with the rule files of that time.")] = None,
    model: Annotated[Path | None, typer.Option("--model", help="Directory of the site's model of that time.")] = None,
    site_key: model_files.SiteKeyOption = None,
    json: output.JsonOption = False,
) -> None:
    """Say what fired and why, and evaluate it again on the values that the evidence holds.

    Each finding is replayed with the rules and the model named (the shipped ones by default): the same values must give the
    same score. Ends with 1 if one does not.

    Example: cybermesh detect trace.pcap --evidence -o json > alerts.json; cybermesh alerts explain alerts.json
    """
    told = [_explained(alert, _Tools.load(rules, model, site_key)) for alert in _read(file, alert_id)]
    if json:
        output.emit(told, output.Format.JSON)
    else:
        for one in told:
            _print(one)
    if any(one["replay"]["differs"] for one in told):
        raise typer.Exit(1)


@alerts.command()
def label(
    file: AlertsFile,
    alert_id: Annotated[str, typer.Argument(metavar="ID", help="Beginning of the alert's id.")],
    kind: Annotated[str, typer.Option("--as", help="What it was: benign, or a type of attack.")],
    capture: Annotated[Path, typer.Option(help="The capture that the alert was raised on.")],
    out: Annotated[Path, typer.Option(help="Table of labelled flows to make or to add to; cybermesh adapt reads it.")],
    json: output.JsonOption = False,
) -> None:
    """Add the flows of an alert to a table of labelled flows.

    Its flows are those between its source and its destination in its time (200 at most, spread over it). Flows of one packet
    are left out: no classifier judges them.

    Example: cybermesh alerts label alerts.json 3f9a --as port_scan --capture trace.pcap --out labelled.csv
    """
    from cybermesh.detect.datasets import CLASSES
    from cybermesh.detect.sitetraffic import metered
    from cybermesh.telemetry.sources import SourceError

    if kind not in CLASSES:
        raise output.CommandError(f"--as {kind}: not one of {', '.join(sorted(CLASSES))}", 2)
    found = _read(file, alert_id)
    if len(found) != 1:
        raise output.CommandError(f"{file}: {len(found)} alerts begin with {alert_id!r}; name one", 2)
    alert = found[0]
    try:
        lines = [line for flows in metered(capture) for line in _labelled(flows, alert, kind)]
    except SourceError as error:
        raise output.CommandError(str(error)) from error
    if not lines:
        raise output.CommandError(f"{capture}: no flow of several packets of alert {alert['id'][:12]} in it")
    step = max(1.0, len(lines) / _FLOWS_MAX)
    kept = [lines[int(at * step)] for at in range(min(len(lines), _FLOWS_MAX))]
    added = _append(out, kept)
    told = {"out": str(out), "alert": alert["id"], "label": kind, "flows": len(lines), "added": added}
    if json:
        output.emit_one(told)
    else:
        typer.echo(f"{out}: {added} flows of {len(lines)} added as {kind}")


@dataclass(frozen=True, slots=True)
class _Tools:
    """What evidence is replayed with."""

    rules: Any
    classifier: Classifier | None

    @classmethod
    def load(cls, rules: Path | None, model: Path | None, site_key: str | None) -> _Tools:
        from cybermesh.cli.detect import load_rules
        from cybermesh.detect.engines.classifier import open_classifier
        from cybermesh.detect.modelfile import ModelError

        key = model_files.public_key(site_key)
        try:
            classifier = open_classifier(model, site_key=key)
        except ModelError as error:
            if model is not None:
                raise output.CommandError(str(error)) from error
            classifier = None
        return cls(load_rules(rules), classifier)


def _read(file: Path, alert_id: str) -> list[dict[str, Any]]:
    """Return the alerts of a file whose id begins with ``alert_id``."""
    import orjson

    try:
        text = file.read_bytes()
    except OSError as error:
        raise output.CommandError(f"{file}: {error.strerror}; name what cybermesh detect -o json printed") from error
    try:
        parsed = (
            orjson.loads(text) if text.lstrip().startswith(b"[") else [orjson.loads(line) for line in text.splitlines() if line]
        )
    except orjson.JSONDecodeError as error:
        raise output.CommandError(f"{file}: no alerts in JSON: {error}") from error
    needed = {"id", "type", "source", "destination", "first", "last"}
    if not all(isinstance(alert, dict) and needed <= alert.keys() for alert in parsed):
        raise output.CommandError(f"{file}: not what cybermesh detect -o json prints: an object without {sorted(needed)}")
    found = [alert for alert in parsed if str(alert["id"]).startswith(alert_id)]
    if not found and (alert_id or not parsed):
        raise output.CommandError(f"{file}: no alert{f' whose id begins with {alert_id!r}' if alert_id else ''} in it")
    return found


def _explained(alert: Mapping[str, Any], tools: _Tools) -> dict[str, Any]:
    """Return an alert with its findings and how their replay went."""
    evidence = alert.get("evidence")
    if not isinstance(evidence, dict):
        raise output.CommandError(f"alert {alert['id'][:12]} has no evidence; run cybermesh detect with --evidence")
    same, differs, skipped = 0, [], []
    for finding in evidence.get("findings", []):
        outcome = _replay(evidence, finding, tools)
        if outcome is None:
            skipped.append(f"{finding['engine']} {finding['rule']}")
        elif outcome:
            differs.append(outcome)
        else:
            same += 1
    return {**alert, "replay": {"same": same, "differs": differs, "not_replayed": skipped}}


def _replay(evidence: Mapping[str, Any], finding: Mapping[str, Any], tools: _Tools) -> str | None:
    """Return an empty text where a finding replays, what differs where not, and None where evidence is not enough to."""
    from cybermesh.detect.evidence import EvidenceError, replay

    if finding["engine"] == "rules":
        try:
            return "" if replay({**evidence, "findings": [finding]}, tools.rules) else None
        except EvidenceError as error:
            return str(error)
    if finding["engine"] == "classifier" and tools.classifier is not None:
        values = finding["values"]
        if str(values.get("model")) != tools.classifier.model.digest[:16]:
            return f"made with the model {values.get('model')}, not with {tools.classifier.model.digest[:16]}"
        try:
            kind, score = tools.classifier.replay({name: float(values[name]) for name in tools.classifier.model.inputs})
        except KeyError as error:
            return f"the evidence lacks {error}"
        told = float(values["strongest_score"])
        return "" if kind == evidence["type"] and score == told else f"the model gives {kind} {score!r}, not {told!r}"
    return None


def _print(told: Mapping[str, Any]) -> None:
    evidence, replayed = told["evidence"], told["replay"]
    typer.echo(f"{told['type']} {told['source']} → {told['destination'] or 'several'}  id {told['id']}")
    typer.echo(f"  {told['first']} to {told['last']}, count {told['count']}, confidence {told['confidence']}")
    typer.echo(f"  rules {evidence['rules_digest'][:16]}, model {evidence['model_digest'][:16] or 'none'}")
    for finding in evidence["findings"]:
        typer.echo(f"  {finding['engine']} {finding['rule']}: {finding['score_ppm'] / 1e6:.3f}  {finding['explanation']}")
        if "condition" in finding:
            typer.echo(f"    fires when {finding['condition']}")
    typer.echo(f"  replayed: {replayed['same']} the same, {len(replayed['differs'])} not")
    for text in (*replayed["differs"], *(f"not replayed: {name}" for name in replayed["not_replayed"])):
        typer.echo(f"    {text}")


def _labelled(flows: FlowBatch, alert: Mapping[str, Any], kind: str) -> list[bytes]:
    """Return the lines of a batch's flows that belong to an alert."""
    import numpy as np

    from cybermesh.cli.flow_rows import csv_rows
    from cybermesh.detect.engines.rules import address_text

    first, last = _microseconds(alert["first"]), _microseconds(alert["last"])
    timely = np.flatnonzero((flows.end_us >= first) & (flows.start_us <= last) & ~flows.single_packet)
    source, target = alert["source"], alert["destination"]
    rows = []
    for row in timely.tolist():
        ends = {address_text(flows.src[row]), address_text(flows.dst[row])}
        if source in ends and (target is None or target in ends):
            rows.append(row)
    text = csv_rows(flows.take(np.array(rows, dtype=np.intp)))
    return [line + f",{kind},alert {alert['id'][:12]}\n".encode() for line in text.splitlines()]


def _microseconds(text: str) -> int:
    try:
        return (datetime.datetime.fromisoformat(text) - _EPOCH) // datetime.timedelta(microseconds=1)
    except (TypeError, ValueError) as error:
        raise output.CommandError(f"{text!r}: not a time as cybermesh detect prints it") from error


def _append(out: Path, lines: list[bytes]) -> int:
    """Add the lines that are not there yet, under the table's header; return how many. The file is replaced as a whole."""
    from cybermesh.cli.flow_rows import csv_header

    header = csv_header().rstrip(b"\n") + b",label_class,Label\n"
    try:
        there = out.read_bytes() if out.exists() else header
        if not there.startswith(header):
            raise output.CommandError(f"{out}: not a table that cybermesh alerts label wrote; name another")
        known = {line.rsplit(b",", 2)[0] for line in there.splitlines()}
        new = [line for line in lines if line.rsplit(b",", 2)[0] not in known]
        beside = out.with_name(out.name + ".new")
        with beside.open("wb") as file:
            file.write(there + b"".join(new))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    except OSError as error:
        raise output.CommandError(f"{out}: {error.strerror}; name a file that can be written") from error
    return len(new)
