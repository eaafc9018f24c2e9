"""The generated code is current, and a stale file is named."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_proto", ROOT / "tools" / "generate_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_code_is_current_and_a_stale_file_is_named(generator: ModuleType, tmp_path: Path) -> None:
    assert generator.stale(generator.OUT) == []
    for path in generator.OUT.glob("*_pb2.py*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "ai_pb2.py").write_text("# edited by hand\n")
    (tmp_path / "control_pb2.pyi").unlink()
    (tmp_path / "gone_pb2.py").write_text("")
    assert [line.split(":")[0] for line in generator.stale(tmp_path)] == ["ai_pb2.py", "control_pb2.pyi", "gone_pb2.py"]


def test_generating_twice_gives_the_same_bytes(generator: ModuleType, tmp_path: Path) -> None:
    generator.generate(tmp_path)
    assert generator.stale(tmp_path) == []
