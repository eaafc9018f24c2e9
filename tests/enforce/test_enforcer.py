"""The enforcer as transcripts: events in, answers and firewall contents out, with a clock that the test moves."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import orjson
import pytest

from cybermesh.addresses import Network
from cybermesh.enforce.acks import Outcome, Place
from cybermesh.enforce.backends import BackendError
from cybermesh.enforce.backends.noop import NoopBackend
from cybermesh.enforce.decisions import EpochUnknownError, Mode, ProofError, Proven
from cybermesh.enforce.enforcer import Enforcer, Ports
from cybermesh.enforce.guard import Limits, Protected
from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Element, Match
from cybermesh.enforce.state import Exemption, State, StateError
from cybermesh.messages import Ack, PolicyUpdate
from cybermesh.policy import parse
from cybermesh.wire import codec
from tests.enforce.test_guard import HERE, MALFORMED, PASSES, TARGETS

START_MS = 1_700_000_000_000
BAD_PROOF = b"bad"
LATER_EPOCH = 9


class Clumsy(NoopBackend):
    """A firewall that fails on command: refuses, loses elements before they are read back, or is changed by others."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[str] = []
        self.swallows = 0
        self.removed = 0

    async def apply(self, plan: Plan, now_ms: int) -> None:
        self._fail()
        await super().apply(plan, now_ms)

    async def rebuild(self, elements: Collection[Element], now_ms: int) -> None:
        self._fail()
        await super().rebuild(elements, now_ms)

    async def read_back(self, matches: Collection[Match]) -> frozenset[Match]:
        if self.swallows:
            self.swallows -= 1
            return frozenset()
        return await super().read_back(matches)

    async def remove_all(self) -> None:
        self._fail()
        self.removed += 1
        await super().remove_all()

    def _fail(self) -> None:
        if self.refusals:
            raise BackendError(self.refusals.pop(0), "as told")


