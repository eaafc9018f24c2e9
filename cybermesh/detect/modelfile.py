"""A classifier on disk: ``model.onnx`` with the trees, ``model.json`` with all that is needed to use them rightly.

Rules:

- nothing is loaded that is not trusted: a shipped model is pinned by SHA-256 in the package, a site's own carries the site's
  Ed25519 signature. Only who names a directory to measure it may load it unsigned;
- ``model.json`` holds the digest of ``model.onnx`` and its own; one changed byte in either is a ``ModelError``;
- a model whose feature definitions differ from the meter's is refused: it would be fed other numbers under the same names;
- both files are data. Nothing in them is executed but the operators of ONNX.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from cybermesh import keys
from cybermesh.detect.guard import Density
from cybermesh.telemetry.features import DEFINITION_HASH, NAMES

FORMAT = 1
SHIPPED, SITE = "flow-classifier", "site-classifier"
ONNX, METADATA, CARD, SIGNATURE = "model.onnx", "model.json", "MODEL_CARD.md", "model.sig"
SIGNED_DOMAIN = b"cybermesh/model/1\x00"
ONNX_BYTES_MAX = 16 << 20
FORBIDDEN_INPUTS = frozenset({"src_port", "dst_port"})


class ModelError(Exception):
    """A model directory cannot be used; the text says which file, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Model:
    """Everything about a classifier but its trees.

    ``classes`` includes ``benign``; ``thresholds`` and ``ceilings`` have an entry for each of the others: the calibrated
    probability from which the class is reported, and the highest confidence that its calibration rows support. ``important``
    lists for each class the inputs that decided most; ``typical`` the 5 %, 50 % and 95 % quantiles of each input over benign
    training rows. ``record`` is what the card says: data, terms, seed, versions, metrics. ``benign_shift`` is added to the
    logarithm of benign's probability before anything else is made of it: what a site's own traffic taught about its threshold.
    """

    name: str
    inputs: tuple[str, ...]
    classes: tuple[str, ...]
    temperature: float
    thresholds: Mapping[str, float]
    ceilings: Mapping[str, float]
    density: Density
    important: Mapping[str, tuple[str, ...]]
    typical: Mapping[str, tuple[float, float, float]]
    record: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    benign_shift: float = 0.0


def encode(model: Model, onnx: bytes) -> bytes:
    """Return the bytes of ``model.json`` for this model and these trees."""
    body = {
        "format": FORMAT,
        "name": model.name,
        "definition_hash": DEFINITION_HASH,
        "inputs": model.inputs,
        "classes": model.classes,
        "temperature": model.temperature,
        "thresholds": dict(model.thresholds),
        "ceilings": dict(model.ceilings),
        "density": _encode_density(model.density),
        "important": dict(model.important),
        "typical": dict(model.typical),
        "record": dict(model.record),
        "onnx_sha256": hashlib.sha256(onnx).hexdigest(),
    }
    if model.benign_shift:
        body["benign_shift"] = model.benign_shift
    return _dump(body | {"sha256": hashlib.sha256(_dump(body)).hexdigest()}) + b"\n"


def save(directory: Path, model: Model, onnx: bytes) -> None:
    """Write ``model.onnx`` and ``model.json`` into ``directory``, made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ONNX).write_bytes(onnx)
    (directory / METADATA).write_bytes(encode(model, onnx))


def sign(directory: Path, key: keys.SigningKey) -> None:
    """Write ``model.sig``, the key's signature of the metadata and through it of the trees."""
    (directory / SIGNATURE).write_text(key.sign(_signed_bytes((directory / METADATA).read_bytes())).hex() + "\n")


def shipped_directory() -> Path:
    """Return where the model that comes with the package lies."""
    return Path(str(resources.files("cybermesh") / "data" / "models" / SHIPPED))


