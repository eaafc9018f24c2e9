"""``cybermesh operator …``: what people order, signed with an operator's key and sent the way of every other message.

A command is a signed message on ``control.operator``: validators order it like everything else, and the ledger decides what
becomes of it. What needs several operators (key ring, protected networks, validator set) is sent by each of them, alike; the
receipts say how many have signed. Sending is no promise, so a command waits for its receipt in the validator's store that the
settings name, and exits with 1 when the ledger refused it; ``--no-wait`` only sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import orjson
import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.store.records import StoredReceipt

RECEIPT_WAIT_S: Final = 30.0
RECEIPT_LOOK_S: Final = 0.1

app = typer.Typer(no_args_is_help=True, help="Approve, revoke, allow, change keys and validators: signed orders.")
KeyFile = Annotated[Path, typer.Option("--key", metavar="FILE", help="The operator's key file, mode 0600.")]
FileOption = Annotated[Path | None, typer.Option("-c", "--config", help="A settings file that names the bus and the topics.")]
PolicyId = Annotated[str, typer.Argument(metavar="ID", help="Policy id, whole.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for whoever reads the ledger.")]
Networks = Annotated[list[str], typer.Argument(metavar="NETWORK…", help="Addresses or prefixes.")]
Remove = Annotated[bool, typer.Option("--remove", help="Take them off the list instead.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Only send; do not wait for the receipt in the validator's store.")]
Action = Annotated[str, typer.Argument(metavar="ACTION", help="The action, for example key_ring or validator_set.")]
Arguments = Annotated[Path, typer.Argument(metavar="FILE", help="A JSON object with the action's own members; - is stdin.")]


@app.command()
def approve(
    identifier: PolicyId, key: KeyFile, config: FileOption = None, reason: Reason = "", no_wait: NoWait = False
) -> None:
    """Approve a pending policy.

    Example: cybermesh operator approve 1f2e3d --key operator-1.key -c validator.toml
    """
    _submit("approve", {"policy_id": identifier, **_given(reason)}, key, config, no_wait=no_wait)


@app.command()
def reject(identifier: PolicyId, key: KeyFile, config: FileOption = None, reason: Reason = "", no_wait: NoWait = False) -> None:
    """Reject a policy that is not decided yet."""
    _submit("reject", {"policy_id": identifier, **_given(reason)}, key, config, no_wait=no_wait)


@app.command()
def revoke(identifier: PolicyId, key: KeyFile, config: FileOption = None, reason: Reason = "", no_wait: NoWait = False) -> None:
    """End a decision before its time."""
    _submit("revoke", {"policy_id": identifier, **_given(reason)}, key, config, no_wait=no_wait)


@app.command()
def allow(
    networks: Networks,
    key: KeyFile,
    config: FileOption = None,
    remove: Remove = False,
    reason: Reason = "",
    no_wait: NoWait = False,
) -> None:
    """Put networks on the allow list, which ends the decisions that meet them, or take them off it."""
    _submit("allow_list", {"remove" if remove else "add": networks, **_given(reason)}, key, config, no_wait=no_wait)


@app.command()
def protect(
    networks: Networks,
    key: KeyFile,
    config: FileOption = None,
    remove: Remove = False,
    reason: Reason = "",
    no_wait: NoWait = False,
) -> None:
    """Protect networks from every policy, or stop to; needs as many operators as the genesis says."""
    _submit("protected_networks", {"remove" if remove else "add": networks, **_given(reason)}, key, config, no_wait=no_wait)


@app.command("kill-switch")
def kill_switch(
    state: Annotated[str, typer.Argument(metavar="on|off")],
    key: KeyFile,
    config: FileOption = None,
    reason: Reason = "",
    no_wait: NoWait = False,
) -> None:
    """Stop every new rule, or allow them again; what is in force runs out as it would."""
    if state not in {"on", "off"}:
        raise output.CommandError(f"{state}: say on or off", 2)
    _submit("kill_switch", {"on": state == "on", **_given(reason)}, key, config, no_wait=no_wait)


@app.command()
def send(action: Action, arguments: Arguments, key: KeyFile, config: FileOption = None, no_wait: NoWait = False) -> None:
    """Send any operator action with its members from a JSON file: add, key_ring, validator_set, label, mute and the others.

    Example: echo '{"remove": ["5f0c…"]}' | cybermesh operator send key_ring - --key operator-1.key -c validator.toml
    """
    from cybermesh.messages import OperatorAction

    if action not in list(OperatorAction):
        raise output.CommandError(f"{action}: no such action; known are {', '.join(OperatorAction)}", 2)
    try:
        raw = sys.stdin.buffer.read() if str(arguments) == "-" else arguments.read_bytes()
        members = orjson.loads(raw)
    except OSError as error:
        raise output.CommandError(f"{arguments}: {error.strerror}", 2) from error
    except orjson.JSONDecodeError as error:
        raise output.CommandError(f"{arguments}: not JSON: {error}", 2) from error
    if not isinstance(members, dict) or members.keys() & {"id", "action"}:
        raise output.CommandError(f"{arguments}: must be an object without id and action, which are set here", 2)
    _submit(action, members, key, config, no_wait=no_wait)


@app.command()
def ready(
    name: Annotated[str, typer.Argument(help="Name of the new validator.")], key: KeyFile, config: FileOption = None
) -> None:
    """Print the entry by which operators add this validator, with its word, good for ten minutes, that it is ready.

    Run it where the new validator's key lies, put what it prints into {"add": [ … ]} and send that as validator_set.
    """
    from cybermesh.config import load
    from cybermesh.keystore import load_key
    from cybermesh.ledger.keyring import ready_bytes
    from cybermesh.roles.firewall import read_genesis

    genesis, own, now_ms = read_genesis(load(config).settings.node.genesis), load_key(key), time.time_ns() // 1_000_000
    signature = own.sign(ready_bytes(genesis.chain_id, now_ms))
    entry = {"name": name, "pubkey": own.public.hex(), "ready_ms": now_ms, "ready_signature": signature.hex()}
    output.emit_one(entry, output.Format.NDJSON)


def _given(reason: str) -> dict[str, object]:
    return {"reason": reason} if reason else {}


def _submit(action: str, arguments: Mapping[str, object], key_file: Path, config: Path | None, *, no_wait: bool) -> None:
    """Sign a command and publish it; prints its id, the digest that its receipt carries, and what the ledger made of it."""
    from cybermesh.bus.topics import Topics
    from cybermesh.config import load
    from cybermesh.envelope.nonces import NonceSource
    from cybermesh.envelope.signing import OperatorContent, Stamp, sign_operator
    from cybermesh.keystore import FileCounters, load_key
    from cybermesh.ledger.receipts import Code
    from cybermesh.messages import OperatorAction, Transaction, TxKind, tx_digest
    from cybermesh.roles.open_bus import open_bus
    from cybermesh.roles.process import store_location
    from cybermesh.wire import codec

    settings, key = load(config).settings, load_key(key_file)
    if settings.bus.kind == "memory":
        raise output.CommandError("bus.kind: a memory bus ends at its process; name settings whose bus others read", 2)
    where = store_location(settings)
    if not no_wait and isinstance(where, Path) and not where.exists():
        raise output.CommandError(f"{where}: no store to read the receipt from; name a validator's settings, or --no-wait", 2)
    now_ms = time.time_ns() // 1_000_000
    with FileCounters(key_file.with_suffix(".nonces")) as counters:
        nonce = NonceSource(counters, batch=1).next(now_ms)
    content = OperatorContent(f"{action}-{nonce.hex()}", OperatorAction(action), arguments)
    raw = codec.encode(sign_operator(content, Stamp(key, now_ms // 1_000, nonce)))
    topic = Topics(**settings.topics.model_dump()).control_operator

    async def publish() -> None:
        async with open_bus(settings) as bus:
            await bus.publish(topic, key.public, raw)

    asyncio.run(publish())
    digest = tx_digest(Transaction(TxKind.OPERATOR, raw).encode()).hex()
    told: dict[str, object] = {"action": action, "id": content.id, "transaction": digest, "topic": topic}
    if no_wait:
        output.emit_one(told, output.Format.NDJSON)
        return
    found = asyncio.run(_receipt(where, digest, RECEIPT_WAIT_S))
    if found is None:
        raise output.CommandError(f"{digest}: sent, and no receipt within {RECEIPT_WAIT_S:g} s; validators may still decide it")
    output.emit_one(told | {"code": found.code, "height": found.height}, output.Format.NDJSON)
    if found.code not in (Code.OK, Code.AWAITING_OPERATORS):
        raise output.CommandError(f"{action}: the ledger answered {found.code}")


async def _receipt(where: str | Path, digest: str, wait_s: float) -> StoredReceipt | None:
    """Return the receipt of a transaction as soon as the store has it; None when it has not by then."""
    from cybermesh.store.store import open_store

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s), open_store(where) as store:
            while not (found := await store.chain.receipts_about(digest)):  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(RECEIPT_LOOK_S)
            return found[0]
    return None