class Host:
    """An agent's host: clock, surroundings, firewall, database, and a committee that says yes to everything it is shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_ms = START_MS
        self.protected = Protected((("own address", ip_network("192.0.2.10/32")),))
        self.backend = Clumsy()
        self.state = State(folder / "agent.sqlite")
        self.limits = Limits()
        self.block_ms = START_MS
        self.enforcer = self.make()

    def make(self) -> Enforcer:
        ports = Ports(prove=self.prove, seal=self.seal, look=lambda: self.protected, now_ms=lambda: self.now_ms)
        return Enforcer(self.state, self.backend, ports, Place("edge-1", "agent-1", limits=self.limits))

    async def restart(self) -> None:
        """The process dies and a new one starts; the firewall and the file stay."""
        self.state.close()
        self.state = State(self.folder / "agent.sqlite")
        self.enforcer = self.make()
        await self.enforcer.open()

    def prove(self, update: PolicyUpdate) -> Proven:
        if update.proof == BAD_PROOF:
            raise ProofError("PROOF_INVALID", "quorum certificate: 2 of 3 signatures")
        if update.epoch == LATER_EPOCH:
            raise EpochUnknownError("EPOCH_UNKNOWN", "epoch 9")
        decided = orjson.loads(update.proof)
        return Proven(
            decided["policy_id"],
            decided["action"],
            bytes.fromhex(decided["rule_hash"]),
            decided["expires_at_ms"],
            decided["decision_seq"],
            decided["epoch"],
            height=decided["decision_seq"],
            block_time_ms=self.block_ms,
            reference="qc",
        )

    def seal(self, ack: Ack) -> bytes:
        return codec.encode(
            dataclasses.replace(ack, nonce=bytes(16), producer_id=bytes(32), pubkey=bytes(32), signature=bytes(64))
        )

    def installed(self) -> dict[str, int]:
        """What the firewall holds: match -> seconds left."""
        return {
            str(match): (element.expires_at_ms - self.now_ms) // 1_000
            for match, element in sorted(self.backend._mirror.view().items())
            if element.expires_at_ms > self.now_ms
        }

    async def acks(self) -> list[str]:
        """Take what would be published: "policy seq result code"."""
        pending = await self.enforcer.pending_acks()
        await self.enforcer.acks_published(item.id for item in pending)
        found = [codec.ACK.layout.to_value(codec.ACK.layout.parse(item.body)) for item in pending]
        return [" ".join((ack.policy_id, str(ack.decision_seq), ack.result, ack.error_code)).strip() for ack in found]


@pytest.fixture
async def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.state.order_mode(Mode.ENFORCE)
    await made.enforcer.open()
    return made


def event(policy_id: str = "p", seq: int = 1, action: str = "add", *, ttl_s: int = 60, **changes: Any) -> PolicyUpdate:
    """Return an event whose proof proves exactly what it says; ``changes`` replace fields afterwards, unproven."""
    target = changes.pop("target", {"ips": ["203.0.113.9"]})
    guardrails = {"ttl_seconds": ttl_s} | changes.pop("guardrails", {})
    opened_ms = changes.pop("opened_ms", START_MS)
    rule = parse(
        {"policy_id": policy_id, "rule_type": "block", "action": "drop", "target": target, "guardrails": guardrails}
    ).to_json()
    digest = hashlib.sha256(rule).digest()
    decided = {
        "policy_id": policy_id,
        "action": action,
        "rule_hash": digest.hex(),
        "expires_at_ms": opened_ms + 1_000 * ttl_s,
        "decision_seq": seq,
        "epoch": 0,
    }
    update = PolicyUpdate(
        policy_id=policy_id,
        action=action,
        rule_type="block",
        rule_data=rule,
        rule_hash=digest,
        requires_ack=True,
        rollback_policy_id="",
        timestamp=START_MS // 1_000,
        effective_height=seq,
        expiration_height=0,
        producer_id=bytes(32),
        signature=bytes(64),
        pubkey=bytes(32),
        proof=orjson.dumps(decided),
        decision_seq=seq,
        expires_at_ms=opened_ms + 1_000 * ttl_s,
        epoch=0,
    )
    return dataclasses.replace(update, **changes)


def codes(outcomes: list[Outcome]) -> list[str]:
    return [outcome.code or outcome.result.value for outcome in outcomes]


async def test_a_decision_is_installed_answered_and_ends_by_itself(host: Host) -> None:
    assert codes(await host.enforcer.handle([event()])) == ["applied"]
    assert host.installed() == {"drop from 203.0.113.9": 60}
    assert await host.acks() == ["p 1 applied"]
    host.now_ms += 60_000
    assert host.installed() == {}
    assert await host.enforcer.tick() == 1
    assert await host.acks() == []


async def test_a_renewal_sets_the_new_end_and_a_removal_ends_at_once(host: Host) -> None:
    await host.enforcer.handle([event()])
    await host.enforcer.handle([event(seq=2, action="update", ttl_s=600)])
    assert host.installed() == {"drop from 203.0.113.9": 600}
    await host.enforcer.handle([event(seq=3, action="remove", ttl_s=600)])
    assert host.installed() == {}
    assert await host.acks() == ["p 1 applied", "p 2 applied", "p 3 applied"]


async def test_the_copies_of_several_validators_are_one_decision(host: Host) -> None:
    assert codes(await host.enforcer.handle([event(), event()])) == ["applied", "duplicate"]
    assert codes(await host.enforcer.handle([event()])) == ["duplicate"]
    assert await host.acks() == ["p 1 applied"]


async def test_a_revoked_block_cannot_be_replayed_until_long_after_its_end(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600), event(seq=2, action="remove", ttl_s=600)])
    host.now_ms += 300_000
    assert codes(await host.enforcer.handle([event(ttl_s=600)])) == ["REPLAYED"]
    await host.restart()
    assert codes(await host.enforcer.handle([event(ttl_s=600)])) == ["REPLAYED"]
    assert host.installed() == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"proof": BAD_PROOF}, "PROOF_INVALID"),
        ({"policy_id": "q"}, "PROOF_MISMATCH"),
        ({"action": "update"}, "PROOF_MISMATCH"),
        ({"action": "remove"}, "PROOF_MISMATCH"),
        ({"action": "enable"}, "PROOF_MISMATCH"),
        ({"rule_data": b"{}"}, "PROOF_MISMATCH"),
        ({"rule_hash": bytes(32)}, "PROOF_MISMATCH"),
        ({"expires_at_ms": START_MS + 3_600_000}, "PROOF_MISMATCH"),
        ({"decision_seq": 2}, "PROOF_MISMATCH"),
        ({"epoch": 1}, "PROOF_MISMATCH"),
        ({"rule_type": "rate_limit"}, "PROOF_MISMATCH"),
        ({"opened_ms": START_MS - 60_000}, "EXPIRED"),
        ({"target": {"ips": ["192.0.2.10"]}}, "PROTECTED_TARGET"),
        ({"target": {"cidrs": ["::ffff:192.0.2.0/120"]}}, "PROTECTED_TARGET"),
        ({"target": {"cidrs": ["0.0.0.0/0"]}}, "PREFIX_TOO_WIDE"),
    ],
    ids=str,
)
async def test_a_decision_that_fails_a_step_changes_nothing_and_says_why(
    host: Host, changes: dict[str, Any], code: str
) -> None:
    proven = {name: changes[name] for name in ("opened_ms", "target") if name in changes}
    altered = {name: value for name, value in changes.items() if name not in proven}
    assert codes(await host.enforcer.handle([dataclasses.replace(event(**proven), **altered)])) == [code]
    assert host.installed() == {}
    (ack,) = await host.acks()
    assert ack.endswith(f"failed {code}")
    assert host.enforcer.counts[code] == 1


@pytest.mark.parametrize(("target", "expected"), TARGETS)
async def test_a_proof_gets_no_target_past_the_guard(host: Host, target: str, expected: str) -> None:
    """The guard's whole table again, each target in a decision that is signed and proven."""
    host.protected = HERE
    rule = orjson.dumps(
        {
            "policy_id": "p",
            "rule_type": "block",
            "action": "drop",
            "target": {"cidrs": [target]},
            "guardrails": {"ttl_seconds": 60},
        }
    )
    digest = hashlib.sha256(rule).digest()
    decided = orjson.loads(event().proof) | {"rule_hash": digest.hex()}
    (outcome,) = await host.enforcer.handle([event(rule_data=rule, rule_hash=digest, proof=orjson.dumps(decided))])
    if expected == PASSES:
        assert (outcome.result, len(host.installed())) == ("applied", 1)
        return
    code = "BAD_POLICY" if expected == MALFORMED else expected
    assert (outcome.code, host.installed()) == (code, {})
    assert await host.acks() == [f"p 1 failed {code}"]