def load(directory: Path, *, site_key: bytes | None = None, allow_unsigned: bool = False) -> tuple[Model, bytes]:
    """Return the metadata and the ONNX bytes of a trusted model.

    A model is trusted when its metadata's SHA-256 is pinned in the package, or ``model.sig`` is ``site_key``'s signature of it,
    or ``allow_unsigned`` says that the caller answers for the directory.

    Raises:
        ModelError: a file is missing, damaged or changed, the model is not trusted, or its features are not the meter's.
    """
    metadata, onnx = _read(directory / METADATA), _read(directory / ONNX)
    if not (allow_unsigned or _pinned(metadata) or _signed(directory, metadata, site_key)):
        raise ModelError(
            f"{directory}: neither pinned in this package nor signed by the site's key; "
            "reinstall the package, or sign the site's model after checking where it comes from"
        )
    model = _decode(directory / METADATA, metadata)
    _check_features(directory / METADATA, metadata)
    if hashlib.sha256(onnx).hexdigest() != orjson.loads(metadata)["onnx_sha256"]:
        raise ModelError(f"{directory / ONNX}: not the file that {METADATA} describes; restore both from one training run")
    return model, onnx


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > ONNX_BYTES_MAX:
            raise ModelError(f"{path}: larger than {ONNX_BYTES_MAX >> 20} MB; not a model of this project")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}; name a directory written by cybermesh train") from error


def _pinned(metadata: bytes) -> bool:
    pins = orjson.loads((resources.files("cybermesh") / "data" / "models" / "pins.json").read_bytes())
    return hashlib.sha256(metadata).hexdigest() in pins.values()


def _signed(directory: Path, metadata: bytes, site_key: bytes | None) -> bool:
    path = directory / SIGNATURE
    if site_key is None or not path.is_file():
        return False
    try:
        signature = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except ValueError:
        return False
    return keys.verify(site_key, _signed_bytes(metadata), signature)


def _signed_bytes(metadata: bytes) -> bytes:
    return SIGNED_DOMAIN + hashlib.sha256(metadata).digest()


def _decode(path: Path, metadata: bytes) -> Model:
    try:
        body = orjson.loads(metadata)
        digest = body.pop("sha256")
        if hashlib.sha256(_dump(body)).hexdigest() != digest:
            raise ModelError(f"{path}: changed after it was written; restore it from the training run")
        if body["format"] != FORMAT:
            raise ModelError(f"{path}: format {body['format']}, this version reads {FORMAT}; train again")
        return Model(
            name=body["name"],
            inputs=tuple(body["inputs"]),
            classes=tuple(body["classes"]),
            temperature=float(body["temperature"]),
            thresholds=body["thresholds"],
            ceilings=body["ceilings"],
            density=_decode_density(body["density"]),
            important={name: tuple(inputs) for name, inputs in body["important"].items()},
            typical={name: (low, middle, high) for name, (low, middle, high) in body["typical"].items()},
            record=body["record"],
            digest=hashlib.sha256(metadata).hexdigest(),
            benign_shift=float(body.get("benign_shift", 0.0)),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: not a model's metadata ({error!r}); name a directory written by cybermesh train") from error


def _check_features(path: Path, metadata: bytes) -> None:
    body = orjson.loads(metadata)
    if body["definition_hash"] != DEFINITION_HASH:
        raise ModelError(f"{path}: trained with other feature definitions than this version meters; train again")
    used = {*body["inputs"], *body["density"]["inputs"]}
    if unknown := sorted(used - set(NAMES)):
        raise ModelError(f"{path}: inputs that the meter does not have: {', '.join(unknown)}; train again")
    if forbidden := sorted(used & FORBIDDEN_INPUTS):
        raise ModelError(f"{path}: ports are never inputs ({', '.join(forbidden)}); train again")


def _encode_density(density: Density) -> dict[str, Any]:
    return {
        "inputs": density.inputs,
        "centre": _encode_array(density.centre),
        "scale": _encode_array(density.scale),
        "centres": [_encode_array(array) for array in density.centres],
        "weights": [_encode_array(array) for array in density.weights],
        "limits": density.limits.tolist(),
    }


def _decode_density(body: Mapping[str, Any]) -> Density:
    width = len(body["inputs"])
    return Density(
        inputs=tuple(body["inputs"]),
        centre=_decode_array(body["centre"]),
        scale=_decode_array(body["scale"]),
        centres=tuple(_decode_array(text).reshape(-1, width) for text in body["centres"]),
        weights=tuple(_decode_array(text).reshape(-1, width) for text in body["weights"]),
        limits=np.array(body["limits"], dtype=np.float64),
    )


def _encode_array(array: npt.NDArray[np.float64]) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode("ascii")


def _decode_array(text: str) -> npt.NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float64)


def _dump(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)
