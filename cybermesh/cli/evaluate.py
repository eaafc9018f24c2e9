"""``cybermesh evaluate``: how good a classifier is on labelled flows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.detect.evaluation import Evaluation


def evaluate(
    data: Annotated[Path, typer.Option(help="Labelled flows: CSV or CSV.gz of any CIC variant, or of cybermesh flows.")],
    model: Annotated[Path | None, typer.Option(help="Directory of a trained model; the shipped one by default.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Measure precision, recall, F1, false positives, AUC, calibration error and abstentions, with 95 % intervals.

    Rows the guard abstains on count as not reported in attack_recall and benign_fpr; per-class figures and macro-F1 are the
    model's classes for all rows. A model named here need not be signed: measuring it trusts nothing it says.

    Example: cybermesh evaluate --data held-out.csv.gz --json
    """
    from cybermesh.detect.datasets import DatasetError, read
    from cybermesh.detect.engines.classifier import open_classifier
    from cybermesh.detect.evaluation import evaluate as measure
    from cybermesh.detect.modelfile import ModelError

    try:
        figures = measure(open_classifier(model, allow_unsigned=model is not None), read(data))
    except (DatasetError, ModelError) as error:
        raise output.CommandError(str(error)) from error
    if json:
        output.emit_one(figures.to_json())
    else:
        _print(figures)


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
