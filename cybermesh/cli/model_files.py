"""What ``train``, ``calibrate`` and ``adapt`` share: where the model they start from is, and where the one they make goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.detect.modelfile import Model

OutOption = Annotated[
    Path, typer.Option(help="Directory for model.onnx, model.json, MODEL_CARD.md and, with --key, model.sig.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="The site's private key (cybermesh keys generate FILE): signs the model.")
]
SiteKeyOption = Annotated[
    str | None, typer.Option("--site-key", help="Public key (64 hex digits) that must have signed the model named.")
]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Directory of the model to start from; default: the shipped.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same rows and seed give the same model.")]
PlotsOption = Annotated[
    Path | None, typer.Option("--plots", help="Directory for PNG files: reliability, confusion, ROC. Needs matplotlib.")
]


def public_key(text: str | None) -> bytes | None:
    """Return the key that an option gives in hex.

    Raises:
        CommandError: it is none.
    """
    if text is None:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise output.CommandError("--site-key: not a public key of 64 hex digits; cybermesh keys show FILE prints it", 2)
    return key


def open_base(directory: Path | None, site_key: str | None) -> tuple[Model, bytes]:
    """Return the model to start from: the shipped one, or a site's.

    A directory named here without a key is the caller's own: checked for damage and for its features, not for who made it.
    """
    from cybermesh.detect.modelfile import load, shipped_directory

    key = public_key(site_key)
    return load(directory or shipped_directory(), site_key=key, allow_unsigned=directory is not None and key is None)


def write(out: Path, model: Model, onnx: bytes, key_file: Path | None) -> None:
    """Write a model with its card into ``out``, signed if there is a key, and say on stderr what follows from that.

    Raises:
        CommandError: the key or the directory cannot be used.
    """
    from cybermesh.detect.modelcard import render
    from cybermesh.detect.modelfile import CARD, SIGNATURE, save, sign
    from cybermesh.keystore import KeystoreError, load_key

    try:
        key = None if key_file is None else load_key(key_file)
    except KeystoreError as error:
        raise output.CommandError(str(error)) from error
    try:
        # The old signature goes first: it must never lie beside a model it does not belong to.
        (out / SIGNATURE).unlink(missing_ok=True)
        save(out, model, onnx)
        (out / CARD).write_text(render(model), encoding="utf-8")
        if key is not None:
            sign(out, key)
    except OSError as error:
        raise output.CommandError(f"{out}: {error.strerror}; name a directory that can be written") from error
    if key is None:
        output.note(f"{out}: not signed, so no detector loads it; make a key (cybermesh keys generate) and give it with --key")
    else:
        output.note(f"{out}: signed; load it with --model {out} --site-key {key.public.hex()}")
