"""Foreign hands in the firewall: what they do to our rules is repaired and counted, and what is theirs stays as it is.

An agent runs in a process of its own. nftables tells it of every change, so there it looks only when it is told; ipset tells
nobody, so there it looks often.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.enforce.agent_process import Agent
from tests.enforce.namespaces import ATTACKER, Lab, Wire, command, eventually, lab

pytestmark = pytest.mark.netns
OTHERS = """
table inet theirs {
    set friends { type ipv4_addr; flags timeout; elements = { 192.0.2.7, 192.0.2.8 } }
    chain input { type filter hook input priority 0; policy accept; ip saddr @friends counter accept; }
}
table ip cybermesh_like {
    chain a {
    }
}
"""
RESTART = "flush ruleset\n" + OTHERS
HANDS = {
    "nftables": [
        ("nft", RESTART),
        ("nft", "delete table inet cybermesh"),
        ("nft", "insert rule inet cybermesh ingress accept"),
        ("nft", "flush chain inet cybermesh prerouting"),
        ("nft", "add set inet cybermesh mine { type ipv4_addr; }"),
        ("nft", f"delete element inet cybermesh drop_in4_address {{ {ATTACKER[4]} }}"),
        ("nft", "add element inet cybermesh drop_in4_address { 10.77.2.5 timeout 1h }"),
        ("nft", "flush set inet cybermesh drop_in4_address"),
    ],
    "iptables": [
        ("nft", RESTART),
        ("iptables", "-F"),
        ("iptables", "-D INPUT -j CYBERMESH-IN"),
        ("iptables", "-I INPUT 1 -s 10.77.0.0/16 -j ACCEPT"),
        ("iptables", "-I CYBERMESH-IN 1 -j ACCEPT"),
        ("ip6tables", "-F CYBERMESH-OUT"),
        ("ipset", "flush {live}"),
        ("ipset", "add {live} 10.77.2.5 timeout 3600"),
        ("ipset", "del {live} " + ATTACKER[4]),
    ],
}


@pytest.fixture(scope="module")
def names(netns: None) -> Iterator[Lab]:
    with lab() as made:
        yield made


@pytest.mark.parametrize("backend", HANDS)
def test_what_others_do_to_our_rules_is_repaired_and_counted_and_theirs_stays(names: Lab, backend: str, tmp_path: Path) -> None:
    inside = ["ip", "netns", "exec", names.host]
    command(*inside, "nft", "-f", "-", text=RESTART)
    line = Wire(names)
    with Agent(names.host, tmp_path, backend, tick_s=0.05, reconcile_s=1_000 if backend == "nftables" else 0.2) as agent:
        agent.send("p", 1, {"ips": [ATTACKER[4]]}, ttl_s=600)
        agent.send("q", 2, {"cidrs": ["198.51.100.0/24"]}, ttl_s=600)
        assert line.passes("attacker") == 0
        drift = 0
        for program, what in HANDS[backend]:
            theirs = others(names)
            act(names, program, what)
            # Rules that this hand has put beside ours are its own business.
            if program == "iptables" and what.startswith("-I INPUT"):
                theirs = others(names)
            assert eventually(lambda counted=drift: agent.ask(status=True)["drift_total"] > counted, within_s=8), what
            drift = agent.ask(status=True)["drift_total"]
            assert (line.passes("attacker"), line.passes("bystander")) == (0, 1), what
            assert others(names) == theirs, what
            assert agent.ask(status=True)["problem"] == ""
    line.close()


def act(names: Lab, program: str, what: str) -> None:
    inside = ["ip", "netns", "exec", names.host]
    if program == "nft":
        command(*inside, "nft", "-f", "-", text=what)
        return
    live = next((name for name in command(*inside, "ipset", "list", "-n").split() if name.endswith("-drop-i4h")), "")
    command(*inside, program, *what.format(live=live).split())


def others(names: Lab) -> str:
    """Everything in the firewall that is not ours, as bytes: tables, and the rules beside ours in iptables' filter table."""
    shown = command("ip", "netns", "exec", names.host, "nft", "-s", "list", "ruleset")
    tables = ["table " + part for part in shown.split("table ") if part and not part.startswith("inet cybermesh {")]
    kept = [table for table in tables if "filter {" not in table.splitlines()[0]]
    saved = command("ip", "netns", "exec", names.host, "iptables-save", "-t", "filter")
    return "".join(kept) + "\n".join(rule for rule in saved.splitlines() if rule.startswith("-A") and "CYBERMESH" not in rule)
