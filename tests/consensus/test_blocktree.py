"""The order of commits, above all after skipped rounds, where a published implementation delivered blocks wrongly."""

from __future__ import annotations

import pytest

from cybermesh.consensus.application import Execution
from cybermesh.consensus.blocktree import BlockTree, Node
from cybermesh.consensus.parts import Root
from cybermesh.consensus.types import Round


@pytest.fixture
def tree(bench):
    return BlockTree(Root.genesis(bench.committee, bench.app.genesis()), None)


def grow(bench, tree, rounds, qc=None):
    """Add a chain with a block in each of these rounds; return the blocks."""
    blocks = []
    for round_ in rounds:
        block = bench.block(round_, qc)
        _, _, state = bench.states[block.hash]
        tree.insert(Node(block, Execution(state, block.header.state_root, 0, False, None), frozenset(), None))
        blocks.append(block)
        qc = bench.qc(block)
    return blocks


@pytest.mark.parametrize("rounds", [[1, 2, 3, 4], [1, 2, 4, 6], [1, 3], [2, 7, 9, 10, 15]])
def test_a_commit_delivers_ancestors_oldest_first_and_each_once(bench, tree, rounds):
    blocks = grow(bench, tree, rounds)
    delivered = []
    for block in blocks[::2]:
        delivered += [node.block.round for node in tree.commit(block.hash)]
    delivered += [node.block.round for node in tree.commit(blocks[-1].hash)]
    assert delivered == rounds
    assert tree.root.height == len(rounds)
    assert len(tree) == 0


def test_a_commit_is_not_repeated_and_an_unknown_block_commits_nothing(bench, tree):
    first, second = grow(bench, tree, [1, 2])
    assert [node.block for node in tree.commit(first.hash)] == [first]
    assert tree.commit(first.hash) == []
    assert tree.commit(bench.genesis.block_hash) == []
    assert second.hash in tree


def test_a_commit_drops_the_branches_it_rules_out(bench, tree):
    (trunk,) = grow(bench, tree, [1])
    left = grow(bench, tree, [2, 3], bench.qc(trunk))
    right = grow(bench, tree, [4, 5], bench.qc(trunk))
    tree.commit(left[0].hash)
    assert left[1].hash in tree
    assert not any(block.hash in tree for block in right)


def test_old_side_branches_go_and_the_way_to_the_highest_certificate_stays(bench, tree):
    (trunk,) = grow(bench, tree, [1])
    side = grow(bench, tree, [2], bench.qc(trunk))
    main = grow(bench, tree, [3, 20], bench.qc(trunk))
    tree.prune(main[1].hash, Round(12))
    assert side[0].hash not in tree
    assert [node.block for node in tree.path(main[1].hash)] == [trunk, *main]


def test_nothing_is_pruned_while_the_highest_certified_block_is_missing(bench, tree):
    (trunk,) = grow(bench, tree, [1])
    tree.prune(bench.block(30).hash, Round(25))
    assert trunk.hash in tree