async def test_a_proven_rule_that_does_not_parse_is_refused_with_its_path(host: Host) -> None:
    rule = b'{"policy_id":"p","rule_type":"block"}'
    digest = hashlib.sha256(rule).digest()
    decided = orjson.loads(event().proof) | {"rule_hash": digest.hex()}
    (outcome,) = await host.enforcer.handle([event(rule_data=rule, rule_hash=digest, proof=orjson.dumps(decided))])
    assert (outcome.code, outcome.detail) == ("BAD_POLICY", "action: is required")


async def test_the_time_left_is_never_more_than_the_policys_own_ttl(host: Host) -> None:
    host.now_ms -= 20_000  # this host's clock is behind by less than the tolerance
    await host.enforcer.handle([event()])
    assert host.installed() == {"drop from 203.0.113.9": 60}


async def test_a_clock_that_is_ahead_only_shortens(host: Host) -> None:
    host.now_ms += 40_000
    await host.enforcer.handle([event()])
    assert host.installed() == {"drop from 203.0.113.9": 20}


async def test_with_a_clock_behind_nothing_new_is_installed_expiry_goes_on_and_it_is_made_up_for(host: Host) -> None:
    await host.enforcer.handle([event("old", 1, ttl_s=60)])
    host.block_ms = host.now_ms + 120_000
    assert codes(await host.enforcer.handle([event("new", 2, ttl_s=600)])) == ["CLOCK_BEHIND"]
    assert codes(await host.enforcer.handle([event("old", 3, action="remove")])) == ["applied"]
    assert host.installed() == {}
    host.now_ms += 100_000
    assert (await host.enforcer.reconcile()).released == 1
    assert host.installed() == {"drop from 203.0.113.9": 500}
    assert (await host.acks())[-2:] == ["old 3 applied", "new 2 applied"]


async def test_the_kill_switch_stops_new_rules_and_nothing_else(host: Host) -> None:
    await host.enforcer.handle([event("a", 1, ttl_s=60)])
    host.state.order_kill_switch(True)
    await host.restart()
    assert codes(await host.enforcer.handle([event("b", 2, target={"ips": ["203.0.113.5"]}, ttl_s=600)])) == ["KILL_SWITCH"]
    assert host.installed() == {"drop from 203.0.113.9": 60}
    host.now_ms += 60_000
    assert await host.enforcer.tick() == 1
    host.state.order_kill_switch(False)
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.5": 540}


