"""``cybermesh adapt``: teach a model this network from about a hundred labelled flows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import model_files, output

FprOption = Annotated[float, typer.Option(min=0.0005, max=0.2, help="Share of benign flows that may be reported.")]


def adapt(
    data: Annotated[
        Path, typer.Option(help="Labelled flows: CSV with label_class or Label; cybermesh alerts label writes one.")
    ],
    out: model_files.OutOption,
    benign: Annotated[
        Path | None, typer.Option(help="The site's ordinary traffic: a capture or a flow table, no labels needed.")
    ] = None,
    model: model_files.ModelOption = None,
    site_key: model_files.SiteKeyOption = None,
    key: model_files.KeyOption = None,
    seed: model_files.SeedOption = 1,
    fpr: FprOption = 0.01,
    json: output.JsonOption = False,
) -> None:
    """Make a site's model from labelled flows of the site and its ordinary traffic; needs the extra named train.

    About 100 labelled flows, some of every attack seen, do well; the ordinary traffic (some hundred flows or more) is what
    makes the threshold good. What the model knew before is kept.

    Example: cybermesh adapt --data labelled.csv --benign quiet-hour.pcap --out site-model --key site.key
    """
    from cybermesh.detect import adaptation
    from cybermesh.detect.datasets import BENIGN, DatasetError, read
    from cybermesh.detect.modelfile import ModelError
    from cybermesh.detect.sitetraffic import read_presumed
    from cybermesh.detect.training import TrainingError, require_extra

    try:
        require_extra()
        base, _ = model_files.open_base(model, site_key)
        labelled = read(data)
        output.note_skipped(data, labelled.skipped)
        quiet = None if benign is None else read_presumed(benign, BENIGN)
        if quiet is None:
            output.note("without --benign the threshold rests on a few labelled rows; expect more false alarms or misses")
        made = adaptation.adapt(base, labelled, quiet, seed=seed, fpr_max=fpr, progress=output.note)
    except TrainingError as error:
        raise output.CommandError(str(error), 2) from error
    except (DatasetError, ModelError) as error:
        raise output.CommandError(str(error)) from error
    model_files.write(out, made.model, made.onnx, key)
    record = made.model.record
    if json:
        output.emit_one({"out": str(out), "onnx_bytes": len(made.onnx), **record})
        return
    folds = record["folds"]
    typer.echo(f"{out}: {record['rows']} labelled rows, {record['rows_of_ordinary_traffic']} of ordinary traffic")
    for name in ("attack_recall", "benign_fpr"):
        low, high = folds["intervals"][name]
        typer.echo(f"  {name:<14} {folds[name]:.4f}  [{low:.4f}, {high:.4f}]  in folds of these rows")
