"""The house rules that no other tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cybermesh"
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if not path.name.endswith("_pb2.py") and "migrations/versions" not in str(path)
)
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "core", "service", "services", "manager", "misc"}
LINES_MAX = 500
FUNCTION_LINES_MAX = 70
PARAMETERS_MAX = 6
# A supervisor may catch everything, and says so: one line each, with the reason beside the except.
SUPERVISOR_MARK = "supervisor:"


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_is_short_and_says_why_it_exists(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LINES_MAX, f"{lines} lines; split it"
    assert ast.get_docstring(_tree(path)), "no module docstring"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_functions_fit_one_screen(path: Path) -> None:
    for function in _functions(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= FUNCTION_LINES_MAX, f"{function.name} has {length} lines"
        if path.is_relative_to(PACKAGE / "cli"):
            continue  # there a parameter is a command line option
        arguments = function.args
        names = [
            a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in {"self", "cls"}
        ]
        assert len(names) <= PARAMETERS_MAX, f"{function.name} has {len(names)} parameters"


def test_no_module_has_a_name_that_says_nothing() -> None:
    bad = [
        _name(path) for path in MODULES if {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts} & BANNED_NAMES
    ]
    assert not bad


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_a_supervisor_catches_everything(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or getattr(node.type, "id", "") in {"Exception", "BaseException"}
        ):
            assert SUPERVISOR_MARK in lines[node.lineno - 1], f"line {node.lineno}: name the error, or mark the supervisor"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_the_command_line_ends_the_process(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "cli"):
        return
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert (getattr(node.func.value, "id", ""), node.func.attr) != ("sys", "exit"), f"line {node.lineno}: sys.exit"


def test_protobuf_types_stay_in_the_wire_package() -> None:
    allowed = (PACKAGE / "wire", PACKAGE / "consensus" / "codec.py")
    bad = [
        _name(path)
        for path in MODULES
        if not any(path == place or path.is_relative_to(place) for place in allowed)
        and re.search(r"\b\w+_pb2\b", path.read_text())
    ]
    assert not bad


def test_lock_file_has_hashes_and_names_no_host() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    requirements = re.split(r"\n(?=[a-z0-9])", text)
    assert [r.split(" ")[0] for r in requirements if "--hash=sha256:" not in r] == []


def test_tracked_files_name_no_registry_and_no_machine() -> None:
    pattern = "|".join(
        (
            "--(extra-)?index-url",
            '"resolved": *"http',
            "py" + "pi\\.org",
            "registry\\.np" + "mjs",
            "(^|[^A-Za-z0-9_.])/(ro" + "ot|wo" + "rk)/",
        )
    )
    found = subprocess.run(
        ["git", "grep", "-nIE", "-e", pattern, "--", ".", ":!*.svg"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode in {0, 1}, found.stderr
    assert found.stdout == ""


def test_version_is_in_the_changelog() -> None:
    from cybermesh import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