async def test_unreadable_surroundings_refuse_new_rules_until_they_can_be_read(host: Host) -> None:
    readable = host.protected
    await host.enforcer.handle([event("a", 1, target={"ips": ["203.0.113.5"]}, ttl_s=600)])
    host.protected = Protected(readable.networks, ("utmp: permission denied",))
    (outcome,) = await host.enforcer.handle([event("b", 2, ttl_s=600)])
    assert (outcome.code, outcome.detail) == ("SURROUNDINGS_UNKNOWN", "utmp: permission denied")
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.5": 600}
    host.protected = readable
    assert (await host.enforcer.reconcile()).released == 1
    assert set(host.installed()) == {"drop from 203.0.113.5", "drop from 203.0.113.9"}


async def test_a_ban_is_withdrawn_when_its_address_becomes_protected_and_comes_back_afterwards(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600)])
    alone = host.protected
    session: tuple[str, Network] = ("session of ops", ip_network("203.0.113.9/32"))
    host.protected = Protected((*alone.networks, session))
    assert (await host.enforcer.reconcile()).withdrawn == 1
    assert host.installed() == {}
    assert (await host.acks())[-1] == "p 1 failed PROTECTED_TARGET"
    await host.restart()
    assert host.installed() == {}
    host.protected = alone
    assert (await host.enforcer.reconcile()).released == 1
    assert host.installed() == {"drop from 203.0.113.9": 600}


async def test_a_restart_asserts_again_without_extending_and_forgets_what_has_ended(host: Host) -> None:
    await host.enforcer.handle([event("a", 1, ttl_s=60), event("b", 2, target={"ips": ["203.0.113.5"]}, ttl_s=600)])
    await host.backend.remove_all()
    host.now_ms += 100_000
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.5": 500}


async def test_acks_survive_a_restart_until_they_are_published(host: Host) -> None:
    await host.enforcer.handle([event()])
    await host.restart()
    assert host.enforcer.acks_ready.is_set()
    assert await host.acks() == ["p 1 applied"]
    assert await host.enforcer.pending_acks() == []
    assert not host.enforcer.acks_ready.is_set()


async def test_a_firewall_that_refuses_leaves_everything_as_it_was_and_is_tried_again(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=60)])
    host.backend.refusals = ["NO_RIGHTS"]
    assert codes(await host.enforcer.handle([event(seq=2, action="update", ttl_s=600)])) == ["NO_RIGHTS"]
    assert host.installed() == {"drop from 203.0.113.9": 60}
    assert (await host.enforcer.reconcile()).released == 1
    assert host.installed() == {"drop from 203.0.113.9": 600}
    assert await host.acks() == ["p 1 applied", "p 2 failed NO_RIGHTS", "p 2 applied"]


async def test_one_bad_decision_in_a_batch_costs_only_itself(host: Host) -> None:
    host.backend.refusals = ["SET_FULL", "SET_FULL"]
    batch = [event("a", 1), event("b", 2, target={"ips": ["203.0.113.5"]})]
    assert codes(await host.enforcer.handle(batch)) == ["SET_FULL", "applied"]
    assert host.installed() == {"drop from 203.0.113.5": 60}


async def test_what_is_not_there_when_read_back_is_not_claimed(host: Host) -> None:
    host.backend.swallows = 2  # after the edit, and after the rebuild that tries to mend it
    assert codes(await host.enforcer.handle([event()])) == ["APPLY_FAILED"]
    assert host.installed() == {}
    assert await host.acks() == ["p 1 failed APPLY_FAILED"]


async def test_a_removal_that_the_firewall_refuses_is_made_up_for(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600)])
    host.backend.refusals = ["NO_RIGHTS"]
    assert codes(await host.enforcer.handle([event(seq=2, action="remove", ttl_s=600)])) == ["NO_RIGHTS"]
    await host.enforcer.reconcile()
    assert host.installed() == {}


async def test_a_table_that_others_have_changed_is_repaired_and_counted(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600), event("b", 2, target={"cidrs": ["198.51.100.0/24"]}, ttl_s=600)])
    await host.backend.remove_all()
    found = await host.enforcer.reconcile()
    assert found.drift == 2
    assert set(host.installed()) == {"drop from 203.0.113.9", "drop from 198.51.100.0/24"}
    assert (await host.enforcer.reconcile()).drift == 0
    assert host.enforcer.status()["drift_total"] == 2


