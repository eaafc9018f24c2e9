"""``cybermesh calibrate``: fit a model's threshold and confidence to this network's ordinary traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cybermesh.cli import model_files, output
from cybermesh.cli.adapt import FprOption


def calibrate(
    benign: Annotated[Path, typer.Option(help="The site's ordinary traffic: a capture or a flow table, no labels needed.")],
    out: model_files.OutOption,
    data: Annotated[Path | None, typer.Option(help="Labelled flows, if there are any: they set the confidence.")] = None,
    model: model_files.ModelOption = None,
    site_key: model_files.SiteKeyOption = None,
    key: model_files.KeyOption = None,
    seed: model_files.SeedOption = 1,
    fpr: FprOption = 0.01,
    json: output.JsonOption = False,
) -> None:
    """Set the threshold so that at most the given share of ordinary flows is reported, and teach the guard what they look like.

    The trees stay as they are, and nothing is downloaded or installed: this works without the extra named train.

    Example: cybermesh calibrate --benign quiet-hour.pcap --out site-model --key site.key
    """
    from cybermesh.detect import recalibration
    from cybermesh.detect.datasets import BENIGN, DatasetError, read
    from cybermesh.detect.modelfile import ModelError
    from cybermesh.detect.sitetraffic import read_presumed

    try:
        base, onnx = model_files.open_base(model, site_key)
        quiet = read_presumed(benign, BENIGN)
        output.note(f"{benign}: {len(quiet)} flows")
        labelled = None if data is None else read(data)
        made = recalibration.calibrate(base, onnx, quiet, labelled, seed=seed, fpr_max=fpr)
    except (DatasetError, ModelError) as error:
        raise output.CommandError(str(error)) from error
    model_files.write(out, made, onnx, key)
    if json:
        output.emit_one({"out": str(out), **made.record})
        return
    typer.echo(f"{out}: {made.record['rows_of_ordinary_traffic']} flows of ordinary traffic")
    for name in ("benign_fpr", "ood_share"):
        typer.echo(f"  {name:<14} {made.record['before'][name]:.4f} before, {made.record['after'][name]:.4f} after")
