"""``cybermesh train``: a classifier from labelled flows, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import model_files, output


def train(
    data: Annotated[Path, typer.Option(help="Labelled flows: CSV or CSV.gz of any CIC variant, or of cybermesh flows.")],
    out: model_files.OutOption,
    seed: model_files.SeedOption = 1,
    key: model_files.KeyOption = None,
    terms: Annotated[str, typer.Option(help="Under which terms the data may be used; goes into the card.")] = "",
    json: output.JsonOption = False,
) -> None:
    """Train, calibrate and measure a classifier; needs what the extra named train installs.

    Example: cybermesh train --data flows.csv.gz --out site-model --seed 7
    """
    from cybermesh.detect.datasets import DatasetError, read
    from cybermesh.detect.training import TrainingError, require_extra
    from cybermesh.detect.training import train as train_model

    try:
        require_extra()
        dataset = read(data)
        output.note_skipped(data, dataset.skipped)
        trained = train_model(dataset, seed, terms=terms, progress=output.note)
    except TrainingError as error:
        raise output.CommandError(str(error), 2) from error
    except DatasetError as error:
        raise output.CommandError(str(error)) from error
    model_files.write(out, trained.model, trained.onnx, key)
    record = trained.model.record
    if json:
        output.emit_one({"out": str(out), "onnx_bytes": len(trained.onnx), **record})
        return
    held_out = record["held_out"]
    typer.echo(f"{out}: {len(trained.onnx):,} bytes of trees, {record['rows']:,} rows")
    for name in ("macro_f1", "attack_recall", "benign_fpr", "auc", "ece", "ood_share"):
        value = held_out[name]
        typer.echo(f"  {name:<14} {'none' if value is None else f'{value:.5f}'}")