async def test_nothing_that_time_does_counts_as_drift(host: Host) -> None:
    wide, narrow = {"cidrs": ["198.51.100.0/24"]}, {"cidrs": ["198.51.100.64/26"]}
    await host.enforcer.handle([event("a", 1, target=wide, ttl_s=600), event("b", 2, target=narrow, ttl_s=900)])
    for _ in range(4):
        host.now_ms += 250_000
        await host.enforcer.tick()
        assert (await host.enforcer.reconcile()).drift == 0


async def test_a_database_that_refuses_takes_the_firewall_back_as_well(host: Host) -> None:
    await host.enforcer.handle([event("a", 1, ttl_s=600)])
    host.state._db.execute("DROP TABLE acks")
    with pytest.raises(StateError, match="no such table"):
        await host.enforcer.handle([event("b", 2, target={"ips": ["203.0.113.5"]}, ttl_s=600)])
    assert host.installed() == {"drop from 203.0.113.9": 600}


async def test_observe_does_everything_but_the_kernel(tmp_path: Path) -> None:
    host = Host(tmp_path)
    await host.enforcer.open()
    (outcome,) = await host.enforcer.handle([event(ttl_s=600)])
    assert outcome.result == "applied"
    assert "observed only" in outcome.detail
    assert host.installed() == {}
    host.state.order_mode(Mode.ENFORCE)
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.9": 600}


async def test_off_removes_everything_survives_a_restart_and_keeps_what_is_decided_meanwhile(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600)])
    host.state.order_mode(Mode.OFF)
    await host.restart()
    assert host.installed() == {}
    later = event("b", 2, target={"ips": ["203.0.113.5"]}, ttl_s=600)
    assert codes(await host.enforcer.handle([later])) == ["ENFORCEMENT_OFF"]
    host.state.order_mode(Mode.ENFORCE)
    await host.restart()
    assert set(host.installed()) == {"drop from 203.0.113.9", "drop from 203.0.113.5"}


async def test_an_order_from_the_command_line_reaches_a_running_agent(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600)])
    outside = State(host.folder / "agent.sqlite")
    outside.order_mode(Mode.OFF)
    await host.enforcer.tick()
    assert host.installed() == {}
    outside.order_mode(Mode.ENFORCE)
    outside.close()
    await host.enforcer.tick()
    assert host.installed() == {"drop from 203.0.113.9": 600}


async def test_enforcing_reverts_unless_it_is_confirmed_and_the_kernel_knows_until_when(host: Host) -> None:
    host.state.order_mode(Mode.ENFORCE, host.now_ms + 120_000)
    await host.restart()
    await host.enforcer.handle([event(ttl_s=600)])
    assert host.installed() == {"drop from 203.0.113.9": 120}
    host.now_ms += 120_000
    await host.enforcer.tick()
    assert host.enforcer.status()["mode"] == "observe"
    assert host.backend.removed


async def test_a_confirmed_mode_stays_and_gives_the_rules_their_full_time(host: Host) -> None:
    host.state.order_mode(Mode.ENFORCE, host.now_ms + 120_000)
    await host.restart()
    await host.enforcer.handle([event(ttl_s=600)])
    outside = State(host.folder / "agent.sqlite")
    outside.confirm()
    outside.close()
    host.now_ms += 60_000
    await host.enforcer.tick()
    assert host.installed() == {"drop from 203.0.113.9": 540}


async def test_an_exception_lifts_a_ban_on_this_host_for_its_time(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=7_200)])
    address = ip_address("203.0.113.9")
    host.state.exempt(Exemption(address, host.now_ms + 3_600_000, "customer called", host.now_ms))
    await host.restart()
    assert host.installed() == {
        "allow from 203.0.113.9": 3_600,
        "allow to 203.0.113.9": 3_600,
        "drop from 203.0.113.9": 7_200,
    }
    host.now_ms += 3_600_000
    await host.enforcer.tick()
    assert host.installed() == {"drop from 203.0.113.9": 3_600}
    assert host.state.orders().exemptions == ()


async def test_a_dry_run_is_answered_and_installs_nothing(host: Host) -> None:
    (outcome,) = await host.enforcer.handle([event(guardrails={"dry_run": True})])
    assert outcome.result == "applied"
    assert "dry run" in outcome.detail
    assert host.installed() == {}


async def test_a_decision_of_a_later_epoch_waits_for_its_committee(host: Host) -> None:
    assert codes(await host.enforcer.handle([event(epoch=LATER_EPOCH)])) == ["EPOCH_UNKNOWN"]
    assert await host.acks() == []
    await host.restart()
    assert codes(await host.enforcer.release_parked()) == ["EPOCH_UNKNOWN"]


