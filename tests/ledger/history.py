"""Random but well-formed histories: what any mixture of honest, careless and hostile signers may put into blocks.

As a program it prints the roots and receipts of one fixed history, so that processes can be compared.
"""

from __future__ import annotations

import hashlib
import random
import sys

from cybermesh import genesis as g
from tests.ledger.world import World, deployment, key, policy, rate_limit

PRODUCERS = ("north-1", "north-2", "south-1", "solo") * 4 + ("mallory",)
OPERATORS = ("alice", "bob", "alice", "bob", "mallory")
HOSTS = tuple(f"203.0.113.{i}" for i in range(6))
ENTITIES = (*HOSTS, *HOSTS, "2001:db8:77::1", "198.51.100.9", "192.0.2.0/28", "somebody", "10.0.0.1")


def tight() -> g.Genesis:
    """A deployment whose every limit is near."""
    return deployment(
        limits=g.Limits(
            targets_per_minute=2, targets_active=3, targets_active_operators=9, deferred_per_producer=3, waiting_per_producer=2,
            pending_per_producer=3, references_per_producer=30,
        ),
        governance=g.Governance(approval_ttl_s=600),
        block_limits=g.BlockLimits(system_receipts=3),
    )  # fmt: skip


class History:
    """Draws transactions; ``step`` applies one block of them."""

    def __init__(self, rng: random.Random, genesis: g.Genesis | None = None) -> None:
        self.rng = rng
        self.world = World(tight() if genesis is None else genesis)
        self.names = [f"p{i}" for i in range(40)]
        self.sent: list[bytes] = []
        self.last: tuple[bytes, ...] = ()

    def draw(self) -> tuple[bytes, ...]:
        """Let time pass and return the transactions of one block."""
        self.world.now_ms += self.rng.choice((0, 0, 1, 1, 300, 1_000, 5_000, 30_000, 61_000, 400_000))
        drawn = [raw for _ in range(self.rng.randrange(5)) for raw in self._draw()]
        if self.sent and self.rng.random() < 0.2:
            drawn.append(self.rng.choice(self.sent))
        chosen = tuple(dict.fromkeys(drawn))
        self.sent += chosen
        self.last = chosen
        return chosen

    def step(self) -> None:
        self.world.apply(*self.draw())

    def _draw(self) -> list[bytes]:
        return self.rng.choice((self._case, self._case, self._pieces, self._command, self._command))()

    def _body(self, entity: str) -> dict[str, object]:
        ttl = self.rng.choice((60, 60, 900, 900, 900, 3_601, 100_000))
        if self.rng.random() < 0.2:
            return rate_limit("192.0.2.80", 80)
        if self.rng.random() < 0.2:
            return policy(target={"cidrs": [self.rng.choice(("203.0.113.0/28", "198.51.100.0/24", "0.0.0.0/0"))]}, ttl=ttl)
        return policy(entity, ttl=ttl)

    def _case(self) -> list[bytes]:
        entity, who = self.rng.choice(ENTITIES), self.rng.choice(PRODUCERS)
        severity, confidence = self.rng.choice((3, 5, 7, 8, 9)), self.rng.choice((0.2, 0.5, 0.9, 1.0))
        details = {"victim": "192.0.2.80"} if self.rng.random() < 0.5 else {}
        name, body = self.rng.choice(self.names), self._body(entity)
        return self.world.case(who, name, body, entity, severity=severity, confidence=confidence, details=details)

    def _pieces(self) -> list[bytes]:
        parts = self._case()
        self.rng.shuffle(parts)
        return parts[: self.rng.randrange(1, 3)]

    def _command(self) -> list[bytes]:
        rng, who = self.rng, self.rng.choice(OPERATORS)
        network = rng.choice(("203.0.113.0/31", "127.0.0.0/8", "2001:db8:77::/64", "192.0.2.80/32"))
        ring = {"name": "north-2", "pubkey": key("north-2").public.hex(), "site": rng.choice(("north", "elsewhere"))}
        drawn: dict[str, dict[str, object]] = {
            "approve": {"policy_id": rng.choice(self.names)},
            "reject": {"policy_id": rng.choice(self.names)},
            "revoke": {"policy_id": rng.choice(self.names)},
            "add": {"policy": self._body(rng.choice(ENTITIES)) | {"policy_id": rng.choice(self.names)}},
            "label": {"anomaly_id": "a", "label": "benign"},
            "mute": {"entity": "x", "until_ms": 5},
            "allow_list": {rng.choice(("add", "remove")): [network]},
            "protected_networks": {rng.choice(("add", "remove")): [network]},
            "key_ring": rng.choice(({"add": [ring]}, {"remove": [key("north-2").public.hex()]}, {"add": 5})),
            "validator_set": {"add": []},
            "kill_switch": {"on": rng.random() < 0.1},
        }
        action = rng.choice(sorted(drawn))
        return [self.world.command(who, action, **drawn[action])]


def print_history(seed: int, blocks: int) -> None:
    history = History(random.Random(seed))
    for _ in range(blocks):
        history.step()
        receipts = history.world.receipts
        digest = hashlib.sha256(b"".join(receipt.encode() for receipt in receipts)).hexdigest()
        print(history.world.height, history.world.state.root.hex(), len(receipts), digest)


if __name__ == "__main__":
    print_history(int(sys.argv[1]), int(sys.argv[2]))
