"""``cybermesh detect INPUT…``: report the attacks in captures, one object per alert."""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output
from cybermesh.cli.model_files import SiteKeyOption, public_key

if TYPE_CHECKING:
    from cybermesh.detect.detector import Detection
    from cybermesh.detect.engines.classifier import Classifier
    from cybermesh.detect.engines.rule_file import RuleSet
    from cybermesh.detect.pipeline import Pipeline
    from cybermesh.telemetry.sources import Batch, Source

Inputs = Annotated[list[str], typer.Argument(metavar="INPUT…", help="Captures, logs, Zeek, Suricata, flow tables, or -.")]
RulesFolder = Annotated[Path | None, typer.Option("--rules", help="Folder with rule files instead of the shipped ones.")]
FailOnAlert = Annotated[bool, typer.Option("--fail-on-alert", help="Exit with 1 if there is any alert.")]
SiteModel = Annotated[
    Path | None, typer.Option("--model", help="Directory of a site's own model, signed; see cybermesh adapt and --site-key.")
]
Evidence = Annotated[
    bool, typer.Option("--evidence", help="Add to every alert what it rests on, for cybermesh alerts explain.")
]
NoClassifier = Annotated[bool, typer.Option("--no-classifier", help="Use rules and statistics only.")]


def detect(
    inputs: Inputs,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
    rules: RulesFolder = None,
    no_classifier: NoClassifier = False,
    model: SiteModel = None,
    site_key: SiteKeyOption = None,
    evidence: Evidence = False,
    fail_on_alert: FailOnAlert = False,
) -> None:
    """Report the attacks in captures and logs; several inputs are one case, so one attack seen in two of them is one alert.

    Examples: [bold]cybermesh detect trace.pcap[/bold] · [bold]cybermesh detect trace.pcap auth.log -o json[/bold]
    """
    form = output.Format.JSON if json else form
    rule_set = load_rules(rules)
    classifier = None if no_classifier else _classifier(model, public_key(site_key))
    found, failed = _detect(inputs, rule_set, classifier)
    if form is output.Format.HUMAN:
        _print(found)
    else:
        told = (as_object(detection) | ({"evidence": detection.evidence} if evidence else {}) for detection in found)
        output.emit(told, form)
    if failed or (fail_on_alert and found):
        raise typer.Exit(1)


def load_rules(folder: Path | None) -> RuleSet:
    """Load the shipped rules, or those of a folder; a fault is a usage error."""
    from cybermesh.detect.engines.rule_file import RuleError, load, shipped_paths
    from cybermesh.telemetry.features import NAMES

    paths = shipped_paths() if folder is None else sorted((*folder.glob("*.yaml"), *folder.glob("*.yml")))
    if not paths:
        raise output.CommandError(f"{folder}: no rule files (*.yaml) there; name a folder that has some", 2)
    try:
        return load(paths, NAMES)
    except RuleError as error:
        raise output.CommandError(f"{error}; mend the rule and try again", 2) from error


def as_object(detection: Detection) -> dict[str, object]:
    """Return the alert as users read it."""
    return {
        "type": detection.type,
        "source": detection.entity,
        "destination": detection.victim,
        "port": detection.port,
        "severity": detection.severity,
        "confidence": round(detection.confidence, 4),
        "first": _iso(detection.first_us),
        "last": _iso(detection.last_us),
        "count": detection.count,
        "spoofable": detection.spoofable,
        "engines": {engine: round(score, 4) for engine, score in detection.votes.items()},
        "explanation": detection.explanation,
        "policy": detection.policy,
        "id": detection.alert_id,
    }