async def test_two_policies_share_an_element_until_the_later_end(host: Host) -> None:
    await host.enforcer.handle([event("a", 1, ttl_s=60), event("b", 2, ttl_s=600)])
    assert host.installed() == {"drop from 203.0.113.9": 600}
    await host.enforcer.handle([event("b", 3, action="remove", ttl_s=600)])
    assert host.installed() == {"drop from 203.0.113.9": 60}


async def test_a_refused_renewal_leaves_what_stood_and_cannot_come_again(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600)])
    wide = event(seq=2, action="update", target={"cidrs": ["198.51.0.0/16"]}, ttl_s=600)
    assert codes(await host.enforcer.handle([wide, wide])) == ["PREFIX_TOO_WIDE", "duplicate"]
    assert host.installed() == {"drop from 203.0.113.9": 600}


async def test_the_limit_per_minute_frees_itself(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.limits = Limits(rules_per_minute_max=1)
    host.state.order_mode(Mode.ENFORCE)
    await host.restart()
    first, second = event("a", 1), event("b", 2, target={"ips": ["203.0.113.5"]}, ttl_s=600)
    assert codes(await host.enforcer.handle([first])) == ["applied"]
    assert codes(await host.enforcer.handle([second])) == ["TOO_FAST"]
    host.now_ms += 60_000
    third = event("c", 3, target={"ips": ["203.0.113.6"]}, ttl_s=600)
    assert codes(await host.enforcer.handle([third])) == ["applied"]


async def test_a_look_from_outside_changes_nothing(host: Host) -> None:
    await host.enforcer.handle([event(ttl_s=600)])
    await host.backend.remove_all()
    difference, audit = await host.make().difference()
    assert [str(element.match) for element in difference.adds] == ["drop from 203.0.113.9"]
    assert audit.elements == {}
    assert host.installed() == {}


async def test_a_file_that_is_no_database_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.sqlite").write_bytes(b"not a database at all, but long enough to be looked at" * 20)
    with pytest.raises(StateError, match=r"agent\.sqlite: file is not a database"):
        State(tmp_path / "agent.sqlite")
    with pytest.raises(StateError, match="unable to open"):
        State(tmp_path / "missing" / "agent.sqlite")


async def test_a_database_of_the_version_before_is_read_and_its_rules_are_made_again(host: Host) -> None:
    await host.enforcer.handle(
        [event(ttl_s=600), event("b", 2, target={"cidrs": ["198.51.100.0/24"], "ports": [80]}, ttl_s=600)]
    )
    before = host.installed()
    host.state._db.execute("ALTER TABLE decisions DROP COLUMN rules")
    host.state._db.execute("ALTER TABLE decisions DROP COLUMN rules_until_ms")
    host.state._db.execute("PRAGMA user_version=1")
    await host.restart()
    assert host.installed() == before


async def test_a_held_decision_keeps_its_rule_over_a_restart(host: Host) -> None:
    host.state.order_kill_switch(True)
    await host.restart()
    await host.enforcer.handle([event(ttl_s=600)])
    await host.restart()
    host.state.order_kill_switch(False)
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.9": 600}


async def test_a_restart_holds_what_has_become_protected_or_too_wide_meanwhile(host: Host) -> None:
    wide = event("b", 2, target={"cidrs": ["198.51.100.0/25"]}, ttl_s=600)
    await host.enforcer.handle([event(ttl_s=600), wide])
    host.protected = Protected((*host.protected.networks, ("session of ops", ip_network("203.0.113.9/32"))))
    host.limits = Limits(prefix_min_v4=26)
    await host.restart()
    assert host.installed() == {}
    assert host.enforcer.status()["held"] == {"PROTECTED_TARGET": 1, "PREFIX_TOO_WIDE": 1}


async def test_a_restart_while_a_renewal_waits_keeps_the_ban_before_it_and_its_end(host: Host) -> None:
    await host.enforcer.handle([event("p", 1, ttl_s=60)])
    host.state.order_kill_switch(True)
    await host.restart()
    await host.enforcer.handle([event("p", 2, ttl_s=600)])
    assert host.installed() == {"drop from 203.0.113.9": 60}
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.9": 60}
    host.state.order_kill_switch(False)
    await host.restart()
    assert host.installed() == {"drop from 203.0.113.9": 600}
