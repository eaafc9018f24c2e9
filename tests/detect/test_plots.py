"""The pictures are drawn without a display, hold what was measured, and a missing library is one clear line."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from cybermesh.detect import plots
from cybermesh.detect.engines.classifier import Classifier
from cybermesh.detect.evaluation import Measured, measure
from tests.detect.flow_rows import synthetic, trained

PNG = b"\x89PNG\r\n\x1a\n"


def measured() -> Measured:
    return measure(Classifier(trained().model, trained().onnx), [synthetic()])


def test_three_pictures_are_drawn(tmp_path: Path) -> None:
    made = plots.draw(measured(), tmp_path / "pictures")
    assert [path.name for path in made] == ["reliability.png", "confusion.png", "roc.png"]
    assert all(path.read_bytes().startswith(PNG) for path in made)


def test_without_attacks_there_is_no_roc(tmp_path: Path) -> None:
    calm = synthetic().take(synthetic().labels == "benign")
    made = plots.draw(measure(Classifier(trained().model, trained().onnx), [calm]), tmp_path)
    assert [path.name for path in made] == ["reliability.png", "confusion.png"]


def test_the_curve_rises_from_what_no_false_positive_leaves_to_everything() -> None:
    negative, positive = np.linspace(0, 1, 1_001), np.array([0.25, 0.5, 0.75, 2.0])
    recall = plots._recall_at(positive, negative)
    assert recall[0] == 0.25
    assert recall[-1] == 1.0
    assert (np.diff(recall) >= 0).all()
    assert recall[np.searchsorted(plots._RATES, 0.3)] == 0.5


def test_no_matplotlib_and_no_directory_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(plots.PlotError, match="can be written"):
        plots.draw(measured(), tmp_path / "file" / "below")
    imported = importlib.import_module

    def without(name: str, *rest):
        if name == "matplotlib":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(plots.PlotError, match=r"pip install 'cybermesh\[train\]'"):
        plots.draw(measured(), tmp_path)
