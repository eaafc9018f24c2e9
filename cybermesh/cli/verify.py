"""``cybermesh verify PROOF --genesis FILE``: check a decision proof with nothing but the two files."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cybermesh.cli import output

if TYPE_CHECKING:
    from cybermesh.genesis import Genesis
    from cybermesh.ledger.receipts import DecisionEffect
    from cybermesh.proof import Proven

ProofFile = Annotated[Path, typer.Argument(metavar="PROOF", help="The proof, as policy prove or the API gave it.")]
GenesisFile = Annotated[
    Path, typer.Option("--genesis", metavar="FILE", help="genesis.json of the chain, from a place you trust.")
]


def verify(
    proof: ProofFile,
    genesis: GenesisFile,
    form: output.FormatOption = output.Format.HUMAN,
    json: output.JsonOption = False,
) -> None:
    """Check a decision proof offline: exit 0 and what was decided, or exit 1 and the step that failed.

    Example: cybermesh verify proof.json --genesis genesis.json
    """
    from cybermesh.genesis import parse
    from cybermesh.proof import ProofError, verify_proof

    chain = parse(_read(genesis, "--genesis"))
    as_json = json or form is not output.Format.HUMAN
    line = output.Format.NDJSON if form is output.Format.NDJSON and not json else output.Format.JSON
    try:
        proven = verify_proof(_read(proof, "PROOF"), chain)
    except ProofError as error:
        if as_json:
            output.emit_one({"valid": False, "step": error.step, "reason": error.reason}, line)
        raise output.CommandError(f"{proof}: the proof fails at {error.step}: {error.reason}") from error
    if as_json:
        output.emit_one(_as_json(proven, chain), line)
    else:
        sys.stdout.write("\n".join(_as_lines(proven, chain)) + "\n")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise output.CommandError(f"{what} {path}: {error.strerror}; give the path of a file that can be read", 2) from error


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1_000, UTC).isoformat(timespec="milliseconds")


def _voters(proven: Proven) -> list[str]:
    return [proven.members[index][1] for index in proven.voters]


def _names(keys: tuple[bytes, ...], genesis: Genesis) -> list[str]:
    """Name the keys that the genesis knows; later ones of the key ring show as hex."""
    known = {producer.pubkey: producer.name for producer in genesis.producers}
    known |= {operator.pubkey: operator.name for operator in genesis.operators}
    return [known.get(key, key.hex()) for key in keys]


def _as_json(proven: Proven, genesis: Genesis) -> dict[str, object]:
    return {
        "valid": True,
        "chain_id": genesis.chain_id.hex(),
        "chain_name": genesis.chain_name,
        "height": proven.header.height,
        "epoch": proven.header.epoch,
        "time": _time(proven.header.time_ms),
        "code": proven.receipt.code,
        "kind": proven.receipt.kind,
        "receipt_id": proven.receipt.id,
        "validators": _voters(proven),
        "decisions": [_decision_json(effect, genesis) for effect in proven.receipt.decisions],
    }


def _decision_json(effect: DecisionEffect, genesis: Genesis) -> dict[str, object]:
    return {
        "policy_id": effect.policy_id,
        "change": effect.change,
        "ending": effect.ending,
        "action": effect.action,
        "rule_type": effect.rule_type,
        "rule_hash": effect.rule_hash.hex(),
        "hosts": effect.hosts,
        "networks": effect.networks,
        "direction": effect.direction,
        "opened_at": _time(effect.opened_at_ms),
        "expires_at": _time(effect.expires_at_ms),
        "ttl_s": effect.ttl_s,
        "decision_seq": effect.decision_seq,
        "why": effect.why,
        "reporters": _names(effect.reporters, genesis),
        "approvers": _names(effect.approvers, genesis),
    }


def _as_lines(proven: Proven, genesis: Genesis) -> list[str]:
    lines = [
        f"valid     chain {genesis.chain_name} ({genesis.chain_id.hex()[:16]}…)",
        f"height    {proven.header.height}, {_time(proven.header.time_ms)}",
        f"agreed    {', '.join(_voters(proven))} ({len(proven.voters)} of {len(proven.members)} validators)",
    ]
    for effect in proven.receipt.decisions:
        lines += _decision_lines(effect, genesis)
    if not proven.receipt.decisions:
        lines.append(f"receipt   {proven.receipt.kind} {proven.receipt.id}: {proven.receipt.code}, no decision")
    return lines


def _decision_lines(effect: DecisionEffect, genesis: Genesis) -> list[str]:
    cause = {"corroborated": "several sites report it", "approved": "an operator approved it"}
    why = cause.get(effect.why, "single sensor, out of its budget")
    people = [f"reported by {', '.join(_names(effect.reporters, genesis))}"] if effect.reporters else []
    people += [f"approved by {', '.join(_names(effect.approvers, genesis))}"] if effect.approvers else []
    ending = f" ({effect.ending})" if effect.ending else ""
    counts = ((effect.hosts, "host"), (effect.networks, "network"))
    targets = " and ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)
    return [
        f"decision  {effect.policy_id} {effect.change}{ending}, number {effect.decision_seq}",
        f"rule      {effect.action} {targets}, {effect.direction}; SHA-256 {effect.rule_hash.hex()}",
        f"until     {_time(effect.expires_at_ms)} ({effect.ttl_s} s)",
        f"why       {'; '.join([why, *people])}",
    ]
