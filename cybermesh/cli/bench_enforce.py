"""What ``cybermesh bench enforce`` measures, each part in a process and a network namespace of its own, with the real kernel.

Run as ``python -m cybermesh.cli.bench_enforce PART FOLDER COUNT`` as root. Parts, in this order:

- ``fill``: a committee of four decides COUNT policies of one host each; the agent's database and nft's own file are written;
- ``nft``: ``nft -f`` of that file, which nobody can beat;
- ``agent``: the agent's database is opened and all of it restored; then policies come over the bus, singly and in one burst,
  with real signatures and real proofs of a quorum, until each is in the kernel and its signed ack is published.

Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from cybermesh import log, proof
from cybermesh.addresses import parse_address
from cybermesh.bus import Subscription
from cybermesh.bus.memory import MemoryBus
from cybermesh.bus.topics import Topics
from cybermesh.consensus.certificates import vote_bytes
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import NO_CERT, PROTOCOL_VERSION, BlockHash, Header, Height, QuorumCert, Round, merkle_root
from cybermesh.enforce import guard, rules
from cybermesh.enforce.backends import nft_script, programs
from cybermesh.enforce.decisions import Decision, Mode
from cybermesh.enforce.packed import pack
from cybermesh.enforce.state import FILE_NAME, Changes, State
from cybermesh.envelope.nonces import NonceSource
from cybermesh.genesis import parse as parse_genesis
from cybermesh.keystore import FileCounters, load_key, save_key
from cybermesh.ledger.merkle import Frontier, LeafHashes, inclusion_path
from cybermesh.ledger.receipts import Change, Code, DecisionEffect, Ending, Kind, Receipt, Why
from cybermesh.ledger.state import state_root
from cybermesh.policy import PolicySpec, parse
from cybermesh.roles.agent import AgentParts, AgentRole
from cybermesh.roles.clock import SystemClock
from cybermesh.roles.deployment import Deployment, Roster, create
from cybermesh.roles.firewall import open_backend
from cybermesh.roles.ring import control_domains
from cybermesh.wire import codec
from cybermesh.wire.control import seal

ONE_BY_ONE: Final = 200
BURST: Final = 10_000
PER_BLOCK: Final = 1_000
_TTL_S: Final = 3_600
_CLONE_NEWNET: Final = 0x4000_0000
_NFT_ROUNDS: Final = 3


def _spec(number: int) -> PolicySpec:
    """Return the policy that blocks host ``number`` of 10.0.0.0/8 (never a protected one)."""
    return parse(
        {
            "policy_id": f"bench-{number:06}",
            "rule_type": "block",
            "action": "drop",
            "target": {"ips": [str(parse_address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"))]},
            "guardrails": {"ttl_seconds": _TTL_S},
            "audit": {"reason_code": "PORT_SCAN"},
        }
    )


class _Committee:
    """Four validators that decide whatever they are given, one block of receipts after the other."""

    def __init__(self, deployment: Deployment, decided: int) -> None:
        self._deployment = deployment
        self._committee = Committee.of(deployment.genesis.chain_id, (each.pubkey for each in deployment.genesis.validators))
        keys = {key.public: key for key in deployment.keys.values()}
        self._keys = [keys[public] for public in self._committee.public_keys]
        self._seq = decided
        self._height = decided // PER_BLOCK

    def decide(self, specs: list[PolicySpec]) -> Iterator[bytes]:
        """Yield the signed updates, as published, of one block that opens all of ``specs``."""
        self._height += 1
        now_ms = time.time_ns() // 1_000_000
        receipts = [self._receipt(spec, self._seq + place, now_ms) for place, spec in enumerate(specs, start=1)]
        self._seq += len(specs)
        leaves = [receipt.leaf for receipt in receipts]
        digest = hashlib.sha256(b"state").digest()
        root = state_root(len(leaves), Frontier().append(leaves).root(), digest)
        header = self._header(now_ms, root)
        certificate = self._certify(header)
        hashes, domains = LeafHashes(leaves), control_domains(self._deployment.genesis)
        for place, (receipt, spec) in enumerate(zip(receipts, specs, strict=True)):
            path = inclusion_path(place, len(leaves), hashes)
            included = proof.Included(receipt, place, len(leaves), path, digest)
            proven = proof.prove([header], certificate, included, self._committee.quorum)
            update = proof.update_of(header, receipt.decisions[0], spec.to_json(), proven)
            yield codec.encode(seal(update, self._deployment.keys["validator-1"], domains))

    def _receipt(self, spec: PolicySpec, seq: int, now_ms: int) -> Receipt:
        effect = DecisionEffect(
            action=spec.action,
            approvers=(),
            change=Change.OPENED,
            decision_seq=seq,
            direction=spec.target.direction,
            ending=Ending.NONE,
            expires_at_ms=now_ms + 1_000 * _TTL_S,
            hosts=1,
            networks=0,
            opened_at_ms=now_ms,
            policy_id=spec.policy_id,
            reporters=(),
            request_id="",
            rule_hash=hashlib.sha256(spec.to_json()).digest(),
            rule_type=spec.rule_type,
            ttl_s=_TTL_S,
            why=Why.APPROVED,
        )
        return Receipt(code=Code.OK, effects=(effect,), height=self._height, id=f"{seq:064x}", kind=Kind.POLICY)

    def _header(self, now_ms: int, root: bytes) -> Header:
        parent = BlockHash(hashlib.sha256(b"parent").digest())
        return Header(
            version=PROTOCOL_VERSION,
            chain_id=self._deployment.genesis.chain_id,
            epoch=1,
            round=Round(self._height),
            height=Height(self._height),
            author=self._height % 4,
            time_ms=now_ms,
            parent_hash=parent,
            parent_round=Round(self._height - 1),
            parent_signers=7,
            qc_digest=hashlib.sha256(b"certificate").digest(),
            tc_digest=NO_CERT,
            payload_root=merkle_root(()),
            state_root=root,
            decision_seq=self._seq,
        )

    def _certify(self, parent: Header) -> QuorumCert:
        block = BlockHash(hashlib.sha256(b"next" + parent.hash).digest())
        round_ = Round(parent.round + 1)
        message = vote_bytes(self._committee, round_, block, parent.round, parent.hash)
        signatures = tuple((index, self._keys[index].sign(message)) for index in range(self._committee.quorum))
        return QuorumCert(1, round_, block, parent.round, parent.hash, signatures)


def fill(folder: Path, count: int) -> dict[str, object]:
    """Write the agent's database, the updates to come, and the same set for nft."""
    deployment = create(Roster("bench", validators=4, producers=1, agents=1))
    (folder / "genesis.json").write_bytes(deployment.genesis.encode())
    save_key(folder / "agent.key", deployment.keys["agent-1"])
    ends_ms = time.time_ns() // 1_000_000 + 1_000 * _TTL_S
    specs = [_spec(number) for number in range(1 << 16, (1 << 16) + count)]
    decisions = tuple(
        Decision(
            spec.policy_id,
            seq,
            spec.to_json(),
            hashlib.sha256(spec.to_json()).digest(),
            ends_ms,
            seq // PER_BLOCK,
            hashlib.sha256(str(seq // PER_BLOCK).encode()).hexdigest(),
        )
        for seq, spec in enumerate(specs, start=1)
    )
    state = State(folder / FILE_NAME, Mode.ENFORCE)
    made = {spec.policy_id: rules.make(spec, spec.networks(), ends_ms) for spec in specs}
    state.commit(Changes(decisions, {policy_id: pack(found) for policy_id, found in made.items()}))
    state.close()
    elements = [rule.element for found in made.values() for rule in found]
    (folder / "bare.nft").write_text(nft_script.rebuild(elements, time.time_ns() // 1_000_000)[0])
    committee = _Committee(deployment, count)
    fresh = [_spec(number) for number in range(1 << 23, (1 << 23) + ONE_BY_ONE + BURST)]
    with (folder / "updates").open("wb") as out:
        for start in range(0, ONE_BY_ONE, 10):
            _write(out, committee.decide(fresh[start : min(start + 10, ONE_BY_ONE)]))
        for start in range(ONE_BY_ONE, len(fresh), PER_BLOCK):
            _write(out, committee.decide(fresh[start : start + PER_BLOCK]))
    return {"decisions": len(decisions)}


def _write(out: IO[bytes], updates: Iterable[bytes]) -> None:
    for update in updates:
        out.write(len(update).to_bytes(4, "big") + update)


def _updates(folder: Path) -> Iterator[bytes]:
    with (folder / "updates").open("rb") as source:
        while head := source.read(4):
            yield source.read(int.from_bytes(head, "big"))


def nft(folder: Path) -> dict[str, object]:
    """Time ``nft -f`` of the same set into a table that is not there."""
    program = programs.find("nft") or "nft"
    seconds: list[float] = []
    for _ in range(_NFT_ROUNDS):
        subprocess.run([program, "flush", "ruleset"], check=True)  # noqa: S603 - in a namespace of our own
        began = time.perf_counter()
        subprocess.run([program, "-f", str(folder / "bare.nft")], check=True)  # noqa: S603
        seconds.append(time.perf_counter() - began)
    return {"nft_f_100k_s": round(statistics.median(seconds), 3)}


async def agent(folder: Path) -> dict[str, object]:
    """Restore, then take policies over the bus."""
    genesis = parse_genesis((folder / "genesis.json").read_bytes())
    topics = Topics()
    backend = open_backend("nftables")
    clock = SystemClock()
    bus = MemoryBus(clock.wall_ms)
    limits = guard.Limits(rules_max=130_000)
    with FileCounters(folder / "agent.nonces") as counters:
        began = time.perf_counter()
        state = State(folder / FILE_NAME, Mode.ENFORCE)
        role = AgentRole(
            AgentParts(
                genesis=genesis,
                key=load_key(folder / "agent.key"),
                name="agent-1",
                topics=topics,
                bus=bus,
                state=state,
                backend=backend,
                nonces=NonceSource(counters),
                clock=clock,
                look=guard.Protected,
                limits=limits,
            )
        )
        await role.open()
        restore_s = time.perf_counter() - began
        rss_mb = _rss_mb()
        updates = list(_updates(folder))
        decided = topics.control_policy
        async with bus.subscribe((topics.control_policy_ack,), "bench") as acks, asyncio.TaskGroup() as group:
            running = group.create_task(role.run(), name="agent")
            each = [await _until_acked(bus, decided, acks, [update]) for update in updates[:ONE_BY_ONE]]
            burst_s = await _until_acked(bus, decided, acks, updates[ONE_BY_ONE:])
            running.cancel()
        found = await backend.audit(clock.wall_ms())
        backend.close()
        state.close()
    each.sort()
    return {
        "one_policy_p50_ms": round(1_000 * statistics.median(each), 2),
        "one_policy_p99_ms": round(1_000 * each[len(each) * 99 // 100], 2),
        "burst_10k_s": round(burst_s, 2),
        "restore_100k_s": round(restore_s, 2),
        "rss_mb": round(rss_mb),
        "installed": len(found.elements),
    }


async def _until_acked(bus: MemoryBus, topic: str, acks: Subscription, updates: list[bytes]) -> float:
    """Publish updates; return the seconds until the last of their acks has come."""
    began = time.perf_counter()
    for update in updates:
        await bus.publish(topic, b"k", update)
    left = len(updates)
    async for ack in acks:
        await acks.ack(ack)
        left -= 1
        if not left:
            break
    return time.perf_counter() - began


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1_024
    return 0.0


def main(part: str, folder: Path, count: int) -> None:
    """Run a part in a network namespace of its own."""
    log.configure(level="error")
    if part != "fill" and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise SystemExit(f"a network namespace needs root: {os.strerror(ctypes.get_errno())}")
    told = fill(folder, count) if part == "fill" else nft(folder) if part == "nft" else asyncio.run(agent(folder))
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
