"""``cybermesh evaluate``: how good a classifier is on labelled flows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import model_files, output

if TYPE_CHECKING:
    from cybermesh.detect.evaluation import Evaluation


def evaluate(
    data: Annotated[Path, typer.Option(help="Labelled flows: CSV or CSV.gz of any CIC variant, or of cybermesh flows.")],
    model: Annotated[Path | None, typer.Option(help="Directory of a trained model; the shipped one by default.")] = None,
    plots: model_files.PlotsOption = None,
    protocol: Annotated[
        bool,
        typer.Option("--protocol", help="Measure the recipe: train on earlier rows with several seeds, test on later ones."),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=50, help="Seeds of --protocol.")] = 5,
    json: output.JsonOption = False,
) -> None:
    """Measure precision, recall, F1, false positives, AUC, calibration error and abstentions, with 95 % intervals.

    Rows the guard abstains on count as not reported in attack_recall and benign_fpr; per-class figures and macro-F1 are the
    model's classes for all rows. A model named here need not be signed: measuring it trusts nothing it says.

    --protocol trains: within each label the first 70 % by time, no overlap, and measures on the rest; then without each day
    in turn. It needs the extra named train.

    Example: cybermesh evaluate --data held-out.csv.gz --json
    """
    from cybermesh.detect.datasets import DatasetError, stream
    from cybermesh.detect.engines.classifier import open_classifier
    from cybermesh.detect.evaluation import figures, measure
    from cybermesh.detect.modelfile import ModelError
    from cybermesh.detect.plots import PlotError, draw

    if protocol:
        _protocol(data, seeds, json)
        return
    try:
        measured = measure(open_classifier(model, allow_unsigned=model is not None), stream(data))
        output.note_skipped(data, measured.skipped)
        if plots is not None:
            output.note("drew " + ", ".join(map(str, draw(measured, plots))))
    except (DatasetError, ModelError, PlotError) as error:
        raise output.CommandError(str(error)) from error
    told = figures(measured)
    if json:
        output.emit_one(told.to_json())
        return
    _print(told)
    if measured.reasons:
        output.note("abstained: " + ", ".join(f"{count} {reason}" for reason, count in sorted(measured.reasons.items())))


def _protocol(data: Path, seeds: int, json: bool) -> None:
    from cybermesh.detect import protocol
    from cybermesh.detect.datasets import DatasetError, read
    from cybermesh.detect.training import TrainingError

    try:
        told = protocol.run(read(data), seeds, output.note)
    except TrainingError as error:
        raise output.CommandError(str(error), 2) from error
    except DatasetError as error:
        raise output.CommandError(str(error)) from error
    if json:
        output.emit_one(told)
        return
    rows = told["rows"]
    typer.echo(f"{rows['train']:,} rows train, {rows['test']:,} later ones test; mean of {seeds} seeds")
    for name, value in told["mean"].items():
        typer.echo(f"  {name:<14} {'none' if value is None else f'{value:.5f}'}")
    typer.echo(f"  false positives of {rows['test_benign']:,} benign rows: {', '.join(map(str, told['false_positives']))}")
    for name, row in told["per_class"].items():
        low, high = row["recall_interval"]
        typer.echo(f"  {name:<14} {row['n']:>7} recall {row['recall']:.4f} [{low:.4f}, {high:.4f}]  F1 {row['f1']:.4f}")
    for day, row in told["without_a_day"].items():
        typer.echo(f"  without {day}: {', '.join(f'{name} {value}' for name, value in row.items())}")


def _print(figures: Evaluation) -> None:
    typer.echo(f"{figures.rows:,} rows")
    for key in ("macro_f1", "macro_f1_all", "attack_recall", "benign_fpr", "auc", "ece", "ood_share"):
        value = getattr(figures, key)
        interval = figures.intervals.get(key)
        text = "none" if value is None else f"{value:.5f}"
        typer.echo(
            f"  {key:<14} {text}" + (f"  [{interval[0]:.5f}, {interval[1]:.5f}]" if interval and value is not None else "")
        )
    typer.echo(f"  {'class':<14} {'rows':>7} {'precision':>10} {'recall':>8} {'F1':>8}")
    for name, row in figures.per_class.items():
        typer.echo(f"  {name:<14} {row['n']:>7} {row['precision']:>10.4f} {row['recall']:>8.4f} {row['f1']:>8.4f}")
