"""``cybermesh train``: a classifier from labelled flows, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import output


def train(
    data: Annotated[Path, typer.Option(help="Labelled flows: CSV or CSV.gz of any CIC variant, or of cybermesh flows.")],
    out: Annotated[Path, typer.Option(help="Directory for model.onnx, model.json and MODEL_CARD.md.")],
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same rows and seed give the same model.")] = 1,
    terms: Annotated[str, typer.Option(help="Under which terms the data may be used; goes into the card.")] = "",
    json: output.JsonOption = False,
) -> None:
    """Train, calibrate and measure a classifier; needs what the extra named train installs.

    Example: cybermesh train --data flows.csv.gz --out site-model --seed 7
    """
    from cybermesh.detect.datasets import DatasetError, read
    from cybermesh.detect.modelcard import render
    from cybermesh.detect.modelfile import CARD, save
    from cybermesh.detect.training import TrainingError, require_extra
    from cybermesh.detect.training import train as train_model

    try:
        require_extra()
        trained = train_model(read(data), seed, terms=terms, progress=output.note)
    except TrainingError as error:
        raise output.CommandError(str(error), 2) from error
    except DatasetError as error:
        raise output.CommandError(str(error)) from error
    try:
        save(out, trained.model, trained.onnx)
        (out / CARD).write_text(render(trained.model), encoding="utf-8")
    except OSError as error:
        raise output.CommandError(f"{out}: {error.strerror}; name a directory that can be written") from error
    record = trained.model.record
    if json:
        output.emit_one({"out": str(out), "onnx_bytes": len(trained.onnx), **record})
        return
    held_out = record["held_out"]
    typer.echo(f"{out}: {len(trained.onnx):,} bytes of trees, {record['rows']:,} rows")
    for key in ("macro_f1", "attack_recall", "benign_fpr", "auc", "ece", "ood_share"):
        value = held_out[key]
        typer.echo(f"  {key:<14} {'none' if value is None else f'{value:.5f}'}")