def _detect(specs: list[str], rules: RuleSet, classifier: Classifier | None) -> tuple[list[Detection], int]:
    """Run all inputs through one pipeline, in order of their times; return the alerts, and how many inputs were not readable.

    What one input shows of an incident and another shows too is one alert.
    """
    from cybermesh.detect.pipeline import Decision, build, latest
    from cybermesh.telemetry.features import NAMES
    from cybermesh.telemetry.metering import choose
    from cybermesh.telemetry.sources import SourceError

    metering = choose(specs, tell=output.note)
    pipeline = build(
        rules,
        meter=metering.new_meter(),
        flow_names=NAMES,
        more_engines=() if classifier is None else (classifier,),
        decision=Decision(model_digest="" if classifier is None else classifier.model.digest),
    )
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        sources = []
        for spec in specs:
            try:
                sources.append(stack.enter_context(contextlib.closing(metering.open_source(spec))))
            except SourceError as error:
                failed.append(str(error))
        found = [detection for batch in _with_progress(sources, failed) for detection in pipeline.feed(batch)]
        found += pipeline.finish()
        for message in failed:
            output.complain(message)
        for source in sources:
            _tell(source, pipeline if len(sources) == 1 else None)
    _tell_failures(pipeline)
    return latest(found), len(failed)


def _classifier(model: Path | None, site_key: bytes | None) -> Classifier | None:
    """Open the model named, which must be good, or the shipped one: without it, go on with rules and statistics, and say so."""
    from cybermesh.detect.engines.classifier import open_classifier
    from cybermesh.detect.modelfile import ModelError

    try:
        return open_classifier(model, site_key=site_key)
    except ModelError as error:
        if model is not None:
            raise output.CommandError(str(error)) from error
        output.note(f"without the classifier: {error}")
        return None


def _with_progress(sources: Sequence[Source], failed: list[str]) -> Iterator[Batch]:
    """Yield the sources' batches in order of time; on a terminal, show how far the inputs have been read."""
    from cybermesh.telemetry.sources.merged import merged

    if not sys.stderr.isatty():
        yield from merged(sources, failed)
        return
    from rich.progress import Progress

    with Progress(console=output.console(stderr=True), transient=True) as progress:
        task = progress.add_task(", ".join(source.name for source in sources), total=float(len(sources)))
        for batch in merged(sources, failed):
            yield batch
            progress.update(task, completed=sum(source.progress or 0.0 for source in sources))


def _tell(source: Source, pipeline: Pipeline | None) -> None:
    """Say on stderr what was read and what was left out, and what a pipeline of its own made of it."""
    counters = source.counters
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(counters.skipped.items()))
    output.note(
        f"{source.name}: {counters.packets} {counters.unit}"
        + (f", {pipeline.flows} flows" if pipeline is not None else "")
        + (f", {pipeline.events} events" if pipeline is not None and pipeline.events else "")
        + (f"; skipped: {skipped}" if skipped else "")
        + (f"; {counters.ended}" if counters.ended else "")
    )


def _tell_failures(pipeline: Pipeline) -> None:
    for name, engine in pipeline.detector.counters.items():
        if engine.failures:
            output.note(f"engine {name} failed {engine.failures} times ({engine.last_failure}); the others went on")


def _iso(time_us: int) -> str:
    """Return microseconds since 1970 as ISO 8601 in UTC."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    try:
        return (epoch + datetime.timedelta(microseconds=time_us)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    except OverflowError:
        return f"{time_us} us"


def _print(found: list[Detection]) -> None:
    """Print alerts for people, one paragraph each."""
    console = output.console()
    if not found:
        console.print("No alerts.")
    for detection in found:
        color = "red" if detection.severity >= 8 else "yellow"
        where = f" → {detection.victim}" if detection.victim else ""
        where += f" port {detection.port}" if detection.port else ""
        console.print(f"[bold {color}]{detection.type}[/] {detection.entity}{where}", soft_wrap=True)
        when = f"{_iso(detection.first_us)} to {_iso(detection.last_us)}"
        how = f"severity {detection.severity}, confidence {detection.confidence:.2f}, count {detection.count}"
        lines = [f"{how}, {when}", detection.explanation]
        if detection.policy is not None:
            lines.append(f"proposes: {_policy_line(detection)}")
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _policy_line(detection: Detection) -> str:
    assert detection.policy is not None
    limits = detection.policy["guardrails"]
    seconds = limits["ttl_seconds"] if isinstance(limits, dict) else "?"
    if detection.policy["action"] == "rate_limit":
        return f"limit packets to {detection.victim} port {detection.port or 'any'} for {seconds} s"
    return f"block {detection.entity} for {seconds} s"
