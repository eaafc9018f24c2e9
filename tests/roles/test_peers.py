"""The file that says where each validator listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from cybermesh.config import ConfigError
from cybermesh.genesis import Genesis
from cybermesh.roles.deployment import Roster, create
from cybermesh.roles.peers import encode_peers, parse_address, read_peers


@pytest.fixture
def genesis() -> Genesis:
    return create(Roster("test", validators=3, producers=1, agents=0)).genesis


def test_a_written_file_gives_every_validator_a_port_of_its_own(tmp_path: Path, genesis: Genesis):
    path = tmp_path / "peers.toml"
    path.write_text(encode_peers(member.name for member in genesis.validators))
    found = read_peers(path, genesis)
    assert found.keys() == {member.pubkey for member in genesis.validators}
    assert {host for host, _ in found.values()} == {"127.0.0.1"}
    assert len({port for _, port in found.values()}) == 3


@pytest.mark.parametrize(
    ("text", "address"),
    [("10.0.0.1:8601", ("10.0.0.1", 8601)), ("[2001:db8::2]:1", ("2001:db8::2", 1)), ("mesh.example:0", ("mesh.example", 0))],
)
def test_addresses_are_read(text: str, address: tuple[str, int]):
    assert parse_address(text, "here") == address


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "host:", "host:x", "host:70000", "host:-1", "2001:db8::2:1", "[]:1", "host:٣"]
)
def test_what_is_no_address_is_refused_with_its_place(text: str):
    with pytest.raises(ConfigError, match=r"^here: "):
        parse_address(text, "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param('validator-1 = "a:1"', r"\[validators\]", id="no table"),
        pytest.param('[validators]\nvalidator-1 = "a:1"\nvalidator-2 = "a:2"', "validator-3: is missing", id="missing"),
        pytest.param(
            "[validators]\n" + "".join(f'validator-{number} = "a:{number}"\n' for number in range(1, 5)),
            "validator-4: is not in the genesis",
            id="stranger",
        ),
        pytest.param("[validators]\nvalidator-1 = 1\nvalidator-2 = 2\nvalidator-3 = 3", "is no address", id="number"),
        pytest.param("[validators", "not TOML", id="not TOML"),
    ],
)
def test_a_wrong_file_names_what_is_wrong(tmp_path: Path, genesis: Genesis, text: str, words: str):
    path = tmp_path / "peers.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_peers(path, genesis)
    assert str(path) in str(refused.value)
    with pytest.raises(ConfigError, match=r"none\.toml.*consensus\.peers"):
        read_peers(tmp_path / "none.toml", genesis)


def test_a_validator_that_came_later_is_named_by_its_key(tmp_path: Path, genesis: Genesis) -> None:
    path, key = tmp_path / "peers.toml", "5e" * 32
    names = [member.name for member in genesis.validators]
    path.write_text(encode_peers(names) + f'"{key}" = "10.0.0.9:8601"\n')
    assert read_peers(path, genesis)[bytes.fromhex(key)] == ("10.0.0.9", 8601)
