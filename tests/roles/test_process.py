"""What a process refuses to start with, before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh.config import ConfigError, Settings, load
from cybermesh.genesis import Budget
from cybermesh.roles.deployment import Roster, create
from cybermesh.roles.process import Role, run


def settings(folder: Path, validators: int, **names: str) -> Settings:
    """Settings of a deployment with so many validators whose genesis lies in the folder."""
    made = create(Roster("start", validators, producers=1, agents=1, operators=1, budget=Budget()))
    path = folder / "genesis.json"
    path.write_bytes(made.genesis.encode())
    places = {"CYBERMESH_NODE__GENESIS": str(path), "CYBERMESH_NODE__STATE_DIR": str(folder / "state")}
    return load(environ={"CYBERMESH_BUS__KIND": "local", **places, **names}).settings


@pytest.mark.parametrize(
    ("validators", "roles", "names", "words"),
    [
        (4, [Role.VALIDATOR], {}, r"node\.id: a validator among several needs its number \(NODE_ID\)"),
        (4, [Role.VALIDATOR], {"NODE_ID": "1", "CYBERMESH_BUS__KIND": "memory"}, r"bus\.kind"),
        (1, [Role.AI], {"CYBERMESH_BUS__KIND": "memory"}, r"bus\.kind"),
        (1, [Role.AI, Role.AI], {}, r"--role: each role once"),
        (4, [Role.VALIDATOR], {"NODE_ID": "1", "CONTROL_SIGNING_DOMAIN": "x"}, r"signing\.control_domain: 'x' differs"),
        (4, [Role.AGENT], {"CONTROL_POLICY_SIGNING_DOMAIN": "x"}, r"signing\.control_policy_domain: 'x' differs"),
    ],
)
async def test_what_cannot_work_is_refused_and_nothing_is_made(
    tmp_path: Path, validators: int, roles: list[Role], names: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        await run(settings(tmp_path, validators, **names), roles)
    assert not (tmp_path / "state").exists()
