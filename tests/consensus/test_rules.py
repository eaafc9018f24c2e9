"""The core stays small enough to read, and every rule has a number that the code cites where it does it."""

from __future__ import annotations

import re
from pathlib import Path

import cybermesh.consensus

FOLDER = Path(cybermesh.consensus.__file__).parent
CORE = ("safety", "replica", "pacemaker", "blocktree")
RULES = 12


def test_the_four_core_files_stay_under_nine_hundred_lines():
    assert sum(len((FOLDER / f"{name}.py").read_text().splitlines()) for name in CORE) < 900


def test_every_rule_is_stated_once_where_the_protocol_is_explained_and_cited_in_code():
    files = {path.name: path.read_text() for path in FOLDER.glob("*.py")}
    stated = {int(number) for text in files.values() for number in re.findall(r"^R(\d+) +[a-z]", text, re.MULTILINE)}
    assert stated == set(range(1, RULES + 1))
    for number in range(1, RULES + 1):
        cited = [name for name, text in files.items() if re.search(rf"(#|\().*\bR{number}\b", text)]
        assert cited, f"R{number} is cited nowhere"
    everywhere = {int(number) for text in files.values() for number in re.findall(r"\bR(\d+)\b", text)}
    assert everywhere == stated, "no rule is cited that is not stated"
