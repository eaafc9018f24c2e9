"""Generate cybermesh/wire/*_pb2.py and their type stubs from proto/cybermesh/v1/*.proto, or check that they are current.

The generated files are committed, so users need no compiler. ``--check`` generates into a temporary folder and compares byte
by byte; it names each stale, missing or left-over file and exits 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGE = "cybermesh/v1"
OUT = ROOT / "cybermesh" / "wire"
PLUGIN = Path(sys.executable).parent / "protoc-gen-mypy"


class GenerateError(Exception):
    """The compiler refused a .proto file or is not installed."""


def generate(out: Path) -> list[Path]:
    """Compile every .proto file into ``out``; return the written files, sorted."""
    sources = sorted((PROTO / PACKAGE).glob("*.proto"))
    if not PLUGIN.exists():
        raise GenerateError(f"{PLUGIN} is missing: run `make setup`")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{PROTO}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--plugin=protoc-gen-mypy={PLUGIN}",
            f"--python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            *(str(source) for source in sources),
        ]
        if protoc.main(arguments) != 0:
            raise GenerateError("protoc refused the .proto files; its message is above")
        written = []
        for path in sorted((Path(scratch) / PACKAGE).iterdir()):
            # protoc names the Python package after the folder of the .proto file; ours live in cybermesh.wire.
            text = path.read_text(encoding="utf-8").replace("cybermesh.v1 import", "cybermesh.wire import")
            target = out / path.name
            target.write_text(text, encoding="utf-8")
            written.append(target)
    return written


def stale(out: Path) -> list[str]:
    """Return one line per generated file in ``out`` that is missing, differs, or has no .proto file any more."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        fresh = {path.name: path.read_bytes() for path in generate(Path(scratch))}
    present = {path.name: path.read_bytes() for path in (*out.glob("*_pb2.py"), *out.glob("*_pb2.pyi"))}
    for name in sorted(fresh.keys() | present.keys()):
        if name not in present:
            found.append(f"{name}: missing")
        elif name not in fresh:
            found.append(f"{name}: left over, its .proto file is gone")
        elif fresh[name] != present[name]:
            found.append(f"{name}: differs from its .proto file")
    return found


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a generated file is not current")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            for path in generate(OUT):
                sys.stderr.write(f"wrote {path.relative_to(ROOT)}\n")
            return 0
        problems = stale(OUT)
    except GenerateError as error:
        sys.stderr.write(f"generate_proto: {error}\n")
        return 2
    for problem in problems:
        sys.stderr.write(f"cybermesh/wire/{problem}: run `make proto` and commit the result\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
